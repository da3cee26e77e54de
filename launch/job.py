"""The one input of every backend: what is trained, on which machines, under which rules.

A Job is plain data, and a backend is a pure function from it to text. `check` holds the rules that no backend
changes; what a backend demands of a Job besides is said in its own module.
"""

import dataclasses
import re
from pathlib import PurePosixPath

from launch import flags as flags_lib
from neo_jax import hardware
from neo_jax.errors import EXIT_NONFINITE, EXIT_USAGE, EXIT_USER_ERROR, UserError
from neo_jax.hardware import Slice, Target

# Exit codes after which the same command would fail again: it is not restarted. All other failures (a signal,
# a lost machine, a hang, a fault of devices or storage) are restarted, `max_restarts` times.
FATAL_EXIT_CODES = (EXIT_USER_ERROR, EXIT_USAGE, EXIT_NONFINITE)

# How many processes the launcher starts: a run refuses to start with fewer. Where JAX does not find out by
# itself, the other two say where process 0 is and which one this is (neo_jax/distributed.py reads all three).
NUM_PROCESSES_VARIABLE = "NEO_JAX_NUM_PROCESSES"
COORDINATOR_VARIABLE = "NEO_JAX_COORDINATOR"
PROCESS_ID_VARIABLE = "NEO_JAX_PROCESS_ID"

CAPACITIES = ("on_demand", "spot", "reservation", "flex_start")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


