"""The top of the page: how good it got, and what it was that was trained."""

import math
import statistics
from collections.abc import Iterator

from data_pipelines.page.markup import Child, Html, element, join, table
from neo_jax import config as config_lib, events, objectives, params as params_lib
from neo_jax.report.charts import smooth
from neo_jax.report.run import Run

# Image -> caption retrieval by linear maps, fitted on three styles of the quickstart's drawings and tested
# on the fourth: (what, candidates, R@1, R@5 where measured). 1,607 concepts are drawn in all four styles.
YARDSTICK_CANDIDATES = 1607
YARDSTICKS = (
    ("linear map from frozen EfficientNet-Lite0 features", YARDSTICK_CANDIDATES, 0.326, 0.528),
    ("linear map from 16x16 pixels", YARDSTICK_CANDIDATES, 0.073, None),
    ("chance", YARDSTICK_CANDIDATES, 1 / YARDSTICK_CANDIDATES, 5 / YARDSTICK_CANDIDATES),
    ("linear map from EfficientNet-Lite0 features, concepts not fitted on", 176, 0.352, None),
    ("chance", 176, 1 / 176, 5 / 176),
)
STAGE_HEAD: tuple[str, ...] = (
    "Stage",
    "steps",
    "trainable",
    "parameters",
    "rows x tokens",
    "image tokens a row",
)
STAGE_HEAD += ("peak lr", "schedule", "loss weights")


def evaluate_command(run: Run) -> Html:
    return element("code", f"python -m neo_jax.evaluate --workdir={run.workdir}")


def headline(run: Run) -> Html:
    """The first evaluated split's R@1 beside yardsticks, and the run in a dozen numbers."""
    tiles = [element("div", element("b", value), element("span", label)) for label, value in _numbers(run)]
    return element(
        "div",
        element("div", _retrieval(run), class_="card big"),
        element("div", element("div", tiles, class_="tiles"), class_="card"),
        class_="top",
    )


def _retrieval(run: Run) -> Html:
    if not run.scores:
        return element(
            "div",
            element("p", "Not evaluated yet. Run ", evaluate_command(run), ", then the report again."),
            class_="missing",
        )
    split, scores = next(iter(run.scores.items()))
    n, r1 = scores["num_candidates"], scores["retrieval_r1"]
    bars: list[tuple[str, float, str]] = [
        ("this model", r1, "ours"),
        ("with images shuffled", scores["retrieval_r1_shuffled"], ""),
        ("chance", 1 / n, ""),
    ]
    if is_quickstart(run):
        bars[1:1] = [(f"{what}*", value, "") for what, _, value, _ in YARDSTICKS[:2]]
    longest = max(value for _, value, _ in bars)
    items = [
        element(
            "li",
            element("span", words),
            element("i", style=f"width:{100 * value / longest:.1f}%"),
            element("span", percent(value)),
            class_=class_ or None,
        )
        for words, value, class_ in bars
    ]
    asked = f"R@1 on {split}: how often, of {n} labels, the model finds an unseen drawing's own likeliest"
    harder = f"* Ranks {YARDSTICK_CANDIDATES:,} captions, which is harder than {n}."
    return join(
        element("b", percent(r1)),
        element("span", asked),
        element("ul", items, class_="bars"),
        element("p", harder, class_="note") if is_quickstart(run) else None,
    )


def _numbers(run: Run) -> Iterator[tuple[str, str]]:
    """(label, value) of each tile."""
    for split, scores in list(run.scores.items())[:1]:
        yield f"captions right ({split})", percent(scores["exact_match"])
        yield f"tag F1 ({split})", percent(scores["tag_f1"])
    for split, loss in list(run.losses[-1]["eval"].items())[:1] if run.losses else ():
        yield f"held-out loss ({split}, step {run.losses[-1]['step']:,})", f"{loss:.3f}"
    last_stage = [line["loss"] for line in run.steps if line["stage"] == run.steps[-1]["stage"]]
    yield "training loss, smoothed", f"{smooth(last_stage)[0][-1]:.3f}"
    yield f"steps of {run.stages[-1].end:,}", f"{run.last_step:,}"
    seconds = run.spans()
    yield "time of its steps", _clock(sum(seconds))
    images = sum(s * line["perf"]["images_per_s"] for s, line in zip(seconds, run.steps, strict=True))
    num_train = sum(run.manifest["counts"]["train"].values())
    yield f"images read, {images / num_train:.1f} per training image", f"{images:,.0f}"
    yield "parameters", f"{params_lib.count(_specs(run)):,}"
    for name, label in (("tokens_per_s", "tokens/s, median"), ("images_per_s", "images/s, median")):
        yield label, f"{statistics.median(line['perf'][name] for line in run.steps):,.0f}"
    yield (
        "of the measured peak (MFU), median",
        percent(statistics.median(line["perf"]["mfu"] for line in run.steps)),
    )
    if run.events:
        seconds_by = events.goodput(run.events)
        yield "of all time in steps that were kept (goodput)", percent(seconds_by["goodput"])
    yield "non-finite steps skipped", str(run.steps[-1]["nonfinite_steps"])


