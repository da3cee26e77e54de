"""BREEN-7B (arXiv 2503.12446): Qwen2.5-7B with learned queries behind every image and a network for both.

    python -m neo_jax.train --config=configs/breen_7b.py --workdir=DIR --config.data.path=DATA

`:smoke` and `:tiny` behind the file name give its small forms (configs/small.py).

Known from the paper: image tokens, then learned queries, then text, all causal; image tokens and queries take
a feed-forward network of their own; the queries learn CLIP's features at a coarse and a fine scale; three
stages (queries and image network; everything; instructions) on 13 M pairs and 4 M instructions. No code is
published.

Guesses, everything else: the patch embedding (EVEv2's), 144 fine and 16 coarse queries, sizes of images, all
rates, steps and rows. The alignment to CLIP is an objective and is not set here: without it the queries learn
from the captions alone.
"""

from ml_collections import ConfigDict

from configs import backbones, base, small

QUERIES = 144 + 16  # fine, then coarse


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "", "smoke" or "tiny"."""
    c = base.get_config()
    c.name, c.family = "breen_7b", "breen"
    m = c.model
    backbones.qwen2p5_7b(m)
    m.embed.kind, m.embed.rotate, m.embed.slots = "conv_gelu_conv", False, QUERIES
    m.embed.patch_size, m.embed.merge_size, m.embed.hidden_size = 16, 2, 1024
    m.route.mlp, m.route.visual_share = "modality", 0.75
    backbones.full_size(c, "data/breen", devices=64)
    c.data.template, c.data.layout, c.data.resize = "chatml", "breen", "evev2"

    shared = dict(
        row_tokens=8192,
        row_patches=5120,
        min_pixels=32**2,
        max_pixels=1024**2,
        loss_reduction="token",
        min_lr_ratio=0.0,
        b1=0.9,
        b2=0.999,
        weight_decay=0.0,
    )
    c.stages = ("prealign", "pretrain", "sft")
    c.stage.prealign = base.stage(
        4_000,
        mixture=ConfigDict({"captions": 1.0}),
        trainable=("patch_embed/.*", "layers/mlp/visual/.*"),
        batch_size=64,
        peak_lr=2e-4,
        warmup_steps=120,
        **shared,
    )
    c.stage.pretrain = base.stage(
        21_000,
        mixture=ConfigDict({"captions": 1.0}),
        batch_size=64,
        peak_lr=4e-5,
        warmup_steps=630,
        **shared,
    )
    c.stage.sft = base.stage(
        8_000,
        mixture=ConfigDict({"instructions": 1.0}),
        batch_size=64,
        peak_lr=2e-5,
        warmup_steps=240,
        **shared,
    )
    return small.shrink(c, arg)
