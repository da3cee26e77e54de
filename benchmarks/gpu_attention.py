"""Our attention kernel on a GPU against the ready-made ones: value and gradients of one packed row.

    python -m benchmarks.gpu_attention [--lengths=8192,...] [--documents=1024,...] [--json]

Contenders, in bfloat16, by turns in one process, medians of five turns of ten calls each: `triton` (ours),
`xla_chunked` (ours, without a kernel), `cudnn` (under the dense mask) and, where Tokamax is installed,
`mosaic`. `ratio` is triton's time / theirs: below 1, ours is faster. Each result and gradient must be within
3 % of ours by norm. Heads are those of NEO-2B, 16 of queries and 8 of keys of 256
channels with values of 128, or with --channels=128 of its backbone.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec

import jax
import jax.numpy as jnp

from benchmarks import turns
from benchmarks.attention import numbers, row
from neo_jax.model.attention import ATTENTION
from neo_jax.model.mask import Intervals

N, K, D_V = 16, 8, 128
CALLS = 10
CLOSE = 0.03


def measure(length: int, document: int, channels: int) -> dict:
    """Milliseconds and ratios of one case."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (N, channels), (K, channels), (K, D_V), (N, D_V)
    *arrays, cotangent = (
        jax.random.normal(key, (1, length, *shape), jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    )
    intervals = row(length, document)
    inputs = arrays, intervals, cotangent

    def loss(
        attend: Callable, qkv: list[jax.Array], intervals: Intervals, cotangent: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        out = attend(*qkv, intervals, channels**-0.5)
        return (out * cotangent).astype(jnp.float32).sum(), out

    contenders, results = {}, {}
    for name in ("triton", "xla_chunked", "cudnn", *(["mosaic"] if find_spec("tokamax") else [])):
        attend = ATTENTION[name]
        both = jax.jit(jax.value_and_grad(functools.partial(loss, attend), has_aux=True))
        (_, out), gradients = both(*inputs)
        results[name] = [x.astype(jnp.float32) for x in (out, *gradients)]
        for mine, theirs in zip(results["triton"], results[name], strict=True):
            gap = float(jnp.linalg.norm(mine - theirs) / jnp.linalg.norm(mine))
            if not gap < CLOSE:
                sys.exit(f"error: {name} differs from triton by {gap:.3f} at {length} / {document}")

        def run(both: Callable = both) -> None:
            jax.block_until_ready([both(*inputs) for _ in range(CALLS)])

        contenders[name] = run
    spent = {name: s.wall / CALLS for name, s in turns.take(contenders).items()}
    return {
        "length": length,
        "document": document,
        "attended": float((intervals.end - intervals.start).sum()) / length**2,
        "ms": {name: 1e3 * seconds for name, seconds in spent.items()},
        "ratio": {name: spent["triton"] / seconds for name, seconds in spent.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=numbers, default=[8192, 32768])
    parser.add_argument("--documents", type=numbers, default=[512, 2048, 8192, 32768])
    parser.add_argument("--channels", type=int, default=256, help="of queries and keys")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit(f"error: this benchmark needs a GPU, and JAX found a {jax.default_backend()}")
    print(
        f"{jax.devices()[0].device_kind}, {args.channels} channels; ratio = triton / contender, milliseconds"
    )
    results = []
    for length in args.lengths:
        for document in sorted({min(document, length) for document in args.documents}):
            r = measure(length, document, args.channels)
            results.append(r)
            cells = [f"{name} {r['ratio'][name]:.2f}x ({ms:.2f})" for name, ms in r["ms"].items()]
            print(f"{length:>6}{document:>7}{r['attended']:>8.1%}  {'  '.join(cells)}", flush=True)
    if args.json:
        print(json.dumps({"gpu_attention": results}))


if __name__ == "__main__":
    main()
