"""Filters and dedup rules: thresholds, and near-duplicates against brute force."""

import dataclasses
import io
import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image as PILImage

from data_pipelines.build import dedup, filters
from data_pipelines.build.dedup import Candidate
from data_pipelines.errors import Reject
from data_pipelines.schema import Example, Image, Text
from tests.data_pipelines.web_corpus import jpeg, picture

ENGLISH = "The old lighthouse keeper climbed the stairs every evening to light the lamp."
GERMAN = "Der alte Leuchtturmwärter stieg jeden Abend die Treppe hinauf, um die Lampe anzuzünden."
FRENCH = "Le vieux gardien du phare montait chaque soir l'escalier pour allumer la lampe."


def document(text: str = ENGLISH, *images: bytes) -> Example:
    return Example("id", "source", (*map(Image, images), Text(text, supervised=True)))


def reason(stage: filters.Stage, example: Example) -> str:
    """Why the stage rejects the example, "" if it does not."""
    try:
        assert stage(example) == example
    except Reject as reject:
        return reject.reason
    return ""


@pytest.mark.parametrize(
    ("stage", "text", "expected"),
    [
        (filters.TextLength(min_chars=5), " 12345 ", ""),
        (filters.TextLength(min_chars=5), " 1234  ", "text_length"),
        (filters.TextLength(max_chars=5), "123456", "text_length"),
        (filters.TextLength(min_words=3), "one two", "text_length"),
        (filters.TextLength(max_words=2), "one, two; three", "text_length"),
        (filters.TextLength(min_chars=50, only_with_images=True), "short", ""),
        (filters.NotEmpty(), " \n", "empty_text"),
        (filters.NotEmpty(needs_image=True), "words", "empty"),
        (filters.Language(("en",)), ENGLISH, ""),
        (filters.Language(("en",)), GERMAN, "language"),
        (filters.Language(("en",)), FRENCH, "language"),
        (filters.Language(("fr", "de")), GERMAN, ""),
        (filters.Language(("en",)), "Opel Corsa 1.2", ""),
        (filters.Language(("en",), min_chars=5, min_probability=0.999), "Opel Corsa 1.2", "language"),
        (filters.Repetition(), ENGLISH, ""),
        (filters.Repetition(), "red shoes " * 10, "repetition"),
        (filters.Repetition(max_word_share=1.0, max_gram_share=1.0), "a b c d e\n" * 3 + "f g", "repetition"),
        (filters.Repetition(min_words=100), "red shoes " * 10, ""),
        (filters.Repetition(max_line_share=1.0, max_gram_share=1.0), "go " * 5 + "a b c d e", "repetition"),
    ],
)
def test_text_filters(stage, text, expected):
    assert reason(stage, document(text)) == expected


@pytest.mark.parametrize(
    ("stage", "width", "height", "expected"),
    [
        (filters.ImageSize(), 40, 30, ""),
        (filters.ImageSize(min_side=31), 40, 30, "too_small"),
        (filters.ImageSize(min_side=30), 40, 30, ""),
        (filters.ImageSize(max_aspect=2.0), 80, 40, ""),
        (filters.ImageSize(max_aspect=2.0), 40, 81, "aspect"),
        (filters.ImageSize(max_pixels=1199), 40, 30, "bomb"),
        (filters.ImageSize(min_bytes=1_000_000), 40, 30, "too_small"),
        (filters.ImageSize(max_bytes=100), 40, 30, "too_many_bytes"),
    ],
)
def test_image_filters(stage, width, height, expected):
    assert reason(stage, document(ENGLISH, jpeg(picture(0, width, height)))) == expected


def test_every_image_of_a_document_is_looked_at():
    good, bad = jpeg(picture(0)), jpeg(picture(1))[:-800]
    assert reason(filters.Decodable(), document(ENGLISH, good, good)) == ""
    assert reason(filters.Decodable(), document(ENGLISH, good, bad)) == "truncated"
    assert reason(filters.ImageSize(), document(ENGLISH, good, b"<html>")) == "not_image"


@given(st.randoms(), st.integers(0, 6))
@settings(max_examples=50, deadline=None)
def test_hashes_within_the_distance_share_a_band(rng: random.Random, distance: int):
    rule = dedup.SimilarImage(max_distance=distance)
    one = rng.getrandbits(64)
    other = one
    for bit in rng.sample(range(64), distance):
        other ^= 1 << bit
    keys = []
    for value in (one, other):
        hashes = value.to_bytes(8)
        keys.append(set(_band_keys(rule, hashes)))
    assert keys[0] & keys[1]
    assert rule.similar(one.to_bytes(8), other.to_bytes(8))
    farther = other
    for bit in [i for i in range(64) if (one ^ other) >> i & 1 == 0][:1]:
        farther ^= 1 << bit
    assert not rule.similar(one.to_bytes(8), farther.to_bytes(8))


