"""Fuyu-8B (Adept, 2023): Persimmon-8B that reads 30 x 30 pixel patches through one matrix.

    python -m neo_jax.train --config=configs/fuyu_8b.py --workdir=DIR --config.data.path=DATA

`:smoke` and `:tiny` behind the file name give its small forms (configs/small.py).

Model: its published configuration and code in `transformers`; 9.41 B parameters. How and on what it was
trained is unpublished: the one stage, fine-tuning on instructions with everything trainable, is a guess from
first to last, made of values that suit other models of this size. Rows of 16,384 tokens are its longest
context.
"""

from ml_collections import ConfigDict

from configs import backbones, base, small


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "", "smoke" or "tiny"."""
    c = base.get_config()
    c.name, c.family = "fuyu_8b", "fuyu"
    m = c.model
    backbones.persimmon_8b(m)
    m.embed.kind, m.embed.bias = "linear_patch", True
    m.embed.patch_size, m.embed.merge_size = 30, 1
    m.embed.pixel_mean = m.embed.pixel_std = (0.5, 0.5, 0.5)
    backbones.full_size(c, "data/fuyu", devices=16)
    c.data.template, c.data.layout, c.data.resize = "fuyu", "fuyu", "fuyu"
    c.data.special_tokens = ("|SPEAKER|", "|NEWLINE|")  # its own vocabulary has them
    c.stages = ("sft",)
    c.stage.sft = base.stage(
        5_000,
        mixture=ConfigDict({"instructions": 1.0}),
        batch_size=16,
        row_tokens=16384,
        row_patches=12288,
        min_pixels=30**2,
        max_pixels=1080 * 1920,
        loss_reduction="token",
        peak_lr=1e-5,
        min_lr_ratio=0.0,
        warmup_steps=150,
        b1=0.9,
        b2=0.999,
        weight_decay=0.0,
    )
    return small.shrink(c, arg)
