"""Mono-InternVL-2B (arXiv 2410.08202): InternLM2-1.8B with a second feed-forward network for image tokens.

    python -m neo_jax.train --config=configs/mono_internvl_2b.py --workdir=DIR --config.data.path=DATA

`:smoke` and `:tiny` behind the file name give its small forms (configs/small.py).

Model: the released code; 3.11 B parameters, as its files have, of which a token uses 1.9 B ("1.8 B" after its
language model). Image tokens take their own network while a prompt is read; every generated token is text.
Stages, the paper's endogenous visual pre-training: 922 M noisy and 258 M synthetic captions with a frozen
language model, 143 M task samples that also train the attention, then 7 M instructions on everything. Tuning
values (4e-5, 0.01, 3 %, 128 samples a step, six tiles and a thumbnail of 448 pixels) are the released
script's.

Guesses: rates, steps and rows per step of the first three stages, for which no figures were found; the 922 M
and which parts train in the third are from second-hand notes; three quarters of a row are kept for image
tokens.
"""

from ml_collections import ConfigDict

from configs import backbones, base, small

VISUAL = ("patch_embed/.*", "layers/mlp/visual/.*")


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "", "smoke" or "tiny"."""
    c = base.get_config()
    c.name, c.family = "mono_internvl_2b", "mono_internvl"
    m = c.model
    backbones.internlm2_1p8b(m)
    m.vocab_size = 92553  # nine special tokens more than InternLM2
    m.embed.kind, m.embed.tile_size = "unshuffle_mlp", 448
    m.embed.patch_size, m.embed.merge_size, m.embed.hidden_size = 14, 2, 1024
    m.route.mlp, m.route.visual_share = "modality", 0.75
    backbones.full_size(c, "data/mono_internvl", devices=64)
    c.data.template, c.data.layout, c.data.resize = "internlm2", "internvl", "internvl"

    shared = dict(
        row_tokens=8192,
        row_patches=6144,
        min_pixels=448**2,
        loss_reduction="token",
        b1=0.9,
        b2=0.999,
        weight_decay=0.01,
    )
    one_tile = dict(batch_size=512, accumulate=8, max_pixels=448**2, min_lr_ratio=0.1)
    c.stages = ("concepts", "semantics", "alignment", "sft")
    c.stage.concepts = base.stage(
        60_000,
        mixture=ConfigDict({"noisy_captions": 1.0}),
        trainable=VISUAL,
        peak_lr=2e-4,
        warmup_steps=600,
        **one_tile,
        **shared,
    )
    c.stage.semantics = base.stage(
        17_000,
        mixture=ConfigDict({"synthetic_captions": 1.0}),
        trainable=VISUAL,
        peak_lr=1e-4,
        warmup_steps=170,
        **one_tile,
        **shared,
    )
    c.stage.alignment = base.stage(
        20_000,
        mixture=ConfigDict({"tasks": 1.0}),
        trainable=(*VISUAL, "layers/attention/.*"),
        peak_lr=5e-5,
        warmup_steps=200,
        **(one_tile | dict(max_pixels=6 * 448**2)),
        **shared,
    )
    c.stage.sft = base.stage(
        54_700,
        mixture=ConfigDict({"instructions": 1.0}),
        batch_size=64,
        max_pixels=6 * 448**2,
        peak_lr=4e-5,
        min_lr_ratio=0.0,
        warmup_steps=1641,
        **shared,
    )
    return small.shrink(c, arg)
