"""Held-out numbers of a trained model: loss, image -> caption retrieval, and the captions it writes.

    python -m neo_jax.evaluate --workdir=runs/quickstart [--step=N] [--split=dev] [--config.eval.FIELD=VALUE]

Retrieval asks which of `num_candidates` label lines is the likeliest for an image; exactly one is right. The
shuffled control asks the same with every image replaced by another one: what a model that ignores images
would score. Writes eval.json (numbers) and samples.json (captions) into the workdir.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from ml_collections import FrozenConfigDict

from data_pipelines import documents, text
from data_pipelines.build.progress import Progress
from data_pipelines.drawing import Drawing
from data_pipelines.loader import read_drawings
from data_pipelines.schema import Document
from neo_jax import config as config_lib, decode, restore, workdir as workdir_lib
from neo_jax.decode import Prefix
from neo_jax.errors import UserError, main_guard
from neo_jax.generate import generate, prompt_batches
from neo_jax.heldout import held_out_loss
from neo_jax.model.mask import Batch
from neo_jax.model.transformer import Transformer
from neo_jax.params import Params, bind
from neo_jax.restore import Trained

# One call scores 8 candidates after 16 images: enough rows to keep the matrix products busy, few enough that
# their activations stay in the cache, and candidates of a call, taken by length, need little padding.
IMAGES_PER_CALL = 16
CANDIDATES_PER_CALL = 8
CALLS_AT_ONCE = 2  # one call computes while the other compiles or is in a part that uses one core only
FILLING_SPLIT = "train"  # its captions fill up the candidates of a split with too few of its own

Scores = dict[str, float]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m neo_jax.evaluate", description="Scores a trained model.")
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of a trained run")
    parser.add_argument("--step", type=int, help="checkpoint to evaluate (default: the newest)")
    parser.add_argument("--split", help="only this split of the data (default: config.eval.splits)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON in the last line")
    args = config_lib.parse_args(parser, argv, required=False)

    if args.config is None:
        config = config_lib.resolve(workdir_lib.load_config(args.workdir), args.overrides)
    else:
        config = config_lib.load(args.config, args.overrides)
    trained = restore.load(args.workdir, config, args.step)
    identity = {"step": trained.step, "config_hash": config_lib.config_hash(config)}
    numbers, samples = {}, {}
    for split in (args.split,) if args.split else config.eval.splits:
        numbers[split], samples[split] = evaluate(trained, split)

    write_results(args.workdir, identity, numbers, samples)
    print(table(trained.step, numbers))
    if args.json:
        print(json.dumps(identity | numbers))


def evaluate(trained: Trained, split: str) -> tuple[Scores, list[dict[str, Any]]]:
    """The numbers of one split (keys: DESIGN section 4, eval.json) and its captioned images.

    Everything but the loss is in the first language of the config.
    """
    config = trained.config
    locale = config.data.locales[0]
    drawings = read_captioned(config, split, locale)
    loss = held_out_loss(
        config, trained.stage.config, trained.model, trained.params, split, trained.mesh
    ).loss

    queries = distinct_labels(drawings, locale, config.eval.num_candidates)
    labels = [drawing.captions[locale][0] for drawing in queries]
    if len(labels) < config.eval.num_candidates:
        others = [e.captions[locale][0] for e in read_captioned(config, FILLING_SPLIT, locale)]
        labels = fill_up(labels, others, config.eval.num_candidates)
    lines = [text.caption_pieces(label, ())[0] for label in labels]
    scores_IC = candidate_scores(trained, prompts(trained, queries, locale), lines, f"{split} retrieval")

    samples = write_captions(trained, drawings[: config.eval.num_generate], locale, f"{split} captions")
    return {"loss": loss} | retrieval(scores_IC) | caption_quality(samples), samples


# Which images and captions


def read_captioned(config: FrozenConfigDict, split: str, locale: str) -> list[Drawing]:
    """The drawings of a split with a caption in `locale`, shuffled by a hash of their ids.

    The first n are thus a fair sample, the same on every machine.

    Raises:
        UserError: there are none.
    """
    drawings = [drawing for drawing in read_drawings(config, split) if locale in drawing.captions]
    if not drawings:
        raise UserError(f"split {split!r} of {config.data.path} has no caption in {locale!r}")
    return sorted(drawings, key=lambda drawing: hashlib.sha1(drawing.id.encode()).digest())


def distinct_labels(drawings: Iterable[Drawing], locale: str, limit: int) -> list[Drawing]:
    """The first `limit` drawings, passing over those labelled like an earlier one."""
    by_label: dict[str, Drawing] = {}
    for drawing in drawings:
        by_label.setdefault(drawing.captions[locale][0], drawing)
    return list(by_label.values())[:limit]


def fill_up(labels: Sequence[str], more: Sequence[str], size: int) -> list[str]:
    """`labels`, then others out of `more`, up to `size` in all; fewer if there are no more."""
    return list(dict.fromkeys([*labels, *more]))[:size]


def prompts(trained: Trained, drawings: Sequence[Drawing], locale: str) -> list[Document]:
    """Every image with the prompt that it had in training."""
    words, table = text.prompt_text(locale), documents.table_rules(trained.config, trained.stage.config)
    return [
        text.prompt_document(trained.tokenizer, [trained.picture(drawing.image, drawing.id)], words, **table)
        for drawing in drawings
    ]


# Retrieval


def candidate_scores(
    trained: Trained, images: Sequence[Document], captions: Sequence[str], name: str
) -> np.ndarray:
    """log p(caption | prompt), float32 [images, captions]. Every prompt is read once, for all captions."""
    lines = [trained.tokenizer.encode(caption) for caption in captions]
    by_length = sorted(range(len(lines)), key=lambda c: len(lines[c]))
    groups = [by_length[i : i + CANDIDATES_PER_CALL] for i in range(0, len(lines), CANDIDATES_PER_CALL)]

    batches = list(prompt_batches(images, IMAGES_PER_CALL, trained.token_side**2 * 3))
    progress = Progress(name, len(batches) * len(groups))
    scores_IC: np.ndarray = np.empty((len(images), len(lines)), np.float32)

    def score(prefix: Prefix, group: Sequence[int]) -> np.ndarray:
        tokens, lengths = _padded([lines[c] for c in group])
        return np.asarray(_score(trained.model, trained.params, prefix, tokens, lengths))

    with concurrent.futures.ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        for i, (part, batch) in enumerate(batches):
            rows = scores_IC[i * IMAGES_PER_CALL :][: len(part)]
            prefix = _read(trained.model, trained.params, batch)
            for group, scores in zip(groups, pool.map(functools.partial(score, prefix), groups), strict=True):
                rows[:, group] = scores[: len(part), : len(group)]
                progress.advance()
    return scores_IC


@functools.partial(jax.jit, static_argnums=0)
def _read(model: Transformer, params: Params, batch: Batch) -> Prefix:
    return decode.read_prompts(bind(model, params), batch)


@functools.partial(jax.jit, static_argnums=0)
def _score(model: Transformer, params: Params, prefix: Prefix, tokens: Array, lengths: Array) -> Array:
    return decode.score_candidates(bind(model, params), prefix, tokens, lengths)


def _padded(lines: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [CANDIDATES_PER_CALL, longest] and lengths, filled up with candidates of one token.

    The longest is rounded up to an even number: every width is compiled, which takes seconds.
    """
    lengths: np.ndarray = np.ones(CANDIDATES_PER_CALL, np.int32)
    lengths[: len(lines)] = [len(line) for line in lines]
    tokens: np.ndarray = np.zeros((CANDIDATES_PER_CALL, lengths.max() + lengths.max() % 2), np.int32)
    for row, line in zip(tokens, lines, strict=False):
        row[: len(line)] = line
    return tokens, lengths


