"""Attention over intervals by kernels that others ship for GPUs.

cuDNN's are told what a packed row with images attends by a dense mask, the only form they take: they compute
all L x S pairs. Tokamax's, in Pallas' Mosaic dialect for Hopper and Blackwell, take the intervals themselves,
and skip the blocks outside them in forward, not in backward. `auto` takes neither: kernels/triton.py skips in
both.

Dimensions: as in chunked.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from absl import flags

from neo_jax.errors import UserError
from neo_jax.model.mask import Intervals, dense

MOSAIC_QUERIES = 128  # of a block of Tokamax's: it wants a whole number of them


def cudnn(
    q_BLNd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    intervals: Intervals,
    scale: float,
    implementation: str = "cudnn",
) -> jax.Array:
    """The same function as `reference`, in bfloat16: [B, L, N, d_v] in the dtype of v, softmax in float32.

    Query and value channels may differ in number: values are padded. A query with an empty interval gives
    zeros. L and S are even. `implementation` is jax.nn's: "xla" computes the same on a CPU, for tests.

    Raises:
        UserError: there is no cuDNN, or it has no kernel for these shapes on this GPU.
    """
    S, d_v = k_BSKd.shape[1], v_BSKd.shape[-1]
    intervals, live = _all_live(intervals, S)
    v = jnp.pad(v_BSKd, [(0, 0)] * 3 + [(0, q_BLNd.shape[-1] - d_v)])
    with _unavailable("cudnn"):
        out = jax.nn.dot_product_attention(
            q_BLNd, k_BSKd, v, mask=dense(intervals, S)[:, None], scale=scale, implementation=implementation
        )
    return jnp.where(live[..., None, None], out[..., :d_v], 0)


def mosaic(
    q_BLNd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    intervals: Intervals,
    scale: float,
    implementation: str = "mosaic_gpu",
) -> jax.Array:
    """The same function as `reference`, in bfloat16: [B, L, N, d_v] in the dtype of v, softmax in float32.

    Query and value channels may differ in number. A query with an empty interval gives zeros.
    `implementation` is Tokamax's: "xla" computes the same on a CPU, for tests.

    Raises:
        UserError: Tokamax is not installed, or has no kernel for this GPU.
    """
    # Tokamax's public function takes no intervals, its implementations do.
    with _unavailable("mosaic"):
        from tokamax._src.ops.attention.api import IMPLEMENTATIONS
        from tokamax._src.ops.attention.base import Mask
    if not flags.FLAGS.is_parsed():  # Tokamax reads its options there
        flags.FLAGS.mark_as_parsed()
    L = q_BLNd.shape[1]
    (start, end), live = _all_live(intervals, k_BSKd.shape[1])
    # Padding queries repeat the last one's interval, so that they make their block visit nothing more.
    missing = (0, -L % MOSAIC_QUERIES)
    start, end = (jnp.pad(x, [(0, 0), missing], mode="edge")[:, None] for x in (start, end))
    q = jnp.pad(q_BLNd, [(0, 0), missing, (0, 0), (0, 0)])
    with _unavailable("mosaic"):
        out = IMPLEMENTATIONS[implementation](
            q, k_BSKd, v_BSKd, mask=Mask(k_start=start, k_end=end), logits_scale=scale
        )
    return jnp.where(live[..., None, None], out[:, :L], 0)


def _all_live(intervals: Intervals, num_keys: int) -> tuple[Intervals, jax.Array]:
    """The intervals with one key for queries that have none, and which have some [B, L] bool."""
    live = intervals.end > intervals.start
    start = jnp.where(live, intervals.start, jnp.minimum(intervals.start, num_keys - 1))
    return Intervals(start, jnp.where(live, intervals.end, start + 1)), live


@contextmanager
def _unavailable(name: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, NotImplementedError, RuntimeError) as error:
        hint = ": pip install -e '.[mosaic]'" if isinstance(error, ImportError) else ""
        raise UserError(
            f"model.attention: {name!r} does not work here ({error}){hint}; or set model.attention to 'auto'"
        ) from error
