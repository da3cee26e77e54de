"""A shipped config's train step on one accelerator: tokens per second and MFU, by attention kernel.

    python -m benchmarks.one_device [--config=configs/neo_2b.py] [--stage=midtrain] [--rows=1]
        [--attention=triton,xla_chunked] [--config.a.b=v ...] [--json]

The real model at full size on made-up packed rows (documents of up to 2,048 tokens, pictures of 11 to 22
tokens a side), under the stage's row budgets. The kernels take turns on one state; medians of five turns of
three steps. MFU is model FLOPs (neo_jax/flops.py) over the chip's published peak in bfloat16.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import jax
from ml_collections import FrozenConfigDict

from benchmarks import ours, rows, turns
from benchmarks.scale import flops_of
from neo_jax import config as config_lib, flops, hardware

SPAN = 2048  # of documents, see rows.py
STEPS = 3  # of a turn


def config_of(
    spec: str, overrides: Sequence[tuple[str, str]], stage: str, num_rows: int, attention: str
) -> FrozenConfigDict:
    """The config on a mesh of one device, with one stage."""
    one = [(f"mesh.{axis}", "1") for axis in ("num_devices", "data", "fsdp", "tensor", "context")]
    one += [
        ("stages", stage),
        (f"stage.{stage}.batch_size", str(num_rows)),
        (f"stage.{stage}.accumulate", "1"),
    ]
    return config_lib.load(spec, [*one, ("model.attention", attention), *overrides])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stage", default="midtrain")
    parser.add_argument("--rows", type=int, default=1, help="of a batch")
    parser.add_argument("--attention", default="triton,xla_chunked")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = config_lib.parse_args(parser, sys.argv[1:], required=False)
    kind = jax.devices()[0].device_kind
    if hardware.of_device(kind) is None:
        sys.exit(f"error: {kind} is not an accelerator of neo_jax/hardware.py")
    peak = flops.peak("bfloat16")
    configs = {
        name: config_of(args.config or "configs/neo_2b.py", args.overrides, args.stage, args.rows, name)
        for name in args.attention.split(",")
    }
    names = list(configs)
    trainers = {names[0]: ours.Trainer(configs[names[0]])}
    first = trainers[names[0]]
    for name in names[1:]:
        trainers[name] = ours.Trainer(configs[name], state=first.state)
    stage = configs[names[0]].stage[args.stage]
    span = min(SPAN, stage.row_tokens)
    batch = rows.batch(first.config.model, stage.batch_size, stage.row_tokens, stage.row_patches, span)
    tokens, wanted = int((batch["kinds"] > 0).sum()), flops_of(first, batch)
    on_mesh = first.put(batch)

    def run(trainer: ours.Trainer) -> None:
        for _ in range(STEPS):
            trainer.state = first.state  # one state, which every step donates
            trainer.step(on_mesh)
            first.state = trainer.state

    contenders = {name: lambda trainer=trainer: run(trainer) for name, trainer in trainers.items()}
    spent = {name: s.wall / STEPS for name, s in turns.take(contenders).items()}
    print(f"{kind}: {first.config.name}, {args.stage}, {args.rows} rows, {tokens} tokens")
    results = {}
    for name, seconds in spent.items():
        memory = trainers[name].compiled.memory_analysis()
        results[name] = {
            "tokens_per_s": tokens / seconds,
            "mfu": wanted / seconds / peak,
            "ratio": spent[names[0]] / seconds,
            "temporary_bytes": memory.temp_size_in_bytes,
            "state_bytes": memory.argument_size_in_bytes,
        }
        r = results[name]
        print(
            f"{name:>12}  {r['tokens_per_s']:>8,.0f} tokens/s  MFU {r['mfu']:.1%}  {r['ratio']:.2f}x"
            f"  state {r['state_bytes'] / 2**30:.1f} GiB  temporaries {r['temporary_bytes'] / 2**30:.1f} GiB"
        )
    if args.json:
        print(json.dumps({"one_device": results}))


if __name__ == "__main__":
    main()
