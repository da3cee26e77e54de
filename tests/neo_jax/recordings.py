"""Recordings of the original implementations (tests/golden/FAMILY) against our model.

What went in becomes a batch as the verify command reads it (neo_jax/convert/recordings.py); here are the
tolerances, and the comparisons whose tensors every family names alike. Cases of one model are padded to one
shape, so that each program is compiled once for all of them.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict
from safetensors.numpy import load_file

from configs import base
from data_pipelines import schema
from neo_jax import params as params_lib
from neo_jax.convert import recordings, table as table_lib
from neo_jax.convert.families import FAMILIES, recognise
from neo_jax.model.transformer import Transformer
from neo_jax.objectives.ntp import cross_entropy, dense_cross_entropy
from tests import golden_files

PER_PATCH = ("patches", "patch_hw")  # fields of a batch that have P rows, not L
Batch = Mapping[str, Any]


def cases(family: str) -> list[Path]:
    """The recorded cases of a family; fails on an empty folder, which would make its tests vacuous."""
    folder = golden_files.ROOT / family
    found = sorted(folder.glob("case*.safetensors"))
    if not found:
        raise FileNotFoundError(f"no recordings in {folder}")
    return found


@functools.cache
def tolerance_groups(folder: Path) -> dict[str, float]:
    """Group of tensors -> the worst float32 error of the original against itself in float64."""
    groups: dict[str, float] = {}
    for tensors in json.loads((folder / "tolerance.json").read_text()).values():
        for name, errors in tensors.items():
            groups[_group(name)] = max(groups.get(_group(name), 0.0), errors["max_abs_diff"])
    return groups


def tolerance(folder: Path, name: str) -> float:
    """What the READMEs suggest: 20 times the error of the tensor's group, 50 times for gradients."""
    return (50 if name.startswith("grad") else 20) * tolerance_groups(folder)[_group(name)]


def _group(name: str) -> str:
    """ "out.hidden.3" -> "out.hidden", "out.layer0.q" -> "out.layer", "grad.lm_head.weight" -> "grad"."""
    first, _, rest = name.partition(".")
    return first if first.startswith("grad") else f"{first}.{re.match('[a-z_]+', rest)[0]}"


def close(actual, expected, atol: float) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual.reshape(expected.shape), expected, rtol=0, atol=atol)


def described(path: Path) -> recordings.Description | None:
    return recordings.describe(json.loads((path.parent / "config.json").read_text()), path.stem)


@functools.cache
def batch_of(path: Path) -> dict[str, np.ndarray]:
    """The batch of a case."""
    tensors = recordings.inputs(path)
    recorded, made = json.loads((path.parent / "config.json").read_text()), described(path)
    family = made.family if made else recognise(recorded)
    config = base.model()
    changes = FAMILIES[family].model_changes(made.hf if made else recorded) | (made.changes if made else {})
    config.update_from_flattened_dict(changes)
    return recordings.BATCHES[family][1](tensors, recorded, config)


def common_shape(batches) -> tuple[int, int, int]:
    """The most rows, tokens and patches of a row."""
    sizes = [(*batch["tokens"].shape, batch["patches"].shape[1]) for batch in batches]
    return tuple(map(max, zip(*sizes, strict=True)))


