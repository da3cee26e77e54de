"""The body of the page: curves of the run, retrieval against yardsticks, captions of held-out images."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from data_pipelines import images
from data_pipelines.loader import read_drawings
from data_pipelines.page.markup import Html, element, image, join, table
from neo_jax.evaluate import parse_caption
from neo_jax.report.charts import Point, Series, line_chart, smooth
from neo_jax.report.run import Run
from neo_jax.report.summary import (
    YARDSTICK_CANDIDATES,
    YARDSTICKS,
    evaluate_command,
    is_quickstart,
    percent,
)

NUM_SAMPLES = 24  # pictures per split
SCORES = ("Split", "loss", "R@1", "R@5", "R@1, shuffled", "chance R@1", "candidates", "exact match", "tag F1")


def curves(run: Run) -> Html:
    """Everything in metrics.jsonl over steps."""
    bands = [
        (stage.name, stage.start, min(stage.end, run.last_step))
        for stage in run.stages
        if stage.start < run.last_step
    ]

    def of(get: Callable[[dict[str, Any]], float]) -> list[Point]:
        return [(line["step"], get(line)) for line in run.steps]

    def perf(name: str) -> list[Point]:
        return of(lambda line: line["perf"][name])

    smoothed, width = _smoothed(run, [line["loss"] for line in run.steps])
    loss = [Series("training", smoothed), Series("training, raw", of(lambda line: line["loss"]), "faint")]
    for i, split in enumerate(run.config.eval.splits, start=1):
        points = [(line["step"], line["eval"][split]) for line in run.losses if split in line["eval"]]
        if points:
            loss.append(Series(split, points, "dots", i))
    sources = sorted({name for line in run.steps for name in line["source_loss"]})
    by_source = []
    for i, name in enumerate(sources):
        points, _ = _smoothed(run, [line["source_loss"].get(name, math.nan) for line in run.steps])
        by_source.append(Series(name, points, colour=i))
    chart = functools.partial(line_chart, stages=bands)
    rate = functools.partial(chart, from_zero=True)
    share = functools.partial(rate, unit="percent")
    padding = [
        Series("of tokens", of(lambda line: line["padding_share"])),
        Series("of image tokens", of(lambda line: line["patch_padding_share"]), colour=1),
    ]
    smoothing = f"Smoothed: centred mean over {width} logged steps, each stage for itself."
    peak = "Of the peak of a matrix product, measured on the machine that trained."
    charts = [
        chart("Loss per token, nats", loss, note=smoothing),
        chart("Training loss per source, smoothed", by_source),
        chart(
            "Gradient norm before clipping", [Series("norm", of(lambda line: line["grad_norm"]))], log=True
        ),
        rate("Learning rate", [Series("rate", of(lambda line: line["lr"]))]),
        share("Padding, share of a batch", padding),
        rate("Tokens per second", [Series("tokens/s", perf("tokens_per_s"))]),
        rate("Images per second", [Series("images/s", perf("images_per_s"))]),
        share("Model FLOPs utilisation (MFU)", [Series("MFU", perf("mfu"))], note=peak),
        share("Time spent waiting for data", [Series("waiting", perf("data_wait_share"))]),
    ]
    return element("div", charts, class_="charts")


def _smoothed(run: Run, values: Sequence[float]) -> tuple[list[Point], int]:
    """(points of the running mean of one value per logged step, its width), restarted with every stage."""
    points: list[Point] = []
    widths = [0]
    for stage in run.stages:
        inside = [i for i, line in enumerate(run.steps) if line["stage"] == stage.name]
        if inside:
            means, width = smooth([values[i] for i in inside])
            points += [(run.steps[i]["step"], mean) for i, mean in zip(inside, means, strict=True)]
            widths.append(width)
    return points, max(widths)


def retrieval(run: Run) -> Html:
    """Scores per split, and what they are to be measured by."""
    if not run.scores:
        return missing(run, "eval.json")
    rows = [
        [
            split,
            f"{score['loss']:.3f}",
            percent(score["retrieval_r1"]),
            percent(score["retrieval_r5"]),
            percent(score["retrieval_r1_shuffled"]),
            percent(1 / score["num_candidates"]),
            score["num_candidates"],
            percent(score["exact_match"]),
            percent(score["tag_f1"]),
        ]
        for split, score in run.scores.items()
    ]
    step = run.evaluation["step"]
    stale = f" The run has gone on since, to step {run.last_step}." if step != run.last_step else ""
    parts = [
        element(
            "p",
            "For every image all candidate labels are ranked by their likelihood under the model; one is "
            "right. The control shows another image in place of each: it must fall to chance. Exact match: "
            "the first line of the greedy caption is the label. Tag F1: overlap of the rest with the tags.",
        ),
        table(SCORES, rows, f"Held-out scores at step {step}.{stale}"),
    ]
    if is_quickstart(run):
        yardsticks = [
            [what, f"{n:,}", percent(r1), "not measured" if r5 is None else percent(r5)]
            for what, n, r1, r5 in YARDSTICKS
        ]
        parts += [
            element("h3", "Yardsticks"),
            table(
                ("Method", "candidates", "R@1", "R@5"),
                yardsticks,
                "Linear maps fitted on three drawing styles and tested on the fourth.",
            ),
            element(
                "p",
                f"Read them with care: most rank {YARDSTICK_CANDIDATES:,} captions, the model above only as "
                "many labels as its column says, and fewer candidates make a higher score. A model that does "
                "not beat the pixel map has learned nothing that colours and rough shapes do not give.",
                class_="note",
            ),
        ]
    return join(parts)


def samples(run: Run) -> Html:
    """Held-out pictures with the model's caption and the true one."""
    if not run.samples:
        return missing(run, "samples.json")
    parts = [
        element(
            "p",
            f"The first {NUM_SAMPLES} of each split in the evaluation's order, which is shuffled: none is "
            "picked by hand. Above the line the model's greedy caption, label and tags; below it the true "
            "one. Right: the label is exactly the true one.",
        )
    ]
    for split, captioned in run.samples.items():
        drawings = {drawing.id: drawing.image for drawing in read_drawings(run.config, split)}
        right = sum(parse_caption(one["generated"])[0] == one["label"] for one in captioned)
        parts += [
            element("h3", split, " ", element("span", f"{right} of {len(captioned)} right", class_="soft")),
            element("ul", [_sample(s, drawings[s["id"]]) for s in captioned[:NUM_SAMPLES]], class_="samples"),
        ]
    return join(parts)


def _sample(sample: dict[str, Any], data: bytes) -> Html:
    label, tags = parse_caption(sample["generated"])
    right = label == sample["label"]
    picture = images.flatten(images.decode(data, sample["id"]))
    words = element(
        "div",
        element("div", "\u2713 right" if right else "\u2717 wrong", class_="mark"),
        element("b", label or "(nothing)"),
        element("span", ", ".join(tags)),
        element("div", "true: ", sample["label"], element("span", ", ".join(sample["tags"])), class_="truth"),
    )
    alt = f"{sample['label']}, drawn by {sample['source']}"
    return element("li", image(picture, alt, lossless=False), words, class_="right" if right else None)


def missing(run: Run, file: str) -> Html:
    return element(
        "p",
        f"There is no {file} in the workdir yet. ",
        evaluate_command(run),
        " makes it; then make the report again.",
        class_="missing",
    )
