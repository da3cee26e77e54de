"""EVE's patch embedding layer: attention inside each token, a class vector per image (specs: EVE 2.3).

Dimensions: P image tokens of m * m = 4 patches, C channels, H heads of c channels, I images of a row.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from data_pipelines import schema
from neo_jax.model.linear import Linear, on_last
from neo_jax.model.mask import Batch
from neo_jax.model.norm import LayerNorm
from neo_jax.model.patches import Pixels, gelu, image_of_patch, show
from neo_jax.params import normal, uniform, vector

NUM_HEADS = 8
NORM_EPS = 1e-5
CLASS, ROW = range(2)  # numbers of its slots: class vector before an image, marker after each of its rows


class Pool(nnx.Module):
    """Multi-head attention of one query over a group: x + W a + b, scores scaled by C^-1/2 (not by head)."""

    def __init__(self, size: int):
        bound = uniform(1 / math.sqrt(size))
        self.q_norm, self.kv_norm = (LayerNorm(size, "vision", NORM_EPS) for _ in range(2))
        self.q, self.k, self.v = (Linear({"vision": size}, {"vision": size}, bound) for _ in range(3))
        self.o = Linear({"vision": size}, {"vision": size}, bound, bound)

    def project(self, query: jax.Array, group: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values with heads: [..., C] -> [..., H, c]."""
        query, group = self.q_norm(query), self.kv_norm(group)
        return _heads(self.q(query)), _heads(self.k(group)), _heads(self.v(group))

    def out(self, query: jax.Array, attended: jax.Array) -> jax.Array:
        return query + self.o(attended.reshape(*attended.shape[:-2], -1))


class LocalAttention(nnx.Module):
    """conv p x p -> each token's patches attended by their mean -> class vector over the image -> MLP.

    Its two slots are its own: the class vector depends on the image, the row marker does not; both pass
    through the MLP with the patches.
    """

    def __init__(self, config: ConfigDict):
        embed = config.embed
        self.pixels, self.dtype = Pixels.of(embed), jnp.dtype(config.dtype)
        C, D = embed.hidden_size, config.hidden_size
        self.patch = Linear({"pixels": self.pixels.size}, {"vision": C}, uniform(self.pixels.size**-0.5))
        self.local, self.over_image = Pool(C), Pool(C)
        self.class_vector = vector((C,), ("vision",), normal(1.0))
        self.row_vector = vector((C,), ("vision",), normal(1.0))
        up_init, out_init = uniform(C**-0.5), uniform(D**-0.5)
        self.up = Linear({"vision": C}, {"mlp": D}, up_init, up_init)
        self.out = Linear({"mlp": D}, {"embed": D}, out_init, out_init)

    def convolve(self, batch: Batch) -> jax.Array:
        """[B, P, m * m, C]."""
        return self.patch(self.pixels(batch["patches"]).astype(self.dtype))

    def pool_patches(self, features_BPmC: jax.Array) -> jax.Array:
        """One vector per token, [B, P, C]: its patches, attended by their mean."""
        mean = features_BPmC.mean(axis=2)
        q, k, v = self.local.project(mean, features_BPmC)
        scores = jnp.einsum("BPHc,BPmHc->BPHm", q, k).astype(jnp.float32) * mean.shape[-1] ** -0.5
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return self.local.out(mean, jnp.einsum("BPHm,BPmHc->BPHc", weights, v))

    def pool_images(self, x_BPC: jax.Array, image_of_patch_BP: jax.Array) -> jax.Array:
        """The class vector of every image of a row: [B, P + 1, C], by image number."""
        P, C = x_BPC.shape[1:]
        query = jnp.broadcast_to(self.class_vector[...].astype(x_BPC.dtype), (1, 1, C))
        q, k, v = self.over_image.project(query, x_BPC)
        scores = (q * k).sum(-1).astype(jnp.float32) * C**-0.5  # [B, P, H]

        def by_image(reduce: Callable, x: jax.Array) -> jax.Array:
            return jax.vmap(lambda x, i: reduce(x, i, num_segments=P + 1))(x, image_of_patch_BP)

        def of_image(x: jax.Array) -> jax.Array:
            return jax.vmap(lambda x, i: x[i])(x, image_of_patch_BP)

        highest = jax.lax.stop_gradient(by_image(jax.ops.segment_max, scores))
        exponents = jnp.exp(scores - of_image(highest))
        weights = (exponents / of_image(by_image(jax.ops.segment_sum, exponents))).astype(v.dtype)
        attended = by_image(jax.ops.segment_sum, weights[..., None] * v)
        return self.over_image.out(query, attended)

    def before_projector(self, batch: Batch, x_BPC: jax.Array) -> jax.Array:
        """Patch, class and row vectors at their positions, [B, L, C]."""
        classes = self.pool_images(x_BPC, image_of_patch(batch))
        classes = jax.vmap(lambda x, i: x[i])(classes, batch["image_ids"])
        row = on_last(self.row_vector[...], classes)
        slots = jnp.where((batch["tokens"] == CLASS)[..., None], classes, row)
        return jnp.where((batch["kinds"] == schema.SLOT)[..., None], slots, show(x_BPC, batch))

    def __call__(self, batch: Batch) -> jax.Array:
        x = self.before_projector(batch, self.pool_patches(self.convolve(batch)))
        return self.out(gelu(self.up(x)))


def _heads(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], NUM_HEADS, -1)
