"""Recordings of the original implementations (tests/golden/FAMILY) as batches of our model.

A recording's arrays are laid out by its README; here they become the token table that our data layer would
have made. Everything is read from the recording's files: no size, id or tolerance is written down in a test.
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
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from configs import base
from data_pipelines import schema
from neo_jax import params as params_lib
from neo_jax.convert import table as table_lib
from neo_jax.convert.families import FAMILIES, recognise
from neo_jax.convert.table import Family
from neo_jax.model.transformer import Transformer
from neo_jax.objectives.ntp import cross_entropy, dense_cross_entropy
from tests import golden_files

IGNORED = -100  # label of a position that is not predicted, in every recording
IMAGE_KINDS = (schema.PATCH, schema.SLOT, schema.SEPARATOR)
PER_PATCH = ("patches", "patch_hw")  # fields of a batch that have P rows, not L


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


def uint8_pixels(normalised: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undoes (x / 255 - mean) / std on [..., 3]; fails where a pixel was no whole number of 0..255."""
    pixels = (normalised.astype(np.float64) * std + np.asarray(mean, np.float64)) * 255
    whole = np.rint(pixels)
    np.testing.assert_allclose(pixels, whole, rtol=0, atol=1e-3)
    assert whole.min() >= 0 and whole.max() <= 255
    return whole.astype(np.uint8)


def runs(kinds: np.ndarray) -> np.ndarray:
    """Image numbers [B, L] of a row whose images are separated by text: each run of image tokens is one."""
    of_image = np.isin(kinds, IMAGE_KINDS)
    starts = of_image & ~np.pad(of_image, ((0, 0), (1, 0)))[:, :-1]
    return np.where(of_image, np.cumsum(starts, axis=1), 0)


def token_table(
    tokens: np.ndarray,
    kinds: np.ndarray,
    squares: Sequence[np.ndarray],
    labels: np.ndarray,
    segment_ids: np.ndarray | None = None,
    positions: np.ndarray | None = None,
    image_ids: np.ndarray | None = None,
    patch_hw: Sequence[np.ndarray] | None = None,
) -> dict[str, jnp.ndarray]:
    """A batch (DESIGN section 3) with 1-D coordinates.

    Args:
        tokens, kinds: [B, L].
        squares: for each row its image tokens in order, uint8 [p, X], (y, x, rgb); p may differ.
        labels: [B, L], the label of each position's own token, IGNORED where it is not predicted.
        segment_ids: [B, L], document numbers, 0 = padding; all 1 where None.
        positions: [B, L], t of each token; its index where None.
        image_ids: [B, L]; `runs` where None.
        patch_hw: for each row [p, 2]; zeros where None, for embeds that do not read it.
    """
    B, L = tokens.shape
    segment_ids = np.ones((B, L), int) if segment_ids is None else segment_ids
    kinds = np.where(segment_ids > 0, kinds, schema.PAD)
    shifted = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    predicts = shifted != IGNORED
    next_segment = np.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    assert (segment_ids == next_segment)[predicts].all(), "a target belongs to another document"
    is_patch = kinds == schema.PATCH
    P = max(len(row) for row in squares)
    patches = np.zeros((B, P, max(row.shape[-1] for row in squares)), np.uint8)
    places = np.zeros((B, P, 2), np.int32)
    for b, row in enumerate(squares):
        assert len(row) == is_patch[b].sum(), "image tokens and patches differ in number"
        if len(row):
            patches[b, : len(row)] = row
        if patch_hw is not None:
            places[b, : len(row)] = patch_hw[b]
    t = np.broadcast_to(np.arange(L), (B, L)) if positions is None else positions
    coords = np.stack([t, np.zeros_like(t), np.zeros_like(t)], axis=-1)
    table = {
        "tokens": tokens,
        "kinds": kinds,
        "segment_ids": segment_ids,
        "image_ids": runs(kinds) if image_ids is None else image_ids,
        "coords": coords.astype(np.float32),
        "targets": np.where(predicts, shifted, 0),
        "loss_weights": predicts.astype(np.float32),
        "patch_index": np.where(is_patch, np.cumsum(is_patch, axis=1) - 1, -1),
        "patches": patches,
        "patch_hw": places,
        "source_ids": np.zeros((B, L), np.int32),
    }
    cast = {np.dtype(np.int64): np.int32}
    return {name: jnp.asarray(x.astype(cast.get(x.dtype, x.dtype))) for name, x in table.items()}


def rows_to_squares(rows: np.ndarray, side: int, order: str) -> np.ndarray:
    """Flattened patches [p, 3 * side^2], "C,H,W" or "H,W,C" -> [p, side, side, 3]."""
    if order == "C,H,W":
        return rows.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    assert order == "H,W,C", order
    return rows.reshape(-1, side, side, 3)


def prompt(batch: dict[str, jnp.ndarray], length: int) -> dict[str, jnp.ndarray]:
    """The first `length` positions of every row; all patches stay."""
    return {name: x if name in PER_PATCH else x[:, :length] for name, x in batch.items()}


