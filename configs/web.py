"""A small NEO on image-text pairs of your own, out of a folder that data_pipelines.build wrote.

    python -m neo_jax.train --config=configs/web.py --config.data.path=data/cc12m --workdir=runs/cc12m

A config of your own can also read the shards where they lie, without a build:

    c.data.sources.cc12m = base.source("webdataset", "gs://bucket/cc12m/*.tar")
    c.data.tokenizer = "data/neo/tokenizer.json"
"""

from ml_collections import ConfigDict

from configs import base, small


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "", "tiny" (toy width) or "smoke" (toy width, a short run on the quickstart's data)."""
    c = base.get_config()
    c.name = "web"
    c.data.path = "data/web"
    c.data.recipe = ""  # built by hand
    c.data.overlong = "split_text"
    c.eval.splits = ()  # ("val",) if the build had a --holdout

    # 45 M parameters: what it takes to see a loss go down on photos, on one accelerator.
    c.model.hidden_size = 512
    c.model.num_layers = 12
    c.model.pre_buffer = 4
    c.model.num_heads, c.model.num_kv_heads, c.model.head_dim = 8, 4, 64
    c.model.mlp_size = 1536
    c.model.init_std = 0.04  # about 1 / sqrt(hidden_size), as 0.02 is at NEO's width
    c.model.embed.hidden_size = 256
    c.model.dtype = "bfloat16"

    # One image token is 32 x 32 pixels; rows of 4096 hold some 16 photos and their captions.
    shared = dict(
        batch_size=16, row_tokens=4096, row_patches=3584, min_pixels=128 * 128, max_pixels=512 * 512
    )
    c.stages = ("align", "full")
    c.stage.align = base.stage(
        500, trainable=("patch_embed/.*", "pre_buffer/.*", "token_embed", "head"), peak_lr=1e-3, **shared
    )
    c.stage.full = base.stage(20_000, peak_lr=1e-3, warmup_steps=1000, **shared)
    return small.shrink(c, arg)
