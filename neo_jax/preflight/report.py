"""A result of preflight in words, as a row of a table, and as the JSON that other programs read."""

from collections.abc import Mapping, Sequence
from typing import Any

from neo_jax.hardware import GiB
from neo_jax.preflight.program import OutOfMemory
from neo_jax.preflight.search import Result

HEADER = (
    f"{'config':<29}{'topology':<18}{'fits':<6}{'HBM GiB':>16}{'FLOPs/model':>13}{'step s':>9}{'MFU':>7}"
    f"  {'bound by':<14}{'compile s':>10}"
)


def text(result: Result) -> str:
    """The whole report."""
    config, target = result.config, result.target
    mesh, stage = config.mesh, config.stage[result.stage]
    axes = " ".join(f"{axis}={mesh[axis]}" for axis in ("data", "fsdp", "tensor", "context"))
    lines = [
        f"{config.name}, stage {result.stage}, on {target.name}: {target.num_devices} devices, {axes}",
        f"batch: {stage.batch_size} rows of {stage.row_tokens} tokens and {stage.row_patches} patches, "
        f"{result.rows_per_device} rows per device, in {stage.accumulate} part(s); assumed: {result.rows}",
    ]
    lines.append(f"memory per device, of {target.hbm_limit / GiB:.2f} GiB:")
    lines += [f"  {name:<14}{size / GiB:8.2f} GiB" for name, size in _categories(result).items()]
    if isinstance(result.program, OutOfMemory):
        lines.append(f"  needed        {result.needed / GiB:8.2f} GiB")
        lines.append(f"the compiler: {result.program.message.splitlines()[0][:200]}")
        return "\n".join(lines)
    memory, estimate = result.program.memory, result.estimate
    assert estimate is not None, "a program was compiled"
    lines += [
        f"  peak          {memory['peak'] / GiB:8.2f} GiB  {'fits' if result.fits else 'DOES NOT FIT'}",
        f"  in host memory{memory['host'] / GiB:8.2f} GiB",
        f"FLOPs per device and step: {estimate.model_flops:.3e} of the model, {estimate.hlo_flops:.3e} "
        f"compiled ({estimate.hlo_flops / estimate.model_flops:.2f}x), {estimate.kernel_flops:.2e} of them "
        "in attention kernels; XLA's own count, with every loop's body once and no kernel: "
        f"{result.program.cost_flops:.3e}",
        f"traffic of memory: {estimate.traffic_bytes / GiB:.1f} GiB",
        "transfers per device and step:",
    ]
    for (kind, axis, overlapped), (times, size) in sorted(estimate.transfers.items()):
        how = "overlapped" if overlapped else "waited for"
        lines.append(f"  {kind:<19}{axis or 'none':<14}{how:<12}{times:8.0f} times {size / GiB:8.3f} GiB")
    spent = "  ".join(f"{name} {seconds:.3f}" for name, seconds in estimate.seconds.items())
    lines += [
        f"seconds by resource: {spent}  waiting for transfers {estimate.exposed_s:.3f}",
        f"estimate: {estimate.step_s:.3f} s per step, MFU {estimate.mfu:.1%}, bound by {estimate.bound_by}",
        f"compiled in {result.program.lower_s:.0f} + {result.program.compile_s:.0f} s with "
        f"{result.program.host_bytes / GiB:.1f} GiB of this machine's memory",
    ]
    return "\n".join(lines)


def _categories(result: Result) -> dict[str, int]:
    """Bytes of memory per device by what they hold; where no program fits, of the state alone."""
    if isinstance(result.program, OutOfMemory):
        return result.state_bytes
    memory = result.program.memory
    other = memory["arguments"] - sum(result.state_bytes.values())
    return result.state_bytes | {"batch, scalars": other, "temporaries": memory["temporaries"]}


def row(path: str, result: Result) -> str:
    memory = f"{result.needed / GiB:.1f} of {result.target.hbm_limit / GiB:.1f}"
    start = f"{path:<29}{result.target.name:<18}{'yes' if result.fits else 'NO':<6}{memory:>16}"
    estimate = result.estimate
    if estimate is None:
        return start
    return start + (
        f"{estimate.hlo_flops / estimate.model_flops:>12.2f}x{estimate.step_s:>9.3f}{estimate.mfu:>7.1%}"
        f"  {estimate.bound_by:<14}{getattr(result.program, 'compile_s', 0):>10.0f}"
    )


def table(results: Sequence[tuple[str, Result]]) -> str:
    return "\n".join([HEADER, *(row(path, result) for path, result in results)])


def as_json(result: Result) -> dict[str, Any]:
    """The fixed keys, then the rest of what `text` says; None where nothing could be compiled."""
    program, estimate = result.program, result.estimate
    compiled = None if isinstance(program, OutOfMemory) else program
    return {
        "fits": result.fits,
        "hbm_bytes_per_device": int(result.needed),
        "hbm_limit_bytes": result.target.hbm_limit,
        "model_flops_per_device": estimate.model_flops if estimate else None,
        "hlo_flops_per_device": estimate.hlo_flops if estimate else None,
        "step_time_estimate_s": estimate.step_s if estimate else None,
        "mfu_estimate": estimate.mfu if estimate else None,
        "bound_by": estimate.bound_by if estimate else "memory capacity",
        "hbm_bytes_by_category": _categories(result),
        "host_memory_bytes_per_device": compiled.memory["host"] if compiled else None,
        "xla_cost_flops_per_device": compiled.cost_flops if compiled else None,
        "collectives": _collectives(estimate.transfers) if estimate else None,
        "lower_s": compiled.lower_s if compiled else None,
        "compile_s": compiled.compile_s if compiled else None,
        "compiler_memory_bytes": compiled.host_bytes if compiled else None,
    }


def _collectives(
    transfers: Mapping[tuple[str, str, bool], tuple[float, float]],
) -> list[dict[str, Any]]:
    """One object per kind and mesh axes; `bytes` are received per device and step."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for (kind, axes, overlapped), (times, size) in sorted(transfers.items()):
        fresh = {"kind": kind, "axes": axes, "times": 0.0, "bytes": 0.0, "overlapped_bytes": 0.0}
        entry = found.setdefault((kind, axes), fresh)
        entry["times"] += times
        entry["bytes"] += size
        entry["overlapped_bytes"] += size if overlapped else 0.0
    return list(found.values())
