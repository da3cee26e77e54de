"""Why the model's matrix products are written as they are: ratios against the obvious way, on this machine.

    python -m benchmarks.layouts

Each pair is timed alternately in one process; a ratio above 1 means that ours is faster.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from neo_jax.model.attention import reference
from neo_jax.model.linear import linear
from neo_jax.model.mask import Intervals, causal, dense

REPEATS = 15
B, L, D, F = 16, 192, 192, 512
N, K, D_QK, D_V = 6, 2, 64, 32


def swiglu(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda x, gate, up, down: product(jax.nn.silu(product(x, gate)) * product(x, up), down)


def einsum_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, intervals: Intervals, scale: float
) -> jax.Array:
    """The same function with the contractions left to einsum."""
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    logits = jnp.einsum("BLKGd,BSKd->BKGLS", q, k) * scale
    allowed = dense(intervals, k.shape[1])[:, None, None]
    weights = jax.nn.softmax(jnp.where(allowed, logits, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("BKGLS,BSKd->BLKGd", weights, v).reshape(*q.shape[:2], -1, v.shape[-1])


def compare(name: str, ours: Callable, obvious: Callable, *args: jax.Array) -> None:
    """Prints median(obvious) / median(ours), forward and with gradients."""

    def gradient(fn: Callable) -> Callable:
        return jax.grad(lambda *args: jnp.square(fn(*args)).sum(), argnums=tuple(range(len(args))))

    for kind, pair in (("forward", (ours, obvious)), ("gradient", (gradient(ours), gradient(obvious)))):
        compiled = [jax.jit(fn) for fn in pair]
        times: list[list[float]] = [[], []]
        for repeat in range(REPEATS + 1):
            for fn, spent in zip(compiled, times, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(fn(*args))
                if repeat:  # the first call compiles
                    spent.append(time.perf_counter() - start)
        print(f"{name:<24}{kind:<10}{statistics.median(times[1]) / statistics.median(times[0]):.2f}x")


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 8)
    x = jax.random.normal(keys[0], (B, L, D))
    gate, up = (jax.random.normal(key, (D, F)) for key in keys[1:3])
    down = jax.random.normal(keys[3], (F, D))
    compare("linear in two dims", swiglu(linear), swiglu(jnp.matmul), x, gate, up, down)

    q = jax.random.normal(keys[4], (B, L, N, D_QK))
    k = jax.random.normal(keys[5], (B, L, K, D_QK))
    v = jax.random.normal(keys[6], (B, L, K, D_V))
    segment_ids = jnp.broadcast_to(jnp.arange(L) // 48, (B, L))
    intervals = causal({"segment_ids": segment_ids})

    def attend(fn: Callable) -> Callable:
        return lambda q, k, v: fn(q, k, v, intervals, D_V**-0.5)

    compare("attention per kv head", attend(reference), attend(einsum_attention), q, k, v)


if __name__ == "__main__":
    main()
