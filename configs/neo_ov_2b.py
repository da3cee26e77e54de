"""NEO-ov-2B (arXiv 2605.28820): NEO-2B for images, several images and video, with its own recipe.

    python -m neo_jax.train --config=configs/neo_ov_2b.py --workdir=DIR --config.data.path=DATA

`:smoke` and `:tiny` behind the file name give its small forms (configs/small.py).

Model: as configs/neo_2b.py. That its weights have the same sizes is confirmed by third parties who ran them
(40 layers); whether its code differs from NEO's in anything else could not be checked. Stages, from the
paper: 20 M pairs on a pre-buffer from NEO and a language model from Qwen3; 60 M single images, pairs of
images and videos mixed 2:4:1:1 with text; 6 M instructions. Rates, pixels, cosine and a warm-up of 1 % are
the paper's.

Guesses: steps and rows per step, from those amounts of data and NEO's samples per step (2560, 1200, 650);
AdamW and floors of the rate as in NEO; 36,864 tokens a row from the second stage on, which holds a picture of
4096^2 pixels and is the longest context of the paper, where it grows to that from 16k.
"""

from ml_collections import ConfigDict

from configs import backbones, base, neo_2b, small


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "", "smoke" or "tiny"."""
    c = base.get_config()
    c.name = "neo_ov_2b"
    backbones.qwen3_1p7b(c.model)
    c.model.tie_embeddings = False
    neo_2b.neo(c.model, pre_buffer=12)
    backbones.full_size(c, "data/neo_ov", devices=128)
    c.data.template = "chatml"
    c.data.number_images = True
    shared = dict(
        min_pixels=256**2, b1=0.9, b2=0.999, adam_eps=1e-8, weight_decay=0.01, clip_norm=1.0, min_lr_ratio=0.1
    )
    c.stages = ("pretrain", "midtrain", "sft")
    c.stage.pretrain = base.stage(
        7_800,
        mixture=ConfigDict({"captions": 0.7, "text": 0.3}),
        trainable=neo_2b.NEW_PARTS,
        batch_size=256,
        accumulate=2,
        row_tokens=8192,
        row_patches=6144,
        max_pixels=1024**2,
        peak_lr=2e-4,
        warmup_steps=78,
        **shared,
    )
    c.stage.midtrain = base.stage(
        50_000,
        mixture=ConfigDict({"text": 2.0, "images": 4.0, "multi_image": 1.0, "video": 1.0}),
        batch_size=128,
        row_tokens=36864,
        row_patches=32768,
        max_pixels=4096**2,
        peak_lr=5e-5,
        warmup_steps=500,
        **shared,
    )
    c.stage.sft = base.stage(
        9_200,
        mixture=ConfigDict({"images": 4.0, "multi_image": 1.0, "video": 1.0}),
        batch_size=128,
        row_tokens=36864,
        row_patches=32768,
        max_pixels=4096**2,
        peak_lr=5e-5,
        warmup_steps=92,
        **shared,
    )
    return small.shrink(c, arg)
