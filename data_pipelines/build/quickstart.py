"""Recipe "quickstart": drawings from npm packages, captions from emojibase, five splits."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

from data_pipelines import text
from data_pipelines.build import shards, splits
from data_pipelines.build.packages import read_files
from data_pipelines.build.progress import Progress
from data_pipelines.build.render import render_all
from data_pipelines.build.sources import CAPTIONS, CAPTIONS_CREDIT, STYLES, read_captions
from data_pipelines.drawing import Caption, Drawing
from data_pipelines.errors import DataError

VERSION = 1  # raise it when the same parameters would give other bytes


def parameters(*, locales: tuple[str, ...], image_size: int, vocab_size: int) -> dict[str, Any]:
    """Returns everything the built bytes depend on, as JSON values."""
    packages = [style.package for style in STYLES.values()] + [CAPTIONS]
    return {
        "recipe": "quickstart",
        "version": VERSION,
        "locales": list(locales),
        "image_size": image_size,
        "vocab_size": vocab_size,
        "splits": {"salt": splits.SALT, "shares": splits.SHARES},
        "packages": {package.spec: package.integrity for package in packages},
    }


def build(folder: Path, params: dict[str, Any]) -> dict[str, Any]:
    """Writes shards and tokenizer.json into an existing folder and returns the manifest's recipe part."""
    locales = params["locales"]
    drawings, drops = _make_drawings(locales, params["image_size"])
    assigned = splits.assign([(drawing.source, drawing.concept) for drawing in drawings])
    if leaks := splits.find_leaks(assigned):
        raise DataError(f"the splits leak: {leaks[0]}")

    by_split: dict[tuple[str, str], list[Drawing]] = {}
    for drawing in sorted(drawings, key=lambda drawing: drawing.id):
        by_split.setdefault((assigned[drawing.source, drawing.concept], drawing.source), []).append(drawing)
    entries = []
    for split, source in itertools.product(splits.SPLITS, sorted(STYLES)):
        entries += shards.write(folder, split, source, by_split.get((split, source), []))

    train = [drawing for drawing in drawings if assigned[drawing.source, drawing.concept] == "train"]
    tokenizer_json = text.train_tokenizer(_training_texts(train, locales), params["vocab_size"])
    (folder / "tokenizer.json").write_text(tokenizer_json)
    counts: dict[str, dict[str, int]] = {split: {} for split in splits.SPLITS}
    for (split, source), part in sorted(by_split.items()):
        counts[split][source] = len(part)
    credits = {name: {"licence": style.licence, "credit": style.credit} for name, style in STYLES.items()}
    return {
        "sources": sorted(STYLES),
        "image_hw": [params["image_size"]] * 2,
        "shards": entries,
        "tokenizer": {"file": "tokenizer.json"} | shards.describe(folder / "tokenizer.json"),
        "counts": counts,
        "dropped": drops,
        "credits": credits | {"captions": CAPTIONS_CREDIT},
        "tokens": _token_statistics(text.Tokenizer(folder / "tokenizer.json"), drawings, locales),
    }


def _make_drawings(locales: list[str], image_size: int) -> tuple[list[Drawing], dict[str, int]]:
    """Renders every drawing that has a caption; the first of those that look alike stays."""
    captions = read_captions(locales)
    drops: Counter[str] = Counter(no_caption=0, same_pixels=0)
    vectors: list[tuple[str, bytes]] = []
    for source, style in STYLES.items():
        for concept, vector in sorted(style.drawings(read_files(style.package)).items()):
            if concept in captions:
                vectors.append((f"{source}/{concept}", vector))
            else:
                drops["no_caption"] += 1
    drawings: list[Drawing] = []
    seen: set[str] = set()
    progress = Progress("rendering", len(vectors))
    for (id_, _), (image, pixel_hash) in zip(vectors, render_all(vectors, image_size), strict=True):
        progress.advance()
        if pixel_hash in seen:
            drops["same_pixels"] += 1
            continue
        seen.add(pixel_hash)
        source, concept = id_.split("/")
        drawings.append(Drawing(id_, source, concept, image, captions[concept]))
    return drawings, dict(drops)


def _training_texts(train: list[Drawing], locales: list[str]) -> list[str]:
    """Returns each caption piece and prompt once, sorted: common concepts would only repeat themselves."""
    captions = (caption for drawing in train for caption in drawing.captions.values())
    pieces = {piece for label, tags in captions for piece in text.caption_pieces(label, tags)}
    return sorted(pieces | {text.prompt_text(locale) for locale in locales})


def _token_statistics(
    tokenizer: text.Tokenizer, drawings: list[Drawing], locales: list[str]
) -> dict[str, Any]:
    """Returns vocabulary size and, per locale, lengths of one prompt, caption and <|im_end|> per image."""
    lengths: dict[str, list[int]] = {locale: [] for locale in locales}
    cache: dict[tuple[str, Caption], int] = {}  # styles and tones share captions
    for drawing in drawings:
        for locale, caption in drawing.captions.items():
            if (locale, caption) not in cache:
                parts = [text.prompt_text(locale), *text.caption_pieces(*caption)]
                cache[locale, caption] = sum(len(tokenizer.encode(part)) for part in parts) + 1
            lengths[locale].append(cache[locale, caption])
    return {
        "vocab_size": tokenizer.size,
        "text_tokens": {
            locale: {"documents": len(n), "mean": round(sum(n) / len(n), 3), "max": max(n)}
            for locale, n in lengths.items()
            if n
        },
    }
