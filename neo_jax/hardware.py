"""The one table of accelerators: what preflight, the MFU meter and the launcher know about a machine.

Figures are the vendors' published peaks (Google Cloud TPU pages, NVIDIA data sheets; dense, not sparse), per
chip; the memory of a TPU is what its compiler lets a program use. A JAX device is a chip, except on tpu7x,
where a chip is two devices. "One way" bandwidth is what a chip can receive while it sends as much.
"""

import dataclasses
import math
import re

from neo_jax.errors import UserError

GiB = 2**30
_FP8 = ("f8e4m3fn", "f8e5m2")


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation. `gke_*` and `topology_prefix` are empty for what GKE or XLA does not name that way."""

    name: str
    platform: str  # "tpu", "gpu" or "cpu"
    peak_bf16: float  # FLOP/s
    peak_int8: float  # operations/s, of products whose operands are of `narrow_dtypes`
    hbm_bytes: float  # memory that a program may use
    hbm_bandwidth: float  # bytes/s
    ici_bandwidth: float  # bytes/s one way over all links of a chip (NVLink for GPUs)
    dcn_bandwidth: float  # bytes/s one way between slices (nodes), a chip's share of its host's
    chips_per_host: int
    devices_per_chip: int = 1  # JAX devices
    narrow_dtypes: tuple[str, ...] = ("s8",)  # as XLA calls them
    torus_axes: int = 0  # dimensions of the interconnect; 0 = a switch
    wraps_from: int = (
        0  # a torus dimension of this many chips, or its multiples, is a ring; shorter is a line
    )
    gke_accelerator: str = ""  # node label cloud.google.com/gke-tpu-accelerator (GPUs: gke-accelerator)
    gke_machine: str = ""
    max_chips: int = 0  # of a 3-D torus: the largest slice that is offered
    slice_name: str = ""  # accelerator type of a TPU VM, before the number: v5litepod-16
    counts_cores: bool = False  # that number counts cores, two per chip: v5p-128 is 64 chips
    vm_runtime: str = ""  # software version of a TPU VM; empty = the Cloud TPU API has no such VMs
    topology_prefix: str = ""  # of jax.experimental.topologies
    device_kind: str = ""  # what jax.Device.device_kind says, for the meter of a running job


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            platform="tpu",
            peak_bf16=197e12,
            peak_int8=393e12,
            hbm_bytes=15.75 * GiB,
            hbm_bandwidth=819e9,
            ici_bandwidth=200e9,
            dcn_bandwidth=3.125e9,
            chips_per_host=4,
            torus_axes=2,
            wraps_from=16,
            gke_accelerator="tpu-v5-lite-podslice",
            gke_machine="ct5lp-hightpu-4t",
            slice_name="v5litepod",
            vm_runtime="v2-alpha-tpuv5-lite",
            topology_prefix="v5e",
            device_kind="TPU v5 lite",
        ),
        Chip(
            name="v5p",
            platform="tpu",
            peak_bf16=459e12,
            peak_int8=918e12,
            hbm_bytes=95.73 * GiB,
            hbm_bandwidth=2765e9,
            ici_bandwidth=600e9,
            dcn_bandwidth=6.25e9,
            chips_per_host=4,
            torus_axes=3,
            wraps_from=4,
            gke_accelerator="tpu-v5p-slice",
            gke_machine="ct5p-hightpu-4t",
            counts_cores=True,
            max_chips=6144,
            slice_name="v5p",
            vm_runtime="v2-alpha-tpuv5",
            topology_prefix="v5",
            device_kind="TPU v5",
        ),
        Chip(
            name="v6e",
            platform="tpu",
            peak_bf16=918e12,
            peak_int8=1836e12,
            hbm_bytes=31.24 * GiB,
            hbm_bandwidth=1640e9,
            ici_bandwidth=400e9,
            dcn_bandwidth=12.5e9,
            chips_per_host=4,
            torus_axes=2,
            wraps_from=16,
            gke_accelerator="tpu-v6e-slice",
            gke_machine="ct6e-standard-4t",
            slice_name="v6e",
            vm_runtime="v2-alpha-tpuv6e",
            topology_prefix="v6e",
            device_kind="TPU v6 lite",
        ),
        Chip(
            name="tpu7x",
            platform="tpu",
            peak_bf16=2307e12,
            peak_int8=4614e12,
            narrow_dtypes=_FP8,  # it has no faster int8
            hbm_bytes=2 * 94.74 * GiB,
            hbm_bandwidth=7380e9,
            ici_bandwidth=600e9,
            dcn_bandwidth=12.5e9,
            chips_per_host=4,
            devices_per_chip=2,
            torus_axes=3,
            wraps_from=4,
            gke_accelerator="tpu7x",
            gke_machine="tpu7x-standard-4t",
            counts_cores=True,
            max_chips=9216,
            slice_name="tpu7x",
            topology_prefix="tpu7x",
            device_kind="TPU7x",
        ),
        Chip(
            name="h100",
            platform="gpu",
            peak_bf16=989e12,
            peak_int8=1979e12,
            narrow_dtypes=("s8", *_FP8),
            hbm_bytes=80e9,
            hbm_bandwidth=3350e9,
            ici_bandwidth=450e9,
            dcn_bandwidth=50e9,
            chips_per_host=8,
            gke_accelerator="nvidia-h100-80gb",
            gke_machine="a3-highgpu-8g",
            device_kind="NVIDIA H100",
        ),
        Chip(
            name="h200",
            platform="gpu",
            peak_bf16=989e12,
            peak_int8=1979e12,
            narrow_dtypes=("s8", *_FP8),
            hbm_bytes=141e9,
            hbm_bandwidth=4800e9,
            ici_bandwidth=450e9,
            dcn_bandwidth=50e9,
            chips_per_host=8,
            gke_accelerator="nvidia-h200-141gb",
            gke_machine="a3-ultragpu-8g",
            device_kind="NVIDIA H200",
        ),
        Chip(
            name="b200",
            platform="gpu",
            peak_bf16=2250e12,
            peak_int8=4500e12,
            narrow_dtypes=("s8", *_FP8),
            hbm_bytes=180e9,
            hbm_bandwidth=8000e9,
            ici_bandwidth=900e9,
            dcn_bandwidth=50e9,
            chips_per_host=8,
            gke_accelerator="nvidia-b200",
            gke_machine="a4-highgpu-8g",
            device_kind="NVIDIA B200",
        ),
        # Simulated devices for runs on one machine, each in a process of its own; of unknown speed.
        Chip(
            name="cpu",
            platform="cpu",
            peak_bf16=0.0,
            peak_int8=0.0,
            hbm_bytes=0.0,
            hbm_bandwidth=0.0,
            ici_bandwidth=0.0,
            dcn_bandwidth=0.0,
            chips_per_host=1,
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips joined by their own interconnect, such as v5p:4x4x4."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices_per_chip

    @property
    def num_hosts(self) -> int:
        return max(1, self.num_chips // self.chip.chips_per_host)

    @property
    def chips_per_host(self) -> int:
        return self.num_chips // self.num_hosts

    @property
    def shape_text(self) -> str:
        """Such as "4x4x4", also the node label cloud.google.com/gke-tpu-topology."""
        return "x".join(map(str, self.shape))

    @property
    def topology(self) -> str:
        """What jax.experimental.topologies calls it."""
        return f"{self.chip.topology_prefix}:{self.shape_text}"

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{self.shape_text}"

    @property
    def vm_type(self) -> str:
        """The accelerator type of a TPU VM, such as v5p-128."""
        cores_per_chip = 2 if self.chip.counts_cores else 1
        return f"{self.chip.slice_name}-{self.num_chips * cores_per_chip}"

    @property
    def vm_hosts(self) -> int:
        """Hosts of that TPU VM: up to eight chips of v5e and v6e share one, where GKE has hosts of four."""
        return 1 if self.chip.torus_axes == 2 and self.num_chips <= 8 else self.num_hosts

    @property
    def machine(self) -> str:
        """The GKE machine type of its hosts; a lone v5e or v6e chip has one of its own."""
        lone = self.num_chips == 1 and self.chip.platform == "tpu"
        return self.chip.gke_machine.removesuffix("-4t") + "-1t" if lone else self.chip.gke_machine

    def ring_bandwidth(self, num_devices: int) -> float:
        """Bytes/s that each device of a group of `num_devices` in this slice receives in a collective.

        The whole slice uses all torus dimensions, a smaller group one of them. A line has half of a ring's
        bandwidth: its ends have one neighbour.
        """
        chip = self.chip
        if num_devices <= chip.devices_per_chip:
            return chip.hbm_bandwidth / chip.devices_per_chip  # two halves of a chip
        if not chip.torus_axes:
            return chip.ici_bandwidth
        wrapped = [size >= chip.wraps_from for size in self.shape if size > 1]
        per_axis = chip.ici_bandwidth / chip.torus_axes
        rates = [per_axis * (1.0 if wraps else 0.5) for wraps in wrapped] or [per_axis]
        rate = sum(rates) if num_devices >= self.num_devices else min(rates)
        return rate / chip.devices_per_chip


def parse(text: str) -> Slice:
    """A slice from "v5p:4x4x4", "v5e:4x4" or, for GPUs, "h100:8".

    Raises:
        UserError: an unknown generation, or a shape that it does not have.
    """
    name, _, shape_text = text.partition(":")
    if name not in CHIPS:
        raise UserError(f"topology {text!r}: unknown generation {name!r}; choose from {', '.join(CHIPS)}")
    chip = CHIPS[name]
    dimensions = chip.torus_axes or 1
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape_text) or shape_text.count("x") != dimensions - 1:
        example = "x".join(["4"] * dimensions) if chip.torus_axes else "8"
        raise UserError(f"topology {text!r}: {name} has {dimensions}-D shapes, such as {name}:{example}")
    return Slice(chip, tuple(map(int, shape_text.split("x"))))


def check_hosts(found: Slice) -> None:
    """Checks that a TPU slice is made of whole hosts: its compiler asks no more of a shape.

    Raises:
        UserError: it is not; the message gives the rule.
    """
    sizes = found.shape[:2]
    if 1 not in sizes and any(size % 2 for size in sizes):  # one host may be a line of chips
        raise UserError(
            f"topology {found.name}: hosts have 2x2 chips, so the first two sizes must be even, such as "
            f"{found.chip.name}:{'x'.join(['4'] * len(found.shape))}"
        )


def check_offered(found: Slice) -> None:
    """Checks that the slice is one that can be rented: Google Cloud's list of topologies, hosts of 8 GPUs.

    Two dimensions (v5e, v6e): 1x1, then powers of two from 2x2 to 16x16, the second as long as the first or
    twice that. Three (v5p, tpu7x): 2x2x1, 2x2x2, 2x2x4, 2x4x4, then multiples of 4 in rising order.

    Raises:
        UserError: it is not; the message gives the rule.
    """
    chip, shape = found.chip, found.shape
    if chip.platform == "cpu":
        offered, rule = found.num_chips <= 64, "processes of one machine are at most 64"
    elif chip.platform == "gpu":
        offered = found.num_chips in (1, 2, 4, 8)
        rule = f"hosts have {chip.chips_per_host} GPUs; name 1, 2, 4 or 8 of them, or a multiple of 8"
    elif chip.torus_axes == 2:
        a, b = shape
        offered = shape == (1, 1) or (a in (2, 4, 8, 16) and b in (a, 2 * a) and b <= 16)
        rule = "2-D slices are 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 and 16x16"
    else:
        small = shape in ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
        cubes = all(size % 4 == 0 for size in shape) and list(shape) == sorted(shape)
        offered = (small or cubes) and found.num_chips <= chip.max_chips
        rule = (
            "3-D slices are 2x2x1, 2x2x2, 2x2x4, 2x4x4 and multiples of 4 in rising order, up to "
            f"{chip.max_chips} chips"
        )
    if not offered:
        raise UserError(f"topology {found.name}: not offered; {rule}")


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a program is to run: equal slices joined by the data-centre network."""

    slice: Slice
    num_slices: int = 1

    @property
    def num_devices(self) -> int:
        return self.slice.num_devices * self.num_slices

    @property
    def num_hosts(self) -> int:
        return self.slice.num_hosts * self.num_slices

    @property
    def name(self) -> str:
        return self.slice.name if self.num_slices == 1 else f"{self.slice.name} x {self.num_slices}"

    @property
    def hbm_limit(self) -> int:
        """Bytes of memory that a program may use on one device."""
        return int(self.slice.chip.hbm_bytes / self.slice.chip.devices_per_chip)


def of_device(device_kind: str) -> Chip | None:
    """The chip whose `device_kind` JAX reports, or None: a CPU, or one that is not in the table.

    "TPU v5" is v5p and "TPU v5 lite" v5e, so the longest name that fits counts.
    """
    known = [chip for chip in CHIPS.values() if chip.device_kind]
    fitting = [chip for chip in known if device_kind.startswith(chip.device_kind)]
    return max(fitting, key=lambda chip: len(chip.device_kind), default=None)
