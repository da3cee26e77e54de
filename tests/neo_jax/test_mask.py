"""Intervals against the definition of the mask, position by position."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo_jax.model.mask import MASKS, dense, slide

LENGTH = 67  # of the longest row drawn: one shape for all, as every other would be compiled anew


@st.composite
def rows(draw):
    """One row: documents of runs of text and images, some text supervised, then padding."""
    segments, images, weights, image = [], [], [], 0
    for segment in range(1, draw(st.integers(1, 4)) + 1):
        for is_image in draw(st.lists(st.booleans(), min_size=1, max_size=4)):
            length = draw(st.integers(1, 4))
            image += is_image
            segments += [segment] * length
            images += [image if is_image else 0] * length
            weights += [0.5 * draw(st.booleans()) for _ in range(length)]
    padding = [0] * draw(st.integers(0, 3))
    ids = (np.array(x + padding, np.int32) for x in (segments, images))
    return dict(zip(("segment_ids", "image_ids"), ids, strict=True)) | {
        "loss_weights": np.array(weights + padding, np.float32)
    }


@functools.partial(jax.jit, static_argnums=(0, 2))
def dense_mask(kind, batch, window):
    index = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    return dense(slide(MASKS[kind](batch), index, window), LENGTH)[0]


def brute_force(kind, segments, images, weights):
    allowed = np.zeros((len(segments), len(segments)), bool)

    def in_prefix(i):
        return segments[i] > 0 and not any(segments[k] == segments[i] and weights[k] > 0 for k in range(i))

    for i in range(len(segments)):
        for j in range(len(segments)):
            ahead = {
                "causal": False,
                "image_bidirectional": images[i] > 0 and images[i] == images[j],
                "prefix": in_prefix(i) and in_prefix(j),
            }[kind]
            allowed[i, j] = segments[i] == segments[j] and (j <= i or ahead)
    return allowed


@pytest.mark.parametrize("kind", sorted(MASKS))
@hypothesis.given(row=rows(), window=st.integers(0, 5))
@hypothesis.settings(max_examples=60, deadline=None)
def test_intervals_equal_definition(kind, row, window):
    expected = brute_force(kind, *row.values())
    length = len(expected)
    batch = {name: np.pad(x, (0, LENGTH - length))[None] for name, x in row.items()}
    found = np.asarray(dense_mask(kind, batch, window))
    index = np.arange(length)
    if window:
        expected &= index[None] >= index[:, None] - window
    np.testing.assert_array_equal(found[:length, :length], expected)
    assert not found[:length][row["segment_ids"] > 0, length:].any()