def _band_keys(rule: dedup.SimilarImage, hashes: bytes) -> list[bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "_perceptual_hash", lambda data: hashes)
        return rule.keys(document(ENGLISH, b"any"))[0]


def found_by_keys(rule: dedup.Rule, examples: list[Example]) -> set[int]:
    """Numbers of the examples that a build would leave out: groups by key, then `losers`."""
    groups: dict[bytes, list[Candidate]] = {}
    for i, example in enumerate(examples):
        keys, evidence = rule.keys(example)
        for key in keys:
            groups.setdefault(key, []).append(Candidate((0, i), str(i), evidence))
    out = set()
    for group in groups.values():
        shuffled = random.Random(1).sample(group, len(group))
        assert list(dedup.losers(rule, shuffled)) == list(dedup.losers(rule, group))
        out |= {loser.place[1] for loser in dedup.losers(rule, group)}
    return out


def test_near_duplicate_images_are_those_that_look_the_same():
    """Recompressed, shrunk and slightly darker copies go; other pictures stay."""
    originals = [picture(seed, 160, 120) for seed in range(12)]
    copies = []
    for pixels in originals[:6]:
        copies += [jpeg(pixels, 40), _resized(pixels, 120, 90), jpeg((pixels * 0.93).astype(np.uint8))]
    examples = [document(ENGLISH, jpeg(pixels)) for pixels in originals]
    examples += [document(ENGLISH, copy) for copy in copies]
    out = found_by_keys(dedup.SimilarImage(max_distance=5), examples)
    assert not out & set(range(12))
    assert len(out) >= 17  # of 18
    pairs = [document(ENGLISH, jpeg(originals[0]), jpeg(originals[i])) for i in (1, 2, 1)]
    assert found_by_keys(dedup.SimilarImage(), pairs) == {2}, "all images of a document count"
    assert found_by_keys(dedup.ExactImage(), pairs) == {2}


def _resized(pixels: np.ndarray, width: int, height: int) -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(pixels).resize((width, height)).save(file, "PNG")
    return file.getvalue()


def test_near_duplicate_texts_equal_brute_force():
    """Pairs that MinHash calls similar have a Jaccard index near the threshold; none far above is missed."""
    rng = random.Random(0)
    words = [f"word{i}" for i in range(400)]
    texts = []
    for _ in range(40):
        base = rng.choices(words, k=120)
        texts.append(base)
        for changes in (1, 3, 8, 30):
            copy = list(base)
            for place in rng.sample(range(120), changes):
                copy[place] = rng.choice(words)
            texts.append(copy)
    examples = [document(" ".join(text)) for text in texts]
    rule = dedup.SimilarText(threshold=0.7)
    evidence = [rule.keys(example)[1] for example in examples]
    runs = [{tuple(text[i : i + 5]) for i in range(116)} for text in texts]
    for i, j in itertools.combinations(range(len(texts)), 2):
        exact = len(runs[i] & runs[j]) / len(runs[i] | runs[j])
        similar = rule.similar(evidence[i], evidence[j])
        assert similar if exact > 0.85 else True, (i, j, exact)
        assert not similar if exact < 0.55 else True, (i, j, exact)
    out = found_by_keys(rule, examples)
    assert not out & set(range(0, 200, 5)), "the first of each family stays"
    assert {i + 1 for i in range(0, 200, 5)} <= out, "one word changed"
    assert not out & {i + 4 for i in range(0, 200, 5)}, "a quarter of the words changed"


def test_texts_differ_by_more_than_case_and_punctuation():
    same = [
        "The Old Town, by night -- a view from the bridge",
        "the old town by night: a view from the bridge!",
    ]
    assert found_by_keys(dedup.ExactText(), [document(text) for text in same]) == {1}
    short = [document("Red car"), document("red car")]
    assert found_by_keys(dedup.ExactText(), short) == set()
    assert found_by_keys(dedup.SimilarText(), short) == set()
    assert found_by_keys(dedup.ExactImage(), short) == set(), "no image is no duplicate image"


def test_stages_and_rules_tell_their_fields():
    for stage in (filters.Language(("en",)), dedup.SimilarText()):
        assert dataclasses.is_dataclass(stage) and stage == dataclasses.replace(stage)
