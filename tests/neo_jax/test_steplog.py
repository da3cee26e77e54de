"""What a line of the log says of speed, by a clock that the test sets."""

from types import SimpleNamespace

import pytest

from neo_jax import steplog
from neo_jax.steplog import StepLog

TOKENS, FLOPS, PEAK = 100, 50.0, 1000.0
METRICS = dict.fromkeys(("nonfinite_steps", "misrouted_tokens", "loss", "grad_norm", "lr", "patches"), 0)
METRICS |= {name: TOKENS for name in steplog.SEEN} | {
    "objectives": {},
    "source_loss": [],
    "source_weight": [],
    "source_tokens": [],
}


class Written(list):
    write = list.append

    def log(self, step: int, text: str) -> None: ...


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(steplog.time, "perf_counter", lambda: now.seconds)
    monkeypatch.setattr(steplog.flops, "train_flops", lambda *_: FLOPS)
    return now


def logging_every_second() -> tuple[StepLog, Written]:
    config = SimpleNamespace(train=SimpleNamespace(log_every=2, max_nonfinite_steps=2), model=None)
    stage = SimpleNamespace(name="full", config=SimpleNamespace(batch_size=2, row_tokens=64, row_patches=64))
    lines = Written()
    return StepLog(config, stage, {}, frozenset(), (), PEAK, lines, lines, 0, {}, {}), lines


def test_speeds_are_those_of_training_alone(clock):
    log, lines = logging_every_second()

    def step(number: int) -> None:
        with log.waiting():
            clock.seconds += 1
        clock.seconds += 4
        log.add(number, METRICS, [])
        log.flush()

    def evaluate() -> None:
        with log.paused():
            clock.seconds += 1000

    evaluate()
    for number in range(1, 7):
        step(number)
        if number in (2, 3):  # behind a line, and in the middle of the next
            evaluate()
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["perf"] == {
            "steps_per_s": 1 / 5,
            "tokens_per_s": TOKENS / 5,
            "images_per_s": TOKENS / 5,
            "mfu": FLOPS / 5 / PEAK,
            "data_wait_share": 1 / 5,
        }


def test_the_step_that_is_one_too_many_is_logged(clock):
    log, lines = logging_every_second()
    for number in range(1, 4):
        clock.seconds += 1
        log.add(number, METRICS | {"nonfinite_steps": number}, [])
        log.flush()
    assert [(line["step"], line["nonfinite_steps"]) for line in lines] == [(2, 2), (3, 3)]
