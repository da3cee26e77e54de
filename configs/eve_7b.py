"""EVE-7B (arXiv 2406.11832): Vicuna-7B behind a patch embedding that attends inside each token.

    python -m neo_jax.train --config=configs/eve_7b.py --workdir=DIR --config.data.path=DATA

`:smoke` and `:tiny` behind the file name give its small forms (configs/small.py), `:aligned` the full recipe
with the alignment of image tokens to CLIP, for data that has the teacher's features.

Model: the released code and Vicuna-7B-v1.5; 6.74 B parameters and 9.0 M + 21.0 M in front of them. Stages:
the released scripts (samples per step, rates, warm-up shares, pixels) and the amounts of data of its README:
16 M, 33 M and 665 K samples. The scripts align to CLIP in all three stages, with weight 1. EVE-HD:
--config.stage.sft.max_pixels=1806336, 14,000 steps and, aligned, teacher_ratio 2.

Guesses: EVE does not pack; 64 and 32 rows of 4096 tokens hold about its 512 and 128 samples (24 x 18 tokens
and a caption are some 560).
"""

from ml_collections import ConfigDict

from configs import backbones, base, small

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "", "smoke", "tiny" or "aligned"."""
    c = base.get_config()
    c.name, c.family = "eve_7b", "eve"
    m = c.model
    backbones.llama2_7b(m)
    m.embed.kind = "local_attention"
    m.embed.patch_size, m.embed.merge_size, m.embed.hidden_size = 14, 2, 1024
    m.embed.pixel_mean, m.embed.pixel_std = CLIP_MEAN, CLIP_STD
    backbones.full_size(c, "data/eve", devices=32)  # its scripts' four machines of 8
    c.data.template, c.data.layout, c.data.resize = "eve_plain", "eve", "eve"

    shared = dict(
        batch_size=64,
        row_tokens=4096,
        row_patches=3072,
        min_pixels=28**2,
        max_pixels=672**2,
        loss_reduction="token",
        min_lr_ratio=0.0,
        b1=0.9,
        b2=0.999,
        weight_decay=0.0,
    )
    c.stages = ("prealign", "pretrain", "sft")
    c.stage.prealign = base.stage(
        31_300,
        mixture=ConfigDict({"captions": 1.0}),
        trainable=("patch_embed/.*",),
        peak_lr=4e-4,
        warmup_steps=939,
        **shared,
    )
    c.stage.pretrain = base.stage(
        64_500, mixture=ConfigDict({"captions": 1.0}), peak_lr=4e-5, warmup_steps=645, **shared
    )
    c.stage.sft = base.stage(
        5_200,
        mixture=ConfigDict({"instructions": 1.0}),
        template="vicuna",
        peak_lr=2e-5,
        warmup_steps=52,
        **(shared | dict(batch_size=32)),
    )
    if arg == "aligned":
        align(c)
        return c
    return small.shrink(c, arg)


def align(c: ConfigDict) -> None:
    """Adds the patch aligning layer (neo_jax/objectives/distill.py): 43.1 M parameters that only train."""
    c.stage.prealign.trainable += ("objectives/distill/.*",)
    for name in c.stages:
        c.stage[name].objectives.distill = 1.0
