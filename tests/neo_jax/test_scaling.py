"""Scaling laws against published fits, known truths and brute force; the commands as a user runs them."""

import csv
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from neo_jax.errors import UserError
from neo_jax.scaling import (
    __main__ as command,
    figures,
    frontier,
    isoflop,
    page,
    parametric,
    points,
    presets,
    results,
)
from neo_jax.scaling.law import Law
from neo_jax.scaling.points import Points
from tests import browser

# Besiroglu et al. 2024, from figure 4 of the Chinchilla paper (epoch-research/analyzing-chinchilla).
CHINCHILLA = Path(__file__).with_name("chinchilla_points.csv")
PUBLISHED = Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
NAMES = ("E", "A", "B", "alpha", "beta")


def of(law: Law, n, d, noise: float = 0.0, seed: int = 0) -> Points:
    """Runs whose losses follow a law, times exp(noise * normal)."""
    n, d = (np.asarray(x, float).ravel() for x in (n, d))
    loss = law.loss(n, d) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    return Points(n, d, 6 * n * d, loss, tuple({} for _ in n))


def grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.meshgrid(np.geomspace(5e7, 1.6e10, side), np.geomspace(1e9, 3e11, side)))


@pytest.fixture(scope="module")
def chinchilla() -> Points:
    rows = points.read(CHINCHILLA)
    return points.select(rows, n="Model Size", c="Training FLOP", drop_highest=5)


def test_the_published_fit_of_chinchillas_runs(chinchilla):
    """With the Huber loss of log residuals, and as Besiroglu et al. took it: in units of a fitted scale."""
    assert len(chinchilla) == 240
    assert len(chinchilla.left_out) == 5
    ours = parametric.fit(chinchilla).law
    for name, tolerance in (("E", 1e-3), ("A", 0.02), ("B", 0.04), ("alpha", 3e-3), ("beta", 5e-3)):
        assert getattr(ours, name) == pytest.approx(getattr(PUBLISHED, name), rel=tolerance), name
    theirs = parametric.fit(chinchilla, delta=1e-5, num_starts=5)
    for name, tolerance in (("E", 5e-4), ("A", 2e-3), ("B", 3e-3), ("alpha", 3e-4), ("beta", 3e-4)):
        assert getattr(theirs.law, name) == pytest.approx(getattr(PUBLISHED, name), rel=tolerance), name
    objective = parametric.Objective.of(chinchilla, 1e-5)
    at_published = objective.values(
        np.array(
            [
                np.log(PUBLISHED.A) - PUBLISHED.alpha * objective.mean_n,
                np.log(PUBLISHED.B) - PUBLISHED.beta * objective.mean_d,
                np.log(PUBLISHED.E),
                PUBLISHED.alpha,
                PUBLISHED.beta,
            ]
        )
    )
    assert theirs.value <= at_published


def test_the_objective_is_its_formula_and_its_gradient_the_differences():
    runs = of(PUBLISHED, *grid(4), noise=0.01)
    objective = parametric.Objective.of(runs, 1e-2)
    theta = np.array([0.3, -0.2, 0.5, 0.4, 0.3])
    law = objective.law(theta)
    r = np.log(law.loss(runs.n, runs.d)) - np.log(runs.loss)
    huber = np.where(abs(r) <= 1e-2, r**2 / 2, 1e-2 * (abs(r) - 1e-2 / 2)).mean() / 1e-2**2
    value, gradient = objective(theta)
    assert value == pytest.approx(huber)
    assert objective.values(theta) == pytest.approx(huber)
    for i in range(5):
        step = np.eye(5)[i] * 1e-6
        difference = (objective(theta + step)[0] - objective(theta - step)[0]) / 2e-6
        assert gradient[i] == pytest.approx(difference, rel=1e-4, abs=1e-6)


