"""One check, the largest batch that passes it, and what would pass where it fails."""

import dataclasses
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from data_pipelines.documents import resize_from_config
from neo_jax import config as config_lib
from neo_jax.errors import UserError
from neo_jax.hardware import Target
from neo_jax.preflight import estimate as estimate_lib, program as program_lib
from neo_jax.preflight.estimate import Estimate, Rows
from neo_jax.preflight.program import OutOfMemory, Program


@dataclasses.dataclass(frozen=True)
class Result:
    """A config on a target."""

    given: FrozenConfigDict
    config: FrozenConfigDict  # `given`, refitted to the target's number of devices
    stage: str
    target: Target
    rows: Rows
    state_bytes: dict[str, int]
    program: Program | OutOfMemory
    estimate: Estimate | None  # None where no program fits

    @property
    def needed(self) -> float:
        """Bytes of memory per device."""
        return self.program.memory["peak"] if isinstance(self.program, Program) else self.program.needed

    @property
    def fits(self) -> bool:
        return isinstance(self.program, Program) and self.needed <= self.target.hbm_limit

    @property
    def rows_per_device(self) -> int:
        mesh = self.config.mesh
        return self.config.stage[self.stage].batch_size // (mesh.data * mesh.fsdp)


def check(config: FrozenConfigDict, stage: str, target: Target, document_tokens: int = 1024) -> Result:
    """Compiles the stage's step for the target and says what it takes."""
    fitted = program_lib.refit(config, stage, target)
    mesh = program_lib.mesh_of(fitted, target)
    rows = estimate_lib.assumed_rows(fitted, stage, document_tokens)
    return _compile(config, fitted, stage, target, mesh, rows)


def most_rows(result: Result) -> int:
    """The most rows per device that fit at once, by doubling and then halving the gap; `result` must fit."""
    fits, fails = result.rows_per_device, None
    if result.config.stage[result.stage].accumulate > 1 and not _again(result, _with_rows(result, fits)).fits:
        fits, fails = 0, fits
    while fails is None or fails - fits > 1:
        tried = fits * 2 if fails is None else (fits + fails) // 2
        if _again(result, _with_rows(result, tried)).fits:
            fits = tried
        else:
            fails = tried
    return fits


def suggestion(result: Result) -> str:
    """The first of a few changes that fits, as flags to add."""
    for overrides, config in _changes(result):
        if _again(result, config).fits:
            return f"would fit with {' '.join(f'--config.{field}={value}' for field, value in overrides)}"
    mesh = result.config.mesh
    if mesh.tensor * mesh.context == result.target.slice.num_devices:
        return "use more devices"
    return "use more devices, or split heads and inner widths further with mesh.tensor"


def _changes(result: Result) -> Iterator[tuple[list[tuple[str, str]], FrozenConfigDict]]:
    """What gives memory back, the cheapest in time first: overrides, and the refitted config they make."""
    for fields in _ways(result):
        overrides = [
            (field, str(value)) for field, value in fields.items() if attrgetter(field)(result.given) != value
        ]
        if not overrides:
            continue
        try:
            changed = config_lib.resolve(result.given, overrides)
        except UserError:  # such as rows too short for one image
            continue
        yield overrides, program_lib.refit(changed, result.stage, result.target)


def _ways(result: Result) -> Iterator[dict[str, Any]]:
    """Values to try, the config's own among them; not all make a valid config."""
    config, stage, here = result.config, result.config.stage[result.stage], f"stage.{result.stage}"
    policies = ("offload",) if config.model.remat_policy == "offload" else ("full", "offload")
    for accumulate in sorted({stage.accumulate, result.rows_per_device}):  # that many are one row at a time
        for policy in policies:
            yield {"model.remat_policy": policy, f"{here}.accumulate": accumulate}
    image_tokens = resize_from_config(config, stage).most_tokens
    for parts in (2, 4):
        if stage.row_tokens % (128 * parts) == 0:
            yield {
                "model.remat_policy": "offload",
                f"{here}.accumulate": result.rows_per_device,
                f"{here}.row_tokens": stage.row_tokens // parts,
                f"{here}.row_patches": max(stage.row_patches // parts, image_tokens),
            }


def _with_rows(result: Result, rows: int) -> FrozenConfigDict:
    config = ConfigDict(result.config.to_dict())
    stage = config.stage[result.stage]
    stage.batch_size = rows * config.mesh.data * config.mesh.fsdp
    stage.accumulate = 1
    return FrozenConfigDict(config)


def _again(result: Result, config: FrozenConfigDict) -> Result:
    mesh = program_lib.mesh_of(config, result.target)
    return _compile(result.given, config, result.stage, result.target, mesh, result.rows)


def _compile(
    given: FrozenConfigDict, config: FrozenConfigDict, stage: str, target: Target, mesh: Mesh, rows: Rows
) -> Result:
    program = program_lib.compile_step(config, stage, mesh)
    estimate = None
    if isinstance(program, Program):
        estimate = estimate_lib.estimate(config, stage, target, program, rows)
    sizes = program_lib.state_bytes(config, stage, mesh)
    return Result(given, config, stage, target, rows, sizes, program, estimate)
