"""HoVLE (arXiv 2412.16158, 2.6 B): InternLM2-chat-1.8B behind eight layers that embed words and images.

    python -m neo_jax.train --config=configs/hovle_2b.py --workdir=DIR --config.data.path=DATA

`:smoke` and `:tiny` behind the file name give its small forms (configs/small.py).

Model: the released code; eight layers shaped as the language model's, tiles of 448 pixels, no norm before the
MLP. The 2,606,327,808 parameters of its files hold two that nothing reads, the language model's own word
embeddings and a class vector with its position; 2,416,775,168 are left. Stages: amounts of data (550 M, 50 M,
7 M samples) and what trains are the paper's.

Its first stage distils: the eight layers learn a vision model's features and the language model's word
embeddings from unpaired images and texts. Here that is an objective, not a part of the model; with the
captions' loss alone stage `embedding` trains the same parameters. Guesses: all rates, steps and rows per
step.
"""

from ml_collections import ConfigDict

from configs import backbones, base, small

EMBEDDING = ("token_embed", "patch_embed/.*", "pre_buffer/.*")


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "", "smoke" or "tiny"."""
    c = base.get_config()
    c.name, c.family = "hovle_2b", "hovle"
    m = c.model
    backbones.internlm2_1p8b(m)
    m.vocab_size = 92553  # nine special tokens more than InternLM2
    m.num_layers, m.pre_buffer = m.num_layers + 8, 8
    m.embed.kind, m.embed.norm, m.embed.tile_size = "unshuffle_mlp", False, 448
    m.embed.patch_size, m.embed.merge_size, m.embed.hidden_size = 14, 2, 2048
    backbones.full_size(c, "data/hovle", devices=64)
    c.data.template, c.data.layout, c.data.resize = "internlm2", "internvl", "internvl"

    shared = dict(
        row_tokens=8192,
        row_patches=7168,
        min_pixels=448**2,
        loss_reduction="token",
        b1=0.9,
        b2=0.999,
        weight_decay=0.01,
    )
    one_tile = dict(batch_size=256, accumulate=4, max_pixels=448**2)
    c.stages = ("embedding", "alignment", "sft")
    c.stage.embedding = base.stage(
        70_000,
        mixture=ConfigDict({"images": 0.5, "text": 0.5}),
        trainable=EMBEDDING,
        peak_lr=2e-4,
        warmup_steps=700,
        **one_tile,
        **shared,
    )
    c.stage.alignment = base.stage(
        7_000,
        mixture=ConfigDict({"captions": 1.0}),
        trainable=EMBEDDING,
        peak_lr=1e-4,
        warmup_steps=70,
        **one_tile,
        **shared,
    )
    c.stage.sft = base.stage(
        54_700,
        mixture=ConfigDict({"instructions": 1.0}),
        batch_size=64,
        max_pixels=6 * 448**2,
        peak_lr=4e-5,
        min_lr_ratio=0.0,
        warmup_steps=547,
        **shared,
    )
    return small.shrink(c, arg)