def test_a_law_without_noise_is_found_exactly():
    law = Law(E=1.9, A=300.0, B=900.0, alpha=0.3, beta=0.33)
    found = parametric.fit(of(law, *grid(5)), num_starts=5).law
    for name in NAMES:
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-3), name


@pytest.mark.slow
def test_all_starts_of_the_grid_find_nothing_better(chinchilla):
    objective = parametric.Objective.of(chinchilla, parametric.DELTA)
    with threadpool_limits(1):
        best = min(objective.descend(start)[0] for start in objective.starts())
    assert parametric.fit(chinchilla).value == pytest.approx(best, rel=1e-8)


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say(chinchilla):
    """200 sets of runs with half a percent of noise: 90 % intervals hold the truth in 85 to 95 % of them.

    Sizes and tokens are those of Chinchilla's 240 runs. A bootstrap is right for many runs: with 81 on a grid
    the intervals are too wide (they held A and alpha in 96 % of the sets).
    """
    hits = dict.fromkeys((*NAMES, "a"), 0)
    sets = 200
    for seed in range(sets):
        runs = of(PUBLISHED, chinchilla.n, chinchilla.d, noise=0.005, seed=seed)
        fitted = parametric.fit(runs, draws=100, seed=seed, num_starts=3)
        for name in NAMES:
            low, high = parametric.interval([getattr(law, name) for law in fitted.draws])
            hits[name] += low <= getattr(PUBLISHED, name) <= high
        low, high = parametric.interval([law.exponents["a"] for law in fitted.draws])
        hits["a"] += low <= PUBLISHED.exponents["a"] <= high
    shares = {name: count / sets for name, count in hits.items()}
    assert all(0.85 <= share <= 0.95 for share in shares.values()), shares


def test_the_optimum_is_the_lowest_point_of_its_budget():
    for flops in (1e19, 1e22):
        n, d = PUBLISHED.optimum(flops)
        assert 6 * n * d == pytest.approx(flops)
        others = np.geomspace(n / 10, n * 10, 20_001)
        best = others[np.argmin(PUBLISHED.loss(others, flops / 6 / others))]
        assert best == pytest.approx(n, rel=1e-3)
    steps = np.array([1e20, 1e22])
    n, d = PUBLISHED.optimum(steps)
    slopes = {"a": np.log(n[1] / n[0]) / np.log(100), "b": np.log(d[1] / d[0]) / np.log(100)}
    assert PUBLISHED.exponents["a"] == pytest.approx(slopes["a"])
    assert PUBLISHED.exponents["b"] == pytest.approx(slopes["b"])
    reducible = PUBLISHED.loss(n, d) - PUBLISHED.E
    assert np.log(reducible[1] / reducible[0]) / np.log(100) == pytest.approx(
        -PUBLISHED.exponents["c_reducible"]
    )


@pytest.mark.parametrize("gone", ["alpha", "beta"])
def test_a_law_without_one_of_its_terms_has_no_optimum(gone):
    law = dataclasses.replace(PUBLISHED, **{gone: 0.0})
    assert np.isnan(law.optimum(1e20)).all()
    with pytest.raises(UserError, match="the law has no optimum"):
        presets.advise(law, 1e20)


def isoflop_runs(noise: float = 0.0) -> Points:
    """Five budgets, nine sizes within a factor of four around each optimum."""
    flops = np.repeat(np.geomspace(1e19, 1e21, 5), 9)
    n = PUBLISHED.optimum(flops)[0] * np.tile(np.geomspace(1 / 4, 4, 9), 5)
    return of(PUBLISHED, n, flops / 6 / n, noise)


