"""A small NEO that learns to name drawings from raw pixels: 12,000 images in four styles, English captions.

    python -m neo_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

About ten minutes on two CPU cores. With `:smoke` behind the file name: toy width, well under two minutes
(configs/small.py).
"""

from ml_collections import ConfigDict

from configs import base, small


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "", "smoke" or "tiny"."""
    c = base.get_config()
    c.name = "quickstart"

    c.model.hidden_size = 128
    c.model.num_layers = 5
    c.model.pre_buffer = 2
    c.model.num_heads = 4
    c.model.num_kv_heads = 2
    c.model.head_dim = 32
    c.model.mlp_size = 384
    c.model.init_std = 0.08  # about 1 / sqrt(hidden_size), as 0.02 is at NEO's width
    c.model.remat_policy = "full"  # on a CPU recomputing is cheaper than the memory traffic of keeping
    c.model.embed.patch_size = 8  # one image token is 16 x 16 pixels
    c.model.embed.hidden_size = 64

    shared = dict(
        batch_size=16,
        row_tokens=192,
        row_patches=72,
        min_pixels=48 * 48,
        max_pixels=48 * 48,
        tags_share=0.25,  # names teach more per token than the tags that follow from them
        parallel_share=0.5,  # a small model soon knows the captions by heart; this makes it look
    )
    # As in NEO's pre-training stage: the new parts first, on frozen post layers, then everything.
    c.stages = ("align", "full")
    c.stage.align = base.stage(
        20,
        trainable=("patch_embed/.*", "pre_buffer/.*", "token_embed", "head"),
        peak_lr=2e-3,
        min_lr_ratio=1.0,
        warmup_steps=10,
        **shared,
    )
    c.stage.full = base.stage(860, peak_lr=3e-3, min_lr_ratio=0.02, warmup_steps=50, **shared)
    c.train.log_every = 10
    c.train.eval_every = 250
    c.train.save_every = 250

    return small.shrink(c, arg)
