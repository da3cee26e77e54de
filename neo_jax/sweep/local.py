"""Runs the cells of a sweep on this machine, a few at a time; the same call goes on where the last one
stopped.

Every cell is a process of its own, `python -m neo_jax.train`, with its own workdir, runs/NAME in that of the
sweep. Beside the run lie log.txt, what it printed, and cell.json, how it ended; of a cell without one, such
as one that a launcher ran, the run's own records say it. What is not finished goes on from its checkpoint.
Failed and diverged cells are not run again unless asked, and stay in the table.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from ml_collections import ConfigDict, FrozenConfigDict

from launch import fit
from neo_jax import config as config_lib, events, metrics, workdir as workdir_lib
from neo_jax.config import Overrides
from neo_jax.errors import EXIT_INTERRUPTED, EXIT_NONFINITE, EXIT_OK, UserError
from neo_jax.sweep.cells import Cell

DONE, DIVERGED, FAILED, BLOCKED, UNFINISHED = "done", "diverged", "failed", "blocked", "unfinished"
POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Cells, and where they run.

    Attributes:
        file: the sweep file.
        overrides: of every cell's config, as on the command line of a run.
    """

    file: pathlib.Path
    cells: Sequence[Cell]
    workdir: pathlib.Path
    overrides: Overrides = ()

    def run_folder(self, cell: Cell) -> pathlib.Path:
        return self.workdir / "runs" / cell.name

    def fields(self, cell: Cell) -> Overrides:
        """What the command line of the cell's run sets: the overrides, and where it branches from."""
        if not cell.trunk:
            return self.overrides
        checkpoint = self.workdir / "runs" / cell.trunk / "checkpoints" / str(cell.branch_step)
        return (*self.overrides, ("branch", str(checkpoint)))

    def config(self, cell: Cell) -> FrozenConfigDict:
        return config_lib.resolve(cell.config, self.fields(cell))

    def command(self, cell: Cell) -> list[str]:
        """The command that runs the cell, here or anywhere."""
        flags = [f"--config.{field}={text}" for field, text in self.fields(cell)]
        config = f"--config={self.file}:{cell.name}"
        return [sys.executable, "-m", "neo_jax.train", config, f"--workdir={self.run_folder(cell)}", *flags]


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a cell ended; of one that ran here, `cell.json`."""

    status: str
    exit_code: int = 0
    message: str = ""
    seconds: float = 0.0


def ending(sweep: Sweep, cell: Cell) -> Ending:
    """How the cell ended; `unfinished` if it has not."""
    path = sweep.run_folder(cell) / "cell.json"
    if not path.is_file():
        return Ending(_by_records(sweep.config(cell), sweep.run_folder(cell)))
    try:
        return Ending(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to run the cell again") from error


def _by_records(config: FrozenConfigDict, workdir: pathlib.Path) -> str:
    """How the run in this workdir ended, wherever it ran: by its metrics and events."""
    lines, log = metrics.read(workdir / "metrics.jsonl"), events.read(workdir)
    skipped = [line["nonfinite_steps"] for line in lines if "nonfinite_steps" in line]
    if skipped and skipped[-1] > config.train.max_nonfinite_steps:
        return DIVERGED
    steps = sum(config.stage[name].steps for name in config.stages)
    if log:  # else only the metrics were copied here
        over = (log[-1]["doing"], log[-1]["step"]) == (events.ENDED, steps)
    else:
        over = bool(lines) and lines[-1]["step"] == steps
    evaluated = not config.eval.splits or any("eval" in line and line["step"] == steps for line in lines)
    return DONE if over and evaluated else UNFINISHED


def check(sweep: Sweep) -> None:
    """Raises UserError for a cell whose config is wrong, or whose workdir holds a run of another config.

    What the launcher changes to fit a config to its machines is no difference.
    """
    for cell in sweep.cells:
        config = sweep.config(cell)
        workdir = sweep.run_folder(cell)
        if (workdir / "config.json").exists():
            found = workdir_lib.load_config(workdir)
            if changes := workdir_lib.differences(found, _as_launched(config, found)):
                raise UserError(
                    f"--workdir={sweep.workdir}: cell {cell.name} was run with another config; use another "
                    f"folder, or take "
                    f"these back: {'; '.join(changes)}"
                )


def _as_launched(config: FrozenConfigDict, found: FrozenConfigDict) -> FrozenConfigDict:
    """A cell's config with batches that the mesh of its run can share, and WORKDIR as its machines saw it."""
    fitted = ConfigDict(config.to_dict())
    for stage in (fitted.stage[name] for name in config.stages):
        stage.batch_size = fit.shared_out(stage.batch_size, found.mesh.data * found.mesh.fsdp)
    inside = [pathlib.Path(path).parts[-4:] for path in (config.branch, found.branch)]
    if inside[0] == inside[1]:  # runs/TRUNK/checkpoints/STEP
        fitted.branch = found.branch
    return FrozenConfigDict(fitted)


