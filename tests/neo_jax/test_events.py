"""Goodput, counted by hand."""

import pytest

from neo_jax import events


def log(*lines):
    return [{"time": float(time), "doing": kind, "step": step} for time, kind, step in lines]


def test_time_by_kind_of_a_run_that_was_killed_and_resumed():
    lines = log(
        (0, events.START, 0),
        (10, events.COMPILE, 0),
        (40, events.TRAIN, 0),
        (60, events.SAVE, 10),
        (61, events.TRAIN, 10),
        (71, events.TRAIN, 15),  # killed somewhere after step 15: steps 10 to 15 are lost
        (100, events.START, 10),
        (105, events.RESTORE, 10),
        (108, events.COMPILE, 10),
        (110, events.TRAIN, 10),
        (130, events.EVAL, 20),
        (135, events.SAVE, 20),
        (136, events.ENDED, 20),
    )
    seconds = events.goodput(lines)
    assert seconds == pytest.approx(
        {
            events.START: 10 + 5,
            events.RESTORE: 3,
            events.COMPILE: 30 + 2,
            events.TRAIN: 20 + 20,
            events.EVAL: 5,
            events.SAVE: 1 + 1,
            "lost": 10,
            "idle": 29,
            "goodput": 40 / 136,
        }
    )


def test_a_run_that_was_killed_before_its_first_checkpoint_lost_its_steps():
    lines = log(
        (0, events.START, 0),
        (10, events.TRAIN, 0),
        (50, events.TRAIN, 400),  # killed: no checkpoint to restore
        (60, events.START, 0),
        (70, events.TRAIN, 0),
        (120, events.ENDED, 500),
    )
    seconds = events.goodput(lines)
    assert (seconds[events.TRAIN], seconds["lost"], seconds["idle"]) == (50, 40, 10)
    assert seconds["goodput"] == pytest.approx(50 / 120)


def test_nothing_logged_yet():
    assert events.goodput([])["goodput"] == 0
    assert events.goodput(log((0, events.START, 0)))["goodput"] == 0


def test_a_kind_is_told_once_unless_again(tmp_path):
    with events.Events(tmp_path) as writer:
        for step in range(4):
            writer.doing(events.TRAIN, step, again=step == 2)
    told = [(line["doing"], line["step"]) for line in events.read(tmp_path)]
    assert told == [(events.TRAIN, 0), (events.TRAIN, 2), (events.ENDED, 2)]
    with events.Events(None) as writer:
        writer.doing(events.TRAIN, 0)