def retrieval(scores_IC: np.ndarray) -> Scores:
    """R@1 and R@5 of a score matrix whose image i belongs to caption i; captions may be more than images.

    A tie counts against the model. In the control, image i + 1 stands in for image i.
    """
    ranks = right_ranks(scores_IC)
    return {
        "retrieval_r1": float((ranks < 1).mean()),
        "retrieval_r5": float((ranks < 5).mean()),
        "retrieval_r1_shuffled": float((right_ranks(np.roll(scores_IC, -1, axis=0)) < 1).mean()),
        "num_candidates": scores_IC.shape[1],
    }


def right_ranks(scores_IC: np.ndarray) -> np.ndarray:
    """How many other captions of row i are not scored below caption i (NaN is never below)."""
    right = np.diagonal(scores_IC)[:, None]
    return (~(scores_IC < right)).sum(axis=1) - 1


# Captions


def write_captions(
    trained: Trained, drawings: Sequence[Drawing], locale: str, name: str
) -> list[dict[str, Any]]:
    """Has the model caption images: id, source, label, tags (the true ones) and generated, of each."""
    progress = Progress(name, len(drawings))
    settings = trained.config.eval
    answers = generate(
        trained, prompts(trained, drawings, locale), settings.max_new_tokens, settings.batch_size
    )
    samples = []
    for drawing, answer in zip(drawings, answers, strict=True):
        label, tags = drawing.captions[locale]
        sample = {"id": drawing.id, "source": drawing.source, "label": label, "tags": list(tags)}
        samples.append(sample | {"generated": answer})
        progress.advance()
    return samples


