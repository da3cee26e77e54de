"""Attention over intervals against attention under a dense mask: time as rows get longer than documents.

    python -m benchmarks.attention [--lengths=1024,...] [--documents=512,...] [--json]

For every row length L and document length, both compute the value and the gradients for queries, keys and
values of the same packed row, by turns in one process; medians of five turns. `ratio` is ours / dense,
`attended` the share of the L * L pairs that the intervals hold: where the cost is proportional to attended
pairs, the two fall together. Dense attention is `reference` over strips of 1024 queries, recomputed in
backward, so that it fits in memory at every L.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from neo_jax.kernels.chunked import xla_chunked
from neo_jax.model.attention import reference
from neo_jax.model.mask import Intervals, image_bidirectional

REPEATS = 5
STRIP = 1024  # queries whose dense scores are held at once
N, K, D_QK, D_V = 2, 1, 64, 32  # heads, key/value heads, channels of queries and keys, of values
IMAGE = 256  # tokens of the image at the head of every document


def dense(q: jax.Array, k: jax.Array, v: jax.Array, intervals: Intervals, scale: float) -> jax.Array:
    B, L = q.shape[:2]
    size = min(STRIP, L)

    def strip(inputs: tuple[jax.Array, Intervals]) -> jax.Array:
        return reference(inputs[0], k, v, inputs[1], scale)

    def strips(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(B, L // size, size, *x.shape[2:]), 1, 0)

    out = jax.lax.map(jax.checkpoint(strip), (strips(q), Intervals(*map(strips, intervals))))
    return jnp.moveaxis(out, 0, 1).reshape(B, L, N, D_V)


def row(length: int, document: int) -> Intervals:
    """One row of documents of `document` tokens, each with an image at its head."""
    index = jnp.arange(length, dtype=jnp.int32)[None]
    segment_ids = index // document + 1
    image_ids = jnp.where(index % document < IMAGE, segment_ids, 0)
    return image_bidirectional({"segment_ids": segment_ids, "image_ids": image_ids})


def measure(length: int, document: int) -> dict[str, float]:
    """Times of one row of `length` tokens holding documents of `document` tokens."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, length, N, D_QK))
    k = jax.random.normal(keys[1], (1, length, K, D_QK))
    v = jax.random.normal(keys[2], (1, length, K, D_V))
    intervals = row(length, document)

    def compiled(attend: Callable) -> Callable:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.square(attend(q, k, v, intervals, D_V**-0.5)).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile()

    functions = {"ours": compiled(xla_chunked), "dense": compiled(dense)}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(REPEATS + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(q, k, v))
            if repeat:  # the first turn warms up
                times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(spent) for name, spent in times.items()}
    memory = {name: f.memory_analysis().temp_size_in_bytes for name, f in functions.items()}
    return {
        "length": length,
        "document": document,
        "attended": float((intervals.end - intervals.start).sum()) / length**2,
        "ratio": seconds["ours"] / seconds["dense"],
        "ours_s": seconds["ours"],
        "dense_s": seconds["dense"],
        "ours_temporary_bytes": memory["ours"],
        "dense_temporary_bytes": memory["dense"],
    }


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=numbers, default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--documents", type=numbers, default=[512, 2048, 8192, 32768])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if any(length % min(STRIP, length) for length in args.lengths):
        sys.exit(f"error: --lengths must be at most {STRIP} or its multiples, got {args.lengths}")
    print(f"{'L':>6}{'document':>10}{'attended':>10}{'ratio':>8}{'ours s':>9}{'dense s':>9}{'ours MB':>9}")
    results = []
    for length in args.lengths:
        for document in sorted({min(document, length) for document in args.documents}):
            r = measure(length, document)
            results.append(r)
            print(
                f"{length:>6}{document:>10}{r['attended']:>10.1%}{r['ratio']:>8.1%}{r['ours_s']:>9.3f}"
                f"{r['dense_s']:>9.3f}{r['ours_temporary_bytes'] / 2**20:>9.1f}",
                flush=True,
            )
    if args.json:
        print(json.dumps({"attention": results}))


if __name__ == "__main__":
    main()
