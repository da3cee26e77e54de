"""Every attention kernel against `reference`, values and gradients, on random packings."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from benchmarks.gpu_compile import Gpu
from neo_jax.errors import UserError
from neo_jax.kernels.chunked import xla_chunked
from neo_jax.kernels.dispatch import dispatch
from neo_jax.kernels.splash import MAX_KEYS, _inside, _pack, _tables, splash
from neo_jax.kernels.triton import Tile, Tiles, _reached_by, triton
from neo_jax.kernels.vendor import cudnn, mosaic
from neo_jax.model.attention import ATTENTION, reference
from neo_jax.model.mask import MASKS, Intervals, dense

SEEDS = st.integers(0, 2**32 - 1)
HEADS = st.sampled_from([(4, 4), (4, 2), (2, 1)])
D_QK, D_V = 16, 8


def packing(rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment and image ids [rows, length] of random documents with random images, and some padding."""
    segment_ids, image_ids = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        end = length - rng.integers(0, length // 4 + 1)
        cuts = np.sort(rng.choice(np.arange(1, end), min(end - 1, rng.integers(0, 6)), replace=False))
        for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, end], strict=True), start=1):
            segment_ids[row, start:stop] = number
            first, last = np.sort(rng.integers(start, stop + 1, 2))
            image_ids[row, first:last] = number
    return segment_ids, image_ids


def intervals_of(rng: np.random.Generator, rows: int, length: int, kind: str) -> Intervals:
    segment_ids, image_ids = packing(rng, rows, length)
    supervised = (rng.random((rows, length)) < 0.3).astype(np.float32)
    batch = {"segment_ids": segment_ids, "image_ids": image_ids, "loss_weights": supervised}
    return MASKS[kind](jax.tree.map(jnp.asarray, batch))


@partial(jax.jit, static_argnums=0)
def value_and_gradients(attend, arrays, intervals, cotangent):
    """The result and the gradients of <result, cotangent> for queries, keys and values."""

    def loss(q, k, v):
        out = attend(q, k, v, intervals, 0.3)
        return (out * cotangent).sum(), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
    return out, gradients


def check(attend, intervals: Intervals, keys: int, heads: tuple[int, int], rng: np.random.Generator) -> None:
    (B, L), (N, K) = intervals.start.shape, heads
    shapes = (B, L, N, D_QK), (B, keys, K, D_QK), (B, keys, K, D_V), (B, L, N, D_V)
    *arrays, cotangent = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    # `reference` spreads a query without keys evenly; kernels give zero. Leave such queries out.
    cotangent = jnp.where((intervals.end > intervals.start)[..., None, None], cotangent, 0)
    expected, expected_gradients = value_and_gradients(reference, arrays, intervals, cotangent)
    out, gradients = value_and_gradients(attend, arrays, intervals, cotangent)
    seen = np.asarray(cotangent != 0).any(axis=(2, 3))
    np.testing.assert_allclose(np.asarray(out)[seen], np.asarray(expected)[seen], rtol=0, atol=5e-6)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-5)


BLOCKED = {block: partial(xla_chunked, block=block) for block in [(8, 8), (16, 24), (64, 16)]}
SPLASH = partial(splash, block=128, interpret=True)
TILES = Tiles(Tile(16, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1))
TRITON = partial(triton, tiles=TILES, interpret=True)


