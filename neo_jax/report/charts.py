"""Line charts as inline SVG, readable without scripts; style.SCRIPT adds values under the pointer.

The SVG is stretched to the figure and holds lines only. Texts and dots are HTML placed in percent over it, so
they keep their size on a phone.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence

from data_pipelines.page.markup import Html, element

Point = tuple[float, float]
MAX_POINTS = 600  # per line; more could not be told apart
NARROW = 0.15  # share of the width
TICKS = 5  # about so many per axis


@dataclasses.dataclass(frozen=True)
class Series:
    """One line. `look` is "line", "faint" (raw values behind a smoothed line) or "dots" (few values)."""

    name: str
    points: Sequence[Point]
    look: str = "line"
    colour: int = 0  # index of the palette; each colour has its own dashes too


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    stages: Sequence[tuple[str, float, float]] = (),
    unit: str = "number",
    log: bool = False,
    from_zero: bool = False,
    note: str = "",
) -> Html:
    """A figure of lines over training steps.

    Args:
        title: what is on the y axis, with its unit.
        series: values that are not finite leave a gap.
        stages: (name, first step, last step), drawn as bands.
        unit: "number" or "percent"; how values are written.
        log: logarithmic y axis; values at or below 0 are left out.
        from_zero: the y axis begins at 0.
        note: a sentence below.
    """
    series = [dataclasses.replace(one, points=thin(one.points)) for one in series]
    drawable = [[p for p in one.points if math.isfinite(p[1]) and (p[1] > 0 or not log)] for one in series]
    xs, ys = ([point[axis] for points in drawable for point in points] for axis in (0, 1))
    if not ys:
        return element(
            "figure", element("figcaption", title), element("p", "No finite value."), class_="chart"
        )
    x_low, x_high = 0.0, max([*xs, *(end for _, _, end in stages)])
    y_low, y_high = _limits(ys, log, from_zero)
    at_x = _scale(x_low, x_high, log=False)
    at_y = _scale(y_low, y_high, log)

    y_ticks = [(value, 100 - 100 * at_y(value)) for value in ticks(y_low, y_high, log)]
    x_ticks = [(value, 100 * at_x(value)) for value in ticks(x_low, x_high, log=False)]
    lines = [element("line", x1=0, x2=1000, y1=10 * y, y2=10 * y, class_="grid") for _, y in y_ticks]
    lines += [
        element("line", x1=1000 * at_x(start), x2=1000 * at_x(start), y1=0, y2=1000, class_="stage")
        for _, start, _ in stages
        if start > x_low
    ]
    dots = []
    for index, (one, points) in enumerate(zip(series, drawable, strict=True)):
        style = f"c{one.colour % 6} {one.look} s{index}"
        for part in _unbroken(one.points, points):
            path = " ".join(f"{1000 * at_x(x):.1f},{1000 - 1000 * at_y(y):.1f}" for x, y in part)
            lines.append(element("polyline", points=path, class_=style))
        if one.look == "dots":
            dots += [_placed("dot " + style, 100 * at_x(x), 100 - 100 * at_y(y)) for x, y in points]
    labels = [_placed("y", 0, y, element("span", format_value(value, unit))) for value, y in y_ticks]
    labels += [_placed("x", x, 100, element("span", format_value(value))) for value, x in x_ticks]
    for name, start, end in stages:  # the name of a narrow band ends where the band does
        narrow = at_x(end) - at_x(start) < NARROW
        where, class_ = (end, "name narrow") if narrow else (start, "name")
        labels.append(_placed(class_, 100 * at_x(where), 0, element("span", name)))
    data = {
        "unit": unit,
        "x": [x_low, x_high],
        "series": [
            {"name": one.name, "points": points} for one, points in zip(series, drawable, strict=True)
        ],
    }
    svg = element(
        "svg",
        lines,
        viewBox="0 0 1000 1000",
        preserveAspectRatio="none",
        role="img",
        aria_label=_described(title, series, drawable, unit),
    )
    return element(
        "figure",
        element("figcaption", title),
        _legend(series),
        element("div", svg, dots, labels, class_="plot", data_chart=json.dumps(data)),
        element("p", note, class_="note") if note else None,
        class_="chart",
    )


def thin(points: Sequence[Point]) -> Sequence[Point]:
    """Every n-th point, so that at most MAX_POINTS are left, and always the last."""
    stride = -(-len(points) // MAX_POINTS) or 1
    return points[::-1][::stride][::-1]


def smooth(values: Sequence[float]) -> tuple[list[float], int]:
    """(centred running mean of the finite values, its width in values)."""
    reach = max(1, len(values) // 20)
    means = []
    for i in range(len(values)):
        near = [value for value in values[max(0, i - reach) : i + reach + 1] if math.isfinite(value)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means, 2 * reach + 1


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values inside the limits: steps of 1, 2 or 5 times a power of ten."""
    if log:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [digit * 10.0**e for e in exponents for digit in (1, 2, 5)]
        inside = [value for value in found if low <= value <= high]
        if len(inside) > TICKS + 2:
            return [value for value in inside if f"{value:e}".startswith("1")]
        if len(inside) > 2:
            return inside  # else the range is too narrow for them
    step = 10.0 ** math.floor(math.log10((high - low) / TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= TICKS)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def format_value(value: float, unit: str = "number") -> str:
    if unit == "percent":
        return f"{100 * value:.3g}%"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _limits(values: list[float], log: bool, from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return (low / 1.1, high * 1.1)
    low = min(low, 0.0) if from_zero else low
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if from_zero else low - margin, high + margin)


def _scale(low: float, high: float, log: bool) -> Callable[[float], float]:
    """Maps low..high to 0..1."""
    if log:
        return lambda value: math.log(value / low) / math.log(high / low)
    return lambda value: (value - low) / ((high - low) or 1.0)


def _unbroken(all_points: Sequence[Point], drawable: Sequence[Point]) -> list[list[Point]]:
    """Runs of drawable points without a gap between them."""
    kept = set(drawable)
    parts: list[list[Point]] = [[]]
    for point in all_points:
        if point in kept:
            parts[-1].append(point)
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


def _placed(class_: str, left: float, top: float, *children: Html) -> Html:
    return element(
        "span", *children, class_=class_, style=f"left:{left:.2f}%;top:{top:.2f}%", aria_hidden="true"
    )


def _legend(series: Sequence[Series]) -> Html | None:
    if len(series) < 2:
        return None
    keys = [
        element(
            "button",
            element("i", class_=f"c{one.colour % 6} {one.look}"),
            one.name,
            type="button",
            data_series=index,
            aria_pressed="true",
        )
        for index, one in enumerate(series)
    ]
    return element("div", keys, class_="legend")


def _described(title: str, series: Sequence[Series], drawable: Sequence[Sequence[Point]], unit: str) -> str:
    """What the lines show, in words."""
    parts = [
        f"{one.name} from {format_value(points[0][1], unit)} at step {points[0][0]:g} "
        f"to {format_value(points[-1][1], unit)} at step {points[-1][0]:g}"
        for one, points in zip(series, drawable, strict=True)
        if points and one.look != "faint"
    ]
    return f"{title}: {'; '.join(parts)}"
