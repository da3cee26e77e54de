"""Intervals against the definition of the mask, position by position."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from neo_jax.model.mask import MASKS, dense


@st.composite
def rows(draw):
    """(segment_ids, image_ids) of one row: documents of runs of text and images, then padding."""
    segments, images, image = [], [], 0
    for segment in range(1, draw(st.integers(1, 4)) + 1):
        for is_image in draw(st.lists(st.booleans(), min_size=1, max_size=4)):
            length = draw(st.integers(1, 4))
            image += is_image
            segments += [segment] * length
            images += [image if is_image else 0] * length
    padding = draw(st.integers(0, 3))
    return np.array([segments + [0] * padding], np.int32), np.array([images + [0] * padding], np.int32)


def brute_force(kind, segments, images):
    allowed = np.zeros((len(segments), len(segments)), bool)
    for i in range(len(segments)):
        for j in range(len(segments)):
            same_image = kind == "image_bidirectional" and images[i] > 0 and images[i] == images[j]
            allowed[i, j] = segments[i] == segments[j] and (j <= i or same_image)
    return allowed


@pytest.mark.parametrize("kind", sorted(MASKS))
@hypothesis.given(row=rows())
@hypothesis.settings(max_examples=60, deadline=None)
def test_intervals_equal_definition(kind, row):
    segment_ids, image_ids = row
    intervals = MASKS[kind](jnp.asarray(segment_ids), jnp.asarray(image_ids))
    expected = brute_force(kind, segment_ids[0], image_ids[0])
    np.testing.assert_array_equal(dense(intervals, segment_ids.shape[1])[0], expected)