# What the kinds of events.goodput are called, in the order of the table.
_TIMES = {
    events.TRAIN: "steps that were kept",
    "lost": "steps taken again after a restart",
    events.START: "start",
    events.RESTORE: "restoring a checkpoint",
    events.COMPILE: "compiling, and the first batch",
    events.EVAL: "held-out losses",
    events.SAVE: "saving checkpoints",
    "idle": "not running: between an end, or a kill, and the next start",
}


def times(run: Run) -> Html:
    """What the run did with its time."""
    if not run.events:
        return element("p", f"There is no {events.FILE} in the workdir.", class_="missing")
    seconds = events.goodput(run.events)
    total = sum(seconds[kind] for kind in _TIMES)
    rows = [
        [words, _clock(seconds[kind]), percent(seconds[kind] / total if total else 0.0)]
        for kind, words in _TIMES.items()
    ]
    starts = sum(event["doing"] == events.START for event in run.events)
    caption = (
        f"{_clock(total)} from the first start to the last event; started {starts} time{'s' * (starts > 1)}."
    )
    return table(("What", "time", "share"), rows, caption)


def setup(run: Run) -> Html:
    """Model, data, stages, versions and credits."""
    specs = _specs(run)
    stages = []
    for stage in run.stages:
        trainable = params_lib.select(specs, stage.config.trainable)
        stages.append(
            [
                stage.name,
                f"{stage.start:,} to {stage.end:,}",
                _code(", ".join(stage.config.trainable)),
                f"{params_lib.count({path: specs[path] for path in trainable}):,}",
                f"{stage.config.batch_size} x {stage.config.row_tokens}",
                stage.config.row_patches,
                f"{stage.config.peak_lr:g}",
                stage.config.schedule,
                stage.config.loss_reduction,
            ]
        )
    counts = run.manifest["counts"]
    sources = run.manifest["sources"]
    images = [
        [split, *(f"{counts[split].get(s, 0):,}" for s in sources), f"{sum(counts[split].values()):,}"]
        for split in sorted(counts, key=lambda split: split != "train")
    ]
    return join(
        element(
            "dl", [[element("dt", term), element("dd", what)] for term, what in _facts(run)], class_="facts"
        ),
        table(STAGE_HEAD, stages, "Stages. A frozen parameter keeps its value to the bit."),
        table(["Images", *sources, "all"], images, "Images per split and source."),
        element("h3", "Data credits"),
        element(
            "ul",
            [
                element("li", f"{name}: {credit['credit']} ({credit['licence']})")
                for name, credit in run.manifest.get("credits", {}).items()
            ],
        ),
        element(
            "details", element("summary", "The whole config"), element("pre", config_lib.to_json(run.config))
        ),
    )


def _facts(run: Run) -> list[tuple[str, Child]]:
    """(term, description) pairs."""
    model, data, embed = run.config.model, run.config.data, run.config.model.embed
    side = embed.patch_size * embed.merge_size
    heads = f"{model.num_heads} query and {model.num_kv_heads} key/value heads of {model.head_dim}"
    used = run.manifest["tokens"]["vocab_size"]
    data_hash, config_hash = run.manifest["data_hash"][:12], run.record["config_hash"]
    versions = {"python": run.record["python"], **run.record["versions"]}
    return [
        ("layers", f"{model.num_layers}, the first {model.pre_buffer} of them pre-buffer"),
        ("sizes", f"width {model.hidden_size}, {heads}, MLP {model.mlp_size}, {model.dtype}"),
        ("kinds", f"{embed.kind} embedding, {model.coords.kind} coordinates, {model.mask} mask"),
        ("image token", f"{side} x {side} pixels, {embed.merge_size} x {embed.merge_size} patches merged"),
        ("vocabulary", f"{model.vocab_size:,} rows, {used:,} used (byte-level BPE)"),
        ("data", [f"{data.recipe or data.path}, locales {', '.join(data.locales)}, hash ", _code(data_hash)]),
        ("config", [f"{run.config.name}, seed {run.config.seed}, hash ", _code(config_hash)]),
        ("git revision", _code(run.record["git_revision"] or "not a checkout")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]


def _code(text: str) -> Html:
    return element("code", text)


def is_quickstart(run: Run) -> bool:
    """Whether the yardsticks are about this data."""
    return run.config.data.recipe == "quickstart"


def percent(share: float) -> str:
    """One decimal, more below one percent."""
    return f"{100 * share:.2g}%" if 0 < share < 0.01 else f"{100 * share:.1f}%"


def _specs(run: Run) -> dict[str, params_lib.ParamSpec]:
    return params_lib.abstract(objectives.build(run.config))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
