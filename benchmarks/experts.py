"""Products of learned experts: tiles and ragged_dot against one matrix for all tokens.

    python -m benchmarks.experts [--tokens=2048,...] [--json]

Each computes the gradients of a product of T tokens of width 256 with matrices to width 768: dense with one
for all, the others with that of each token's expert, of 8 that are busy unequally. `tiles` is what experts
run where there is no TPU (neo_jax/kernels/grouped.py). Ratios are to dense, of medians.
"""

import argparse
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import turns
from neo_jax.kernels.grouped import tiled

D, F, NUM = 256, 768, 8


def measure(tokens: int, repeats: int = turns.REPEATS) -> dict[str, float]:
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((tokens, D), (NUM, D, F)))
    shares = rng.dirichlet(np.full(NUM, 3.0))
    sizes = jnp.asarray(rng.multinomial(tokens, shares), jnp.int32)

    def gradients(product: Callable) -> Callable:
        def loss(x: jax.Array, w: jax.Array) -> jax.Array:
            return jnp.square(product(x, w)).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))

    functions = {
        "dense": gradients(lambda x, w: x @ w[0]),
        "tiles": gradients(lambda x, w: tiled(x, w, sizes)),
        "ragged_dot": gradients(lambda x, w: jax.lax.ragged_dot(x, w, sizes)),
    }
    runs = {name: lambda f=f: jax.block_until_ready(f(x, w)) for name, f in functions.items()}
    # What comes behind ragged_dot pays for its memory: E copies of x, which it gives back to the system.
    last = {"ragged_dot": runs.pop("ragged_dot")}
    spent = turns.take(runs, repeats) | turns.take(last, repeats)
    ratios = {f"{name}_ratio": spent[name].wall / spent["dense"].wall for name in ("tiles", "ragged_dot")}
    return {"tokens": tokens, "busiest": int(sizes.max()), "dense_s": spent["dense"].wall} | ratios


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=numbers, default=[2048, 8192])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    print(f"{'T':>7}{'busiest':>9}{'dense s':>9}{'tiles':>8}{'ragged_dot':>12}")
    results = []
    for tokens in args.tokens:
        r = measure(tokens)
        results.append(r)
        print(
            f"{r['tokens']:>7}{r['busiest']:>9}{r['dense_s']:>9.3f}{r['tiles_ratio']:>7.2f}x"
            f"{r['ragged_dot_ratio']:>11.2f}x",
            flush=True,
        )
    if args.json:
        print(json.dumps({"experts": results}))


if __name__ == "__main__":
    main()
