"""One check, the largest batch that passes it, and what would pass where it fails."""

import dataclasses
from collections.abc import Iterator

from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from neo_jax.hardware import Target
from neo_jax.preflight import estimate as estimate_lib, program as program_lib
from neo_jax.preflight.estimate import Estimate, Rows
from neo_jax.preflight.program import OutOfMemory, Program


@dataclasses.dataclass(frozen=True)
class Result:
    """A config on a target."""

    config: FrozenConfigDict  # refitted to the target's number of devices
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
    config = program_lib.refit(config, stage, target)
    mesh = program_lib.mesh_of(config, target)
    return _compile(config, stage, target, mesh, estimate_lib.assumed_rows(config, stage, document_tokens))


def most_rows(result: Result) -> int:
    """The most rows per device that fit, by doubling and then halving the gap; `result` must fit."""
    fits, fails = result.rows_per_device, None
    while fails is None or fails - fits > 1:
        tried = fits * 2 if fails is None else (fits + fails) // 2
        if _again(result, _with_rows(result, tried)).fits:
            fits = tried
        else:
            fails = tried
    return fits


def suggestion(result: Result) -> str:
    """The first of a few changes that fits, as flags to add."""
    for flags, config in _changes(result):
        if _again(result, config).fits:
            return f"would fit with {flags}"
    return "use more devices, or split the weights further with mesh.tensor"


def _changes(result: Result) -> Iterator[tuple[str, FrozenConfigDict]]:
    """What gives memory back, the cheapest in time first."""
    stage, rows = result.stage, result.rows_per_device
    config = ConfigDict(result.config.to_dict())
    flags = ""
    if config.model.remat_policy != "full":
        config.model.remat_policy = "full"
        flags = "--config.model.remat_policy=full "
        yield flags.strip(), FrozenConfigDict(config)
    accumulate = config.stage[stage].accumulate
    if rows % (2 * accumulate) == 0:
        config.stage[stage].accumulate = rows  # one row at a time
        flags += f"--config.stage.{stage}.accumulate={rows} "
        yield flags.strip(), FrozenConfigDict(config)
    length, patches = config.stage[stage].row_tokens, config.stage[stage].row_patches
    for parts in (2, 4):
        if length % (128 * parts) == 0:
            config.stage[stage].row_tokens, config.stage[stage].row_patches = (
                length // parts,
                patches // parts,
            )
            sizes = f"--config.stage.{stage}.row_tokens={length // parts}"
            sizes += f" --config.stage.{stage}.row_patches={patches // parts}"
            yield (flags + sizes).strip(), FrozenConfigDict(config)


def _with_rows(result: Result, rows: int) -> FrozenConfigDict:
    config = ConfigDict(result.config.to_dict())
    stage = config.stage[result.stage]
    stage.batch_size = rows * config.mesh.data * config.mesh.fsdp
    stage.accumulate = 1
    return FrozenConfigDict(config)


def _again(result: Result, config: FrozenConfigDict) -> Result:
    mesh = program_lib.mesh_of(config, result.target)
    return _compile(config, result.stage, result.target, mesh, result.rows)


def _compile(config: FrozenConfigDict, stage: str, target: Target, mesh: Mesh, rows: Rows) -> Result:
    program = program_lib.compile_step(config, stage, mesh)
    estimate = None
    if isinstance(program, Program):
        estimate = estimate_lib.estimate(config, stage, target, program, rows)
    sizes = program_lib.state_bytes(config, stage, mesh)
    return Result(config, stage, target, rows, sizes, program, estimate)
