"""The report of a fit: one HTML file that needs nothing else, plots inline."""

import math
from collections.abc import Mapping, Sequence

from data_pipelines.page.markup import Child, Html, element, join, table
from data_pipelines.page.page import page
from neo_jax.scaling.law import NAMES, or_zero
from neo_jax.scaling.parametric import interval
from neo_jax.scaling.results import Results

CAPTIONS = {
    "loss_curves": "Training loss of every run over the FLOPs it had spent.",
    "valleys": "IsoFLOP valleys. A filled star is a bottom between the smallest and the largest N that "
    "were trained; "
    "an empty one is an extrapolation and takes no part in the power laws.",
    "allocation": "How many parameters a budget wants. Band: 90 % of the bootstrap draws.",
    "loss_frontier": "The compute-optimal frontier: the lower convex hull of the runs, and the power law "
    "through it.",
    "residuals": "What the law is wrong by, run by run.",
    "intervals": "Bootstrap draws of each number; dotted: 90 % of them.",
    "held_out": "The runs of most FLOPs, predicted by the law of all others.",
    "sources": "The laws of the sources along their frontiers.",
    "arms": "The laws of the arms along their frontiers.",
}


def render(results: Results, figures: Mapping[str, str], made_by: str) -> str:
    """The whole page. `figures`: name -> SVG."""
    shown = [
        ("The law", _law(results)),
        ("Advice", _advice(results)),
        ("Runs", join(_picture("loss_curves", figures), _left_out(results))),
        ("IsoFLOP valleys", join(_picture("valleys", figures), _valleys(results))),
        (
            "Frontier",
            join(_frontier(results), _picture("allocation", figures), _picture("loss_frontier", figures)),
        ),
        ("Residuals", _picture("residuals", figures)),
        ("Intervals", _picture("intervals", figures)),
        ("Held-out prediction", join(_held_out(results), _picture("held_out", figures))),
        ("Sources", join(_laws(results.sources, results.no_source, "source"), _picture("sources", figures))),
        ("Arms", join(_laws(results.arms, results.no_arm, "arm"), _picture("arms", figures))),
        ("Mixtures", _mixtures(results)),
    ]
    sections = [(name, content) for name, content in shown if content]
    points = results.points
    return page(
        "Scaling law",
        f"{len(points)} runs of {_number(points.n.min())} to {_number(points.n.max())} parameters and "
        f"{_number(points.d.min())} to {_number(points.d.max())} tokens, {_number(points.c.min())} to "
        f"{_number(points.c.max())} FLOPs.",
        None,
        sections,
        join("Made by ", element("code", made_by), "."),
    )


def _law(results: Results) -> Html:
    fitted = results.fitted
    rows = []
    for name in NAMES:
        numbers = (getattr(fitted.law, name), *interval([getattr(law, name) for law in fitted.draws]))
        value, low, high = (_number(or_zero(name, number)) for number in numbers)
        rows.append((name, value, f"{low} to {high}"))
    return join(
        element("p", "L(N, D) = E + A / N^alpha + B / D^beta, nats per token."),
        table(("", "value", "90 % interval"), rows, f"Approach 3; {len(fitted.draws)} bootstrap draws"),
        [element("p", warning, class_="note") for warning in results.warnings],
    )


def _advice(results: Results) -> Html:
    rows = [
        (
            f"{advice.flops:.2g}",
            _number(advice.n),
            _number(advice.d),
            _number(advice.d / advice.n),
            _number(advice.loss) if advice.loss is not None else "",
            "inside" if inside else "extrapolated",
        )
        for advice, inside in results.advice
    ]
    head = ("FLOPs", "train N", "on D tokens", "D / N", "loss", "budget")
    return table(head, rows, "For C FLOPs train N parameters on D tokens (approach 3)")


def _left_out(results: Results) -> Html | None:
    if not results.points.left_out:
        return None
    return table(("run", "why"), results.points.left_out, "Runs that the law was not fitted to")


