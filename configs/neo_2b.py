"""NEO-2B (arXiv 2510.14979): Qwen3-1.7B behind a pre-buffer of 12 new layers, in the paper's three stages.

    python -m neo_jax.train --config=configs/neo_2b.py --workdir=DIR --config.data.path=DATA

`:smoke` and `:tiny` behind the file name give its small forms (configs/small.py).

Model: every size is the published code's or Qwen3's; 2.897 B parameters, as the released files have, with a
head of its own. Stages: table 5 of the paper (steps, rates, schedules, warm-up, pixels, sample length, share
of text). The released scripts differ: b2 0.95; rates 8e-4, 5e-5, 6e-5; floors 0.1, 0.2, 0.1; 200k, 50k, 4.5k
steps; at most 2048^2, 4096^2 and 4096^2 pixels. Gradient clipping, the "square" loss reduction and the rotary
base of the patch embedding come from the code.

Guesses: rows are 8192 tokens long, the paper's longest sample, and batch_size is so many of them that they
hold about the published number of samples (2560, 1200 and 650, at 600 to 1,500 tokens each); 6,144 of a row's
tokens may be patches; the mixture of stage `sft`, for which no share of text is given. What the sources hold
is listed in the paper's appendix; they are named here after their kind.
"""

from ml_collections import ConfigDict

from configs import backbones, base, small

# What the first stage trains: all that is new, and nothing that comes from the language model.
NEW_PARTS = (
    "patch_embed/.*",
    "pre_buffer/.*",
    "layers/attention/qkv/[qk]_hw/weight",
    "layers/attention/qkv/[qk]_norm_[hw]/weight",
)


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "", "smoke" or "tiny"."""
    c = base.get_config()
    c.name = "neo_2b"
    backbones.qwen3_1p7b(c.model)
    c.model.tie_embeddings = False
    neo(c.model, pre_buffer=12)
    stages(c)
    return small.shrink(c, arg)


def neo(m: ConfigDict, pre_buffer: int) -> None:
    """Makes a backbone NEO: layers in front, patches of 32 x 32 pixels, positions (t, h, w), image masks."""
    m.num_layers, m.pre_buffer = m.num_layers + pre_buffer, pre_buffer
    m.mask = "image_bidirectional"
    m.coords.kind, m.coords.rope_theta_hw = "thw", 1e4
    m.embed.kind, m.embed.patch_size, m.embed.merge_size, m.embed.hidden_size = "conv_gelu_conv", 16, 2, 1024
    m.embed.rotate, m.embed.rope_theta = True, 1e4


def stages(c: ConfigDict) -> None:
    """Data, devices and the paper's stages, which both sizes share."""
    backbones.full_size(c, "data/neo", devices=128)  # the paper's 16 machines of 8
    budgets = dict(row_tokens=8192, row_patches=6144, min_pixels=256**2)
    adamw = dict(b1=0.9, b2=0.999, adam_eps=1e-8, weight_decay=0.01, clip_norm=1.0)
    c.stages = ("pretrain", "midtrain", "sft")
    c.stage.pretrain = base.stage(
        190_000,
        mixture=ConfigDict({"captions": 0.7, "text": 0.3}),
        trainable=NEW_PARTS,
        batch_size=256,
        accumulate=2,
        max_pixels=1024**2,
        peak_lr=8e-4,
        min_lr_ratio=0.05,
        warmup_steps=2000,
        **budgets,
        **adamw,
    )
    c.stage.midtrain = base.stage(
        50_000,
        mixture=ConfigDict({"midtrain": 0.7, "text": 0.3}),
        batch_size=256,
        accumulate=2,
        max_pixels=2048**2,
        peak_lr=4e-5,
        min_lr_ratio=0.1,
        warmup_steps=200,
        **budgets,
        **adamw,
    )
    c.stage.sft = base.stage(
        6_000,
        mixture=ConfigDict({"instructions": 1.0}),
        batch_size=128,
        max_pixels=2048**2,
        peak_lr=5e-5,
        min_lr_ratio=0.0,
        warmup_steps=200,
        **budgets,
        **adamw,
    )
