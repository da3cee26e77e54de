"""All that can be known of a Job before a cluster sees it.

The files are well formed (JobSet: schema and rules; shell: `bash -n`), the compilers know the flags, and the
train step fits the machines (neo_jax.preflight, in a process of its own with the same flags).
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import yaml

from launch import flags as flags_lib, rules
from launch.flags import Group
from launch.job import Job
from neo_jax.errors import UserError
from neo_jax.hardware import GiB

_LOAD_LIBTPU = """
from jax.experimental import topologies
topologies.get_topology_desc(platform="tpu", topology_name={topology!r})
"""
_LOAD_JAXLIB = "import jax; jax.devices()"
# No accelerator, no question to a metadata server, and none of the caller's own flags.
_COMPILER_ENV = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
_QUIET = {"TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}


def checks(job: Job, kind: str, text: str, *, preflight: bool) -> Iterator[str]:
    """Runs one check after the other and tells what each has shown.

    `kind`: "jobset" or "shell", what `text` is.

    Raises:
        UserError: one failed.
    """
    if kind == "jobset":
        manifest = yaml.safe_load(text)
        rules.check_schema(manifest)
        rules.check_jobset(manifest, job)
        yield "manifest: has the fields of JobSet v1alpha2, and they fit each other and the machines"
    else:
        check_shell(text)
        yield "script: bash can parse it"
    group = flags_lib.group(job.flags, job.target)
    check_flags(group, job)
    by = "libtpu" if group.variable == "LIBTPU_INIT_ARGS" else "jaxlib"
    yield f"flags: {by} knows the {len(group.flags)} of group {group.name}"
    if not preflight:
        yield "preflight: left out"
    elif job.target.slice.chip.platform != "tpu":
        kind = job.target.slice.chip.platform.upper()
        yield f"preflight: left out, as it compiles for TPUs only, not for a {kind}"
    else:
        yield f"preflight: {check_preflight(job, group)}"


def check_shell(text: str) -> None:
    """Raises UserError if bash cannot parse the script."""
    result = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"script: {result.stderr.strip().splitlines()[0]}")


def check_flags(group: Group, job: Job) -> None:
    """Starts libtpu (or jaxlib, for GPUs) with the flags, which it refuses to do with one it does not know.

    Raises:
        UserError: it refused; the message is the compiler's.
    """
    given = dict(job.env).get(group.variable, group.text)
    if not given:
        return
    tpu = group.variable == "LIBTPU_INIT_ARGS"
    if tpu and importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu, which knows the flags and runs on any CPU, is not here: pip install libtpu")
    code = _LOAD_LIBTPU.format(topology=job.target.slice.topology) if tpu else _LOAD_JAXLIB
    result = _run([sys.executable, "-c", code], {group.variable: given, **_QUIET})
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise UserError(f"--flags={group.name}: {'libtpu' if tpu else 'jaxlib'} says: {last}")


def check_preflight(job: Job, group: Group) -> str:
    """Compiles the train step for the machines; returns what preflight says of it in one line.

    Raises:
        UserError: it does not fit, or preflight found a mistake.
    """
    command = [
        *(sys.executable, "-m", "neo_jax.preflight", f"--config={job.config}"),
        *(f"--topology={job.target.slice.name}", f"--num_slices={job.target.num_slices}", "--json"),
        *(f"--config.{field}={value}" for field, value in job.overrides),
    ]
    given = dict(job.env).get(group.variable, group.text)
    result = _run(command, {group.variable: given} if given else {})
    lines = result.stdout.strip().splitlines()
    if result.returncode:
        unfit = [line for line in lines if line.startswith("does not fit")]
        told = unfit or result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise UserError(f"preflight of {job.config} on {job.target.name}: {told[-1].removeprefix('error: ')}")
    found = json.loads(lines[-1])
    needed, limit = found["hbm_bytes_per_device"] / GiB, found["hbm_limit_bytes"] / GiB
    return (
        f"fits, {needed:.1f} of {limit:.1f} GiB per device; estimate: {found['step_time_estimate_s']:.2f} s "
        f"per step, MFU {found['mfu_estimate']:.0%}, bound by {found['bound_by']}"
    )


def _run(command: list[str], env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    own = {key: value for key, value in os.environ.items() if key not in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")}
    return subprocess.run(command, env={**own, **_COMPILER_ENV, **env}, capture_output=True, text=True)
