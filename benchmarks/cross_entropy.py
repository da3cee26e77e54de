"""Chunked cross-entropy against the full logits: time and memory over positions and vocabulary.

    python -m benchmarks.cross_entropy [--positions=2048,...] [--vocabularies=2048,...] [--json]

For every number of positions T and vocabulary V, both compute the loss and its gradients for hidden states
and output matrix, by turns in one process; `ratio` is ours / dense, of medians. Every position is supervised,
the worst case: others cost ours nothing and the dense logits as much as these. Memory is what the compiled
program holds besides its inputs and results.
"""

import argparse
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks import turns
from neo_jax.objectives.ntp import cross_entropy, dense_cross_entropy

D = 256  # width


def measure(positions: int, vocabulary: int, repeats: int = turns.REPEATS) -> dict[str, float]:
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (1, positions, D))
    head = jax.random.normal(keys[1], (D, vocabulary)) * D**-0.5
    targets = jax.random.randint(keys[2], (1, positions), 0, vocabulary)
    weights = jnp.ones((1, positions))

    def compiled(loss: Callable) -> jax.stages.Compiled:
        def scalar(hidden: jax.Array, head: jax.Array) -> jax.Array:
            return loss(hidden, head, targets, weights)[0]

        return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1))).lower(hidden, head).compile()

    functions = {"ours": compiled(cross_entropy), "dense": compiled(dense_cross_entropy)}
    spent = turns.take(
        {name: lambda f=f: jax.block_until_ready(f(hidden, head)) for name, f in functions.items()}, repeats
    )
    memory = {name: f.memory_analysis().temp_size_in_bytes for name, f in functions.items()}
    return {
        "positions": positions,
        "vocabulary": vocabulary,
        "ratio": spent["ours"].wall / spent["dense"].wall,
        "ours_s": spent["ours"].wall,
        "dense_s": spent["dense"].wall,
        "ours_temporary_bytes": memory["ours"],
        "dense_temporary_bytes": memory["dense"],
    }


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--positions", type=numbers, default=[2048, 8192, 32768])
    parser.add_argument("--vocabularies", type=numbers, default=[2048, 16384])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    print(f"{'T':>7}{'V':>8}{'ratio':>8}{'ours s':>9}{'dense s':>9}{'ours MiB':>10}{'dense MiB':>11}")
    results = []
    for vocabulary in args.vocabularies:
        for positions in args.positions:
            r = measure(positions, vocabulary)
            results.append(r)
            print(
                f"{positions:>7}{vocabulary:>8}{r['ratio']:>8.2f}{r['ours_s']:>9.3f}{r['dense_s']:>9.3f}"
                f"{r['ours_temporary_bytes'] / 2**20:>10.1f}{r['dense_temporary_bytes'] / 2**20:>11.1f}",
                flush=True,
            )
    if args.json:
        print(json.dumps({"cross_entropy": results}))


if __name__ == "__main__":
    main()
