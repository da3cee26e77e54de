"""Programs for TPUs we do not have, compiled on this CPU by the compiler in the libtpu wheel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from neo_jax import hardware, mesh as mesh_lib, params as params_lib
from neo_jax.kernels.splash import splash
from neo_jax.model.mask import Intervals
from neo_jax.model.transformer import Transformer
from neo_jax.preflight import hlo, program, search
from tests.neo_jax.test_preflight import V5E, small_config

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


pytestmark = pytest.mark.usefixtures("tpu_compiler")


def devices(name: str) -> list:
    return topologies.get_topology_desc(platform="tpu", topology_name=hardware.parse(name).topology).devices


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_splash_compiles(name):
    """NEO's head sizes, forward and backward: three kernels."""
    found = devices(name)
    assert len(found) == hardware.parse(name).num_devices
    assert hardware.of_device(found[0].device_kind) is hardware.parse(name).chip
    here = jax.sharding.SingleDeviceSharding(found[0])

    def shape(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=here)

    def loss(q, k, v, start, end):
        return splash(q, k, v, Intervals(start, end), 128**-0.5).astype(jnp.float32).sum()

    ids = shape(1, 512, dtype=jnp.int32)
    arrays = shape(1, 512, 2, 256), shape(1, 512, 1, 256), shape(1, 512, 1, 128)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays, ids, ids).compile()
    names = [kernel.name for kernel in hlo.Module(compiled.as_text()).kernels()]
    assert sorted(name.split("_")[2] for name in names) == ["dkv", "dq", "fwd"]


def test_flops_and_transfers_of_a_known_program():
    """Four layers of x @ w, scanned, with w split over devices: counted by hand."""
    layers, rows, D = 4, 512, 1024
    mesh = Mesh(np.array(devices("v5e:2x2")).reshape(4), ("fsdp",), axis_types=(AxisType.Auto,))

    def shape(spec, *dims):
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def loss(w, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jnp.square(jax.lax.scan(layer, x, w)[0].astype(jnp.float32)).sum()

    w, x = shape((None, "fsdp"), layers, D, D), shape(("fsdp",), 4 * rows, D)
    compiled = jax.jit(jax.grad(loss), out_shardings=w.sharding).lower(w, x).compile()
    module = hlo.Module(compiled.as_text())
    # Forward one product, backward two; the first layer's input has no gradient, but a scan computes it.
    assert module.flops() == 3 * layers * 2 * rows * D * D
    assert module.flops() > 2 * compiled.cost_analysis()["flops"]  # which sees a loop's body once
    received = {"all-gather": 0.0, "all-reduce": 0.0}
    for (kind, axes, _), (_, size) in hlo.by_axes(module.collectives(), {"fsdp": 4}).items():
        assert axes == "fsdp"
        received[kind] += size
    # Three quarters of each layer's weight come from others, forward and backward. Its gradient is summed
    # by a ring that passes three quarters twice.
    assert received == {
        "all-gather": 2 * layers * D * D * 2 * 3 / 4,
        "all-reduce": 2 * layers * D * D * 2 * 3 / 4,
    }


@pytest.mark.parametrize(
    ("axes", "remat"),
    [({"fsdp": 4}, "full"), ({"fsdp": 2, "tensor": 2}, "full"), ({"fsdp": 2, "context": 2}, "offload")],
    ids=["fsdp", "tensor", "context_offload"],
)
def test_train_step_on_four_chips(axes, remat):
    """Eight rows in two parts: their work, their gradients and what is kept of them are split."""
    B, L, D, N, K, d, F, V, parts = 8, 1024, 256, 2, 2, 128, 512, 2048, 2
    changes = {f"mesh.{axis}": size for axis, size in {"num_devices": 4, **axes}.items()}
    changes |= {"model.num_layers": 1, "model.num_kv_heads": K, "model.remat_policy": remat}
    result = search.check(small_config(**changes, **{"stage.only.accumulate": parts}), "only", V5E)
    mesh, compiled = result.config.mesh, result.program
    module = hlo.Module(compiled.text)

    # Products: a quarter of the batch's, but for patches, which tensor does not split.
    tokens, patches = B * L // 4, B * L // 2 // (mesh.fsdp * mesh.context)
    layer = D * N * d * 2 + D * K * d * 3 + N * d * D + 3 * D * F
    products = tokens * (6 * layer + 2 * (layer - F * D)) + 6 * D * V * tokens // 2
    products += patches * (4 * 768 * 128 * 4 + 512 * D * 6)
    found = result.estimate
    assert found.hlo_flops - found.kernel_flops == pytest.approx(products, rel=0.02)
    # Attention: forward, again, dq and dkv, for a device's own heads or queries over all keys.
    heads, keys = N // mesh.tensor, K // mesh.tensor
    arrays = [tuple(x.dims for x in kernel.operands if x.dtype == "bf16")[:2] for kernel in module.kernels()]
    assert arrays == [((heads, L // mesh.context, 2 * d), (keys, L, 2 * d))] * 4

    def received(axis):
        return sum(size for (_, axes, _), (_, size) in found.transfers.items() if axes == axis)

    rows = B // mesh.fsdp
    if mesh.tensor > 1:  # sums of two products, forward and backward
        assert received("tensor") >= 4 * rows * L * D * 2
    if mesh.context > 1:  # keys and values of the row's other half, forward and again
        assert received("context") >= 2 * rows * L // 2 * K * 3 * d * 2
    kept = rows // parts * L // mesh.context * D * 2  # the layer's input, in bfloat16
    assert compiled.memory["host"] == (kept if remat == "offload" else 0)

    # The state is updated in place, and no device adds up more of the gradients than it keeps.
    assert compiled.memory["aliased"] == pytest.approx(sum(result.state_bytes.values()), rel=0.01)
    specs = params_lib.abstract(Transformer(result.config.model))
    splits = mesh_lib.param_shardings(program.mesh_of(result.config, V5E), specs)
    local = {path: splits[path].shard_shape(spec.shape) for path, spec in specs.items()}
    (loop,) = (x for x in module.computations[module.entry].values() if x.opcode == "while")
    added = {shape.dims for shape in loop.shapes if shape.dtype == "f32"}
    assert {*local.values()} <= added
    assert not added & {spec.shape for path, spec in specs.items() if spec.shape != local[path]}
