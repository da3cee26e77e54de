"""SLURM: one batch script for GPU nodes, one process per GPU under srun.

JAX finds the processes in what srun sets (the batch step alone is not enough). `--signal=TERM@S` sends
SIGTERM to the steps S seconds before the time is up; a run that saved and left, was killed or lost a node is
queued again, `max_restarts` times. Exit codes of FATAL_EXIT_CODES end it.
"""

import shlex

from launch import job as job_lib
from launch.job import FATAL_EXIT_CODES, Job, Run
from neo_jax.errors import UserError

SUBMIT_FOLDER = "$SLURM_SUBMIT_DIR"  # as the source of a mount: where sbatch was called


def render(job: Job) -> str:
    """The batch script.

    Raises:
        UserError: the job is none for SLURM; the message names the flag.
    """
    check(job)
    place = job.target.slice
    fatal = "|".join(map(str, (0, *sorted(FATAL_EXIT_CODES))))
    exports = [
        f"export {name}={shlex.quote(value)}"
        for name, value in job.environment(job.target.num_hosts * place.chips_per_host).items()
    ]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# {job.name} on {job.target.name}: one process per GPU",
            *(f"#SBATCH --{option}" for option in options(job)),
            "",
            "set -u",
            "unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY  # processes talk to each other directly",
            *exports,
            "",
            "code=0",
            f"{_srun(job)} || code=$?",
            'case "$code" in',
            f'  {fatal}) exit "$code" ;;',
            "esac",
            f'if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.max_restarts} ]; then',
            '  echo "exit code $code: queued again"',
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$code"',
            "",
        ]
    )


def check(job: Job) -> None:
    """What SLURM demands of a Job. Raises UserError."""
    job_lib.check(job)
    if job.target.slice.chip.platform != "gpu":
        raise UserError(f"--backend=slurm: {job.target.name} is no GPU; use --backend=gke or tpu_vm for TPUs")
    if job.capacity in ("spot", "flex_start"):
        raise UserError(
            f"--capacity={job.capacity}: SLURM has partitions for that; name one with --queue=PARTITION"
        )
    for mount in job.mounts:
        if not job.image:
            raise UserError(
                f"--mount={mount.source}:{mount.path}: needs --image; without, folders are as they are"
            )
        if mount.kind != "host":
            raise UserError(
                f"--mount={mount.source}:{mount.path}: SLURM mounts folders of its nodes, /FOLDER:/PATH"
            )
    if job.image:
        job_lib.check_workdir(job)
    job_lib.refuse(job, "slurm", "namespace", "zone", "project", "placement_policy", "ramdisk", "pathways")


def options(job: Job) -> list[str]:
    """What follows `#SBATCH --`, one per line."""
    place = job.target.slice
    optional = {
        "time": f"{job.hours}:00:00" if job.hours else "",
        "partition": job.queue,
        "qos": job.priority,
        "reservation": job.reservation,
    }
    return [
        f"job-name={job.name}",
        f"nodes={job.target.num_hosts}",
        f"ntasks-per-node={place.chips_per_host}",
        f"gpus-per-node={place.chips_per_host}",
        "exclusive",
        "mem=0",
        f"signal=TERM@{job.grace_s}",
        "requeue",
        "open-mode=append",  # a restart goes on in the same log
        f"output={job.name}-%j.log",
        *(f"{name}={value}" for name, value in optional.items() if value),
    ]


def _srun(job: Job) -> str:
    """The step: the command in every task, all of which end when one fails."""
    words = ["srun", "--kill-on-bad-exit=1"]
    if job.image:
        words.append(shlex.quote(f"--container-image={job.image}"))
        words.append(
            f"--container-mounts={','.join(f'{_source(m.source)}:{shlex.quote(m.path)}' for m in job.mounts)}"
        )
    return " ".join([*words, *(shlex.quote(word) for word in job.command())])


def _source(source: str) -> str:
    """Quoted for the shell, but for the variable that the shell is to replace."""
    if source.startswith(SUBMIT_FOLDER):
        rest = source.removeprefix(SUBMIT_FOLDER)
        return f'"{SUBMIT_FOLDER}"' + (shlex.quote(rest) if rest else "")
    return shlex.quote(source)


def submit(job: Job) -> list[str]:
    """The command that takes the script on its stdin."""
    return ["sbatch", "--parsable"]


def status(run: Run) -> list[list[str]]:
    """Commands that show where the run stands, in the queue and afterwards."""
    fields = "JobID,JobName,State,ExitCode,Elapsed,NNodes,Restarts"
    return [
        ["squeue", f"--name={run.name}", "--format=%i %j %T %M %D %R"],
        ["sacct", f"--name={run.name}", "--allocations", f"--format={fields}"],
    ]
