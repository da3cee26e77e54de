"""Chunked cross-entropy equals the dense definition, values and gradients, and never holds all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo_jax.objectives.ntp import cross_entropy, dense_cross_entropy


def inputs(dtype, B=2, L=13, D=8, V=29):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (B, L, D)).astype(dtype)
    head = jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (B, L), 0, V)
    weights = jnp.where(jax.random.uniform(keys[3], (B, L)) < 0.6, jax.random.uniform(keys[3], (B, L)), 0.0)
    return hidden, head, targets, weights


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_chunked_equals_dense(chunk, dtype, tolerance):
    hidden, head, targets, weights = inputs(dtype)

    def run(loss_fn):
        return jax.value_and_grad(lambda h, w: 3.0 * loss_fn(h, w)[0], argnums=(0, 1))(hidden, head)

    chunked = run(lambda h, w: cross_entropy(h, w, targets, weights, chunk))
    dense = run(lambda h, w: dense_cross_entropy(h, w, targets, weights))
    for ours, expected in zip(jax.tree.leaves(chunked), jax.tree.leaves(dense), strict=True):
        assert ours.dtype == expected.dtype
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(ours.astype(float), expected.astype(float), atol=tolerance * scale)


def test_per_token_values():
    hidden, head, targets, weights = inputs(jnp.float32)
    total, ce = cross_entropy(hidden, head, targets, weights, 4)
    log_p = jax.nn.log_softmax(hidden @ head)
    expected = -np.take_along_axis(np.asarray(log_p), np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(ce, np.where(weights > 0, expected, 0), atol=1e-5)
    np.testing.assert_allclose(total, (ce * weights).sum(), rtol=1e-6)


def test_peak_memory_has_no_part_that_grows_with_logits():
    """Twice the positions take as much more whatever the vocabulary, and twice the vocabulary whatever L."""

    def temporaries(L, V, loss=cross_entropy, D=8):
        shapes = (
            jax.ShapeDtypeStruct((1, L, D), jnp.float32),
            jax.ShapeDtypeStruct((D, V), jnp.float32),
            jax.ShapeDtypeStruct((1, L), jnp.int32),
            jax.ShapeDtypeStruct((1, L), jnp.float32),
        )
        gradient = jax.jit(jax.grad(lambda *args: loss(*args)[0], argnums=(0, 1)))
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    L, V = 1024, 4096
    small, long, wide, both = (temporaries(i * L, j * V) for i, j in ((1, 1), (2, 1), (1, 2), (2, 2)))
    assert temporaries(L, V, dense_cross_entropy) >= 4 * L * V
    assert long < 2 * L * V
    assert abs(both - long - wide + small) < 4 * L * V / 1000
