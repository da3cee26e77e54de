"""Folders in Hugging Face's layout as checkpoints of ours."""

import pathlib
import re
import shutil
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, FrozenConfigDict

from configs import base
from data_pipelines import documents
from data_pipelines.text import Tokenizer
from neo_jax import (
    config as config_lib,
    grow,
    objectives,
    params as params_lib,
    restore,
    workdir as workdir_lib,
)
from neo_jax.convert import fields, files, ours, table
from neo_jax.convert.families import FAMILIES, recognise
from neo_jax.convert.files import Tensor
from neo_jax.convert.recordings import Description
from neo_jax.convert.table import Family, Row
from neo_jax.errors import UserError
from neo_jax.model.transformer import Transformer
from neo_jax.params import ParamSpec
from neo_jax.restore import Trained

# What goes along unread, for generation and for a later export.
COMPANIONS = re.compile(
    r"(special_tokens_map|added_tokens|generation_config|(video_)?(pre)?processor_config)\.json"
    r"|tokenizer[\w.]*|vocab\.json|merges\.txt|chat_template\.(json|jinja)"
)
# Rotary tables, which old checkpoints of language models carry; they follow from the config.
DERIVED = re.compile(r".*rotary_emb\.inv_freq|.*\.attention\.(bias|masked_bias)")
PRE_BUFFER_OUTPUTS = re.compile(
    r"pre_buffer/(attention/o|mlp/down|mlp/\w+/down|attention/o/\w+)/(weight|bias)"
)


class Source:
    """A checkpoint folder, opened and checked: every tensor of the family's table is there in its shape."""

    def __init__(self, folder: pathlib.Path, described: Description | None = None):
        """
        Args:
            described: of a recording, whose config.json is no model's (recordings.py).

        Raises:
            UserError: the family is unknown, or config.json and the weights disagree; file, tensor and both
                shapes are in the message.
        """
        if not folder.is_dir():
            raise UserError(f"--hf={folder}: no such folder")
        self.folder = folder
        self.hf = files.read_json(folder / "config.json") if described is None else described.hf
        try:
            self.family_name = recognise(self.hf) if described is None else described.family
            self.family = FAMILIES[self.family_name]
            changes = self.family.model_changes(self.hf)
            if described is not None:
                changes |= described.changes
            if "neo_jax" in self.hf:  # exported by us: the switches that no other config.json has are there
                model = ConfigDict(fields.section(fields.section(self.hf, "neo_jax"), "model"))
                changes |= flatten_dict(model.to_dict(), sep=".")
        except UserError as error:
            raise UserError(
                f"{folder / 'config.json'}: {str(error).removeprefix('config.json: ')}"
            ) from error
        self._opened = files.open_folder(folder)
        if described is not None:
            self._opened = {name: x for name, x in self._opened.items() if described.holds(name)}
        self.tensors = _canonical(self.family, self._opened)
        self.model = base.model()
        self.model.update_from_flattened_dict(changes)
        self.model.tie_embeddings, self.note = self._tied()
        self.specs = params_lib.abstract(Transformer(self.model))
        rows = list(self.family.table(self.model))
        table.check_cover(self.specs, rows)
        self._check(rows, self.tensors)
        self._rows: dict[str, list[tuple[Row, int]]] = {}
        self._place(rows)

    def _place(self, rows: list[Row]) -> None:
        for row in rows:
            for part, path in enumerate(row.paths):
                self._rows.setdefault(path, []).append((row, part))

    def take_heads(self, config: FrozenConfigDict) -> None:
        """Adds the heads of the objectives of a whole config, where this checkpoint of training has them.

        Raises:
            UserError: it has a part of a head, or one of another shape.
        """
        wanted = params_lib.abstract(objectives.build(config))
        specs = {path: spec for path, spec in wanted.items() if path.startswith("objectives/")}
        rows = list(self.family.heads(config)) if specs else []
        if not any(row.name in self._opened for row in rows):
            return
        table.check_cover(specs, rows)
        held = {row.name: self._opened[row.name] for row in rows if row.name in self._opened}
        self._check(rows, held, "config.objectives")
        self.tensors |= held
        self.specs |= specs
        self._place(rows)

    def load(self, path: str) -> np.ndarray:
        """One of our parameters, float32, assembled from its tensors."""
        rows = self._rows[path]
        values: np.ndarray = np.empty(self.specs[path].shape, np.float32)
        for row, part in rows:
            tensor = self.tensors[row.name].read()
            values[... if row.at is None else row.at] = table.to_ours(self.specs, row, tensor)[part]
        return values

    def _tied(self) -> tuple[bool, str]:
        """Whether head and word embedding are one, and what to tell about it (specs: neo.md section 9).

        The weights decide: a head of its own is kept whatever config.json says, and a missing one is the word
        embedding unless config.json says that it is not.
        """
        untied = self.model.copy_and_resolve_references()
        untied.tie_embeddings = False
        rows = {row.paths: row for row in self.family.table(untied)}
        head, embed = rows[("head",)].name, rows[("token_embed",)].name
        nested = [value for value in self.hf.values() if isinstance(value, Mapping)]
        said = fields.tied(*nested, self.hf)
        if head not in self.tensors:
            if said is False:
                shape = self.tensors[embed].shape if embed in self.tensors else "unknown"
                raise UserError(
                    f"{self.folder}: tensor {head} is missing, which config.json says is not tied to {embed} "
                    f"of shape {shape}; if it is, set tie_word_embeddings to true"
                )
            return True, ""
        if not said or embed not in self.tensors:
            return False, ""
        if self.tensors[head].shape == self.tensors[embed].shape and np.array_equal(
            self.tensors[head].read(), self.tensors[embed].read()
        ):
            del self.tensors[head]
            return True, ""
        return False, f"{head} differs from {embed}, although config.json ties them: they are kept apart"

    def _check(self, rows: list[Row], tensors: Mapping[str, Tensor], config: str = "config.json") -> None:
        """Names, shapes and types, which follow from what `config` names. Raises UserError."""
        wanted = {row.name: row for row in rows}
        where = self.folder / files.INDEX
        where = where if where.is_file() else next(iter(tensors.values())).file
        if missing := [row for row in rows if row.name not in tensors]:
            raise UserError(
                f"{where}: lacks {len(missing)} tensors that {config} asks for, first {missing[0].name} "
                f"of shape {missing[0].shape}"
            )
        if extra := sorted(set(tensors) - set(wanted)):
            tensor = tensors[extra[0]]
            raise UserError(
                f"{tensor.file}: {len(extra)} tensors have no place in {config}'s model, first {extra[0]} "
                f"of shape {tensor.shape}"
            )
        for name, row in wanted.items():
            tensor = tensors[name]
            if tensor.shape != row.shape:
                raise UserError(
                    f"{tensor.file}: tensor {name} has shape {tensor.shape}, but {config} makes it "
                    f"{row.shape}"
                )
            if tensor.dtype not in ("F64", "F32", "F16", "BF16"):
                raise UserError(f"{tensor.file}: tensor {name} is of type {tensor.dtype}, not floating point")