@dataclasses.dataclass(frozen=True)
class Mount:
    """A folder of every machine's container: gs://BUCKET[/FOLDER], pvc://CLAIM, or a path on the machine."""

    source: str
    path: str

    @property
    def kind(self) -> str:
        """ "gs", "pvc" or "host"."""
        scheme, found, _ = self.source.partition("://")
        return scheme if found else "host"

    @property
    def name(self) -> str:
        """Of the bucket, the claim, or the path on the machine."""
        rest = self.source.partition("://")[2] or self.source
        return rest.partition("/")[0] if self.kind == "gs" else rest

    @property
    def folder(self) -> str:
        """Of the bucket, the only one that is mounted; "" = all of it."""
        return self.source.partition("://")[2].partition("/")[2].strip("/") if self.kind == "gs" else ""


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run on a cluster."""

    name: str  # of everything that the cluster makes for it
    config: str  # FILE.py[:ARG], as seen in the image
    target: Target
    workdir: str  # the same folder on all machines
    image: str = ""  # container image that holds this repository at its working directory
    overrides: tuple[tuple[str, str], ...] = ()  # --config.FIELD=VALUE, those of fit.py included
    mounts: tuple[Mount, ...] = ()
    env: tuple[tuple[str, str], ...] = ()  # on top of what the flag group sets
    flags: str = "default"  # group of XLA and libtpu flags (flags.py)
    capacity: str = "on_demand"  # one of CAPACITIES
    reservation: str = ""  # name, for capacity "reservation"
    queue: str = ""  # Kueue LocalQueue, SLURM partition
    priority: str = ""  # PriorityClass, SLURM QOS
    max_restarts: int = 20
    grace_s: int = 300  # from SIGTERM to SIGKILL: longer than a step and a save
    hours: int = 0  # longest run, 0 = what the cluster allows
    ramdisk: str = ""  # where the ramdisk for checkpoints in memory is mounted, "" = none (GKE)
    pathways: str = ""  # gs:// folder for Pathways' scratch files, "" = without Pathways (GKE, experimental)
    placement_policy: str = ""  # workload policy of a multi-host tpu7x node pool (GKE)
    namespace: str = "default"  # Kubernetes
    zone: str = ""  # TPU VM
    project: str = ""  # TPU VM

    def environment(self, num_processes: int) -> dict[str, str]:
        """What every process finds in its environment; `env` wins over the flag group."""
        group = flags_lib.group(self.flags, self.target)
        return {**group.environment, NUM_PROCESSES_VARIABLE: str(num_processes), **dict(self.env)}

    def command(self) -> list[str]:
        """What every process runs."""
        memory = [("train.local_folder", self.ramdisk)] if self.ramdisk else []
        fields = [f"--config.{field}={value}" for field, value in (*memory, *self.overrides)]
        module = ["python", "-m", "neo_jax.train"]
        return [*module, f"--config={self.config}", f"--workdir={self.workdir}", *fields]


@dataclasses.dataclass(frozen=True)
class Run:
    """What is enough to find a submitted Job again."""

    name: str
    namespace: str = "default"
    zone: str = ""
    project: str = ""


def target_of(topology: str, num_slices: int) -> Target:
    """Slices from flags: "v5p:4x4x4" and 2, or "h100:64", eight hosts of 8 GPUs.

    The GPUs of a host are a slice: what joins hosts is the data-centre network.

    Raises:
        UserError: unknown, not offered, or no slices.
    """
    if num_slices < 1:
        raise UserError(f"--num_slices={num_slices}: must be at least 1")
    found = hardware.parse(topology)
    per_host = found.chip.chips_per_host
    if found.chip.platform == "gpu" and found.num_chips > per_host and found.num_chips % per_host == 0:
        num_slices *= found.num_chips // per_host
        found = Slice(found.chip, (per_host,))
    hardware.check_offered(found)
    return Target(found, num_slices)


def parse_mount(text: str) -> Mount:
    """ "gs://bucket:/data", "gs://bucket/folder:/data", "pvc://claim:/data" or "/folder:/data".

    Raises:
        UserError: it is none of these.
    """
    source, _, path = text.rpartition(":")
    mount = Mount(source, path)
    if mount.kind not in ("gs", "pvc", "host") or not mount.name.strip("/") or not path.startswith("/"):
        raise UserError(f"--mount={text}: write gs://BUCKET:/PATH, pvc://CLAIM:/PATH or /FOLDER:/PATH")
    if mount.kind == "gs" and re.search(r"[\s,:]", mount.name + mount.folder):
        raise UserError(
            f"--mount={text}: a bucket's folder is mounted only without spaces, commas and colons"
        )
    if mount.kind == "pvc" and "/" in mount.name:
        raise UserError(f"--mount={text}: a claim is mounted as a whole; write pvc://CLAIM:/PATH")
    if mount.kind == "host" and not source.startswith("/"):
        raise UserError(f"--mount={text}: {source!r} is no absolute path on the machines")
    return mount


def check(job: Job) -> None:
    """What must hold of a Job on any backend.

    Raises:
        UserError: for the first that does not; the message names the flag.
    """
    if not _DNS_LABEL.fullmatch(job.name) or len(job.name) > 63:
        raise UserError(
            f"--name={job.name}: must be 1 to 63 lower-case letters, digits and '-', start with a letter and "
            "not end with '-'"
        )
    for flag, value in (("max_restarts", job.max_restarts), ("hours", job.hours)):
        if value < 0:
            raise UserError(f"--{flag}={value}: must not be negative")
    if job.grace_s < 30:
        raise UserError(f"--grace_s={job.grace_s}: must be at least 30: a step and a save have to fit")
    if job.capacity not in CAPACITIES:
        raise UserError(f"--capacity={job.capacity}: choose from {', '.join(CAPACITIES)}")
    if (job.capacity == "reservation") != bool(job.reservation):
        raise UserError("--capacity=reservation and --reservation=NAME go together; give both or neither")
    for name, _ in job.env:
        if not _ENV_NAME.fullmatch(name):
            raise UserError(f"--env={name}: not a name of an environment variable; write --env=NAME=VALUE")
    paths = [mount.path for mount in job.mounts]
    if len(set(paths)) < len(paths):
        raise UserError(f"--mount: two mounts have the same path; all paths: {', '.join(paths)}")


def check_workdir(job: Job) -> None:
    """Raises UserError unless the workdir lies in a mount, which outlives the containers."""
    folder = PurePosixPath(job.workdir)
    if not any(folder.is_relative_to(mount.path) for mount in job.mounts):
        raise UserError(
            f"--workdir={job.workdir}: lies in no mount, so checkpoints would end with the container; add "
            f"--mount=gs://BUCKET:{folder if folder.is_absolute() else '/workdir'} or name a folder in one"
        )


def refuse(job: Job, backend: str, *fields: str) -> None:
    """Raises UserError if a field is set that the backend has no use for, rather than leave it out."""
    defaults = {field.name: field.default for field in dataclasses.fields(Job)}
    for field in fields:
        if getattr(job, field) != defaults[field]:
            raise UserError(f"--{field}: the {backend} backend has no such thing; leave it out")