def test_valleys_and_frontier_find_the_exponents_of_the_law():
    runs = isoflop_runs()
    found = isoflop.valleys(runs)
    assert [valley.inside for valley in found] == [True] * 5
    for valley in found:
        assert valley.n == pytest.approx(PUBLISHED.optimum(valley.flops)[0], rel=0.03)
        assert 6 * valley.n * valley.d == pytest.approx(valley.flops, rel=1e-6)
        assert valley.loss == pytest.approx(PUBLISHED.loss(valley.n, valley.d), rel=1e-3)
    fitted = parametric.fit(runs, num_starts=3)
    result = frontier.fit(isoflop_runs(1e-4), fitted, draws=50, seed=0)
    for name in ("a", "b", "d"):
        one = result.measured[name]
        assert one.value == pytest.approx(PUBLISHED.exponents[name], rel=0.02)
        assert one.low <= one.value <= one.high
    c, best = np.array([1e19, 1e21]), PUBLISHED.loss(*PUBLISHED.optimum(np.array([1e19, 1e21])))
    slope = np.log(best[1] / best[0]) / np.log(c[1] / c[0])
    assert result.measured["c"].value == pytest.approx(slope, rel=0.05)


def test_a_bottom_outside_its_runs_takes_no_part():
    flops = np.repeat(np.geomspace(1e19, 1e21, 3), 5)
    n = PUBLISHED.optimum(flops)[0] * np.tile(np.geomspace(3, 9, 5), 3)  # all too large
    found = isoflop.valleys(of(PUBLISHED, n, flops / 6 / n))
    assert found
    assert not any(valley.inside for valley in found)
    assert isoflop.power_laws(found) == {}


def test_the_lower_hull_lies_below_all_runs():
    runs = of(PUBLISHED, *grid(6), noise=0.02)
    hull = frontier.lower_hull(runs)
    x, y = np.log(runs.c), np.log(runs.loss)
    assert list(hull) == sorted(hull, key=lambda i: x[i])
    assert np.all(np.interp(x, x[hull], y[hull]) <= y + 1e-9)
    slopes = np.diff(y[hull]) / np.diff(x[hull])
    assert np.all(np.diff(slopes) > 0)
    assert min(runs.c[frontier.lower_hull(runs, min_flops=1e19)]) > 1e19


def test_presets_are_the_printed_tables():
    shukor = presets.preset("shukor_early_avg")
    assert isinstance(shukor, presets.Exponents)
    # Closed form of the printed alpha and beta, within what printing rounds.
    assert shukor.beta / (shukor.alpha + shukor.beta) == pytest.approx(shukor.a, abs=2e-3)
    assert shukor.alpha / shukor.beta == pytest.approx(shukor.d, abs=2e-3)
    assert shukor.b / shukor.a == pytest.approx(shukor.d, abs=2e-3)
    low, high = (presets.advise(shukor, flops) for flops in (1e20, 1e22))
    assert high.n / low.n == pytest.approx(100**0.526)
    assert high.d / low.d == pytest.approx(100**0.473)
    assert high.loss == pytest.approx(29.57 * 1e22**-0.0492)
    assert 6 * high.n * high.d == pytest.approx(1e22, rel=0.01)
    assert "assumption" in high.assumption
    own = presets.advise(shukor, 1e22, presets.Anchor(1e20, 1e9))
    assert own.n == pytest.approx(1e9 * 100**0.526)
    assert not own.assumption
    late = presets.preset("shukor_late_avg")
    for anchor in (None, presets.Anchor(1e20, 1e9)):
        assert "6 (N_v D_v + N D)" in presets.advise(late, 1e22, anchor).assumption
    hoffmann = presets.preset("chinchilla_hoffmann")
    assert isinstance(hoffmann, Law)
    assert hoffmann.exponents["a"] == pytest.approx(0.46, abs=0.01)  # as printed, like alpha and beta
    advice = presets.advise(hoffmann, 1e21)
    assert 6 * advice.n * advice.d == pytest.approx(1e21)


