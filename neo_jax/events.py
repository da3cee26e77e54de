"""What a run did with its time: `events.jsonl` in the workdir, and the goodput that follows from it.

Every line says what the run does from then on, {"time": UNIX seconds, "doing": KIND, "step": N}, until the
next line. A run that was killed has no last line: what it did after its last one counts as idle.
"""

import itertools
import json
import pathlib
import time
from typing import Any

from neo_jax import metrics

FILE = "events.jsonl"
START, RESTORE, COMPILE, TRAIN = "start", "restore", "compile", "train"
EVAL, SAVE, ENDED = "eval", "save", "ended"
KINDS = (START, RESTORE, COMPILE, TRAIN, EVAL, SAVE)


class Events:
    """Writes the lines of one process; `workdir` None writes none."""

    def __init__(self, workdir: pathlib.Path | None):
        self._file = None if workdir is None else (workdir / FILE).open("a", buffering=1)
        self._last: tuple[str, int] | None = None

    def doing(self, kind: str, step: int, again: bool = False) -> None:
        """From now on the run does `kind`; the same as before is not repeated unless `again`."""
        if self._file is None or (self._last is not None and self._last[0] == kind and not again):
            return
        self._last = (kind, step)
        self._file.write(json.dumps({"time": round(time.time(), 3), "doing": kind, "step": step}) + "\n")

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self.doing(ENDED, self._last[1] if self._last else 0)
            self._file.close()


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run, without a last one that a kill cut short; [] if there are none."""
    return metrics.read(workdir / FILE)


def goodput(events: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by kind, and "goodput", the share that steps took which were kept.

    Besides KINDS: "lost", the training of steps that had to be taken again after a restart, and "idle",
    between a run's end and the next start. A run that was killed ends with its last line.
    """
    seconds = dict.fromkeys((*KINDS, "lost", "idle"), 0.0)
    taken: list[tuple[int, float]] = []  # (step a stretch of training began at, seconds), of what may be lost
    for event, following in itertools.zip_longest(events, events[1:]):
        kind, step = event["doing"], event["step"]
        if kind == START:  # from `step`, 0 without a checkpoint: what was trained after it is taken again
            lost = sum(length for began, length in taken if began >= step)
            seconds["lost"] += lost
            seconds[TRAIN] -= lost
            taken = [(began, length) for began, length in taken if began < step]
        if following is None:
            continue
        length = following["time"] - event["time"]
        if kind == ENDED or following["doing"] == START:
            seconds["idle"] += length
            continue
        seconds[kind] += length
        if kind == TRAIN:
            taken.append((step, length))
    total = sum(seconds.values())
    return seconds | {"goodput": seconds[TRAIN] / total if total else 0.0}
