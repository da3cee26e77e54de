"""The grids of scaling-law work, each a function from a base config to cells.

All of them vary the last stage of the base config and leave the stages before it alone; a base with one stage
is what most want. Learning rates, widths and depths of each model are the caller's `sizes`: laws are only as
good as the rates that their models were trained with, so give each its own.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict, FrozenConfigDict

from neo_jax import flops, objectives, optim, params as params_lib
from neo_jax.errors import UserError
from neo_jax.sweep import cells
from neo_jax.sweep.cells import Cell, Change


def size(name: str, *, width: int, layers: int, heads: int, peak_lr: float, pre_buffer: int = 0) -> Change:
    """A model size: heads of width / heads channels, as many key/value heads, SwiGLU of width 8/3, rounded to
    8.
    """
    if width % (2 * heads):
        raise UserError(f"size {name}: width {width} is not divisible by 2 * {heads} heads")
    values = {
        "hidden_size": width,
        "num_layers": layers,
        "pre_buffer": pre_buffer,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "mlp_size": 8 * round(width / 3),
        "init_std": round(width**-0.5, 4),
    }
    return Change(name, {f"model.{field}": value for field, value in values.items()} | {"*.peak_lr": peak_lr})


def step_flops(config: ConfigDict | FrozenConfigDict, document_tokens: float) -> float:
    """FLOPs of a step of the last stage whose rows are full and whose text is all supervised.

    Nominal: what plans a sweep before there is data. Runs log what they really take, 10 to 20 % less.

    Args:
        document_tokens: a document's tokens, image included; attention counts pairs inside documents.
    """
    stage = config.stage[config.stages[-1]]
    specs = params_lib.abstract(objectives.build(config))
    tokens = stage.batch_size * stage.row_tokens
    patches = min(stage.batch_size * stage.row_patches, tokens)
    counts = {
        "tokens": tokens,
        "visual_tokens": patches,
        "patches": patches,
        "supervised_tokens": tokens - patches,
        "attended_pairs": tokens * document_tokens / 2,
    }
    return flops.train_flops(config.model, specs, params_lib.select(specs, stage.trainable), counts)


def isoflop(
    base: ConfigDict, sizes: Sequence[Change], budgets: Sequence[float], *, document_tokens: float
) -> list[Cell]:
    """Every size at every budget of training FLOPs: the valleys of approach 2, and points for approach 3.

    With schedule "wsd" a size's smaller budgets are branches of its largest.

    Raises:
        UserError: a budget is not positive, or gives a size fewer steps than its warm-up.
    """
    if not budgets or not all(math.isfinite(budget) and budget > 0 for budget in budgets):
        raise UserError(
            f"isoflop: budgets are positive numbers of FLOPs, got {', '.join(f'{b:g}' for b in budgets)}"
        )
    lengths = []
    for each in sizes:
        [cell] = _cells(base, [each])
        per_step = step_flops(cell.config, document_tokens)
        lengths.append(
            [
                (f"C{budget:.2g}".replace("+", ""), round(budget / per_step), budget)
                for budget in sorted(budgets)
            ]
        )
    return _by_length(base, sizes, lengths)


def cooldowns(base: ConfigDict, sizes: Sequence[Change], steps: Sequence[int]) -> list[Cell]:
    """N x D: every size for every number of steps, all but the longest as cooldowns of the longest.

    Raises:
        UserError: the last stage's schedule is not "wsd", or a number of steps is below the warm-up.
    """
    if base.stage[base.stages[-1]].schedule != "wsd":
        raise UserError(
            f'cooldowns: stage.{base.stages[-1]}.schedule must be "wsd", so that runs share their trunk'
        )
    lengths = [(f"D{count}", count, None) for count in sorted(steps)]
    return _by_length(base, sizes, [lengths] * len(sizes))


def lr_batch(base: ConfigDict, rates: Sequence[float], batch_sizes: Sequence[int]) -> list[Cell]:
    """Learning rate x batch size at one number of tokens: steps fall as the batch grows, and the warm-up with
    them.
    """
    stage = base.stage[base.stages[-1]]
    batches = []
    for batch in batch_sizes:
        ratio = stage.batch_size / batch
        values = {
            "*.batch_size": batch,
            "*.steps": max(1, round(stage.steps * ratio)),
            "*.warmup_steps": round(stage.warmup_steps * ratio),
        }
        batches.append(Change(f"b{batch}", values))
    return _cells(base, cells.product(batches, cells.axis("*.peak_lr", rates, "lr")))


def resolutions(
    base: ConfigDict, sides: Sequence[int], mixes: Mapping[str, Mapping[str, float]]
) -> list[Cell]:
    """Resolution and share of image tokens: images of side x side pixels, in mixtures of sources with images
    and without.

    Both together give the share; the table of results has `image_tokens` and `text_tokens` of each run.
    """
    pixels = [
        Change(f"px{side}", {"*.min_pixels": side * side, "*.max_pixels": side * side}, arm=f"px{side}")
        for side in sides
    ]
    return mixtures(base, mixes, pixels)


def mixtures(
    base: ConfigDict, mixes: Mapping[str, Mapping[str, float]], others: Sequence[Change] = (Change("", {}),)
) -> list[Cell]:
    """Named mixtures of sources, each an arm with a law of its own, times sizes or lengths."""
    arms = [Change(name, {"*.mixture": dict(weights)}, arm=name) for name, weights in mixes.items()]
    return _cells(base, cells.product(arms, others))


def native_and_modular(base: ConfigDict, others: Sequence[Change] = (Change("", {}),)) -> list[Cell]:
    """Two arms that start from one language model (config.init): all trains, or only what stands in front of
    it.

    A modular model has an image encoder that was trained without the language model. None of the config's
    kinds is
    such an encoder, so there is no real one to compare with. What stands here is its other half: the language
    model is frozen and meets images through parts of their own (patch embedding and pre-buffer). It tells
    what is lost by not training the language model on images; not what a pre-trained encoder would bring.

    Raises:
        UserError: the base starts from nothing, or has no pre-buffer.
    """
    if not base.init:
        raise UserError(
            "native_and_modular: config.init must name the language model that both arms start from"
        )
    if not base.model.pre_buffer:
        raise UserError(
            "native_and_modular: model.pre_buffer must be above 0; it stands in front of the frozen model"
        )
    arms = [
        Change("native", {"*.trainable": (".*",)}, arm="native"),
        Change("modular", {"*.trainable": ("patch_embed/.*", "pre_buffer/.*")}, arm="modular"),
    ]
    return _cells(base, cells.product(arms, others))


def experts_and_dense(base: ConfigDict, others: Sequence[Change] = (Change("", {}),)) -> list[Cell]:
    """Dense, experts by modality (hard routing of MLP, or of MLP, attention and norms as in EVEv2), and
    learned experts (model.experts, balanced with the weight 0.01 of Shukor et al., who take one of 8).

    A token uses as many weights in all arms, and a step takes as many FLOPs, but for the learned router, a
    column for each expert; experts have more in all (`n_active` and `n_total` of the table).
    """
    balanced = base.stage[base.stages[-1]].objectives.to_dict() | {"balance": 0.01}
    arms = [
        Change(
            "dense", {f"model.route.{part}": "shared" for part in ("mlp", "attention", "norm")}, arm="dense"
        ),
        Change("experts_mlp", {"model.route.mlp": "modality"}, arm="experts_mlp"),
        Change(
            "experts_all",
            {f"model.route.{part}": "modality" for part in ("mlp", "attention", "norm")},
            arm="experts_all",
        ),
        Change("experts_topk", {"model.route.mlp": "topk", "*.objectives": balanced}, arm="experts_topk"),
    ]
    return _cells(base, cells.product(arms, others))


def _by_length(
    base: ConfigDict, sizes: Sequence[Change], lengths: Sequence[Sequence[tuple[str, int, float | None]]]
) -> list[Cell]:
    """For each size its runs (name, steps, budget), longest first; under "wsd" the others branch from it."""
    stage = base.stage[base.stages[-1]]
    before = sum(base.stage[name].steps for name in base.stages[:-1])
    made = []
    for each, runs in zip(sizes, lengths, strict=True):
        for name, steps, _ in runs:
            if steps <= stage.warmup_steps:
                raise UserError(
                    f"cell {each.name}-{name}: {steps} steps, not more than the warm-up of "
                    f"{stage.warmup_steps}; "
                    "raise the budget or take the size out"
                )
        changes = [
            cells.product([each], [Change(name, {"*.steps": steps}, budget=budget)])[0]
            for name, steps, budget in runs
        ]
        *shorter, longest = _cells(base, changes)
        if stage.schedule != "wsd":
            made += [*shorter, longest]
            continue
        branches = [
            dataclasses.replace(cell, trunk=longest.name, branch_step=before + _cooldown_start(cell.config))
            for cell in shorter
        ]
        steps_kept = tuple(sorted({branch.branch_step for branch in branches}))
        trunk_change = dataclasses.replace(
            changes[-1], values={**changes[-1].values, "train.keep_steps": steps_kept}
        )
        made += [*_cells(base, [trunk_change]), *branches]
    return made


def _cooldown_start(config: FrozenConfigDict) -> int:
    return optim.cooldown_start(config.stage[config.stages[-1]])


def _cells(base: ConfigDict, changes: Sequence[Change]) -> list[Cell]:
    """Cells of the base; "*." stands for its last stage."""
    last = f"stage.{base.stages[-1]}."
    spelt = [
        dataclasses.replace(
            change,
            values={
                last + field[2:] if field.startswith("*.") else field: value
                for field, value in change.values.items()
            },
        )
        for change in changes
    ]
    return cells.build(base, spelt)