def sweep_table(folder: Path) -> Path:
    """A table as a sweep writes it: two arms, two sources; a cell failed, one diverged, one has no loss."""
    rows = []
    for arm, law in (("dense", PUBLISHED), ("experts", Law(1.7, 450.0, 2000.0, 0.35, 0.36))):
        runs = isoflop_runs(2e-3)
        for i in range(len(runs)):
            loss = float(law.loss(runs.n[i], runs.d[i]) * runs.loss[i] / PUBLISHED.loss(runs.n[i], runs.d[i]))
            rows.append(
                {
                    "name": f"{arm}{i}",
                    "arm": arm,
                    "status": "done",
                    "budget": round(float(runs.c[i]), -15),
                    "n_non_embedding": float(runs.n[i]),
                    "tokens": float(runs.d[i]),
                    "flops": float(runs.c[i]),
                    "loss": loss,
                    "loss/captions": 0.8 * loss,
                    "loss/text": 1.2 * loss,
                }
            )
    rows[0] |= {"status": "failed", "loss": None}
    rows[1] |= {"status": "diverged", "loss": None}
    rows[2] |= {"loss": float("nan")}
    path = folder / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    """The output of `fit` on a sweep's table."""
    folder = tmp_path_factory.mktemp("fit")
    sweep_table(folder)
    command.main(["fit", f"--results={folder}", f"--out={folder}/out", "--bootstrap=20"])
    return folder / "out"


