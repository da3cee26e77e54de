"""The hardware table against published device names and against the compiler's own topologies."""

import pytest

from neo_jax import hardware
from neo_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "chips", "devices", "hosts", "topology"),
    [  # TPU documentation: v5p-128 is 4x4x4 with 64 chips on 16 hosts, v6e-256 is 16x16 on 64 hosts of 4
        ("v5e:4x4", 16, 16, 4, "v5e:4x4"),
        ("v5p:4x4x4", 64, 64, 16, "v5:4x4x4"),
        ("v6e:16x16", 256, 256, 64, "v6e:16x16"),
        ("tpu7x:2x2x1", 4, 8, 1, "tpu7x:2x2x1"),
        ("h100:8", 8, 8, 1, ":8"),
    ],
)
def test_slices(text, chips, devices, hosts, topology):
    found = hardware.parse(text)
    assert (found.num_chips, found.num_devices, found.num_hosts) == (chips, devices, hosts)
    assert (found.topology, found.name) == (topology, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9:4x4", "unknown generation 'v9'; choose from v5e, v5p"),
        ("v5p:4x4", "v5p has 3-D shapes, such as v5p:4x4x4"),
        ("v5e:4x0", "v5e has 2-D shapes"),
        ("v5e", "v5e has 2-D shapes"),
    ],
)
def test_unknown_slices_are_told(text, message):
    with pytest.raises(UserError, match=message):
        hardware.parse(text)


def test_devices_are_recognised():
    kinds = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "NVIDIA H100 80GB HBM3": "h100"}
    for kind, name in kinds.items():
        assert hardware.of_device(kind) is hardware.CHIPS[name]
    assert hardware.of_device("cpu") is None


def test_bandwidth_of_groups():
    v5p, v5e = hardware.parse("v5p:4x4x4"), hardware.parse("v5e:4x4")
    assert v5p.ring_bandwidth(64) == 600e9  # three rings of two links each
    assert v5p.ring_bandwidth(4) == 200e9
    assert v5e.ring_bandwidth(16) == 100e9  # 4 < 16: lines, half of two rings
    assert hardware.parse("v5e:16x16").ring_bandwidth(256) == 200e9
    assert hardware.parse("h100:8").ring_bandwidth(8) == 450e9
