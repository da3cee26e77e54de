"""Distillation: visual positions of the residual stream learn the features of a frozen teacher.

EVE's patch aligning layer (arXiv 2406.11832 section 3.3; specs: EVE 2.5). Taps of the stream, every few
layers down from the last, each with a LayerNorm and a matrix to the teacher's width. Per image token the last
layer's tap attends to the others; the result, added to a projection of the last layer, should point where the
teacher's feature points. Needs the batch field

    teacher_features  [B, P, C] float   for the cell of ratio x ratio image tokens (stage.teacher_ratio) whose
                                        upper left patch is row p of `patches`; other rows may hold anything

The teacher itself runs in the data pipeline, not here.

Dimensions: B rows, L positions, P patches, D width, C teacher channels, T taps, H heads of c channels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from neo_jax.errors import UserError
from neo_jax.model.linear import Linear
from neo_jax.model.mask import Batch
from neo_jax.model.norm import LayerNorm
from neo_jax.model.patches import image_of_patch
from neo_jax.params import stack, uniform

NUM_HEADS = 8
NORM_EPS = 1e-5
COSINE_EPS = 1e-8  # least norm of a vector in a cosine


class Tap(nnx.Module):
    """One layer of the stream in the teacher's width: LayerNorm, then a matrix."""

    def __init__(self, width: int, size: int):
        self.norm = LayerNorm(width, "embed", NORM_EPS)
        self.project = Linear({"embed": width}, {"teacher": size}, uniform(width**-0.5))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.project(self.norm(x))


class Distill(nnx.Module):
    """The head, and the loss; `config` is the whole config."""

    def __init__(self, config: ConfigDict):
        D, C = config.model.hidden_size, config.objectives.distill.teacher_size
        # The last layer (after the final norm) first, down to the embeddings (0) where the step meets them.
        self.layers = tuple(range(config.model.num_layers, -1, -config.objectives.distill.every))
        self.taps = stack(Tap(D, C), len(self.layers))
        self.last = Linear({"embed": D}, {"teacher": C}, uniform(D**-0.5), uniform(D**-0.5))
        self.fused = Linear({"teacher": C}, {"teacher": C}, uniform(C**-0.5), uniform(C**-0.5))

    def student(self, taps: Sequence[jax.Array]) -> jax.Array:
        """Predicted teacher features [..., C] of the stream at `layers`, T arrays [..., D]."""
        graph, params = nnx.split(self.taps)
        features = jax.vmap(lambda params, x: nnx.merge(graph, params)(x))(params, jnp.stack(taps))
        by_head = features.reshape(*features.shape[:-1], NUM_HEADS, -1)  # [T, ..., H, c]
        query, keys = by_head[0], by_head[1:]
        scores = jnp.einsum("...Hc,T...Hc->T...H", query, keys).astype(jnp.float32)
        weights = jax.nn.softmax(scores * features.shape[-1] ** -0.5, axis=0).astype(keys.dtype)
        fused = jnp.einsum("T...H,T...Hc->...Hc", weights, keys)
        return self.last(taps[0]) + self.fused(fused.reshape(features.shape[1:]))

    def weight(self, batch: Batch, stage: ConfigDict) -> jax.Array:
        """Images that have a cell: what `loss` sums over."""
        return (_cells(batch, stage.teacher_ratio).per_image > 0).sum().astype(jnp.float32)

    def vectors(self, batch: Batch, stage: ConfigDict) -> jax.Array:
        """Cells of all images."""
        return _cells(batch, stage.teacher_ratio).per_image.sum()

    def predict(self, batch: Batch, taps: Mapping[int, jax.Array], stage: ConfigDict) -> jax.Array:
        """Predicted teacher features [B, P, C], in the rows that the batch has the teacher's in.

        Args:
            taps: the stream [B, L, D] at `layers`.
            stage: its teacher_ratio is the image tokens per side of one cell; their vectors are averaged.
        """
        first = _cells(batch, stage.teacher_ratio).first
        positions = _position_of_patch(batch)[..., None]

        def pooled(x_BLD: jax.Array) -> jax.Array:
            x = jnp.take_along_axis(x_BLD, positions, axis=1)
            return _by_row(jax.ops.segment_sum, x, first) / stage.teacher_ratio**2

        return self.student([pooled(taps[layer]) for layer in self.layers])

    def loss(self, batch: Batch, taps: Mapping[int, jax.Array], stage: ConfigDict) -> jax.Array:
        """Sum over images of 1 - mean cosine(student, teacher) over the image's cells. float32.

        Cells that an odd grid leaves incomplete are left out, as pooling does; arguments as in `predict`.

        Raises:
            UserError: the batch has no teacher features, or of another width.
        """
        teacher = _teacher(batch, self.last.weight[...].shape[-1])
        cells = _cells(batch, stage.teacher_ratio)
        student = self.predict(batch, taps, stage).astype(jnp.float32)
        distance = 1 - _cosine(student, jnp.where(cells.whole[..., None], teacher, 1.0))
        total = _by_row(jax.ops.segment_sum, jnp.where(cells.whole, distance, 0.0), cells.image, extra=1)
        return (total / jnp.maximum(cells.per_image, 1)).sum()