def _valleys(results: Results) -> Html:
    if not results.valleys:
        return element("p", "No budget has three sizes on an upward parabola.")
    rows = [
        (
            _number(v.flops),
            len(v.runs),
            _number(v.n),
            _number(v.d),
            _number(v.loss),
            "yes" if v.inside else "no",
        )
        for v in results.valleys
    ]
    return table(
        ("FLOPs", "runs", "N", "D", "loss", "inside its runs"), rows, "Bottoms of the valleys (approach 2)"
    )


def _frontier(results: Results) -> Html:
    meaning = {"a": "N ~ C^a", "b": "D ~ C^b", "c": "L ~ C^c", "d": "D ~ N^d"}
    rows = []
    for name, formula in meaning.items():
        measured, closed = results.frontier.measured[name], results.frontier.closed_form.get(name)
        rows.append(
            (
                formula,
                _number(measured.value),
                f"{_number(measured.low)} to {_number(measured.high)}",
                _number(closed.value) if closed else "",
                f"{_number(closed.low)} to {_number(closed.high)}" if closed else "",
            )
        )
    head = ("", "measured", "90 % interval", "from alpha, beta", "90 % interval")
    return table(head, rows, "Exponents: a, b, d from the valleys and in closed form, c from the lower hull")


def _held_out(results: Results) -> Html:
    found = results.prediction
    if found is None:
        return element("p", "Too few runs would be left to fit.")
    return element(
        "p",
        f"The law of {found.num_fitted} runs predicts the {len(found.runs)} of most FLOPs with a mean "
        f"error of "
        f"{100 * found.mean_error:.2f} % and a largest of {100 * found.largest_error:.2f} % (R2 "
        f"{found.r2:.3f}).",
    )


def _laws(fits: Mapping, missing: Mapping[str, str], kind: str) -> Child:
    if not fits and not missing:
        return None
    rows = [
        (
            name,
            *(
                "{} ({} to {})".format(
                    *(_number(or_zero(key, x)) for x in (getattr(one.law, key), *_interval(one.draws, key)))
                )
                for key in ("E", "alpha", "beta")
            ),
            _number(one.law.exponents["a"]),
            _number(one.law.exponents["b"]),
        )
        for name, one in fits.items()
    ]
    lines = [element("p", f"{name}: {why}.", class_="note") for name, why in missing.items()]
    grid = table((kind, "E", "alpha", "beta", "a", "b"), rows, "Value (90 % interval)") if rows else None
    return join(grid, lines)


def _mixtures(results: Results) -> Child:
    found = results.mixtures
    if found is None:
        reason = results.no_mixtures
        return element("p", f"No law over mixtures: {reason}.", class_="note") if reason else None
    laws = [
        (
            target,
            *(_number(or_zero(name, getattr(fit.law, name))) for name in NAMES),
            *(f"{_number(c)}, {_number(g)}" for c, g in zip(fit.law.C, fit.law.gamma, strict=True)),
            f"{100 * abs(fit.residuals).mean():.2f} %",
        )
        for target, fit in found.fits.items()
    ]
    advice = [
        (
            one.target,
            *(
                f"{weight:.3f} ({' to '.join(f'{bound:.3f}' for bound in interval(column))})"
                for weight, column in zip(one.weights, one.draws.T, strict=True)
            ),
            _number(one.loss),
            "inside" if one.inside else "extrapolated",
        )
        for one in found.advice
    ]
    return join(
        element(
            "p",
            "L(N, D, h) = E + 1 / sum of C h^gamma over the sources + A / N^alpha + B / D^beta, h: shares of "
            f"the training tokens; {found.num_runs} runs with {found.num_mixtures} mixtures.",
        ),
        table(
            ("loss on", *NAMES, *(f"C, gamma of {name}" for name in found.sources), "mean error"),
            laws,
            "One law over all mixtures for each loss",
        ),
        table(
            ("least loss on", *found.sources, "loss at largest N, D", "shares"),
            advice,
            "Best share of each source, for any N and D (90 % interval)",
        ),
    )


def _interval(draws: Sequence, key: str) -> tuple[float, float]:
    return interval([getattr(law, key) for law in draws])


def _picture(name: str, figures: Mapping[str, str]) -> Html | None:
    if name not in figures:
        return None
    return element("figure", Html(figures[name]), element("figcaption", CAPTIONS[name]), class_="printed")


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "not known"
    if value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}"
    return f"{value:.4g}"