def caption_quality(samples: Sequence[dict[str, Any]]) -> Scores:
    """Share of exactly right label lines, and mean F1 of the tags; 0 without samples."""
    parsed = [parse_caption(sample["generated"]) for sample in samples]
    exact = [label == sample["label"] for (label, _), sample in zip(parsed, samples, strict=True)]
    f1 = [set_f1(tags, sample["tags"]) for (_, tags), sample in zip(parsed, samples, strict=True)]
    num = max(1, len(samples))
    return {"exact_match": sum(exact) / num, "tag_f1": sum(f1) / num}


def parse_caption(caption: str) -> tuple[str, list[str]]:
    """Label and tags of a caption: the inverse of `text.caption_pieces`."""
    label, _, tags = caption.partition("\n")
    return label, [tag.strip() for tag in tags.split(",") if tag.strip()]


def set_f1(found: Iterable[str], right: Iterable[str]) -> float:
    """Harmonic mean of precision and recall, 2 |both| / (|found| + |right|); 1 if both sets are empty."""
    found, right = set(found), set(right)
    total = len(found) + len(right)
    return 2 * len(found & right) / total if total else 1.0


# Results


def write_results(
    workdir: pathlib.Path,
    identity: dict[str, Any],
    numbers: dict[str, Scores],
    samples: dict[str, list[dict[str, Any]]],
) -> None:
    """Writes eval.json and samples.json; what they hold of other splits stays if it is of this checkpoint."""
    eval_path, samples_path = workdir / "eval.json", workdir / "samples.json"
    old_numbers, old_samples = _read_json(eval_path), _read_json(samples_path)
    if identity.items() <= old_numbers.items():
        numbers, samples = old_numbers | numbers, old_samples | samples
    # The numbers last: once they are there, the samples belong to them.
    _write_json(samples_path, samples)
    _write_json(eval_path, identity | numbers)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a file; {} if there is none or it is damaged, as it is about to be replaced."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    partial.rename(path)


def table(step: int, numbers: dict[str, Scores]) -> str:
    """The numbers for people, one line per split."""
    lines = [f"step {step:<12} loss     R@1     R@5  shuffled R@1  candidates   exact  tag F1"]
    for split, n in numbers.items():
        lines.append(
            f"{split:<15}{n['loss']:>7.4f}  {n['retrieval_r1']:>6.1%}  {n['retrieval_r5']:>6.1%}  "
            f"{n['retrieval_r1_shuffled']:>12.1%}  {n['num_candidates']:>10}  {n['exact_match']:>6.1%}  "
            f"{n['tag_f1']:>6.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main_guard(main)
