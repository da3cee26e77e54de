"""Small forms of every experiment: `:tiny`, toy width, and `:smoke`, also a short run of all its stages.

    python -m neo_jax.train --config=configs/neo_2b.py:smoke --workdir=DIR

Kinds, switches and stages stay; sizes, budgets and learning rates become those of the quickstart, on whose
data a smoke run trains. Nothing is learnt about the model's quality from either.
"""

from ml_collections import ConfigDict

from configs import base

TOKEN_SIDE = 16  # pixels per side of an image token
IMAGE_SIDE = 48  # pixels per side of an image: 3 x 3 tokens
TEXT_TOKENS = 96  # of a row that a cut leaves to text: more than its longest caption


def shrink(c: ConfigDict, arg: str) -> ConfigDict:
    """The config, in the form that the argument behind its file name asks for: "", "tiny" or "smoke"."""
    if arg not in ("", "tiny", "smoke"):
        raise ValueError(f"unknown argument {arg!r}; there are 'tiny' and 'smoke'")
    if arg:
        tiny(c)
    if arg == "smoke":
        smoke(c)
    return c


def tiny(c: ConfigDict) -> None:
    """Sizes: of the model, where grouped heads and a pre-buffer stay if it has them, of rows and images."""
    m = c.model
    m.embed.hidden_size = 64 if m.embed.hidden_size == m.hidden_size else 32
    m.hidden_size, m.mlp_size = 64, 128
    m.num_layers, m.pre_buffer = (3, 1) if m.pre_buffer else (2, 0)
    m.num_kv_heads = 4 if m.num_kv_heads == m.num_heads else 2
    m.num_heads, m.head_dim = 4, 16
    m.vocab_size = base.model().vocab_size + len(c.data.special_tokens)
    m.init_std = 0.08  # about 1 / sqrt(hidden_size), as 0.02 is at full width
    m.dtype = "float32"
    m.sliding_window = min(m.sliding_window, 64)
    m.embed.merge_size = min(m.embed.merge_size, 2)
    m.embed.patch_size = TOKEN_SIDE // m.embed.merge_size
    m.embed.tile_size = IMAGE_SIDE
    c.data.resize_canvas, c.data.resize_grid = (IMAGE_SIDE, IMAGE_SIDE), (IMAGE_SIDE // 2, TOKEN_SIDE // 2)
    c.mesh = base.mesh()
    row_tokens = 2 * TEXT_TOKENS + 2 * m.embed.slots
    m.route.visual_share = min(m.route.visual_share, 1 - TEXT_TOKENS / row_tokens)
    for name in c.stages:
        stage = c.stage[name]
        stage.batch_size, stage.accumulate = 4, 1
        stage.row_tokens, stage.row_patches = row_tokens, 72
        stage.min_pixels = stage.max_pixels = IMAGE_SIDE**2


def smoke(c: ConfigDict) -> None:
    """Of a tiny config: the quickstart's data, a few steps of each stage, a rate that suits its width."""
    c.data.path, c.data.recipe, c.data.template = base.data().path, base.data().recipe, "plain"
    c.eval.splits = c.eval.splits or ("val_render",)
    for name in c.stages:
        stage = c.stage[name]
        stage.mixture, stage.template = ConfigDict({"all": 1.0}), ""
        stage.steps, stage.warmup_steps = (20 if name == c.stages[-1] else 10), 5
        stage.peak_lr = 2e-3
    c.train.log_every, c.train.eval_every, c.train.save_every = 5, 0, 10
