"""Where a run's numbers go: metrics.jsonl, TensorBoard events, and the terminal."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm


class MetricsWriter:
    """Writes one JSON object per logged step to `workdir/metrics.jsonl`, and the same to TensorBoard.

    Wall-clock figures live under the key "perf"; everything else is a pure function of config and step, the
    same in a run that was killed and resumed as in one that was not. Use as a context manager.

    Args:
        workdir: an existing folder.
        start_step: lines of later steps, left by a killed run, are dropped: those steps are taken again.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int):
        self.path = workdir / "metrics.jsonl"
        kept = [line for line in read(self.path) if line["step"] <= start_step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.rename(self.path)
        self._file = self.path.open("a", buffering=1)  # by the line: a kill loses no finished line
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # A plain file: TensorBoard's own writer has a thread, whose traceback a full disk would bring.
        self._events = (folder / f"events.out.tfevents.{time.time_ns()}").open("wb")
        self._records = RecordWriter(self._events)
        self._chart(file_version="brain.Event:2")
        # Has TensorBoard drop later steps, which a killed run left.
        self._chart(step=start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def _chart(self, **fields: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def write(self, line: dict[str, Any]) -> None:
        """`line` holds "step" and numbers, nested by dicts; "rejected" is not charted."""
        self._file.write(json.dumps(line) + "\n")
        # A chart for every shard that rejects something would bury the others.
        for name, value in _flatten({key: value for key, value in line.items() if key != "rejected"}):
            if isinstance(value, int | float) and name != "step":
                summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
                self._chart(step=line["step"], summary=summary)
        self._events.flush()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        try:
            self._events.close()
        except OSError:
            if kind is None:  # else the first error is the one to tell
                raise


class NoWriter(MetricsWriter):
    """For the processes of a run other than the first: writes nothing."""

    def __init__(self) -> None:
        pass

    def write(self, line: dict[str, Any]) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        pass


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last one that a kill cut short; [] if there is no file."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class Progress:
    """A bar with rate and ETA on a terminal; elsewhere a plain line for every logged step.

    One process of a run shows it; with `shown` False it is silent.
    """

    def __init__(self, start_step: int, total_steps: int, shown: bool = True):
        self.total = total_steps
        self._first, self._began = start_step, time.monotonic()
        self._shown = shown
        self._bar = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True)

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def log(self, step: int, text: str) -> None:
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        per_step = (time.monotonic() - self._began) / max(1, step - self._first)
        print(f"step {step}/{self.total}  {text}  ETA {_clock(per_step * (self.total - step))}", flush=True)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._shown:
            print(text, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    return f"{minutes}:{seconds:02d}"


def _flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flatten(item, f"{prefix}{key}/")
        else:
            yield prefix + key, item
