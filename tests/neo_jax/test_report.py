"""The report of a small workdir, opened in a real browser."""

import html
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest

from data_pipelines.loader import read_drawings
from data_pipelines.page import markup
from neo_jax import events, stages as stages_lib, workdir as workdir_lib
from neo_jax.errors import main_guard
from neo_jax.report import __main__ as command, charts
from tests import browser

HOSTILE = "<script>throw 'x'</script> & \"quotes\" <img src=x>"

# Uses every chart and the first legend.
PROBE = """
  const plots = [...document.querySelectorAll("[data-chart]")];
  for (const plot of plots) {
    const box = plot.getBoundingClientRect();
    const [x, y] = [box.left + box.width / 2, box.top + 1];
    plot.dispatchEvent(new PointerEvent("pointermove", {clientX: x, clientY: y}));
  }
  found.tips = plots.map(plot => plot.querySelector(".tip").textContent);
  const button = document.querySelector(".legend button");
  button.click();
  found.pressed = button.getAttribute("aria-pressed");
  found.hidden = document.querySelectorAll("polyline.off").length;
"""


def write_metrics(workdir: Path, config) -> None:
    """A line every log_every steps as train.py writes them, one of them with a loss that is not finite."""
    lines, stages = [], stages_lib.plan(config)
    for step in range(config.train.log_every, stages[-1].end + 1, config.train.log_every):
        loss = 2 + 5 * math.exp(-step / 150) + 0.1 * math.sin(step)
        stage = stages_lib.at(stages, step - 1)
        lines.append(
            {
                "step": step,
                "stage": stage.name,
                "loss": math.nan if step == 2 * config.train.log_every else loss,
                "source_loss": {
                    "fluent": loss,
                    "noto": 1.1 * loss,
                    "openmoji": 1.2 * loss,
                    "twemoji": 0.9 * loss,
                },
                "grad_norm": 1 + math.cos(step) / 2,
                "lr": 1e-3 * (1 - step / stages[-1].end),
                "tokens": 2900,
                "supervised_tokens": 1500,
                "patches": 1000,
                "images": 60,
                "documents": 60,
                "padding_share": 0.04,
                "patch_padding_share": 0.2,
                "nonfinite_steps": 1,
                "perf": {
                    "steps_per_s": 2.0,
                    "tokens_per_s": 5800.0 + step,
                    "images_per_s": 120.0,
                    "mfu": 0.42,
                    "data_wait_share": 0.01,
                },
            }
        )
        if step % config.train.eval_every == 0:
            lines.append(
                {"step": step, "eval": {split: loss + 0.2 * i for i, split in enumerate(config.eval.splits)}}
            )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text)


def write_evaluation(workdir: Path, config) -> None:
    """eval.json and samples.json; every third caption is right, one of the others is hostile."""
    scores = {
        "loss": 2.34,
        "retrieval_r1": 0.412,
        "retrieval_r5": 0.67,
        "retrieval_r1_shuffled": 0.004,
        "num_candidates": 256,
        "exact_match": 0.333,
        "tag_f1": 0.45,
    }
    evaluation = {"step": stages_lib.plan(config)[-1].end, "config_hash": "0" * 12}
    evaluation |= {split: scores for split in config.eval.splits}
    (workdir / "eval.json").write_text(json.dumps(evaluation))
    samples = {}
    for split in config.eval.splits:
        samples[split] = []
        for i, drawing in enumerate(read_drawings(config, split)[:30]):
            label, tags = drawing.captions["en"]
            guess = label if i % 3 == 0 else HOSTILE if i == 1 else "flag: Nowhere"
            samples[split].append(
                {
                    "id": drawing.id,
                    "source": drawing.source,
                    "label": label,
                    "tags": list(tags),
                    "generated": f"{guess}\nflag, one",
                }
            )
    (workdir / "samples.json").write_text(json.dumps(samples))


def write_events(workdir: Path) -> None:
    """A run that was killed after 100 s and took 40 s of its steps again."""
    lines = [
        (0, events.START, 0),
        (10, events.COMPILE, 0),
        (30, events.TRAIN, 0),
        (60, events.SAVE, 100),
        (61, events.TRAIN, 100),
        (101, events.TRAIN, 200),
        (121, events.START, 100),
        (123, events.RESTORE, 100),
        (126, events.COMPILE, 100),
        (128, events.TRAIN, 100),
        (200, events.ENDED, 300),
    ]
    (workdir / events.FILE).write_text(
        "".join(
            json.dumps({"time": 1e9 + time, "doing": kind, "step": step}) + "\n" for time, kind, step in lines
        )
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, quickstart_data) -> Path:
    """A finished run, and its report.html."""
    workdir = tmp_path_factory.mktemp("report") / "run"
    workdir_lib.claim(workdir, quickstart_data)
    write_metrics(workdir, quickstart_data)
    write_events(workdir)
    write_evaluation(workdir, quickstart_data)
    command.main([f"--workdir={workdir}"])
    return workdir


