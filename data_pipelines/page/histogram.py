"""Histograms as columns, readable without scripts."""

from collections.abc import Mapping

from data_pipelines.page.markup import Html, element

LABELS = 5  # about so many below the columns


def histogram(title: str, counts: Mapping[float, int], unit: str = "") -> Html:
    """A figure of columns of equal width.

    Args:
        title: what is counted.
        counts: lower edge of each bin, ascending -> number, bins with none between others included.
        unit: of the edges.
    """
    total, highest = sum(counts.values()), max(counts.values(), default=0)
    if not highest:
        return element(
            "figure", element("figcaption", title), element("p", "Nothing to count."), class_="chart"
        )
    columns, stride = [], -(-len(counts) // LABELS)
    for i, (edge, number) in enumerate(counts.items()):
        words = f"from {_written(edge)}{unit}: {number:,} ({number / total:.1%})"
        label = element("span", _written(edge)) if i % stride == 0 else None
        bar = element("i", style=f"height:{100 * number / highest:.2f}%")
        columns.append(element("div", bar, label, title=words))
    commonest = max(counts, key=lambda edge: counts[edge])
    alt = f"{title}: {total:,} in {len(counts)} bins, most ({highest:,}) from {_written(commonest)}{unit}"
    return element(
        "figure",
        element("figcaption", title),
        element("div", columns, class_="histogram", role="img", aria_label=alt),
        class_="chart",
    )


def _written(edge: float) -> str:
    return f"{edge:,.0f}" if edge >= 10 else f"{edge:.2g}"
