"""EVEv2-7B (arXiv 2502.06788): Qwen2.5-7B with a second copy of every layer for image tokens.

    python -m neo_jax.train --config=configs/evev2_7b.py --workdir=DIR --config.data.path=DATA

`:smoke` and `:tiny` behind the file name give its small forms (configs/small.py).

Model: the released code and Qwen2.5-7B-Instruct; 14,156,712,960 parameters. Stages: the released scripts
(samples per step, rates, warm-up of 3 %, pixels, lengths) and the amounts of data of its paper: 10 M, 29 M,
48 M, 15 M and 7.3 M samples. Its first stage trains a dense model, whose layers are then copied: an import of
Qwen2.5 makes the copies at once, and as they stay frozen through that stage the function is the same.

Guesses: rows of 8192 tokens, 128 a step, hold about its 1024 samples of some 750 tokens, or 512 of twice
that; three quarters of a row are kept for image tokens.
"""

from ml_collections import ConfigDict

from configs import backbones, base, small
from configs.eve_7b import CLIP_MEAN, CLIP_STD

VISUAL = ("patch_embed/.*", "layers/.*/visual/.*")


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "", "smoke" or "tiny"."""
    c = base.get_config()
    c.name, c.family = "evev2_7b", "evev2"
    m = c.model
    backbones.qwen2p5_7b(m)
    m.embed.kind, m.embed.rotate, m.embed.slots = "conv_gelu_conv", False, 2
    m.embed.patch_size, m.embed.merge_size, m.embed.hidden_size = 16, 2, 1024
    m.embed.pixel_mean, m.embed.pixel_std = CLIP_MEAN, CLIP_STD
    m.route.attention = m.route.mlp = m.route.norm = "modality"
    m.route.visual_share = 0.75
    backbones.full_size(c, "data/evev2", devices=128)  # its scripts' 16 machines of 8
    c.data.template, c.data.layout, c.data.resize = "evev2_plain", "evev2", "evev2"

    shared = dict(
        batch_size=128,
        row_tokens=8192,
        row_patches=6144,
        min_pixels=32**2,
        loss_reduction="token",
        min_lr_ratio=0.0,
        b1=0.9,
        b2=0.999,
        weight_decay=0.0,
    )
    small_images, large_images = dict(max_pixels=800**2), dict(max_pixels=1600**2)
    captions = ConfigDict({"captions": 1.0})
    c.stages = ("prealign", "visual", "visual_hd", "full", "sft")
    c.stage.prealign = base.stage(
        9_766,
        mixture=captions,
        trainable=("patch_embed/.*",),
        peak_lr=2e-4,
        warmup_steps=293,
        **small_images,
        **shared,
    )
    c.stage.visual = base.stage(
        28_320,
        mixture=captions,
        trainable=VISUAL,
        peak_lr=1e-4,
        warmup_steps=850,
        **small_images,
        **shared,
    )
    c.stage.visual_hd = base.stage(
        46_875,
        mixture=captions,
        trainable=VISUAL,
        peak_lr=5e-5,
        warmup_steps=1406,
        **large_images,
        **shared,
    )
    c.stage.full = base.stage(
        29_297,
        mixture=ConfigDict({"general_qa": 1.0}),
        template="evev2",
        peak_lr=2e-5,
        warmup_steps=879,
        **large_images,
        **shared,
    )
    c.stage.sft = base.stage(
        14_258,
        mixture=ConfigDict({"instructions": 1.0}),
        template="evev2",
        peak_lr=1e-5,
        warmup_steps=428,
        **large_images,
        **shared,
    )
    return small.shrink(c, arg)