def test_fit_writes_json_plots_and_a_page(fitted, tmp_path):
    found = json.loads((fitted / "fit.json").read_text())
    for name in NAMES:
        assert found[name] == pytest.approx(getattr(PUBLISHED, name), rel=0.25), name
        low, high = found["intervals"][name]
        assert low <= high
    assert found["runs"] == 42
    assert [one["reason"] for one in found["left_out"]] == ["failed", "diverged", "loss is nan"]
    assert len(found["isoflop"]) == 5
    assert found["frontier"]["measured"]["a"]["value"] == pytest.approx(PUBLISHED.exponents["a"], rel=0.1)
    assert found["held_out"]["mean_error"] < 0.01
    assert set(found["arms"]) == {"dense", "experts"}
    assert found["sources"]["text"]["E"] / found["sources"]["captions"]["E"] == pytest.approx(1.5, rel=1e-3)
    plots = {
        "valleys",
        "allocation",
        "loss_frontier",
        "residuals",
        "intervals",
        "held_out",
        "sources",
        "arms",
    }
    for plot in plots:
        assert (fitted / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (fitted / f"{plot}.svg").read_text()
    page = (fitted / "report.html").read_text()
    seen = browser.probe(page, tmp_path, 1200, 'found.svgs = document.querySelectorAll("figure svg").length;')
    assert seen["errors"] == []
    assert seen["outside"] == []
    assert seen["overflow"] <= 0
    assert seen["svgs"] == len(plots)
    assert "dense0" in page
    assert "diverged" in page


def test_advice_from_a_fit_and_from_a_preset(fitted, capsys):
    command.main(["advise", f"--fit={fitted}/fit.json", "--flops=1e20", "--json"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 6 * said["n"] * said["d"] == pytest.approx(1e20)
    command.main(["advise", "--preset=shukor_early_avg", "--flops=1e22", "--json"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["n"] > 1e9
    assert said["law"]["a"] == 0.526


def test_advice_from_a_fit_counts_flops_as_its_runs_do(tmp_path, capsys):
    """The runs of the quickstart take twice 6ND: advice of 6ND would be for twice the budget."""
    results = Path(__file__).parents[2] / "docs/scaling_quickstart/results.jsonl"
    command.main(["fit", f"--results={results}", f"--out={tmp_path}", "--bootstrap=0"])
    found = json.loads((tmp_path / "fit.json").read_text())
    assert found["flops_per_nd"] == pytest.approx(11.85, abs=0.01)
    capsys.readouterr()
    for reported in found["advice"]:
        command.main(["advise", f"--fit={tmp_path}/fit.json", f"--flops={reported['flops']}", "--json"])
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        for name in ("n", "d", "loss"):
            assert said[name] == pytest.approx(reported[name]), name


def test_a_sweeps_folder_gives_the_loss_curves_of_its_runs(tmp_path):
    """Of three steps each; one left no metrics, and two lines tell no training loss."""
    runs = of(PUBLISHED, *grid(3))
    table, told = [], []
    for i in range(len(runs)):
        name, workdir = f"cell{i}", tmp_path / "runs" / f"cell{i}"
        cell = {"name": name, "status": "done", "workdir": f"runs/{name}", "loss": runs.loss[i]}
        table.append(cell | {"n_non_embedding": runs.n[i], "tokens": runs.d[i], "flops": runs.c[i]})
        workdir.mkdir(parents=True)
        line = [(runs.c[i] * share, runs.loss[i] / share) for share in (0.25, 0.5, 1.0)]
        if i != 4:
            lines = [{"step": s, "loss": loss, "seen": {"flops": c}} for s, (c, loss) in enumerate(line, 1)]
            lines.insert(1, {"step": 1, "eval": {"dev": 3.0}, "seen": {"flops": line[0][0]}})
            lines.append({"step": 3, "eval": {"dev": 2.5}, "seen": {"flops": line[2][0]}})
            (workdir / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
            told.append((name, line))
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    rows = points.read(tmp_path)
    assert command.curves(tmp_path, rows) == command.curves(path, rows) == told
    assert command.curves(CHINCHILLA, points.read(CHINCHILLA)) == []
    axes = figures.loss_curves(told).axes[0]
    assert [list(zip(*drawn.get_data(), strict=True)) for drawn in axes.lines] == [line for _, line in told]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [name for name, _ in told]
    command.main(["fit", f"--results={tmp_path}", f"--out={tmp_path}/out", "--bootstrap=0"])
    assert (tmp_path / "out" / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    curves = (tmp_path / "out" / "loss_curves.svg").read_text()
    assert curves[curves.index("<svg") :] in (tmp_path / "out" / "report.html").read_text()


def test_the_command_on_a_table_from_elsewhere(tmp_path):
    argv = [sys.executable, "-m", "neo_jax.scaling", "fit", f"--results={CHINCHILLA}", f"--out={tmp_path}"]
    argv += [
        "--n=Model Size",
        "--c=Training FLOP",
        "--loss=loss",
        "--drop_highest=5",
        "--bootstrap=0",
        "--json",
    ]
    result = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["alpha"] == pytest.approx(0.3478, rel=3e-3)
    assert found["runs"] == 240


def test_what_the_runs_do_not_show_is_told_as_0_everywhere():
    law = Law(2e-23, 400.0, 1000.0, 0.34, 0.37)
    runs, fitted = of(law, *grid(3)), parametric.Fit(law, 0.0, np.zeros(9), (law, law))
    warnings = results._warnings(runs, fitted, pooled=False)
    found = SimpleNamespace(points=runs, fitted=fitted, mixtures=None, no_mixtures="", warnings=warnings)
    assert warnings == ["E is 0: the runs do not reach far enough to show an irreducible loss."]
    assert command._told(found).startswith("     E = 0   (90 %: 0 to 0)\n     A = 400 ")
    assert re.sub("<[^>]*>", "|", str(page._law(found))).count("|E||0||0 to 0|") == 1


def with_rows(folder: Path, change) -> str:
    """A damaged table."""
    path = sweep_table(folder)
    rows = change([json.loads(line) | {"together": ""} for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--results={path}"


ALL = {
    "empty": (lambda rows: [], "holds no run"),
    "diverged": (
        lambda rows: [row | {"status": "diverged"} for row in rows],
        "none of the 90 runs can be used (diverged",
    ),
    "few": (lambda rows: rows[3:8], "only 5 of 5 runs can be used; a law of five numbers needs at least 6"),
    "one_size": (lambda rows: [row | {"n_non_embedding": 1e8} for row in rows], "1 different N"),
    "no_column": (lambda rows: [{"name": row["name"]} for row in rows], "have no column 'n_non_embedding'"),
}


@pytest.mark.parametrize("case", ALL)
def test_results_that_cannot_be_fitted(case, tmp_path):
    change, message = ALL[case]
    by = [] if case == "no_column" else ["--by=together"]
    with pytest.raises(UserError) as caught:
        command.main(["fit", with_rows(tmp_path, change), f"--out={tmp_path}/out", *by])
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("count", "left"), [(1, 4), (4, 1), (5, 0), (7, 0)])
def test_more_outliers_than_runs_leave_none(count, left):
    rows = [{"n": 1e8, "d": 1e9, "loss": loss} for loss in (3.0, 1.0, 2.0, 5.0, 4.0)]
    told = f"only {left} of 5 runs" if left else "none of the 5 runs"
    with pytest.raises(UserError, match=f"{told} can be used .*the {count} of highest loss"):
        points.select(rows, n="n", d="d", drop_highest=count)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["advise", "--preset=shukor", "--flops=1e20"],
            "--preset=shukor: unknown; choose from chinchilla_hoffmann",
        ),
        (
            ["advise", "--preset=shukor_early_avg", "--flops=-1e20"],
            "--flops=-1e+20: a budget is a positive number",
        ),
        (["advise", "--preset=shukor_early_avg", "--flops=1e20", "--anchor=1e9"], "write N@FLOPS"),
        (["advise", "--preset=chinchilla_hoffmann", "--flops=1e20", "--anchor=1e9@1e20"], "its own factors"),
        (["advise", "--fit=nowhere.json", "--flops=1e20"], "no such file"),
        (["fit", "--results=nowhere", "--out=out"], "no such file or folder"),
        (
            ["fit", f"--results={CHINCHILLA}", "--out=out", "--by=Model_size"],
            "--by=Model_size: the results have no such column; did you mean Model Size?",
        ),
        (
            ["fit", "--results=/", "--out=out"],
            "holds no results.parquet or results.jsonl; have neo_jax.sweep run or status write them, with "
            "--workdir=/",
        ),
        (["fit", f"--results={__file__}", "--out=out"], "a table ends in .csv, .jsonl, .parquet"),
        (["fit", f"--results={CHINCHILLA}", "--out=out", "--bootstrap=-1"], "--bootstrap=-1: at least 0"),
        (["fit", f"--results={CHINCHILLA}", "--out=out", "--delta=0"], "--delta=0: must be positive"),
        (["fit", f"--results={CHINCHILLA}", "--out=out", "--delta=inf"], "--delta=inf: must be a finite"),
        (
            ["fit", f"--results={CHINCHILLA}", "--out=out", "--min_flops=nan"],
            "--min_flops=nan: must be a finite",
        ),
        (
            ["fit", f"--results={CHINCHILLA}", "--out=out", "--min_flops=inf"],
            "--min_flops=inf: must be a finite",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(argv, message):
    with pytest.raises(UserError) as caught:
        command.main(argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_tables_are_named(tmp_path):
    for name, text in (("a.jsonl", "{"), ("a.parquet", "PAR")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="damaged"):
            points.read(tmp_path / name)
    for line, why in (("[1, 2]", "a run is an object"), ('"x"', "a run is an object"), ("{1}", "Expecting")):
        path = tmp_path / "rows.jsonl"
        path.write_text('{"loss": 1}\n\n' + line)
        with pytest.raises(UserError, match=f"rows.jsonl: damaged: line 3: {why}"):
            points.read(path)


def test_a_budget_that_is_no_number_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("name,budget,loss\nfirst,,2\nsecond,1e18,2\nthird,small,2\n")
    with pytest.raises(UserError, match=r"rows\.csv: row 3, column budget: 'small' is no number of FLOPs"):
        points.read(path)


def test_the_copied_points_are_those_of_the_figure():
    with CHINCHILLA.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 245
    assert max(float(row["loss"]) for row in rows) == pytest.approx(5.0056, abs=1e-4)
