"""Writes DIR/report.html about the run in DIR: python -m neo_jax.report --workdir=DIR"""

import argparse
import pathlib
from collections.abc import Sequence

from data_pipelines.page import rows as page_rows
from data_pipelines.page.markup import Html, element, join
from data_pipelines.page.page import page
from data_pipelines.text import Tokenizer
from neo_jax.errors import main_guard
from neo_jax.report import results, rows, run as run_lib, summary


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m neo_jax.report", description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of a trained run")
    args = parser.parse_args(argv)
    page = render(run_lib.read(args.workdir))
    path = args.workdir / "report.html"
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.rename(path)
    print(f"wrote {path} ({len(page.encode()) / 1e6:.1f} MB)")


def render(run: run_lib.Run) -> str:
    """The whole page."""
    sections = (
        ("What was trained", summary.setup(run)),
        ("Curves", results.curves(run)),
        ("Where the time went", summary.times(run)),
        ("Retrieval", results.retrieval(run)),
        ("Captions of held-out images", results.samples(run)),
        ("What the model sees", _packed_row(run)),
    )
    trained = " then ".join(stage.name for stage in run.stages)
    return page(
        f"{run.config.name}: a run of neo_jax",
        f"One transformer over raw image patches and words, with no vision encoder. Stages: {trained}.",
        summary.headline(run),
        sections,
        join(
            "Made by ",
            element("code", f"python -m neo_jax.report --workdir={run.workdir}"),
            " from config.json, metrics.jsonl, events.jsonl, eval.json, samples.json and the data folder.",
        ),
    )


def _packed_row(run: run_lib.Run) -> Html:
    row, source_names = rows.first_row(run.config)
    tokenizer = Tokenizer(
        pathlib.Path(run.config.data.path) / run.manifest["tokenizer"]["file"], run.config.data.special_tokens
    )
    side = run.config.model.embed.patch_size * run.config.model.embed.merge_size
    stage = run.stages[-1].name
    return join(
        element(
            "p",
            f"The first row of the first batch of stage {stage}, drawn from the arrays that the model got: "
            "documents packed one after the other, so that little is padding.",
        ),
        element("h3", "Attention mask"),
        page_rows.mask_figure(row, *rows.intervals(row, run.config.model.mask)),
        element("h3", "The row"),
        element(
            "p",
            "Green: the weight with which predicting this token counts in the loss. Pictures are put "
            "together again from the row's patches, with the grid of image tokens over them.",
        ),
        page_rows.row_figure(row, source_names, tokenizer, side),
    )


if __name__ == "__main__":
    main_guard(main)
