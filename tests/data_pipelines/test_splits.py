"""Splits: what each promises to be unseen is unseen, in the rule and in the data that was built."""

import itertools

import pytest
from hypothesis import given, strategies as st

from data_pipelines import loader
from data_pipelines.build import splits
from data_pipelines.build.sources import STYLES, concept_key

BASES = [f"{0x1F600 + i:x}" for i in range(150)]
VARIANTS = [
    f"1f9d1{tone}-200d-{thing:x}".replace("1f9d1", person)
    for person, tone, thing in itertools.product(
        ("1f9d1", "1f468", "1f469"), ("", "-1f3fb", "-1f3ff"), range(0x1F680, 0x1F6A0)
    )
]
IMAGES = [(style, concept) for style in STYLES for concept in BASES + VARIANTS]


def test_no_leaks_and_every_split_has_images():
    assigned = splits.assign(IMAGES)
    assert assigned.keys() == set(IMAGES)
    assert splits.find_leaks(assigned) == []
    assert set(assigned.values()) == set(splits.SPLITS)


def test_assignment_does_not_depend_on_order():
    assert splits.assign(IMAGES) == splits.assign(reversed(IMAGES))


@given(st.lists(st.sampled_from(IMAGES), unique=True, min_size=1, max_size=60))
def test_no_leaks_whatever_is_missing(images):
    assigned = splits.assign(images)
    # A concept that is left in one style only must be in train, unless it is unseen as a whole.
    assert splits.find_leaks(assigned) == []


def test_leaks_are_found():
    role = VARIANTS[0]
    assert splits.find_leaks({("noto", role): "val_concept", ("twemoji", role): "train"})
    assert splits.find_leaks({("noto", role): "val_combo", ("twemoji", role): "train"})
    assert splits.find_leaks({("noto", role): "val_combo"})
    assert splits.find_leaks({("noto", role): "val_render"})


@pytest.mark.parametrize(
    ("concept", "role"),
    [
        ("1f468-1f3fb-200d-1f680", "1f9d1-1f680"),
        ("1f469-200d-1f680", "1f9d1-1f680"),
        ("1f3c3-1f3fd-200d-2640", "1f3c3"),
        ("1f34e", "1f34e"),
        ("2640", "2640"),
    ],
)
def test_role(concept, role):
    assert splits.role(concept) == role


@pytest.mark.parametrize(
    ("codepoints", "key"),
    [("0023-FE0F-20E3", "23-20e3"), ("1F468-200D-2764-fe0f", "1f468-200d-2764"), ("00A9", "a9")],
)
def test_concept_key(codepoints, key):
    assert concept_key(codepoints) == key


def test_built_data_has_no_leaks(quickstart_data):
    drawings = {split: loader.read_drawings(quickstart_data, split) for split in splits.SPLITS}
    assigned = {(e.source, e.concept): split for split, part in drawings.items() for e in part}
    assert len(assigned) == sum(len(part) for part in drawings.values()), "no image is in two splits"
    assert splits.find_leaks(assigned) == []
    pictures = [drawing.image for part in drawings.values() for drawing in part]
    assert len(set(pictures)) == len(pictures), "no picture is stored twice"
    sizes = {split: len(part) for split, part in drawings.items()}
    assert 11_000 < sizes["train"] < 13_500
    for split, size in {"dev": 300, "val_render": 630, "val_combo": 650, "val_concept": 540}.items():
        assert 0.8 * size < sizes[split] < 1.2 * size
