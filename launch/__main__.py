"""Writes, checks and submits the files that run a config on a cluster.

    python -m launch render   --backend=gke --topology=v5p:4x4x4 --num_slices=2 \\
        --config=configs/neo_9b.py --image=IMAGE --name=RUN
    python -m launch validate (the same flags) [--skip_preflight]
    python -m launch submit   (the same flags) [--skip_preflight] [--dry-run]
    python -m launch status   --backend=gke --name=RUN

`render` prints the file; `validate` checks it, the flags and the fit of the step without any cluster;
`submit` validates, and then gives the file to kubectl, sbatch or gcloud.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from launch import fit, flags, submit, validate
from launch.backends import BACKENDS, Backend
from launch.job import CAPACITIES, Job, Run, parse_mount, target_of
from neo_jax import config as config_lib
from neo_jax.errors import UserError, main_guard

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Job)}
_TEXTS = {  # flag -> help; all are fields of Job
    "image": "container image that holds this repository",
    "reservation": "name of the reservation, with --capacity=reservation",
    "queue": "Kueue LocalQueue; SLURM partition",
    "priority": "PriorityClass; SLURM QOS",
    "namespace": "Kubernetes namespace",
    "ramdisk": "path at which a ramdisk is mounted, for checkpoints in memory (GKE, experimental)",
    "pathways": "gs:// folder for Pathways' scratch files; runs the job under Pathways (GKE, experimental)",
    "placement_policy": "workload policy of the node pool, for multi-host tpu7x (GKE)",
    "zone": "zone of the TPU VM",
    "project": "project of the TPU VM",
}
_NUMBERS = {
    "max_restarts": "restarts after failures that may pass (a lost machine, a hang)",
    "grace_s": "seconds from SIGTERM to SIGKILL: longer than a step and a save",
    "hours": "longest run; 0 = what the cluster allows",
}


def main(argv: Sequence[str]) -> None:
    args = config_lib.parse(_parser(), argv)
    backend = BACKENDS[args.backend]
    if args.command == "status":
        submit.show(backend.status(Run(args.name, args.namespace, args.zone, args.project)))
        return
    job = job_of(args, backend)
    text = backend.render(job)
    if args.command == "render":
        print(text, end="")
        return
    for line in validate.checks(job, backend.kind, text, preflight=not args.skip_preflight):
        print(line, flush=True)
    if args.command == "submit":
        submit.submit(backend.submit(job), text, dry_run=args.dry_run)
        return
    print(f"{job.name}: valid")


def job_of(args: argparse.Namespace, backend: Backend) -> Job:
    """The Job that the flags describe, its mesh fitted to the machines (which is told on stderr).

    Raises:
        UserError: flags or config are wrong.
    """
    target = target_of(args.topology, args.num_slices)
    fitted = fit.fields(args.config, args.overrides, target)
    if fitted:
        told = " ".join(f"--config.{field}={value}" for field, value in fitted)
        print(f"fitted to the {target.num_devices} devices of {target.name}: {told}", file=sys.stderr)
    bare = backend.workdir_without_image if not args.image else ""
    workdir = bare or backend.workdir
    mounts = tuple(map(parse_mount, args.mount)) or (() if bare else backend.mounts)
    return Job(
        target=target,
        config=args.config,
        overrides=(*args.overrides, *fitted),
        workdir=args.workdir or workdir.format(name=args.name),
        mounts=mounts,
        env=tuple(map(_variable, args.env)),
        **{name: getattr(args, name) for name in ("name", "capacity", "flags", *_TEXTS, *_NUMBERS)},
    )


def _variable(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found:
        raise UserError(f"--env={text}: write --env=NAME=VALUE")
    return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    job = _job_flags()
    commands.add_parser("render", parents=[job], help="print the file")
    checked = commands.add_parser("validate", parents=[job], help="check it without a cluster")
    submitted = commands.add_parser("submit", parents=[job], help="check it and give it to the cluster")
    for command in (checked, submitted):
        command.add_argument(
            "--skip_preflight", action="store_true", help="do not compile the train step, which takes minutes"
        )
    submitted.add_argument("--dry-run", action="store_true", help="show what would be submitted, and to what")
    run = commands.add_parser("status", help="ask the cluster where a run stands")
    run.add_argument("--backend", required=True, choices=BACKENDS)
    run.add_argument("--name", required=True, help="of the run in the cluster")
    for name in ("namespace", "zone", "project"):
        run.add_argument(f"--{name}", default=_DEFAULTS[name], help=_TEXTS[name])
    return parser


def _job_flags() -> argparse.ArgumentParser:
    """The flags that make a Job, for every subcommand that needs one."""
    job = argparse.ArgumentParser(add_help=False)
    job.add_argument("--backend", required=True, choices=BACKENDS)
    config_lib.add_flag(job, required=True)
    job.add_argument("--name", required=True, help="of the run in the cluster")
    job.add_argument("--topology", required=True, help="such as v5p:4x4x4, v6e:16x16, h100:64 or cpu:2")
    job.add_argument("--num_slices", type=int, default=1, help="slices joined by the data-centre network")
    job.add_argument(
        "--workdir", default="", help="folder that all machines share; by default one of its own"
    )
    job.add_argument(
        "--mount",
        action="append",
        default=[],
        help="gs://BUCKET[/FOLDER]:/PATH, pvc://CLAIM:/PATH or /FOLDER:/PATH; repeat",
    )
    job.add_argument("--env", action="append", default=[], help="NAME=VALUE for every process; repeat")
    job.add_argument("--flags", default="default", help=f"group of XLA flags: {', '.join(flags.GROUPS)}")
    job.add_argument("--capacity", default="on_demand", help=", ".join(CAPACITIES))
    for name, text in _TEXTS.items():
        job.add_argument(f"--{name}", default=_DEFAULTS[name], help=text)
    for name, text in _NUMBERS.items():
        job.add_argument(
            f"--{name}", type=int, default=_DEFAULTS[name], help=f"{text} (default {_DEFAULTS[name]})"
        )
    return job


if __name__ == "__main__":
    main_guard(main)