@pytest.mark.parametrize("width", [1200, 500])
def test_page_works_in_a_browser(workdir, tmp_path, width):
    found = browser.probe((workdir / "report.html").read_text(), tmp_path, width, PROBE)
    assert found["errors"] == []
    assert found["outside"] == []
    # 24 samples of each of three splits; mask, strips and at least one picture of the packed row.
    assert len(found["images"]) >= 3 * 24 + 5
    assert [alt for alt, width in found["images"] if width == 0] == []
    assert all(alt for alt, _ in found["images"])
    assert len(found["tips"]) == 9
    assert all(tip.startswith("step ") for tip in found["tips"])
    assert found["pressed"] == "false"
    assert found["hidden"] > 0
    assert found["overflow"] <= 0


def test_captions_are_there_and_escaped(workdir):
    page = (workdir / "report.html").read_text()
    assert html.escape(HOSTILE) in page
    assert HOSTILE not in page
    samples = json.loads((workdir / "samples.json").read_text())
    for captioned in samples.values():
        assert all(html.escape(sample["label"]) in page for sample in captioned[:24])
    assert page.count('class="mark"') == 3 * 24
    for number in ("41.2%", "32.6%", "7.3%", "2.340"):
        assert number in page


def test_where_the_time_went(workdir):
    page = html.unescape((workdir / "report.html").read_text())
    table = re.sub("<[^>]*>", "|", page.partition("Where the time went")[2])
    told = {line[0]: line[1:] for line in re.findall(r"\|([^|]+)\|+(\d+ min \d+ s)\|+([\d.]+%)\|", table)}
    assert told == {
        "steps that were kept": ("1 min 42 s", "51.0%"),
        "steps taken again after a restart": ("0 min 40 s", "20.0%"),
        "start": ("0 min 12 s", "6.0%"),
        "restoring a checkpoint": ("0 min 3 s", "1.5%"),
        "compiling, and the first batch": ("0 min 22 s", "11.0%"),
        "held-out losses": ("0 min 0 s", "0.0%"),
        "saving checkpoints": ("0 min 1 s", "0.5%"),
        "not running: between an end, or a kill, and the next start": ("0 min 20 s", "10.0%"),
    }
    assert "3 min 20 s from the first start to the last event; started 2 times." in table


def test_without_evaluation_the_rest_is_there(workdir, tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(workdir / name, tmp_path)
    command.main([f"--workdir={tmp_path}"])
    page = (tmp_path / "report.html").read_text()
    assert f"python -m neo_jax.evaluate --workdir={tmp_path}" in page
    assert "<polyline" in page
    assert 'class="mask"' in page


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "metrics.jsonl").unlink(), "has no logged step yet"),
        (lambda folder: (folder / "config.json").unlink(), "holds no run"),
        (lambda folder: (folder / "eval.json").write_text("{"), "eval.json is damaged"),
        (lambda folder: (folder / "metrics.jsonl").write_text("{\n{}\n"), "metrics.jsonl is damaged"),
    ],
)
def test_what_is_missing_or_damaged_is_said_in_one_line(
    workdir, tmp_path, damage, message, monkeypatch, capsys
):
    for name in ("config.json", "metrics.jsonl", "eval.json"):
        shutil.copy(workdir / name, tmp_path)
    damage(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", f"--workdir={tmp_path}"])
    with pytest.raises(SystemExit) as end:
        main_guard(command.main)
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_elements_escape_what_is_not_markup():
    inner = markup.element("b", "1 < 2")
    assert inner == "<b>1 &lt; 2</b>"
    outer = markup.element("p", [inner, "&"], None, title='"', class_="x", hidden=True, id=None)
    assert outer == '<p title="&quot;" class="x" hidden><b>1 &lt; 2</b>&amp;</p>'


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 760, False, [0, 200, 400, 600]),
        (3, 3.4, False, [3, 3.1, 3.2, 3.3, 3.4]),
        (0.3, 8, True, [0.5, 1, 2, 5]),
        (1.3, 2.1, True, [1.4, 1.6, 1.8, 2]),
        (0.001, 1000, True, [0.001, 0.01, 0.1, 1, 10, 100, 1000]),
    ],
)
def test_ticks_are_round_and_inside(low, high, log, expected):
    assert charts.ticks(low, high, log) == pytest.approx(expected)


def test_a_gap_in_a_line_where_values_are_not_finite():
    points = [(0, 1.0), (1, 2.0), (2, math.inf), (3, 2.0), (4, 1.0)]
    figure = charts.line_chart("loss", [charts.Series("a", points)])
    assert figure.count("<polyline") == 2
    assert "No finite value" in charts.line_chart("loss", [charts.Series("a", [(0, math.nan)])])
    means, _ = charts.smooth([1.0, math.nan, 3.0])
    assert means == [1.0, 2.0, 3.0]


def test_a_long_run_is_thinned_and_keeps_its_end():
    points = [(i, float(i)) for i in range(10_000)]
    thinned = charts.thin(points)
    assert len(thinned) <= charts.MAX_POINTS
    assert thinned[-1] == points[-1]
