"""This machine as a cluster: a script that starts one process per simulated device (launch/local.py)."""

import shlex

from launch import job as job_lib
from launch.job import NUM_PROCESSES_VARIABLE, Job, Run
from neo_jax.errors import UserError


def render(job: Job) -> str:
    """The script.

    Raises:
        UserError: the job is none for this machine; the message names the flag.
    """
    job_lib.check(job)
    if job.target.slice.chip.platform != "cpu" or job.target.num_slices > 1:
        raise UserError(
            f"--backend=local: {job.target.name} is not this machine; name processes, --topology=cpu:2"
        )
    job_lib.refuse(
        job,
        "local",
        *("image", "mounts", "capacity", "queue", "priority", "hours", "namespace", "zone", "project"),
        *("placement_policy", "ramdisk", "pathways", "max_restarts", "grace_s"),
    )
    count = job.target.num_hosts
    environment = job.environment(count)
    del environment[NUM_PROCESSES_VARIABLE]  # launch/local.py sets it
    python, dash_m, module, *flags = job.command()
    code = (
        "import sys; from launch import local; "
        f'sys.exit(local.run([sys.executable, "{dash_m}", "{module}", *sys.argv[1:]], {count}))'
    )
    start = [python, "-c", code, *flags]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# {job.name}: {count} processes on this machine",
            *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
            f"exec {shlex.join(start)}",
            "",
        ]
    )


def submit(job: Job) -> list[str]:
    """The command that takes the script on its stdin; it stays until the run has ended."""
    return ["bash", "-s"]


def status(run: Run) -> list[list[str]]:
    """Commands that show where the run stands, if it has the folder that it gets unless told otherwise."""
    return [["tail", "-n", "3", f"runs/{run.name}/metrics.jsonl"]]