def padded(batch: Batch, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """The batch with empty rows, padding behind its rows, and patches that nothing shows."""
    B, L, P = shape

    def pad(name: str, x: np.ndarray) -> np.ndarray:
        second = P if name in (*PER_PATCH, "teacher_features") else L
        widths = [(0, B - x.shape[0]), (0, second - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
        return np.pad(x, widths, constant_values=-1 if name == "patch_index" else 0)

    return {name: pad(name, np.asarray(x)) for name, x in batch.items()}


def one_image_a_row(images: Sequence[recordings.Grid]) -> dict[str, np.ndarray]:
    """Images of EVE's or EVEv2's recordings, each alone in a row."""
    ids = np.full((len(images), 1), -1)
    labels = np.full_like(ids, recordings.IGNORED)
    case = {"in.input_ids": ids, "in.attention_mask": np.ones_like(ids), "in.labels": labels}
    return recordings.expanded(case, images, placeholder=-1)


@functools.cache
def _model(config: FrozenConfigDict) -> tuple[Transformer, dict]:
    """One object for equal configs: compiled programs know models by identity."""
    model = Transformer(config)
    return model, params_lib.abstract(model)


@functools.partial(jax.jit, static_argnums=0)
def run(model: Transformer, params: Batch, batch: Batch) -> dict[str, Any]:
    """Everything that recordings compare of one forward and backward pass.

    `hidden`: embeddings, after each layer but the last, after the final norm. `losses`: (value, cross-entropy
    of every position, gradients) of the loss as defined and of the form that training uses.
    """

    def forward(params: Batch) -> Any:
        bound = params_lib.bind(model, params)
        final, layers = bound.hidden_states(batch)
        hidden = [bound.embed(batch), *layers[:-1], final]
        seen = {"hidden": hidden, "last_layer": layers[-1], "logits": bound.logits(final)}
        return (final, bound.head_DV()), seen | {"patches": bound.patch_embed(batch)}

    ends, pull, seen = jax.vjp(forward, params, has_aux=True)
    losses, cotangents = [], []
    for loss_fn in (dense_cross_entropy, cross_entropy):

        def loss(ends: Any, loss_fn: Any = loss_fn) -> Any:
            total, ce = loss_fn(*ends, batch["targets"], batch["loss_weights"])
            return total / batch["loss_weights"].sum(), ce

        value, cotangent = jax.value_and_grad(loss, has_aux=True)(ends)
        losses.append(value)
        cotangents.append(cotangent)
    # One after the other through one backward pass.
    gradients = jax.lax.map(lambda ends: pull(ends)[0], jax.tree.map(lambda *x: jnp.stack(x), *cotangents))
    parts = [jax.tree.map(lambda g, i=i: g[i], gradients) for i in range(len(losses))]
    return seen | {"losses": [(*loss, g) for loss, g in zip(losses, parts, strict=True)]}


@functools.partial(jax.jit, static_argnums=0)
def decode(model: Transformer, params: Batch, documents: Batch, read: jax.Array) -> jax.Array:
    """Logits [N, L, V] of N documents, of which read[n] tokens are read at once and the rest one by one."""
    bound, L = params_lib.bind(model, params), documents["tokens"].shape[1]
    unread = jnp.arange(L, dtype=jnp.int32)[None] >= read[:, None]
    absent = {"kinds": schema.PAD, "segment_ids": 0, "image_ids": 0, "patch_index": -1}
    prompts = documents | {name: jnp.where(unread, fill, documents[name]) for name, fill in absent.items()}
    hidden, caches = bound.prefill(prompts, cache_size=L)

    def step(carry: Any, at: jax.Array) -> tuple[Any, None]:
        hidden, caches = carry
        slots = jnp.clip(at, read, L - 1)[:, None]  # none but places behind the prompt is written
        tokens = jnp.take_along_axis(documents["tokens"], slots, axis=1)
        coords = jnp.take_along_axis(documents["coords"], slots[..., None], axis=1)
        new, caches = bound.extend(tokens, coords, slots, caches)
        hidden = jax.vmap(lambda h, x, slot: h.at[slot].set(x))(hidden, new[:, 0], slots[:, 0])
        return (hidden, caches), None

    (hidden, _), _ = jax.lax.scan(step, (hidden, caches), read.min() + jnp.arange(L, dtype=jnp.int32))
    return bound.logits(hidden)


class Recording:
    """One recorded case: what went in as a batch of ours, the model with the recorded weights, what came out.

    Comparisons note the tensors they saw, so that `uncompared` can tell whether anything recorded was left
    out.
    """

    def __init__(self, path: Path, **changes: Any):
        """`changes`: fields of the model's config.json that are to differ from the case's."""
        self.path, self.folder, self.case = path, path.parent, load_file(path)
        self.recorded = json.loads((path.parent / "config.json").read_text())
        made = described(path) or recordings.Description(recognise(self.recorded), self.recorded, {})
        self.family, self.hf = FAMILIES[made.family], made.hf | changes
        self.config: ConfigDict = base.model()
        self.config.update_from_flattened_dict(self.family.model_changes(self.hf) | made.changes)
        weights = load_file(self.folder / "weights.safetensors")
        known = {name: x for name, x in weights.items() if self.family.canonical(name) is not None}
        self.weights = {name: x for name, x in known.items() if made.holds(name)}
        self.batch = batch_of(path)
        self.shape = common_shape(batch_of(other) for other in cases_like(path))
        self.compared: set[str] = set()

    @functools.cached_property
    def model(self) -> Transformer:
        return _model(FrozenConfigDict(self.config))[0]

    @property
    def specs(self) -> dict:
        return _model(FrozenConfigDict(self.config))[1]

    @functools.cached_property
    def params(self) -> dict[str, np.ndarray]:
        return table_lib.from_hf(self.specs, self.family.table(self.config), self.weights)

    def bound(self, params: Batch | None = None) -> Transformer:
        return params_lib.bind(self.model, self.params if params is None else params)

    def cropped(self, x: Any) -> np.ndarray:
        """[..., B, L, :] of a program on a padded batch, without the padding."""
        B, L = self.batch["tokens"].shape
        return np.asarray(x)[:B, :L]

    @functools.cached_property
    def outputs(self) -> dict[str, Any]:
        """What `run` gives, without the padding to a common shape."""
        out = jax.device_get(run(self.model, self.params, padded(self.batch, self.shape)))
        out |= {name: self.cropped(out[name]) for name in ("logits", "last_layer", "patches")}
        out["hidden"] = [self.cropped(x) for x in out["hidden"]]
        return out

    def close(self, name: str, actual: Any, group: str | None = None) -> None:
        """Compares with the tensor `name`; [B, L, ...] only where the row is no padding."""
        expected, actual = self.case[name], np.asarray(actual)
        self.compared.add(name)
        real = np.asarray(self.batch["segment_ids"]) > 0
        if expected.shape[:2] == real.shape:
            actual, expected = actual[real], expected[real]
        close(actual, expected, tolerance(self.folder, group or name))

    def check_hidden_states_and_logits(self) -> None:
        hidden = self.outputs["hidden"]
        self.close("out.inputs_embeds", hidden[0])
        assert len(hidden) == sum(name.startswith("out.hidden.") for name in self.case)
        for index, x in enumerate(hidden):
            self.close(f"out.hidden.{index}", x)
        self.close("out.logits", self.outputs["logits"])

    def check_loss_and_gradients(self) -> None:
        """Both forms of the loss; every recorded gradient, under its HF name."""
        for value, _, gradients in self.outputs["losses"]:
            self.close("out.loss", value)
            self.close("out.loss_f64", value, group="out.loss")
            ours = table_lib.to_hf(self.family.table(self.config), gradients)
            for name in self.case:
                if name.startswith("grad."):
                    self.close(name, ours[name.removeprefix("grad.")])

    def check_decoding(self) -> None:
        """Each document alone, read to its last image and continued token by token: the recorded logits."""
        documents = list(self._documents())
        shape = _shape_of_documents(tuple(cases_like(self.path)))
        images = [np.flatnonzero(row["image_ids"][0]) for _, row in documents]
        read = np.array([int(places[-1]) + 1 if len(places) else 1 for places in images], np.int32)
        rows = [padded(row, (1, *shape[1:])) for _, row in documents]
        joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        spare = shape[0] - len(rows)
        logits = decode(self.model, self.params, padded(joined, shape), np.pad(read, (0, spare), mode="edge"))
        for (expected, _), found, start in zip(documents, np.asarray(logits), read, strict=False):
            assert start < len(expected), "nothing to decode"
            close(found[: len(expected)], expected, tolerance(self.folder, "out.logits"))

    def _documents(self) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """(recorded logits, batch of one row) of every document of the batch."""
        for b, places, row in documents_of(self.batch):
            yield self.case["out.logits"][b, places], row

    def check_round_trip(self) -> None:
        back = table_lib.to_hf(self.family.table(self.config), self.params)
        assert set(back) == set(self.weights)
        for name, tensor in self.weights.items():
            np.testing.assert_array_equal(back[name], tensor)

    def check_config_round_trip(self, special: Mapping[str, int]) -> None:
        """The config.json that we write says what the recorded one does, and is known as this family's."""
        written = self.family.hf_config(self.config, special, 0, 0)
        assert FAMILIES[recognise(written)] is FAMILIES[recognise(self.hf)] is self.family
        decided = self.family.model_changes(written)
        for field, value in decided.items():
            ours = self.config
            for part in field.split("."):
                ours = ours[part]
            assert value == ours, field

    def uncompared(self) -> set[str]:
        """Recorded results that no comparison has looked at."""
        return {name for name in self.case if name.startswith(("out.", "grad"))} - self.compared


def cases_like(path: Path) -> list[Path]:
    """The cases of the same folder that hold logits."""
    return [other for other in cases(path.parent.name) if _has_logits(other)]


@functools.cache
def _has_logits(path: Path) -> bool:
    return bool({"logits", "out.logits"} & set(load_file(path)))


def documents_of(batch: Batch) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray]]]:
    """(row, places in it, batch of one row) of every document of a batch; all patches of the row stay."""
    for b, segments in enumerate(batch["segment_ids"]):
        for segment in np.unique(segments[segments > 0]):
            [places] = np.nonzero(segments == segment)
            row = {k: x[b : b + 1] if k in PER_PATCH else x[b, places][None] for k, x in batch.items()}
            yield b, places, row


@functools.cache
def _shape_of_documents(paths: tuple[Path, ...]) -> tuple[int, int, int]:
    """The most documents of a case, tokens of a document and patches of a row."""
    found = [[row for *_, row in documents_of(batch_of(path))] for path in paths]
    _, L, P = common_shape(row for rows in found for row in rows)
    return max(map(len, found)), L, P
