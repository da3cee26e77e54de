"""Coordinates of tokens: NEO's recordings, transformers' Qwen2-VL, and brute force over random documents."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, strategies as st
from safetensors.numpy import load_file

from data_pipelines import layout, positions, text
from data_pipelines.positions import POSITIONS


def test_neo(golden_dir):
    """t, h, w and loss weights of every recorded document, rebuilt from its grid alone."""
    folder = golden_dir("neo")
    ids = json.loads((folder / "config.json").read_text())
    context, start = ids["img_context_token_id"], ids["img_start_token_id"]
    cases = sorted(folder.glob("case*.safetensors"))
    assert cases
    for path in cases:
        case = load_file(path)
        grids = [tuple(grid // 2) for grid in case["grid_hw"]]
        for first, end in itertools.pairwise(case["seq_boundaries"]):
            tokens = case["input_ids"][first:end]
            num_images = int((tokens == start).sum())
            own, grids = grids[:num_images], grids[num_images:]
            is_patch = tokens == context
            hw = np.zeros((len(tokens), 2), int)
            hw[is_patch] = np.concatenate([np.zeros((0, 2), int), *(np.argwhere(np.ones(g)) for g in own)])
            image_ids = np.where(is_patch, np.cumsum(tokens == start), 0)
            golden = np.stack([case[f"{axis}_index"][first:end] for axis in "thw"], axis=-1)
            np.testing.assert_array_equal(positions.thw(image_ids, hw, 1.0), golden, err_msg=path.name)
            supervised = case["labels"][first:end] != -100
            weights = supervised * text.reduction_weight(int(supervised.sum()), "square")
            np.testing.assert_allclose(weights, case["loss_weight"][first:end], rtol=1e-6)


Parts = list[int | tuple[int, int]]  # a number of words, or an image's grid
PARTS = st.lists(
    st.one_of(st.integers(1, 5), st.tuples(st.integers(1, 4), st.integers(1, 5))), min_size=1, max_size=7
)


def table(parts: Parts) -> tuple[np.ndarray, np.ndarray]:
    """image_ids and hw of words and bare grids."""
    image_ids, hw = [], []
    for part in parts:
        if isinstance(part, int):
            image_ids += [0] * part
            hw += [(0, 0)] * part
        else:
            number = max(image_ids, default=0) + 1
            image_ids += [number] * math.prod(part)
            hw += list(itertools.product(*map(range, part)))
    return np.array(image_ids), np.array(hw)


@given(PARTS)
def test_v2pe_with_steps_of_one_is_1d(parts):
    image_ids, hw = table(parts)
    np.testing.assert_array_equal(positions.v2pe(image_ids, hw, 1.0), positions.one_d(image_ids, hw, 1.0))
    np.testing.assert_array_equal(positions.one_d(image_ids, hw, 1.0)[:, 0], np.arange(len(image_ids)))


@given(PARTS, st.sampled_from([1 / 256, 1 / 16, 0.1, 1 / 3, 0.5]))
def test_v2pe_by_brute_force(parts, delta):
    image_ids, hw = table(parts)
    expected, last, steps = [], -1.0, 0  # `last` = the position before the present run of image tokens
    for in_image in image_ids > 0:
        if in_image:
            steps += 1
            expected.append(last + steps * delta)
        else:
            last += math.ceil(round(steps * delta, 6)) + 1
            steps = 0
            expected.append(last)
    found = positions.v2pe(image_ids, hw, delta)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-6)
    assert not found[:, 1:].any()


@given(PARTS)
def test_thw_by_brute_force(parts):
    image_ids, hw = table(parts)
    expected, t = [], -1
    for i, number in enumerate(image_ids):
        if number == 0 or i == 0 or image_ids[i - 1] != number:
            t += 1
        expected.append((t, *hw[i]))
    np.testing.assert_array_equal(positions.thw(image_ids, hw, 1.0), expected)


def test_mrope_equals_qwen2_vl():
    config = transformers.Qwen2VLConfig(
        text_config=dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16)
        | dict(vocab_size=32, num_key_value_heads=2),
        vision_config=dict(depth=1, embed_dim=16, hidden_size=16, num_heads=2, spatial_merge_size=2),
    )
    model = transformers.Qwen2VLModel(config)
    rng = np.random.default_rng(0)
    for _ in range(30):
        parts: Parts = [int(rng.integers(1, 6))]
        for _ in range(rng.integers(0, 4)):
            parts += [tuple(rng.integers(1, 7, 2).tolist()), int(rng.integers(1, 6))]
        image_ids, hw = table(parts)
        types = torch.tensor(image_ids > 0).int()[None]
        grids = [(1, 2 * part[0], 2 * part[1]) for part in parts if not isinstance(part, int)]
        expected, _ = model.get_rope_index(
            torch.zeros_like(types, dtype=torch.long),
            mm_token_type_ids=types,
            image_grid_thw=torch.tensor(grids) if grids else None,
        )
        np.testing.assert_array_equal(
            positions.mrope(image_ids, hw, 1.0).T, expected[:, 0].numpy(), str(parts)
        )


@pytest.mark.parametrize("kind", sorted(POSITIONS))
@pytest.mark.parametrize("name", sorted(layout.LAYOUTS))
def test_every_kind_with_every_layout(kind, name):
    """Never decreasing at text, 0 at the start, and row marks at their row's end."""
    ids = type("Ids", (), {"special_id": lambda self, token: 9})()
    image = layout.image_tokens(layout.LAYOUTS[name], ids, 2, 3, 1)
    image_ids = np.concatenate([[0, 0], image.grid, [0], np.where(image.grid, 2, 0), [0]])
    hw = np.concatenate([np.zeros((2, 2), int), image.hw, [[0, 0]], image.hw, [[0, 0]]])
    coords = POSITIONS[kind](image_ids, hw, 0.25)
    assert coords.shape == (len(image_ids), 3) and coords.dtype == np.float32
    np.testing.assert_array_equal(coords[0], 0)
    assert (np.diff(coords[image_ids == 0, 0]) >= 1).all()
    in_image = image_ids == 1
    if kind in ("thw", "thw_split"):
        assert len(set(coords[in_image, 0])) == 1
        np.testing.assert_array_equal(coords[in_image, 1:], hw[in_image])


def test_an_empty_document():
    for kind in POSITIONS.values():
        assert kind(np.zeros(0, int), np.zeros((0, 2), int), 1.0).shape == (0, 3)
