"""The law over mixtures against laws that are known, brute force, and what a table must have."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from neo_jax.scaling import __main__ as command, mixtures
from neo_jax.scaling.mixtures import MEAN, MixtureLaw
from neo_jax.scaling.points import Points
from tests import browser

SOURCES = ("books", "photos", "web")
LAWS = {
    "books": MixtureLaw(1.5, 300.0, 900.0, 0.3, 0.33, np.array([1.2, 0.5, 0.7]), np.array([0.6, 0.3, 0.4])),
    "photos": MixtureLaw(0.9, 200.0, 700.0, 0.28, 0.31, np.array([0.5, 1.1, 0.6]), np.array([0.3, 0.5, 0.5])),
}
COLUMNS = {"n": "n", "d": "d", "c": None, "loss": "loss", "drop_highest": 0}
# Every way to deal out quarters, and the middle: 16 mixtures.
QUARTERS = np.array([h for h in itertools.product(range(5), repeat=3) if sum(h) == 4]) / 4
MIXTURES = np.vstack([QUARTERS * 0.9 + 0.1 / 3, np.full((1, 3), 1 / 3)])


def rows(shares: np.ndarray, noise: float = 0.0) -> list[dict]:
    """A table of runs of three sizes and three lengths for each mixture [m, 3], an arm each."""
    rng = np.random.default_rng(1)
    made = []
    for (i, h), n, d in itertools.product(enumerate(shares), (1e8, 4e8, 1.6e9), (2e9, 8e9, 3.2e10)):
        losses = {
            f"loss/{name}": float(law.loss(n, d, h) * np.exp(noise * rng.standard_normal()))
            for name, law in LAWS.items()
        }
        share = {f"share/{name}": float(part) for name, part in zip(SOURCES, h, strict=True)}
        loss = sum(losses.values()) / 2
        made.append({"name": f"m{i}", "arm": f"m{i}", "n": n, "d": d, "loss": loss, **losses, **share})
    return made


def law_of(table: list[dict], draws: int = 0) -> mixtures.Mixtures:
    found, reason = mixtures.over_mixtures(table, COLUMNS, delta=1e-3, draws=draws, seed=0)
    assert found is not None, reason
    return found


def true_least(laws: list[MixtureLaw]) -> tuple[np.ndarray, float]:
    """(shares, mean floor) at the lowest point of a fine grid."""
    steps = np.linspace(0, 1, 201)
    grid = np.array([(x, y, 1 - x - y) for x, y in itertools.product(steps, steps) if x + y <= 1 + 1e-9])
    floors = np.mean([law.floor(np.clip(grid, 0, None)) for law in laws], axis=0)
    return grid[floors.argmin()], float(floors.min())


@pytest.fixture(scope="module")
def fitted() -> mixtures.Mixtures:
    return law_of(rows(MIXTURES, noise=1e-3), draws=10)


def test_losses_of_unseen_mixtures_and_larger_runs_are_predicted(fitted):
    unseen = np.random.default_rng(2).dirichlet((2, 2, 2), 50)
    for name, law in LAWS.items():
        for n, d in ((4e8, 8e9), (1e10, 2e11)):
            found = fitted.fits[name].law.loss(n, d, unseen)
            np.testing.assert_allclose(found, law.loss(n, d, unseen), rtol=5e-3)


def test_the_advice_is_near_the_true_optimum(fitted):
    assert [one.target for one in fitted.advice] == [MEAN, *LAWS]
    for one in fitted.advice:
        laws = list(LAWS.values()) if one.target == MEAN else [LAWS[one.target]]
        shares, least = true_least(laws)
        np.testing.assert_allclose(one.weights, shares, atol=0.05)
        assert np.mean([law.floor(one.weights) for law in laws]) < least * 1.001
        assert one.weights.sum() == pytest.approx(1) and one.inside
        assert one.draws.shape == (10, 3) and not fitted.warnings
        assert np.abs(one.draws - one.weights).max() < 0.1
        assert one.loss == pytest.approx(np.mean([law.loss(1.6e9, 3.2e10, shares) for law in laws]), rel=5e-3)


def test_without_noise_the_fit_is_exact():
    n, d = (np.tile(x, len(MIXTURES)) for x in ((1e8, 4e8, 1.6e9), (8e9, 3.2e10, 2e9)))
    shares = np.repeat(MIXTURES, 3, axis=0)
    runs = Points(n, d, 6 * n * d, LAWS["photos"].loss(n, d, shares), tuple({} for _ in n))
    assert np.abs(mixtures.fit(runs, shares, num_starts=3).residuals).max() < 1e-5


def test_the_order_of_sources_and_runs_does_not_matter(fitted):
    table = rows(MIXTURES, noise=1e-3)[::-1]
    renamed = dict(zip((f"share/{name}" for name in SOURCES), ("share/z", "share/a", "share/m"), strict=True))
    found = law_of([{renamed.get(key, key): value for key, value in row.items()} for row in table])
    assert found.sources == ("a", "m", "z")  # photos, web, books
    for one, other in zip(found.advice, fitted.advice, strict=True):
        np.testing.assert_allclose(one.weights, other.weights[[1, 2, 0]], atol=2e-3)
        assert one.loss == pytest.approx(other.loss, rel=1e-4)


@pytest.mark.parametrize("exponent", [0.4, 1.0])
def test_equal_sources_are_mixed_equally(exponent):
    law = MixtureLaw(1.0, 0.0, 0.0, 0.0, 0.0, np.full(4, 0.7), np.full(4, exponent))
    if exponent < 1:  # a straight line has no best mixture
        np.testing.assert_allclose(mixtures.optimum([law]), 0.25, atol=1e-6)
    better = dataclasses.replace(law, C=np.array([0.7, 0.7, 0.7, 1.4]))
    found = mixtures.optimum([better])
    # From the Lagrangian: h_i ~ C_i^(1 / (1 - gamma)).
    ideal = better.C ** (1 / (1 - exponent)) if exponent < 1 else np.array([0, 0, 0, 1.0])
    np.testing.assert_allclose(found, ideal / ideal.sum(), atol=1e-4)


def test_the_gradient_is_the_differences():
    shares = np.vstack([MIXTURES, [0.0, 0.5, 0.5]])
    n, d = np.geomspace(1e8, 1e9, 17), np.geomspace(1e9, 1e11, 17)[::-1].copy()
    points = Points(n, d, 6 * n * d, LAWS["books"].loss(n, d, shares) * 1.01, tuple({} for _ in n))
    objective = mixtures.Objective.over(points, shares, 1e-2)
    theta = np.array([0.3, -0.2, 0.1, 0.4, 0.3, 0.5, 0.1, -0.3, 0.4, 0.9, 0.2])
    value, gradient = objective(theta)
    assert np.isfinite(gradient).all() and objective.values(theta) == pytest.approx(value)
    law, predicted = objective.mixture_law(theta), np.exp(objective.residuals(theta)) * points.loss
    np.testing.assert_allclose(law.loss(n, d, shares), predicted)
    for i in range(len(theta)):
        step = np.eye(len(theta))[i] * 1e-6
        difference = (objective(theta + step)[0] - objective(theta - step)[0]) / 2e-6
        assert gradient[i] == pytest.approx(difference, rel=1e-4, abs=1e-6), i


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda table: table[: 6 * 9],
            "6 different mixtures of 3 sources; a law over mixtures needs at least 7",
        ),
        (
            lambda table: [row | {"share/web": None} for row in table],
            "144 of 144 runs do not tell the shares",
        ),
        (lambda table: [row | {"n": 1e8} for row in table], "the runs have 1 different N"),
        (lambda table: table[::14], "11 runs; a law over mixtures of 3 sources needs 12"),
        (lambda table: [{"n": row["n"], "d": row["d"], "loss": row["loss"]} for row in table], ""),
    ],
)
def test_what_a_table_must_have(change, reason):
    found, why = mixtures.over_mixtures(change(rows(MIXTURES)), COLUMNS, delta=1e-3, draws=0, seed=0)
    assert found is None
    assert reason in why and bool(reason) == bool(why)


def test_mixtures_that_make_no_difference_have_no_best_one():
    noise = np.random.default_rng(0).standard_normal
    table = [
        row | {"loss": row["loss"] * np.exp(0.02 * noise())} for row in rows(np.tile(MIXTURES[:1], (16, 1)))
    ]
    shares = np.repeat(MIXTURES, 9, axis=0)
    for row, h in zip(table, shares, strict=True):
        row |= {f"share/{name}": float(part) for name, part in zip(SOURCES, h, strict=True)}
        del row["loss/books"], row["loss/photos"]
    found = law_of(table, draws=10)
    assert list(found.fits) == ["loss"]
    assert "The best mixture (loss) is not known" in found.warnings[0]


def test_shares_that_vary_by_chance_are_one_mixture():
    rng = np.random.default_rng(0)
    assert mixtures.count(rng.dirichlet((300, 500, 200), 40)) == 1
    assert mixtures.count(MIXTURES) == 16


def test_the_command_tells_the_best_mixture(tmp_path, capsys):
    """Arms of three runs each, too few for laws of their own: the main law is of all together."""
    table = [row for i, row in enumerate(rows(MIXTURES, noise=1e-3)) if i % 9 in (0, 4, 8)]
    path: Path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    argv = ["fit", f"--results={path}", f"--out={tmp_path}/out", "--n=n", "--d=d", "--bootstrap=5"]
    command.main(argv)
    said = capsys.readouterr().out
    assert "least loss (mean) with shares of books" in said
    assert "No arm has enough runs for a law" in said
    found = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert found["mixtures"]["sources"] == list(SOURCES)
    assert found["mixtures"]["num_mixtures"] == 16
    best = {one["target"]: one["weights"] for one in found["mixtures"]["advice"]}
    assert max(best["books"], key=best["books"].get) == "books"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "One law over all mixtures" in page
    seen = browser.probe(page, tmp_path, 1200)
    assert seen["errors"] == [] and seen["overflow"] <= 0

    path.write_text("".join(json.dumps(row) + "\n" for row in rows(MIXTURES[:1])))
    command.main([*argv[:-1], "--bootstrap=0"])
    assert "no law over mixtures: the runs have 1 different mixtures" in capsys.readouterr().out