@pytest.fixture(params=["cudnn", "mosaic"])
def vendor(request):
    """What is ours of them: masks, padding, queries without keys. Their kernels run on GPUs only."""
    if request.param == "cudnn":
        yield partial(cudnn, implementation="xla")
    else:
        with jax.numpy_rank_promotion("allow"):  # Tokamax adds arrays of different ranks
            yield partial(mosaic, implementation="xla")


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.sampled_from([*BLOCKED]), HEADS, st.sampled_from([*MASKS]))
def test_chunked(seed, block, heads, kind):
    rng = np.random.default_rng(seed)
    check(BLOCKED[block], intervals_of(rng, 2, 50, kind), 50, heads, rng)


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_chunked_any_interval(seed):
    """No order among intervals, more keys than queries, and queries that see nothing."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 70, (2, 33)).astype(np.int32)
    end = np.minimum(start + rng.integers(0, 40, start.shape), 70).astype(np.int32)
    check(BLOCKED[16, 24], Intervals(jnp.asarray(start), jnp.asarray(end)), 70, (4, 2), rng)


@pytest.mark.parametrize("attend", [BLOCKED[8, 8], TRITON])
def test_of_nothing_is_zero(attend):
    empty = Intervals(jnp.full((1, 5), 3, jnp.int32), jnp.full((1, 5), 3, jnp.int32))
    ones = jnp.ones((1, 5, 2, D_V))
    out, gradients = value_and_gradients(attend, (ones, ones, ones), empty, ones)
    assert not np.any(out)
    assert not any(np.any(gradient) for gradient in gradients)


def test_vendors_of_nothing(vendor):
    test_of_nothing_is_zero(vendor)


def test_chunked_bfloat16_keeps_a_float32_softmax():
    """4,000 equal scores: their weights' sum would stand still at 256 in bfloat16."""
    q = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    k, v = jnp.ones((1, 4000, 1, 8), jnp.bfloat16), jnp.ones((1, 4000, 1, 4), jnp.bfloat16)
    intervals = Intervals(jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), 4000, jnp.int32))
    np.testing.assert_allclose(np.asarray(xla_chunked(q, k, v, intervals, 1.0), np.float32), 1.0, atol=4e-3)


@pytest.mark.parametrize("document", [64, 256])
@pytest.mark.parametrize(
    "kernel",
    [partial(xla_chunked, block=(32, 32)), partial(TRITON, tiles=Tiles(*[Tile(32, 32, 4, 1)] * 3))],
    ids=["xla_chunked", "triton"],
)
def test_visits_live_blocks_only(kernel, document):
    """Keys outside the visited blocks do not matter, whatever they hold: not even NaN gets through."""
    L, block = 256, 32
    ids = jnp.arange(L, dtype=jnp.int32)[None] // document
    intervals = MASKS["causal"]({"segment_ids": ids})
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, L, 1, 8)), jnp.float32) for _ in range(3))
    expected = reference(q, k, v, intervals, 1.0)
    attend = jax.jit(partial(kernel, scale=1.0))
    for start in range(0, L, block):
        low, high = start // document * document, start + block  # what the block of queries attends
        poisoned = [jnp.full_like(x, jnp.nan).at[:, low:high].set(x[:, low:high]) for x in (k, v)]
        out = attend(q, *poisoned, intervals)
        visited = slice(start, start + block)
        np.testing.assert_allclose(out[:, visited], expected[:, visited], atol=1e-5)


def test_chunked_memory_is_linear_in_the_row():
    def temporary(L):
        q, k, v = (jax.ShapeDtypeStruct((1, L, 2, 16), jnp.float32) for _ in range(3))
        ids = jax.ShapeDtypeStruct((1, L), jnp.int32)

        def loss(q, k, v, start, end):
            return xla_chunked(q, k, v, Intervals(start, end), 1.0, block=(128, 128)).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, ids, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    lengths = 4096, 8192, 16384
    small, middle, large = map(temporary, lengths)
    assert large - middle == pytest.approx(2 * (middle - small), rel=0.05)
    assert large < 16384**2  # bytes: far below one [L, L] array of float32


@settings(deadline=None, max_examples=6)
@given(SEEDS, st.sampled_from([*MASKS]))
def test_splash(seed, kind):
    rng = np.random.default_rng(seed)
    check(SPLASH, intervals_of(rng, 2, 384, kind), 384, (4, 2), rng)


def test_splash_pads_odd_rows():
    rng = np.random.default_rng(1)
    check(SPLASH, intervals_of(rng, 1, 300, "image_bidirectional"), 300, (2, 2), rng)


def test_splash_any_interval():
    """A slice of the queries over all keys (context parallelism), under a sliding window (SOLO)."""
    rng = np.random.default_rng(2)
    start, end = (x[:, 200:400] for x in intervals_of(rng, 1, 512, "image_bidirectional"))
    start = jnp.maximum(start, jnp.arange(200, 400, dtype=jnp.int32)[None] - 60)
    check(SPLASH, Intervals(start, end), 512, (2, 1), rng)


