"""From a compiled program to step time and MFU: a roofline over compute, memory and interconnect.

No data is read: rows are assumed to be full, and of equal documents that each hold one image and its share of
the row's text. Their intervals give the model's FLOPs (flops.py) and the blocks that attention visits.
"""

import dataclasses
import math

import numpy as np
from ml_collections import FrozenConfigDict

from neo_jax import flops, params as params_lib
from neo_jax.hardware import Target
from neo_jax.model.transformer import Transformer
from neo_jax.objectives.ntp import CHUNK
from neo_jax.preflight import hlo
from neo_jax.preflight.program import Program


@dataclasses.dataclass(frozen=True)
class Rows:
    """What every row of the assumed batch holds."""

    tokens: int
    image_tokens: int  # of one document
    documents: int

    @property
    def patches(self) -> int:
        return self.image_tokens * self.documents

    def intervals(self, mask: str) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of each position's interval; the image stands at the head of its document."""
        index = np.arange(self.tokens)
        document = np.minimum(index * self.documents // self.tokens, self.documents - 1)
        start, stop = (np.searchsorted(document, document, side=side) for side in ("left", "right"))
        place = index - start
        sees_image = (place < self.image_tokens) & (mask != "causal")
        image_end = np.minimum(start + self.image_tokens, stop)
        return np.asarray(start), np.where(sees_image, image_end, index + 1)

    def __str__(self) -> str:
        words = (self.tokens - self.patches) // self.documents
        return f"{self.documents} documents a row, each {self.image_tokens} image tokens and {words} of text"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Per device and step."""

    model_flops: float  # the convention of flops.py
    hlo_flops: float  # what the program computes: products, and attention in its kernels
    kernel_flops: float  # the part of that in kernels
    traffic_bytes: float  # of the device's memory
    seconds: dict[str, float]  # resource -> time it alone would take
    exposed_s: float  # transfers that nothing overlaps
    step_s: float
    mfu: float
    bound_by: str
    transfers: dict[tuple[str, str, bool], tuple[float, float]]  # see hlo.by_axes


def assumed_rows(config: FrozenConfigDict, stage_name: str, document_tokens: int) -> Rows:
    """Rows that fill both budgets with documents of about so many tokens."""
    stage = config.stage[stage_name]
    documents = max(1, round(stage.row_tokens / document_tokens))
    return Rows(stage.row_tokens, stage.row_patches // documents, documents)


def estimate(
    config: FrozenConfigDict, stage_name: str, target: Target, program: Program, rows: Rows
) -> Estimate:
    stage, mesh, model = config.stage[stage_name], config.mesh, config.model
    chip, num = target.slice.chip, target.num_devices
    start, end = rows.intervals(model.mask)
    specs = params_lib.abstract(Transformer(model))
    counts = {
        "tokens": rows.tokens,
        "visual_tokens": rows.patches,
        "patches": rows.patches,
        "supervised_tokens": rows.tokens - rows.patches,
        "attended_pairs": float((end - start).sum()),
    }
    per_row = flops.train_flops(model, specs, params_lib.select(specs, stage.trainable), counts)
    model_flops = per_row * stage.batch_size / num

    # Of one device and one part of the accumulation.
    local_rows = stage.batch_size / (mesh.data * mesh.fsdp * stage.accumulate)
    positions = local_rows * rows.tokens / mesh.context
    supervised = positions * counts["supervised_tokens"] / rows.tokens
    module = hlo.Module(program.text, dynamic_trips=math.ceil(supervised / CHUNK))
    kernel_flops = sum(
        kernel.times * _kernel_flops(kernel, start, end, mesh.context) for kernel in module.kernels()
    )
    hlo_flops = module.flops() + kernel_flops
    narrow_flops = module.flops(chip.narrow_dtypes)

    shape = {axis: mesh[axis] for axis in ("data", "fsdp", "tensor", "context")}
    collectives = module.collectives()
    slices = target.num_slices
    seconds = {
        "compute": ((hlo_flops - narrow_flops) / chip.peak_bf16 + narrow_flops / chip.peak_int8)
        * chip.devices_per_chip,
        "memory": module.traffic() * chip.devices_per_chip / chip.hbm_bandwidth,
        "interconnect": 0.0,
        "network": 0.0,
    }
    exposed = 0.0
    for collective in collectives:
        if len(collective.devices) < 2 and collective.opcode != "collective-permute":
            continue
        crosses = slices > 1 and len({device * slices // num for device in collective.devices}) > 1
        group = math.prod(shape[axis] for axis in hlo.axes_of(collective.devices, shape).split("+") if axis)
        rate = chip.dcn_bandwidth / chip.devices_per_chip if crosses else target.slice.ring_bandwidth(group)
        spent = collective.times * collective.bytes / rate
        seconds["network" if crosses else "interconnect"] += spent
        exposed += 0.0 if collective.overlapped else spent
    step_s = max(seconds.values()) + exposed
    peak = chip.peak_bf16 / chip.devices_per_chip
    return Estimate(
        model_flops=model_flops,
        hlo_flops=hlo_flops,
        kernel_flops=kernel_flops,
        traffic_bytes=module.traffic(),
        seconds=seconds,
        exposed_s=exposed,
        step_s=step_s,
        mfu=model_flops / (step_s * peak),
        bound_by=max(seconds, key=lambda resource: seconds[resource]),
        transfers=hlo.by_axes(collectives, shape),
    )


def _kernel_flops(kernel: hlo.Kernel, start: np.ndarray, end: np.ndarray, context: int) -> float:
    """FLOPs of one run of a splash kernel: its products, over every pair of the blocks that it visits."""
    tables, arrays = kernel.operands[:2], [shape for shape in kernel.operands if shape.dtype == "bf16"]
    if not kernel.name.startswith("splash") or len(arrays) < 3:
        return 0.0
    (heads, length, qk), values = arrays[0].dims, arrays[2].dims[-1]
    block = length // tables[0].dims[1]
    pairs = live_blocks(start, end, block) * block**2 / context
    channels = {
        "fwd": qk + values,
        "dkv": 2 * qk + 2 * values,  # scores, weights' gradient, keys' and values' gradients
        "dq": 2 * qk + values,  # scores, weights' gradient, queries' gradient
    }
    phase = next(phase for phase in channels if f"_{phase}_" in kernel.name)
    return 2.0 * pairs * heads * channels[phase]


def live_blocks(start: np.ndarray, end: np.ndarray, block: int) -> int:
    """Blocks of queries by keys that hold an attended pair, in a row padded to whole blocks."""
    padding = -len(start) % block
    start, end = (np.pad(x, (0, padding), mode="edge").reshape(-1, block) for x in (start, end))
    return int(((end.max(axis=1) - 1) // block - start.min(axis=1) // block + 1).sum())
