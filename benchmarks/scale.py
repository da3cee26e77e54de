"""Step time against depth, width, row length and experts, beside the FLOPs that each asks for.

    python -m benchmarks.scale [--json]

All sizes of an axis take turns in one process. `time` and `FLOPs` are ratios to the first size of the axis:
where time grows faster than FLOPs, something besides matrix products grows. Rows change in number as they
change in length, so every step has the same tokens. FLOPs are those of neo_jax/flops.py.

Last, the layers alone, forward and backward: with weights of their own for visual tokens (`model.route`,
EVEv2: all of a layer) against the same layers shared by all tokens, in time and in FLOPs by XLA's count.
"""

import argparse
import json

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from benchmarks import ours, rows, turns
from configs import base
from neo_jax import config as config_lib, flops, params as params_lib
from neo_jax.model.route import is_visual

TOKENS = 2048  # of a batch
AXES = {
    "layers": (2, 4, 8),
    "width": (128, 256, 512),
    "length": (512, 1024, 2048),
    "experts": (1, 4, 8),  # learned, each token through two of half the width; 1 is dense
}
SPAN = 512  # of documents, see rows.py
VISUAL_SHARE = 0.625  # of a row's tokens


def config_of(
    layers: int = 4,
    width: int = 256,
    length: int = 1024,
    experts: int = 1,
    tokens: int = TOKENS,
    routed: bool = False,
) -> FrozenConfigDict:
    c = base.get_config()
    m = c.model
    m.num_layers, m.pre_buffer = layers, layers // 2
    m.hidden_size, m.mlp_size, m.num_heads, m.num_kv_heads = width, 3 * width, width // 32, width // 64
    m.head_dim = 32
    if routed:
        m.route.attention = m.route.mlp = m.route.norm = "modality"
        m.route.visual_share = VISUAL_SHARE
    if experts > 1:
        m.route.mlp, m.experts.num, m.experts.per_token = "topk", experts, 2
    c.stages = ("full",)
    patches = int(VISUAL_SHARE * length)
    c.stage.full = base.stage(
        100, batch_size=tokens // length, row_tokens=length, row_patches=patches, warmup_steps=0
    )
    return config_lib.resolve(c)


def batch_of(config: FrozenConfigDict) -> dict[str, np.ndarray]:
    stage = config.stage.full
    span = min(SPAN, stage.row_tokens)
    return rows.batch(config.model, stage.batch_size, stage.row_tokens, stage.row_patches, span)


def axis(configs: dict[str, FrozenConfigDict], repeats: int = turns.REPEATS) -> dict[str, dict[str, float]]:
    """Seconds and FLOPs of a train step of each config."""
    steps, wanted = {}, {}
    for name, config in configs.items():
        trainer, numbers = ours.Trainer(config), batch_of(config)
        batch = trainer.put(numbers)
        steps[name] = lambda trainer=trainer, batch=batch: trainer.step(batch)
        wanted[name] = flops_of(trainer, numbers)
    spent = turns.take(steps, repeats)
    return {name: {"seconds": spent[name].wall, "flops": wanted[name]} for name in configs}


def flops_of(trainer: ours.Trainer, batch: dict[str, np.ndarray]) -> float:
    model = params_lib.bind(trainer.model, trainer.state.params)
    intervals = model.intervals(batch)
    kinds = batch["kinds"]
    metrics = {
        "tokens": (kinds > 0).sum(),
        "visual_tokens": is_visual(kinds).sum(),
        "patches": (batch["patch_index"] >= 0).sum(),
        "supervised_tokens": (batch["loss_weights"] > 0).sum(),
        "attended_pairs": ((intervals.end - intervals.start) * (kinds > 0)).sum(),
    }
    return flops.train_flops(trainer.config.model, trainer.specs, trainer.trainable, metrics)


def layers(repeats: int = turns.REPEATS, **size: int) -> dict[str, dict[str, float]]:
    """Seconds and FLOPs of the layers of a dense and of a routed model, forward and backward."""
    steps, counted = {}, {}
    for name in ("shared", "modality"):
        config = config_of(routed=name == "modality", **size)
        trainer = ours.Trainer(config)
        batch = trainer.put(batch_of(config))

        def loss(params: params_lib.Params, batch: dict, model=trainer.model) -> jax.Array:
            return params_lib.bind(model, params)(batch).sum()

        own = {path: x for path, x in trainer.state.params.items()}
        lowered = jax.jit(jax.grad(loss)).lower(own, batch)
        program = lowered.compile()
        steps[name] = lambda f=program, own=own, batch=batch: jax.block_until_ready(f(own, batch))
        counted[name] = float(lowered.cost_analysis()["flops"])
    spent = turns.take(steps, repeats)
    return {name: {"seconds": spent[name].wall, "flops": counted[name]} for name in steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    tables = {
        name: axis({str(size): config_of(**{name: size}) for size in sizes}) for name, sizes in AXES.items()
    }
    tables["layers alone"] = layers()
    print(f"{'axis':<14}{'size':>9}{'seconds':>10}{'time':>8}{'FLOPs':>8}")
    for name, table in tables.items():
        first = next(iter(table.values()))
        for size, r in table.items():
            print(
                f"{name:<14}{size:>9}{r['seconds']:>10.3f}{r['seconds'] / first['seconds']:>7.2f}x"
                f"{r['flops'] / first['flops']:>7.2f}x"
            )
    if args.json:
        print(json.dumps({"scale": tables}))


if __name__ == "__main__":
    main()
