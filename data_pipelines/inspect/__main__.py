"""Shows what a data folder holds: sample rows as the model gets them, histograms, rejects, how full rows are.

python -m data_pipelines.inspect data/quickstart            # writes data/quickstart/inspect.html
python -m data_pipelines.inspect data/quickstart --json
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.build.outputs import Rows
from data_pipelines.build.statistics import bin_edges
from data_pipelines.errors import REASONS, DataError
from data_pipelines.inspect import read as read_lib
from data_pipelines.inspect.read import Inspection
from data_pipelines.page import rows as page_rows
from data_pipelines.page.histogram import histogram
from data_pipelines.page.markup import Html, element, join, table
from data_pipelines.page.page import page

HISTOGRAMS = {
    "tokens": "Tokens of a document, pictures included",
    "patches": "Image tokens of a document",
    "text_tokens": "Text tokens of a document",
    "image_aspect": "Width of an image over its height",
    "image_pixels": "Pixels of an image as it is stored",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that data_pipelines.build made")
    parser.add_argument("--json", action="store_true", help="print the numbers as one line instead")
    parser.add_argument("--out", type=Path, help="the page's file (default: DIR/inspect.html)")
    parser.add_argument("--rows", type=int, default=2, help="sample rows to draw (default: 2)")
    parser.add_argument("--mask", choices=read_lib.MASKS, default="image_bidirectional", help="mask to draw")
    parser.add_argument("--config", help="FILE.py[:ARG]; packs a folder of documents by its rules")
    parser.add_argument("--stage", help="stage of the config (default: its last)")
    args = parser.parse_args(argv)
    try:
        inspection = read_lib.read(
            args.folder, args.rows, Rows.from_config_file(args.config, args.stage) if args.config else None
        )
        if args.json:
            print(json.dumps(inspection.to_json(), sort_keys=True))
            return 0
        path = args.out or args.folder / "inspect.html"
        text = render(inspection, args.mask)
        path.write_text(text, encoding="utf-8")
    except (DataError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"wrote {path} ({len(text.encode()) / 1e6:.1f} MB)")
    return 0


def render(found: Inspection, mask: str) -> str:
    """The whole page."""
    num_documents = sum(sum(counts.values()) for counts in found.manifest["counts"].values())
    form = {"rows": "packed rows", "examples": "documents"}.get(found.manifest.get("form", ""), "drawings")
    sections = [
        ("What is stored", _stored(found)),
        ("Sizes", _histograms(found.statistics)),
        ("Left out", _rejects(found.manifest)),
        *[(f"Row {i}", _row(found, row, mask)) for i, row in enumerate(found.rows, start=1)],
    ]
    return page(
        f"{found.folder.name}: a data folder",
        f"{num_documents:,} documents from {', '.join(found.manifest['sources'])}, stored as {form}.",
        _headline(found),
        sections,
        join("Made by ", element("code", f"python -m data_pipelines.inspect {found.folder}"), "."),
    )


def _headline(found: Inspection) -> Html:
    packing, totals = found.packing, found.statistics["totals"]
    tiles = [
        (f"{packing['tokens_used']:.1%}", f"of {found.shape.row_tokens:,} tokens per row used"),
        (f"{packing['patches_used']:.1%}", f"of {found.shape.row_patches:,} image tokens per row used"),
        (f"{totals['documents'] / packing['rows']:.1f}", "documents per row"),
        (f"{totals.get('images', 0) / totals['documents']:.2f}", "images per document"),
    ]
    return element(
        "div",
        element(
            "div",
            [element("div", element("b", value), element("span", words)) for value, words in tiles],
            class_="tiles",
        ),
        element("p", f"Of {packing['basis']}.", class_="note"),
        class_="card",
    )


def _stored(found: Inspection) -> Html:
    manifest = found.manifest
    counts = table(
        ("split", *manifest["sources"]),
        [
            (split, *(f"{part.get(source, 0):,}" for source in manifest["sources"]))
            for split, part in manifest["counts"].items()
        ],
        "Documents by split and source.",
    )
    size = sum(shard["bytes"] for shard in manifest["shards"])
    facts = [
        ("shards", f"{len(manifest['shards'])}, {size / 1e6:,.1f} MB"),
        ("vocabulary", f"{found.tokenizer.size:,} tokens"),
        ("recipe", element("code", manifest["recipe_hash"][:16])),
        ("data", element("code", manifest["data_hash"][:16])),
    ]
    return join(
        counts,
        element("dl", [(element("dt", name), element("dd", value)) for name, value in facts], class_="facts"),
    )


def _histograms(statistics: Mapping[str, Any]) -> Html:
    figures = [
        histogram(
            title, {bin_edges(bin_)[0]: number for bin_, number in _whole(statistics["histograms"][name])}
        )
        for name, title in HISTOGRAMS.items()
        if name in statistics["histograms"]
    ]
    return element("div", figures, class_="charts")


def _whole(bins: Mapping[str, int]) -> list[tuple[str, int]]:
    """The bins from the first to the last, those without any counts too."""
    numbers = [int(bin_) for bin_ in bins if bin_ != "zero"]
    between = range(min(numbers), max(numbers) + 1) if numbers else ()
    zero = [("zero", bins["zero"])] if "zero" in bins else []
    return [*zero, *((str(number), bins.get(str(number), 0)) for number in between)]


def _rejects(manifest: dict[str, Any]) -> Html:
    found = read_lib.rejects(manifest)
    if not found:
        return element("p", "No record was left out.")
    rows = [
        (element("code", reason), source, f"{number:,}", REASONS.get(reason, ""))
        for source, part in found.items()
        for reason, number in sorted(part.items(), key=lambda item: -item[1])
    ]
    by_source = table(("reason", "source", "records", "the record"), rows, "Records left out, by reason.")
    shards = [
        (shard["name"], shard["source"], f"{shard['records']:,}", f"{sum(shard['rejects'].values()):,}")
        for shard in manifest.get("input", [])
    ]
    if not shards:
        return by_source
    by_shard = table(
        ("shard of the input", "source", "records", "left out"), shards, "By shard of the input."
    )
    return join(by_source, element("details", element("summary", f"{len(shards)} shards"), by_shard))


def _row(found: Inspection, row: page_rows.Row, mask: str) -> Html:
    return join(
        element("h3", "Attention mask"),
        page_rows.mask_figure(row, *read_lib.intervals(row, mask)),
        element("h3", "Documents"),
        element(
            "p",
            "Green: the weight with which predicting this token counts in the loss. Pictures are put "
            "together again from the row's patches, with the grid of image tokens over them.",
        ),
        page_rows.row_figure(row, found.manifest["sources"], found.tokenizer, found.shape.resize.side),
    )


if __name__ == "__main__":
    sys.exit(main())
