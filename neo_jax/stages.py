"""A run is a list of stages; this module says which steps belong to which."""

import dataclasses

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage placed on the run's step axis: it takes the steps start <= step < end."""

    name: str
    index: int
    start: int
    end: int
    config: ConfigDict


def plan(config: ConfigDict) -> tuple[Stage, ...]:
    """The stages of a resolved config in order."""
    stages: list[Stage] = []
    start = 0
    for index, name in enumerate(config.stages):
        end = start + config.stage[name].steps
        stages.append(Stage(name, index, start, end, config.stage[name]))
        start = end
    return tuple(stages)


def at(stages: tuple[Stage, ...], step: int) -> Stage:
    """The stage that takes `step`; the last one when all are done."""
    return next((stage for stage in stages if step < stage.end), stages[-1])