class _Cells(NamedTuple):
    """How the patches [B, P] of rows make teacher cells of ratio x ratio image tokens."""

    first: jax.Array  # int32, the first patch of the cell that a patch belongs to
    whole: jax.Array  # bool, this patch is the first of a cell that has all its patches
    image: jax.Array  # int32, number of its image; 0 = not shown
    per_image: jax.Array  # [B, P + 1] int32, whole cells of each image number; 0 at number 0


def _cells(batch: Batch, ratio: int) -> _Cells:
    image = image_of_patch(batch)
    rows, columns = batch["patch_hw"][..., 0], batch["patch_hw"][..., 1]
    widths = _by_row(jax.ops.segment_max, columns + 1, image, extra=1)
    width = jnp.take_along_axis(widths, image, axis=1)
    own = jnp.arange(image.shape[1], dtype=jnp.int32)[None]
    first = jnp.where(image > 0, own - rows % ratio * width - columns % ratio, own)
    whole = _by_row(jax.ops.segment_sum, (image > 0).astype(jnp.int32), first) == ratio**2
    return _Cells(first, whole, image, _by_row(jax.ops.segment_sum, whole.astype(jnp.int32), image, extra=1))


def _by_row(reduce: Callable, x: jax.Array, segments_BP: jax.Array, extra: int = 0) -> jax.Array:
    """A segment reduction in every row: x [B, P, ...] -> [B, P + extra, ...]."""
    num = x.shape[1] + extra
    return jax.vmap(lambda x, segments: reduce(x, segments, num_segments=num))(x, segments_BP)


def _position_of_patch(batch: Batch) -> jax.Array:
    """Where each row of `patches` is shown, [B, P] int32; 0 for those that are not."""
    index = batch["patch_index"]
    B, L = index.shape
    P = batch["patches"].shape[1]
    positions = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
    # Positions without a patch write to a column of their own, which is cut off.
    columns = jnp.where(index >= 0, index, P)
    return jnp.zeros((B, P + 1), jnp.int32).at[jnp.arange(B)[:, None], columns].set(positions)[:, :P]


def _teacher(batch: Batch, size: int) -> jax.Array:
    if "teacher_features" not in batch:
        raise UserError(
            "the objective distill needs the batch field teacher_features, which the data does not have; "
            "set the stage's objectives.distill to 0 or build the data with a teacher's features"
        )
    teacher = batch["teacher_features"]
    if teacher.shape[-1] != size:
        raise UserError(
            f"objectives.distill.teacher_size is {size}, but the data's teacher_features have "
            f"{teacher.shape[-1]} channels"
        )
    chex.assert_shape(teacher, (*batch["patches"].shape[:2], size))
    return teacher.astype(jnp.float32)


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    def length(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1), COSINE_EPS**2))

    return (a * b).sum(-1) / (length(a) * length(b))
