"""Programs for TPUs we do not have, compiled on this CPU by the compiler in the libtpu wheel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from neo_jax import hardware
from neo_jax.kernels.splash import splash
from neo_jax.model.mask import Intervals
from neo_jax.preflight import hlo

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