def run(
    sweep: Sweep,
    *,
    jobs: int,
    retry: bool,
    after_each: Callable[[], None],
    say: Callable[[str], None] = print,
) -> int:
    """Runs what is not finished, at most `jobs` cells at a time.

    Args:
        retry: failed cells run again; diverged ones would diverge again.
        after_each: called whenever a cell has ended.
        say: takes a line for a person.

    Returns EXIT_OK when every cell has ended, EXIT_INTERRUPTED after SIGINT or SIGTERM, which running cells
    get too, or where a cell was stopped by itself: the same call goes on with it and its branches.
    """
    if retry:
        for cell in sweep.cells:
            if ending(sweep, cell).status in (FAILED, BLOCKED):
                (sweep.run_folder(cell) / "cell.json").unlink()
    waiting = [cell for cell in sweep.cells if ending(sweep, cell).status == UNFINISHED]
    total, by_name = len(sweep.cells), {cell.name: cell for cell in sweep.cells}
    if len(waiting) < total:
        say(f"{total - len(waiting)} of {total} cells have ended before")
    running: dict[str, tuple[Cell, subprocess.Popen[bytes], float]] = {}
    asked: list[int] = []
    stopping = False
    before = {
        number: signal.signal(number, lambda number, _: asked.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        while (waiting and not asked) or running:
            if asked:
                for _, process, _ in running.values():
                    process.send_signal(signal.SIGTERM)
                asked[:], waiting, stopping = [], [], True
            for cell in list(waiting):
                if cell.trunk in running or cell.trunk in [other.name for other in waiting]:
                    continue
                trunk = ending(sweep, by_name[cell.trunk]) if cell.trunk else Ending(DONE)
                if trunk.status == UNFINISHED:  # something stopped it, and it is not started again here
                    waiting.remove(cell)
                    say(f"{cell.name} unfinished: its trunk {cell.trunk} was stopped; run the sweep again")
                elif trunk.status != DONE:
                    _record(
                        sweep.run_folder(cell),
                        Ending(BLOCKED, message=f"its trunk {cell.trunk} {trunk.status}"),
                    )
                    waiting.remove(cell)
                    after_each()
                elif len(running) < jobs and not asked:
                    waiting.remove(cell)
                    running[cell.name] = (cell, _start(sweep, cell), time.monotonic())
                    say(f"{cell.name} starts")
            for name, (cell, process, began) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[name]
                if stopping and code < 0:  # before it could save, by our signal or the one that we got
                    code = EXIT_INTERRUPTED
                found = _ended(sweep.run_folder(cell), code, time.monotonic() - began)
                left = len(waiting) + len(running)
                say(f"{name} {found.status} after {found.seconds:.0f} s, {left} to go{_because(found)}")
                if found.status != UNFINISHED:
                    _record(sweep.run_folder(cell), found)
                after_each()
            if running:
                time.sleep(POLL_SECONDS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    unfinished = [cell for cell in sweep.cells if ending(sweep, cell).status == UNFINISHED]
    return EXIT_INTERRUPTED if unfinished else EXIT_OK


def _start(sweep: Sweep, cell: Cell) -> subprocess.Popen[bytes]:
    workdir = sweep.run_folder(cell)
    workdir.mkdir(parents=True, exist_ok=True)
    environment: Mapping[str, str] = {
        # Cells of one shape evaluate with one program; a branch differs from its trunk in the schedule only.
        "JAX_COMPILATION_CACHE_DIR": str((sweep.workdir / "compiled").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    with (workdir / "log.txt").open("ab") as log:
        return subprocess.Popen(
            sweep.command(cell),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=dict(environment) | dict(os.environ),
            start_new_session=True,  # Ctrl-C reaches this process only, which passes it on once
        )


def _ended(workdir: pathlib.Path, code: int, seconds: float) -> Ending:
    status = {EXIT_OK: DONE, EXIT_NONFINITE: DIVERGED, EXIT_INTERRUPTED: UNFINISHED}.get(code, FAILED)
    message = "" if status in (DONE, UNFINISHED) else _last_words(workdir / "log.txt")
    if code < 0:
        message = f"killed by {signal.Signals(-code).name}"
    return Ending(status, code, message, round(seconds, 1))


def _last_words(log: pathlib.Path) -> str:
    """The last error that a log tells of, or its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1].removeprefix("error: ")


def _record(workdir: pathlib.Path, found: Ending) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    partial = workdir / "cell.partial"
    partial.write_text(json.dumps(dataclasses.asdict(found)) + "\n")
    partial.rename(workdir / "cell.json")


def _because(found: Ending) -> str:
    return f": {found.message}" if found.message else ""