def test_splash_packs_intervals():
    """The mask function against its definition at the ends of the 16-bit range."""
    rng = np.random.default_rng(3)
    start = np.append(rng.integers(0, MAX_KEYS, 200), [0, MAX_KEYS - 1]).astype(np.int32)
    end = np.append(rng.integers(start[:-2] + 1, MAX_KEYS + 1), [1, MAX_KEYS]).astype(np.int32)
    keys = np.stack([start - 1, start, end - 1, end]).astype(np.int32)
    inside = _inside(jnp.broadcast_to(_pack(jnp.asarray(start), jnp.asarray(end)), keys.shape), keys)
    np.testing.assert_array_equal(inside, (start <= keys) & (keys < end))


def test_splash_refuses_rows_beyond_16_bits():
    q, k = (
        jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.float32),
        jax.ShapeDtypeStruct((1, 2**16, 1, 8), jnp.float32),
    )
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    with pytest.raises(UserError, match="at most 65535 tokens"):
        jax.eval_shape(partial(splash, scale=1.0), q, k, k, Intervals(ids, ids))


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.sampled_from([*MASKS]))
def test_splash_tables(seed, kind):
    """A block is live if and only if the dense mask has a pair in it; dead steps fetch no new block."""
    length, block = 96, 8
    rng = np.random.default_rng(seed)
    intervals = intervals_of(rng, 1, length, kind)
    mask = np.asarray(dense(intervals, length))[0]
    live = mask.reshape(length // block, block, length // block, block).any(axis=(1, 3))
    forward, backward = _tables(intervals.start[0], intervals.end[0], block, block, length // block)
    for table in (forward, backward):
        np.testing.assert_array_equal(np.asarray(table.block_mask[0]) > 0, live)
    queries, keys = np.nonzero(live)
    np.testing.assert_array_equal(np.asarray(forward.data_next[0])[queries, keys], keys)
    np.testing.assert_array_equal(np.asarray(backward.data_next[0])[queries, keys], queries)
    fetched = [np.unique(row).size for row in np.asarray(forward.data_next[0])]
    np.testing.assert_array_equal(fetched, live.sum(axis=1))
    fetched = [np.unique(column).size for column in np.asarray(backward.data_next[0]).T]
    np.testing.assert_array_equal(fetched, live.sum(axis=0))


@settings(max_examples=20)
@given(SEEDS, HEADS, st.sampled_from([*MASKS]))
def test_triton(seed, heads, kind):
    rng = np.random.default_rng(seed)
    check(TRITON, intervals_of(rng, 2, 50, kind), 50, heads, rng)


@settings(max_examples=20)
@given(SEEDS)
def test_triton_any_interval(seed):
    """No order among intervals, more keys than queries, and queries that see nothing."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 70, (2, 33)).astype(np.int32)
    end = np.minimum(start + rng.integers(0, 40, start.shape), 70).astype(np.int32)
    check(TRITON, Intervals(jnp.asarray(start), jnp.asarray(end)), 70, (4, 2), rng)


@settings(max_examples=30)
@given(SEEDS, st.sampled_from([*MASKS]))
def test_triton_gradients_of_keys_visit_the_blocks_that_reach_them(seed, kind):
    """Of documents, which are contiguous, not one block more than the dense mask has a pair in."""
    length, tile = 96, Tile(8, 16, 4, 1)
    intervals = intervals_of(np.random.default_rng(seed), 2, length, kind)
    mask = np.asarray(dense(intervals, length))
    live = mask.reshape(2, length // tile.queries, tile.queries, length // tile.keys, tile.keys).any(
        axis=(2, 4)
    )
    first, stop = map(np.asarray, _reached_by(intervals, tile, length))
    np.testing.assert_array_equal(stop - first, live.sum(axis=1))
    np.testing.assert_array_equal(first, live.argmax(axis=1))


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SEEDS, HEADS, st.sampled_from([*MASKS]))
def test_vendors(vendor, seed, heads, kind):
    rng = np.random.default_rng(seed)
    check(vendor, intervals_of(rng, 2, 50, kind), 50, heads, rng)


def test_vendors_any_interval(vendor):
    """No order among intervals, more keys than queries, and queries that see nothing."""
    rng = np.random.default_rng(4)
    start = rng.integers(0, 71, (2, 33)).astype(np.int32)
    end = np.minimum(start + rng.integers(0, 40, start.shape), 70).astype(np.int32)
    check(vendor, Intervals(jnp.asarray(start), jnp.asarray(end)), 70, (4, 2), rng)


def lowered_for_gpu(attend, dtype: str, channels: tuple[int, int]) -> str:
    """The program of value and gradients, as a GPU would get it."""
    q, k, v = (
        jax.ShapeDtypeStruct((2, 1000, heads, size), dtype)
        for heads, size in ((4, channels[0]), (2, channels[0]), (2, channels[1]))
    )
    ids = jax.ShapeDtypeStruct((2, 1000), jnp.int32)

    def loss(q, k, v, start, end):
        return attend(q, k, v, Intervals(start, end), 0.1).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, v, ids, ids)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("dtype", "channels"), [("bfloat16", (256, 128)), ("bfloat16", (128, 128)), ("float32", (24, 12))]
)
def test_triton_lowers_without_a_gpu(dtype, channels):
    """To Triton's code for the three kernels, in tiles of every shipped size; it runs on GPUs only."""
    text = lowered_for_gpu(triton, dtype, channels)
    for name in ("attention_forward", "attention_backward_queries", "attention_backward_keys"):
        assert name in text
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 3


@pytest.mark.parametrize("channels", [(256, 128), (128, 128)])
def test_mosaic_lowers_without_a_gpu(monkeypatch, channels):
    """To Tokamax's three kernels for Hopper, which read the two vectors: there is no [L, S] array."""
    monkeypatch.setattr("jax.extend.backend.get_default_device", Gpu)
    with jax.numpy_rank_promotion("allow"):  # Tokamax adds arrays of different ranks
        text = lowered_for_gpu(mosaic, "bfloat16", channels)
    assert text.count("custom_call @mosaic_gpu_v2") == 3
    assert "1000x1000x" not in text and "1024x1000x" not in text


@pytest.mark.parametrize("channels", [(256, 128), (128, 128)])
def test_cudnn_lowers_without_a_gpu(monkeypatch, channels):
    for asked, answer in (("check_cudnn_version", 91000), ("check_compute_capability", True)):
        monkeypatch.setattr(
            f"jax._src.cudnn.fused_attention_stablehlo.{asked}", lambda *_, answer=answer: answer
        )
    text = lowered_for_gpu(cudnn, "bfloat16", channels)
    for name in ("fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"):
        assert text.count(f"custom_call @__cudnn${name}(") == 1


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "message"),
    [
        ("splash", "cpu", "float32", "'splash' needs a tpu, and this run is on a cpu"),
        ("cudnn", "cpu", "bfloat16", "'cudnn' needs a gpu, and this run is on a cpu"),
        ("mosaic", "tpu", "bfloat16", "'mosaic' needs a gpu, and this run is on a tpu"),
        ("mosaic", "cuda", "float32", "'mosaic' multiplies in bfloat16, and model.dtype is 'float32'"),
        ("cudnn", "cuda", "bfloat16", "'cudnn' does not work here .cuDNN is not detected"),
        ("mosaic", "cuda", "bfloat16", "'mosaic' does not work here .Not supported on cpu"),
    ],
)
def test_kernels_that_do_not_work_here(monkeypatch, name, platform, dtype, message):
    monkeypatch.setattr("neo_jax.mesh.platform", lambda: platform)
    q, ids = jax.ShapeDtypeStruct((1, 8, 1, 8), dtype), jax.ShapeDtypeStruct((1, 8), jnp.int32)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(partial(dispatch(name, ATTENTION), scale=1.0), q, q, q, Intervals(ids, ids))