def _canonical(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors under the names of the table.

    Raises:
        UserError: two tensors of a file are the same one under an old and a new name.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        known = None if DERIVED.fullmatch(name) else family.canonical(name)
        if known is None:
            continue
        if known in found:
            raise UserError(f"{tensor.file}: tensor {name} is there twice, under an old and a new name")
        found[known] = tensor
    if not found:
        raise UserError("the checkpoint holds no tensors")
    return found


def run(
    hf: pathlib.Path,
    out: pathlib.Path,
    native: FrozenConfigDict | None = None,
    zero_pre_buffer: bool = False,
) -> Source:
    """Writes a workdir that holds the model as checkpoint 0, its config and its tokenizer files.

    Args:
        native: a config whose model is to start from this one (grow.py), objectives' heads included; None:
            the same model, without heads.
        zero_pre_buffer: new pre-buffer layers add nothing at first, so that text logits are the base's.

    Raises:
        UserError: as `Source` and `grow.plan`; nothing is left behind.
    """
    source = Source(hf)
    if zero_pre_buffer and not (native is not None and native.model.pre_buffer):
        raise UserError("--zero_pre_buffer: needs a --config whose model.pre_buffer is positive")
    config = imported_config(source) if native is None else native
    source.take_heads(config)
    specs = params_lib.abstract(objectives.build(config))
    make = _maker(source, config, specs, zero_pre_buffer)
    record = {
        "stage": config.stages[0],
        "data_hash": None,
        "config_hash": config_lib.config_hash(config),
        "family": source.family_name,
    }
    with ours.replacing(out) as partial:
        for path in sorted(hf.iterdir()):
            if COMPANIONS.fullmatch(path.name) and path.is_file():
                shutil.copyfile(path, partial / path.name)
        ours.save(partial / "checkpoints" / "0", ((path, make(path)) for path in specs), record)
        workdir_lib.claim(partial, config)
    return source


def load(hf: pathlib.Path) -> Trained:
    """The model of a folder, in memory: what `restore.load` gives after `run`, with no workdir between.

    Raises:
        UserError: as `Source`, or the folder has no tokenizer.
    """
    source = Source(hf)
    config = imported_config(source)
    params = {path: jnp.asarray(source.load(path)) for path in params_lib.abstract(Transformer(config.model))}
    tokenizer = Tokenizer(hf / restore.TOKENIZER, config.data.special_tokens)
    return restore.on_one_device(config, 0, params, tokenizer)


def _maker(
    source: Source, config: FrozenConfigDict, specs: Mapping[str, ParamSpec], zero_pre_buffer: bool
) -> Callable[[str], np.ndarray]:
    """path -> parameter of the model of `config`."""
    if config.model == FrozenConfigDict(source.model) and set(specs) == set(source.specs):
        return source.load
    grow.check_config(source.model, config.model)
    origins = grow.plan({path: spec.shape for path, spec in source.specs.items()}, specs)
    key = jax.random.key(config.seed)

    def make(path: str) -> np.ndarray:
        if zero_pre_buffer and PRE_BUFFER_OUTPUTS.fullmatch(path):
            return np.zeros(specs[path].shape, np.float32)
        return np.asarray(grow.one(path, origins[path], specs, source.load, key))

    return make


def imported_config(source: Source) -> FrozenConfigDict:
    """A config of the model as it is, with one stage that states its pixel budget."""
    c = base.get_config()
    c.name = c.family = source.family_name
    c.data.update(source.family.data)
    c.model = source.model
    budget = source.family.pixels(source.hf)
    exported = source.hf.get("neo_jax")
    if exported is not None:
        c.name = exported["name"]
        c.data.update(exported["data"])
    c.data.vocab_size = min(c.data.vocab_size, c.model.vocab_size - len(c.data.special_tokens))
    c.stages = ("imported",)
    stage = base.stage(1, warmup_steps=0, min_pixels=budget[0], max_pixels=budget[1])
    stage.row_patches = documents.resize_from_config(c, stage).most_tokens
    stage.row_tokens = stage.row_patches + 1024
    c.stage.imported = stage
    if exported is not None:
        c.stage.imported.update(exported["stage"])
    return config_lib.resolve(c)
