"""What a compiled program does on one device, read from its scheduled HLO text.

XLA's own cost analysis counts the body of a loop once and cannot see into kernels. Here every instruction
counts as often as the loops around it run; the trip count of a loop over layers stands in its condition.
"""

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

import numpy as np

ITEM_BYTES = {
    "pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
    "after-all", "iota", "partition-id", "replica-id", "async-start", "async-update",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array; `space` is 0 for the device's memory, others are on the chip (1) or the host (5)."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * ITEM_BYTES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result; several for a tuple
    operands: tuple[str, ...]
    text: str  # attributes, after the operands
    is_root: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """One transfer between devices, as often as the program runs it in a step."""

    opcode: str
    bytes: float  # that a device receives, per execution
    times: float
    devices: tuple[int, ...]  # one of its groups, by place in the mesh
    overlapped: bool  # starts before, and ends after, other work
    source: str  # the line of the model it comes from, as far as XLA knows


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A custom call, such as one of splash attention's."""

    name: str
    times: float
    operands: tuple[Shape, ...]


class Module:
    """A parsed program. `dynamic_trips` stands in for the trip count of loops whose length is data."""

    def __init__(self, text: str, dynamic_trips: float = 1.0):
        self.computations, self.entry = _parse(text)
        self.dynamic_trips = dynamic_trips
        self.times: dict[str, float] = defaultdict(float)  # computation -> executions per step
        self.control: set[str] = set()  # computations whose instructions run one by one
        self.fused: set[str] = set()
        self.beside: set[str] = set()  # those that another core runs beside other work
        self.waited: set[str] = set()  # those that another core runs while this one waits
        self._visit(self.entry, 1.0, self.control)

    def _visit(self, name: str, times: float, kind: set[str]) -> None:
        self.times[name] += times
        kind.add(name)
        for instruction in self.computations[name].values():
            called = _attribute(instruction, "(?:to_apply|calls)")
            if instruction.opcode == "while":
                condition, body = (_attribute(instruction, key) for key in ("condition", "body"))
                self._visit(body, times * self._trips(condition, body), kind)
            elif "async_execution_thread=" in instruction.text and instruction.opcode == "async-start":
                hidden = self._works_before_done(self.computations[name], instruction)
                self._visit(called, times, self.beside if hidden else self.waited)
            elif instruction.opcode in ("call", "async-start"):
                self._visit(called, times, kind)
            elif instruction.opcode == "fusion":
                self._visit(called, times, self.fused)
            elif instruction.opcode in ("conditional", "custom-call"):
                for branch in re.findall(r"%[\w.-]+", _branches(instruction)):
                    self._visit(branch, times, kind)

    def _works_before_done(self, computation: dict[str, Instruction], start: Instruction) -> bool:
        """Whether products, kernels or loops run from an asynchronous start to the end of it.

        A start without operands only has another core load its program; the update with them sets it off.
        """
        name, works = start.name, False
        for instruction in itertools.dropwhile(lambda x: x is not start, computation.values()):
            if name in instruction.operands:
                if instruction.opcode.endswith("-done"):
                    return works
                name, works = instruction.name, False
            works |= self._is_work(instruction)
        raise ValueError(f"{start.name} never ends")

    def _is_work(self, instruction: Instruction) -> bool:
        if instruction.opcode == "fusion":
            fused = self.computations[_attribute(instruction, "calls")]
            return any(self._is_work(inner) for inner in fused.values())
        return _is_kernel(instruction) or instruction.opcode in ("convolution", "dot", "while", "call")

    def _trips(self, condition: str, body: str) -> float:
        """How often a loop runs whose counter, from 0 on, is compared with a constant."""
        test = self.computations[condition]
        root = _root(test)
        limits = [test[name] for name in root.operands if name in test and test[name].opcode == "constant"]
        if root.opcode != "compare" or "direction=LT" not in root.text or len(limits) != 1:
            return self.dynamic_trips
        counter = _search(r"index=(\d+)", test[root.operands[0]].text)
        step = _added(_root(self.computations[body]).operands[int(counter)], self.computations[body])
        return math.ceil(float(limits[0].text) / step)

    def flops(self, dtypes: Collection[str] | None = None) -> float:
        """Multiply-adds count two; matrix products and convolutions only, no kernels.

        With `dtypes`, only those both of whose operands are of one of these types.
        """
        return sum(
            self.times[name] * _product_flops(instruction, computation)
            for name, computation in self.computations.items()
            if self.times[name]
            for instruction in computation.values()
            if instruction.opcode in ("convolution", "dot")
            and (
                dtypes is None
                or {computation[x].shapes[0].dtype for x in instruction.operands[:2]} <= {*dtypes}
            )
        )

    def collectives(self) -> list[Collective]:
        """A transfer that is cut into steps and fused with compute appears in each step; it counts once."""
        found: dict[str, Collective] = {}
        for name, instruction in self._executed():
            opcode = instruction.opcode.removesuffix("-start")
            if opcode not in COLLECTIVES:
                continue
            channel = re.search(r"channel_id=(\d+)", instruction.text)
            key = f"{opcode} {channel[1]}" if channel else instruction.name
            times = self.times[name]
            if key in found:
                times = max(times, found[key].times)
            overlapped = name in self.beside or name in self.fused
            if instruction.opcode.endswith("-start"):
                overlapped = self._works_before_done(self.computations[name], instruction)
            devices = _group(instruction.text)
            found[key] = Collective(
                opcode=opcode,
                bytes=_received(opcode, instruction, len(devices)),
                times=times,
                devices=devices,
                overlapped=overlapped,
                source=_search(r'op_name="([^"]*)"', instruction.text),
            )
        return list(found.values())

    def kernels(self) -> list[Kernel]:
        return [
            Kernel(
                instruction.name.strip("%"),
                self.times[name],
                _shapes(_search(r"operand_layout_constraints=\{(.*?\})\}", instruction.text)),
            )
            for name, instruction in self._executed()
            if _is_kernel(instruction)
        ]

    def traffic(self) -> float:
        """Bytes read from and written to the device's memory, with what stays on the chip left out.

        Of what calls other computations, these count.
        """
        total = 0.0
        for name in self.control | self.beside | self.waited:
            computation = self.computations[name]
            for instruction in computation.values():
                calls = instruction.opcode in _NO_TRAFFIC or "called_computations=" in instruction.text
                if calls or instruction.opcode.endswith("-done"):
                    continue
                moved = self._written(instruction)
                for place, operand in enumerate(instruction.operands):
                    if operand in computation and not instruction.opcode.endswith("-start"):
                        moved += self._read(instruction, place, computation[operand])
                total += self.times[name] * moved
        return total

    def _written(self, instruction: Instruction) -> float:
        """Bytes that an instruction writes to memory: of an update in place, the update."""
        if instruction.opcode != "fusion":
            return sum(_in_memory(shape) for shape in instruction.shapes)
        fused = self.computations[_attribute(instruction, "calls")]
        root = _root(fused)
        results = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
        if len(results) != len(instruction.shapes):  # a transfer cut into steps
            return sum(_in_memory(shape) for shape in instruction.shapes)
        total = 0.0
        for shape, result in zip(instruction.shapes, results, strict=True):
            while result.opcode == "bitcast":
                result = fused[result.operands[0]]
            if result.opcode == "dynamic-update-slice" and shape.space == 0:
                total += fused[result.operands[1]].shapes[0].bytes
            else:
                total += _in_memory(shape)
        return total

    def _read(self, instruction: Instruction, place: int, operand: Instruction) -> float:
        """Bytes that it reads of an operand: of one that it only slices or updates, the slices."""
        whole = sum(_in_memory(shape) for shape in operand.shapes)
        if instruction.opcode in ("slice", "dynamic-slice"):
            return min(whole, instruction.shapes[0].bytes)
        if instruction.opcode != "fusion" or not whole:
            return whole
        fused = self.computations[_attribute(instruction, "calls")]
        names = [i.name for i in fused.values() if i.opcode == "parameter" and i.text == str(place)]
        sliced = 0.0
        for name in names:  # grows by the bitcasts of the parameter
            for user in fused.values():
                if name not in user.operands:
                    continue
                if user.opcode == "bitcast":
                    names.append(user.name)
                elif user.opcode == "dynamic-slice":
                    sliced += user.shapes[0].bytes
                elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                    return whole
        return sliced

    def _executed(self) -> Iterator[tuple[str, Instruction]]:
        for name, computation in self.computations.items():
            if self.times[name]:
                for instruction in computation.values():
                    yield name, instruction


def by_axes(
    collectives: Sequence[Collective], mesh_shape: dict[str, int]
) -> dict[tuple[str, str, bool], tuple[float, float]]:
    """(kind, mesh axes, overlapped) -> (transfers, bytes received per device) of a step."""
    totals: dict[tuple[str, str, bool], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for collective in collectives:
        key = collective.opcode, axes_of(collective.devices, mesh_shape), collective.overlapped
        totals[key][0] += collective.times
        totals[key][1] += collective.times * collective.bytes
    return {key: (number, size) for key, (number, size) in totals.items()}


def axes_of(devices: Sequence[int], mesh_shape: dict[str, int]) -> str:
    """The mesh axes along which a group of devices differs, joined by "+"."""
    places = np.unravel_index(list(devices), tuple(mesh_shape.values()))
    return "+".join(name for name, place in zip(mesh_shape, places, strict=True) if np.ptp(place) > 0)


# Parsing


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    entry = ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY %")) and line.rstrip().endswith("{"):
            name = _search(r"(%[\w.-]+)", line)
            current = computations[name] = {}
            entry = name if line.startswith("ENTRY") else entry
        elif line.startswith("  ") and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    cut = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shape, rest = right[:cut], right[cut:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    inside, attributes = rest[len(opcode) + 1 : end], rest[end + 1 :]
    return Instruction(
        name=left.removeprefix("ROOT "),
        opcode=opcode,
        shapes=_shapes(shape),
        operands=tuple(re.findall(r"%[\w.-]+", inside)),
        text=inside if opcode in ("constant", "parameter") else attributes,
        is_root=left.startswith("ROOT "),
    )


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _added(name: str, computation: dict[str, Instruction]) -> float:
    """What a chain of additions adds to a loop's counter in one turn."""
    instruction = computation[name]
    if instruction.opcode == "constant":
        return float(instruction.text)
    if instruction.opcode == "add":
        return sum(_added(operand, computation) for operand in instruction.operands)
    return 0.0  # the counter itself


def _closing(text: str, start: int) -> int:
    """Where the parenthesis opened at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"unbalanced parentheses in HLO: {text[:120]}")


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(
            dtype,
            tuple(int(size) for size in dims.split(",") if size),
            int(_search(r"S\((\d+)\)", layout) or 0),
        )
        for dtype, dims, layout in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?", text)
    )


def _search(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""


def _is_kernel(instruction: Instruction) -> bool:
    target = 'custom_call_target="tpu_custom_call"'
    return instruction.opcode == "custom-call" and target in instruction.text


def _attribute(instruction: Instruction, key: str) -> str:
    return _search(rf"\b{key}=(%[\w.-]+)", instruction.text)


def _branches(instruction: Instruction) -> str:
    return _search(r"(?:branch|called)_computations=\{([^}]*)\}", instruction.text) or " ".join(
        _attribute(instruction, key) for key in ("true_computation", "false_computation")
    )


def _in_memory(shape: Shape) -> int:
    return shape.bytes if shape.space == 0 else 0


# FLOPs


def _product_flops(instruction: Instruction, computation: dict[str, Instruction]) -> float:
    left, right = (computation[name].shapes[0].dims for name in instruction.operands[:2])
    out = instruction.shapes[0].dims
    if instruction.opcode == "dot":
        contracted = _search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
        return 2.0 * math.prod(out) * math.prod(left[int(dim)] for dim in contracted.split(",") if dim)
    labels = _search(r"dim_labels=([\w?]+->\w+)", instruction.text) or _search(
        r"dim_labels=([\w?]+_[\w?]+->[\w?]+)", instruction.text
    )
    inputs, outputs = labels.split("->")
    left_labels, right_labels = inputs.split("_")
    window = _window(instruction.text)
    pairs = 1.0  # (output place, kernel place) that meet an input, over all spatial dimensions
    for axis in sorted(label for label in outputs if label.isdigit()):
        sizes = left[left_labels.index(axis)], right[right_labels.index(axis)], out[outputs.index(axis)]
        pairs *= _meetings(*sizes, **{key: values[int(axis)] for key, values in window.items()})
    if "ragged_dot" in _search(r'op_name="([^"]*)"', instruction.text):
        pairs = 1.0  # written as all rows times every group's matrix; the kernel skips what is masked
    features = right[right_labels.index("i")]  # per group
    return 2.0 * pairs * out[outputs.index("b")] * out[outputs.index("f")] * features


def _window(text: str) -> dict[str, list[int]]:
    """The attributes of a convolution's window, per spatial dimension, with their defaults."""
    window = _search(r"window=\{([^}]*)\}", text)
    rank = len(_search(r"size=([\dx]+)", window).split("x")) if "size=" in window else 0

    def numbers(key: str, default: str) -> list[str]:
        found = _search(rf"\b{key}=([-\dx_]+)", window)
        return found.split("x") if found else [default] * rank

    return {
        "stride": [int(n) for n in numbers("stride", "1")],
        "low": [int(n.split("_")[0]) for n in numbers("pad", "0_0")],
        "left_dilation": [int(n) for n in numbers("lhs_dilate", "1")],
        "right_dilation": [int(n) for n in numbers("rhs_dilate", "1")],
    }


def _meetings(
    size: int, kernel: int, out: int, stride: int, low: int, left_dilation: int, right_dilation: int
) -> int:
    """Pairs of output and kernel places that fall on an input place, not on padding, in one dimension."""
    place = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * right_dilation - low
    inside = (place >= 0) & (place <= (size - 1) * left_dilation) & (place % left_dilation == 0)
    return int(inside.sum())


# Collectives


def _received(opcode: str, instruction: Instruction, num: int) -> float:
    """Bytes that a device receives, by a ring among `num` devices."""
    started = instruction.opcode.endswith("-start") and len(instruction.shapes) > 1
    shapes = instruction.shapes[1:2] if started else instruction.shapes
    size = float(sum(shape.bytes for shape in shapes))
    others = (num - 1) / max(num, 1)
    return {
        "all-gather": size * others,
        "all-reduce": 2 * size * others,
        "reduce-scatter": size * (num - 1),
        "all-to-all": size * others,
        "collective-permute": size,
    }[opcode]


def _group(text: str) -> tuple[int, ...]:
    """One group of devices: {{0,1},{2,3}}, [2,2]<=[4], a mesh with axes, or the pairs of a permutation."""
    if pair := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return int(pair[1]), int(pair[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return tuple(int(number) for number in listed[1].split(","))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        groups, dims, order = (_numbers(part) for part in iota.groups())
        devices = np.arange(math.prod(dims)).reshape(dims)
        devices = devices.transpose(order) if order else devices
        return tuple(int(device) for device in devices.reshape(groups)[0])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        used = re.findall(r"'(\w+)'", named[2])
        devices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        first = tuple(slice(None) if name in used else 0 for name in sizes)
        return tuple(int(device) for device in devices[first].ravel())
    return (0,)


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",")) if text else ()