class Recording:
    """One recorded case: what went in as a batch of ours, the model with the recorded weights, what came out.

    A family's test makes its batch; the comparisons whose tensors every family names alike are here. Each
    notes the tensors it saw, so that `uncompared` can tell whether anything recorded was left out.
    """

    def __init__(self, path: Path, family: Family, hf: Mapping[str, Any], **changes: Any):
        """`hf` is the model's config.json; `changes` are dotted fields of configs/base.model()."""
        self.folder, self.family, self.hf, self.case = path.parent, family, hf, load_file(path)
        self.config: ConfigDict = base.model()
        self.config.update_from_flattened_dict(family.model_changes(hf) | changes)
        self.model = Transformer(self.config)
        self.specs = params_lib.abstract(self.model)
        weights = load_file(self.folder / "weights.safetensors")
        self.weights = {name: x for name, x in weights.items() if family.canonical(name) is not None}
        self.params = table_lib.from_hf(self.specs, family.table(self.config), self.weights)
        self.batch: dict[str, jnp.ndarray] = {}
        self.compared: set[str] = set()

    def bound(self, params: Mapping[str, jnp.ndarray] | None = None) -> Transformer:
        return params_lib.bind(self.model, self.params if params is None else params)

    @functools.cached_property
    def outputs(self) -> dict[str, Any]:
        """Embeddings, hidden states after every layer and after the final norm, logits, losses.

        `losses` are (value, gradients) of the loss as defined and of the form that training uses.
        """

        def run(params: Mapping[str, jnp.ndarray], batch: Mapping[str, jnp.ndarray]) -> dict[str, Any]:
            model = self.bound(params)
            final, layers = model.hidden_states(batch)
            losses = [
                jax.value_and_grad(functools.partial(self._loss, loss_fn))(params, batch)
                for loss_fn in (dense_cross_entropy, cross_entropy)
            ]
            return {
                "embeds": model.embed(batch),
                "layers": layers,
                "final": final,
                "logits": model.logits(final),
                "losses": losses,
            }

        return jax.jit(run)(self.params, self.batch)

    def _loss(self, loss_fn: Any, params: Mapping[str, jnp.ndarray], batch: Mapping[str, jnp.ndarray]) -> Any:
        model, weights = self.bound(params), batch["loss_weights"]
        total, _ = loss_fn(model(batch), model.head_DV(), batch["targets"], weights)
        return total / weights.sum()

    def close(self, name: str, actual: Any, group: str | None = None) -> None:
        """Compares with the tensor `name`; [B, L, ...] only where the row is no padding."""
        expected, actual = self.case[name], np.asarray(actual)
        self.compared.add(name)
        real = np.asarray(self.batch["segment_ids"]) > 0
        if expected.shape[:2] == real.shape:
            actual, expected = actual[real], expected[real]
        close(actual, expected, tolerance(self.folder, group or name))

    def check_hidden_states_and_logits(self) -> None:
        out = self.outputs
        self.close("out.inputs_embeds", out["embeds"])
        after = [out["embeds"], *out["layers"][:-1], out["final"]]
        assert len(after) == sum(name.startswith("out.hidden.") for name in self.case)
        for index, hidden in enumerate(after):
            self.close(f"out.hidden.{index}", hidden)
        self.close("out.logits", out["logits"])

    def check_loss_and_gradients(self) -> None:
        """Both forms of the loss; every recorded gradient, under its HF name."""
        for value, gradients in self.outputs["losses"]:
            self.close("out.loss", value)
            self.close("out.loss_f64", value, group="out.loss")
            ours = table_lib.to_hf(self.family.table(self.config), gradients)
            for name in self.case:
                if name.startswith("grad."):
                    self.close(name, ours[name.removeprefix("grad.")])

    def check_decoding(self) -> None:
        """Each document alone, read to its last image and continued token by token: the recorded logits."""
        decode = jax.jit(self._decode, static_argnums=2)
        for expected, document in self._documents():
            images = np.flatnonzero(document["image_ids"][0])
            read = int(images[-1]) + 1 if len(images) else 1
            assert read < len(expected), "nothing to decode"
            close(decode(self.params, document, read), expected, tolerance(self.folder, "out.logits"))

    def _decode(
        self, params: Mapping[str, jnp.ndarray], document: Mapping[str, jnp.ndarray], read: int
    ) -> jnp.ndarray:
        """Logits [L, V] of one document, of which `read` tokens are read at once."""
        model, tokens, coords = self.bound(params), document["tokens"][0], document["coords"][0]
        hidden, caches = model.prefill(prompt(document, read), cache_size=len(tokens))

        def step(caches: Any, slot: jnp.ndarray) -> tuple[Any, jnp.ndarray]:
            at = slot[None, None]
            hidden, caches = model.extend(tokens[at], coords[at], at, caches)
            return caches, hidden[0, 0]

        _, rest = jax.lax.scan(step, caches, jnp.arange(read, len(tokens), dtype=jnp.int32))
        return model.logits(jnp.concatenate([hidden[0], rest]))

    def _documents(self) -> Iterator[tuple[np.ndarray, dict[str, jnp.ndarray]]]:
        """(recorded logits, batch of one row) of every document of the batch."""
        batch = self.batch
        for b, segments in enumerate(np.asarray(batch["segment_ids"])):
            for segment in np.unique(segments[segments > 0]):
                [places] = np.nonzero(segments == segment)
                row = {k: x[b : b + 1] if k in PER_PATCH else x[b, places][None] for k, x in batch.items()}
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
