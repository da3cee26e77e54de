"""A trained model out of a workdir, to look at or to start from: nothing in the workdir is changed.

Only the parameters are read, not the optimizer state, and they go to the devices that ask whatever mesh
trained them. `neo_jax.convert import` makes such workdirs, too; they bring a tokenizer instead of data.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict
from orbax.checkpoint import v1 as ocp

from data_pipelines import documents
from data_pipelines.dataset import open_data
from data_pipelines.images import Picture, make_picture
from data_pipelines.text import Tokenizer
from neo_jax import mesh as mesh_lib, params as params_lib, stages as stages_lib
from neo_jax.checkpoint import item, steps_in
from neo_jax.errors import UserError
from neo_jax.model.transformer import Transformer
from neo_jax.params import Params
from neo_jax.stages import Stage

TOKENIZER = "tokenizer.json"  # in workdirs that hold a model, but no run


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model after `step` steps, with what it takes to give it images and text."""

    config: FrozenConfigDict
    step: int
    stage: Stage  # took the last of these steps; its pixel budget is what the model is used to
    model: Transformer  # unbound
    params: Params
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh  # one device

    @property
    def token_side(self) -> int:
        """Pixels per side of one image token."""
        embed = self.config.model.embed
        return embed.patch_size * embed.merge_size

    def picture(self, data: bytes, name: str) -> Picture:
        """An image file as the model sees it: on white, resized to the stage's pixel budget.

        Raises:
            DataError: it is not an image; the message has its name.
        """
        return make_picture(data, documents.resize_from_config(self.config, self.stage.config), name=name)


def load(workdir: pathlib.Path, config: FrozenConfigDict, step: int | None = None) -> Trained:
    """Loads a checkpoint of a run.

    Args:
        workdir: the run's folder.
        config: the run's, from `workdir.load_config`; fields that do not shape the model may differ.
        step: which checkpoint; None for the newest.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or it belongs to other data or another model.
    """
    folder = checkpoint_folder(workdir, step)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    specs = params_lib.abstract(Transformer(config.model))
    params, record = load_params(
        folder,
        {
            path: jax.ShapeDtypeStruct(spec.shape, np.float32, sharding=sharding)
            for path, spec in specs.items()
        },
    )
    return on_one_device(config, int(folder.name), params, tokenizer_of(workdir, config, folder, record))


def on_one_device(config: FrozenConfigDict, step: int, params: Params, tokenizer: Tokenizer) -> Trained:
    """A model from parameters that lie on the first device."""
    mesh = jax.sharding.Mesh(np.reshape(jax.devices()[:1], [1] * len(mesh_lib.AXES)), mesh_lib.AXES)
    return Trained(config, step, last_stage(config, step), Transformer(config.model), params, tokenizer, mesh)


def last_stage(config: FrozenConfigDict, step: int) -> Stage:
    """The stage that took the last of `step` steps."""
    return stages_lib.at(stages_lib.plan(config), step - 1)


def tokenizer_of(
    workdir: pathlib.Path, config: FrozenConfigDict, checkpoint: pathlib.Path, record: Mapping[str, Any]
) -> Tokenizer:
    """The tokenizer of a checkpoint: of the data it was trained on, or, imported, what came along with it.

    Raises:
        UserError: the data is not the checkpoint's.
    """
    if record["data_hash"] is None:
        return Tokenizer(workdir / TOKENIZER, config.data.special_tokens)
    data = open_data(config.data)
    if record["data_hash"] != data.data_hash:
        raise UserError(
            f"checkpoint {checkpoint} was trained on data {record['data_hash']}, but the config names "
            f"{data.data_hash}, whose tokens mean something else: bring the old data back"
        )
    return data.tokenizer


def load_params(
    checkpoint: pathlib.Path, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[Params, dict[str, Any]]:
    """The parameters of a checkpoint folder, with the shapes and shardings given, and its JSON record.

    Raises:
        UserError: the checkpoint is damaged or does not fit.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # without the optimizer state
    try:
        with context:
            name = item(checkpoint)
            state = ocp.load_checkpointables(checkpoint, {name: {"params": dict(shapes)}})[name]
            return state["params"], load_record(checkpoint)
    except Exception as error:  # Orbax raises many kinds for damaged files
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"cannot load checkpoint {checkpoint}: {reason}; try another step") from error


def load_record(checkpoint: pathlib.Path) -> dict[str, Any]:
    """The JSON record of a checkpoint folder."""
    return ocp.checkpointables_metadata(checkpoint).custom_metadata


def param_shapes(checkpoint: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """path -> shape of the parameters in a checkpoint folder."""
    tree = ocp.checkpointables_metadata(checkpoint).metadata[item(checkpoint)]["params"]
    return {path: tuple(leaf.shape) for path, leaf in tree.items()}


def checkpoint_folder(workdir: pathlib.Path, step: int | None = None) -> pathlib.Path:
    """The folder of one whole checkpoint, the newest by default.

    Raises:
        UserError: there is none, or none of this step.
    """
    folder = (workdir / "checkpoints").absolute()
    steps = steps_in(folder)
    if not steps:
        raise UserError(f"{workdir} has no checkpoint yet; train with --workdir={workdir}")
    if step is not None and step not in steps:
        raise UserError(f"--step={step}: {workdir} has checkpoints of steps {', '.join(map(str, steps))}")
    return folder / str(steps[-1] if step is None else step)
