"""The plots of a fit, by matplotlib: one figure becomes a PNG, an SVG, and the picture in the page.

The charts of neo_jax.report are stretched HTML over SVG, read in a browser only; these are for papers too, so
scaling laws have one way to draw, this one.
"""

import io
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from neo_jax.errors import UserError
from neo_jax.scaling import isoflop
from neo_jax.scaling.frontier import Frontier
from neo_jax.scaling.heldout import Prediction
from neo_jax.scaling.law import NAMES, Law
from neo_jax.scaling.parametric import Fit, interval
from neo_jax.scaling.points import Points

Figure = Any  # matplotlib has no types
Curve = tuple[str, Sequence[tuple[float, float]]]  # name, (FLOPs, loss)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError("plots need matplotlib: pip install 'neo_jax[scaling]'") from error
    matplotlib.use("agg")
    # The same bytes every time, and text as text.
    matplotlib.rcParams.update({"svg.hashsalt": "neo_jax", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    return pyplot


def _axes(x: str, y: str, *, log_x: bool = True, log_y: bool = False) -> tuple[Figure, Any]:
    figure, axes = _pyplot().subplots(figsize=(6.4, 4.0), layout="constrained")
    axes.set(xlabel=x, ylabel=y, xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def loss_curves(curves: Sequence[Curve]) -> Figure:
    """Training loss of every run over the FLOPs spent."""
    figure, axes = _axes("training FLOPs", "training loss, nats per token", log_y=True)
    for name, points in curves:
        axes.plot(*np.array(points).T, linewidth=0.8, alpha=0.8, label=name)
    if len(curves) <= 8:
        axes.legend(frameon=False)
    return figure


def valleys(points: Points, found: Sequence[isoflop.Valley]) -> Figure:
    """Loss over N, a colour per budget; a filled star is a bottom inside its runs, an empty one is
    extrapolated.
    """
    figure, axes = _axes("parameters N", "loss, nats per token")
    of = {id(valley): index for index, valley in enumerate(found)}
    for runs in isoflop.budgets(points):
        if not any(len(valley.runs) == len(runs) and (valley.runs.c == runs.c).all() for valley in found):
            axes.plot(runs.n, runs.loss, ".", color="0.75")
    for valley in found:
        colour = f"C{of[id(valley)] % 10}"
        axes.plot(
            valley.runs.n,
            valley.runs.loss,
            "o",
            color=colour,
            markersize=4,
            label=f"{valley.flops:.2g} FLOPs",
        )
        ends = np.log([min(valley.runs.n.min(), valley.n), max(valley.runs.n.max(), valley.n)])
        # A bottom far outside would squeeze the runs into a corner.
        ends = np.clip(ends, np.log(valley.runs.n.min() / 3), np.log(valley.runs.n.max() * 3))
        n = np.exp(np.linspace(ends[0], ends[1], 100))
        axes.plot(n, valley.parabola(n), color=colour, linewidth=1)
        if n[0] <= valley.n <= n[-1]:
            face = colour if valley.inside else "none"
            axes.plot(valley.n, valley.loss, "*", color=colour, markerfacecolor=face, markersize=10)
    axes.legend(frameon=False)
    return figure


def allocation(points: Points, fitted: Fit, frontier: Frontier, found: Sequence[isoflop.Valley]) -> Figure:
    """Optimal N over C: bottoms of valleys, their power law, and the parametric law with its 90 % band."""
    figure, axes = _axes("training FLOPs C", "optimal parameters N", log_y=True)
    c = np.geomspace(points.c.min(), 10 * points.c.max(), 60)
    k = points.flops_per_nd
    axes.plot(c, fitted.law.optimum(c, k)[0], color="C0", label="approach 3")
    if fitted.draws:
        drawn = np.array([law.optimum(c, k)[0] for law in fitted.draws])
        low, high = np.array([interval(column) for column in drawn.T]).T
        axes.fill_between(c, low, high, color="C0", alpha=0.15, linewidth=0)
    for valley in found:
        axes.plot(
            valley.flops,
            valley.n,
            "*",
            color="C1",
            markerfacecolor="C1" if valley.inside else "none",
            markersize=9,
        )
    if "a" in frontier.laws:
        axes.plot(c, frontier.laws["a"](c), "--", color="C1", label="approach 2 (valleys)")
    axes.axvspan(points.c.max(), c[-1], color="0.5", alpha=0.08, linewidth=0)
    axes.text(points.c.max() * 1.1, axes.get_ylim()[0] * 1.15, "extrapolated", fontsize=8, color="0.4")
    axes.legend(frameon=False)
    return figure


def loss_frontier(points: Points, frontier: Frontier) -> Figure:
    """Loss over C: runs, those on the lower hull, and the power law through them."""
    figure, axes = _axes("training FLOPs C", "loss, nats per token", log_y=True)
    axes.plot(points.c, points.loss, ".", color="0.6", label="runs")
    hull = list(frontier.hull)
    axes.plot(points.c[hull], points.loss[hull], "o-", color="C0", markersize=4, label="lower hull")
    if "c" in frontier.laws:
        law = frontier.laws["c"]
        axes.plot(
            points.c[hull],
            law(points.c[hull]),
            "--",
            color="C1",
            label=f"{law.factor:.3g} C^{law.exponent:.4f}",
        )
    axes.legend(frameon=False)
    return figure


def residuals(points: Points, fitted: Fit) -> Figure:
    """The law's error of every run, over C."""
    figure, axes = _axes("training FLOPs C", "law / loss - 1, percent")
    errors = 100 * np.expm1(fitted.residuals)
    marks = axes.scatter(points.c, errors, c=np.log10(points.n), s=18)
    figure.colorbar(marks, label="log10 N")
    axes.axhline(0, color="0.4", linewidth=0.8)
    return figure


def intervals(fitted: Fit) -> Figure:
    """The bootstrap draws of each number of the law."""
    figure, panels = _pyplot().subplots(1, len(NAMES), figsize=(9.6, 2.4), layout="constrained")
    for axes, name in zip(panels, NAMES, strict=True):
        values = np.array([getattr(law, name) for law in fitted.draws])
        if name in ("A", "B"):
            values = np.log10(np.maximum(values, 1e-300))
        value = getattr(fitted.law, name)
        axes.hist(values, bins=24, color="C0", alpha=0.6)
        for edge in interval(values):
            axes.axvline(edge, color="0.3", linestyle=":")
        axes.axvline(np.log10(max(value, 1e-300)) if name in ("A", "B") else value, color="C1")
        axes.set(title=f"log10 {name}" if name in ("A", "B") else name, yticks=[])
    return figure


def held_out(prediction: Prediction) -> Figure:
    """Predicted against measured loss of the runs of most FLOPs."""
    figure, axes = _axes("measured loss", "predicted loss", log_x=False)
    measured = prediction.runs.loss
    axes.plot(measured, prediction.predicted, "o", markersize=4)
    both = np.concatenate([measured, prediction.predicted])
    axes.plot([both.min(), both.max()], [both.min(), both.max()], color="0.4", linewidth=0.8)
    return figure


def laws(named: dict[str, Law], points: Points) -> Figure:
    """Reducible and irreducible loss along the frontier, a line per source or arm."""
    figure, axes = _axes("training FLOPs C", "loss at the optimal N and D", log_y=True)
    c = np.geomspace(points.c.min(), points.c.max(), 60)
    for name, law in named.items():
        axes.plot(c, law.loss(*law.optimum(c, points.flops_per_nd)), label=name)
    axes.legend(frameon=False)
    return figure


def save(figure: Figure, folder: pathlib.Path, name: str) -> str:
    """Writes NAME.png and NAME.svg; returns the SVG's text."""
    figure.savefig(folder / f"{name}.png", dpi=150)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    _pyplot().close(figure)
    svg = text.getvalue()
    (folder / f"{name}.svg").write_text(svg)
    return svg[svg.index("<svg") :]
