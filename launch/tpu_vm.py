"""TPU VMs without Kubernetes: a queued resource, and the same command over ssh on all of its machines.

The text is a script that waits for the machines, runs the container on each, and gives them back; when they
are taken away (spot) or fail it asks for new ones, `max_restarts` times. Every command it runs is an argv
list of this module. JAX finds the processes by the metadata server of the machines.

ssh loses the exit codes of several machines, so each prints its own as "neo_jax exit N" at the end. Docker's
own codes, of an image that is wrong or may not be pulled, end the run like those of FATAL_EXIT_CODES.
"""

import shlex

from launch import job as job_lib
from launch.job import FATAL_EXIT_CODES, Job, Run
from neo_jax.errors import UserError

_GCLOUD = ("gcloud", "compute", "tpus")
_GCLOUD_ALPHA = ("gcloud", "alpha", "compute", "tpus")  # which alone can name a reservation
_POLL_S = 30
_MAX_UNKNOWN = 10  # times in a row that gcloud may fail to tell the state: deleted, or the login is over
_DOCKER_EXIT_CODES = (125, 126, 127)  # of `docker run` when the command did not start

_INSTALL_GCSFUSE = (
    "command -v gcsfuse >/dev/null || { "
    "echo deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt "
    "gcsfuse-$(lsb_release -c -s) main | sudo tee /etc/apt/sources.list.d/gcsfuse.list && "
    "curl -sS https://packages.cloud.google.com/apt/doc/apt-key.gpg | "
    "sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null && "
    "sudo apt-get update -q && sudo apt-get install -q -y gcsfuse; }"
)


def render(job: Job) -> str:
    """The script.

    Raises:
        UserError: the job is none for TPU VMs; the message names the flag.
    """
    check(job)
    runs = [f'{shlex.join(argv)} 2>&1 | tee -a "$log" &' for argv in run(job)]
    fatal = "|".join(map(str, (*sorted(FATAL_EXIT_CODES), *_DOCKER_EXIT_CODES)))
    return f"""\
#!/bin/bash
# {job.name} on {job.target.name}: {job.target.num_slices} x {job.target.slice.vm_type}
set -u
log={job.name}.log
give_back() {{
  {shlex.join(delete(job))}
}}
trap 'give_back; exit 130' INT TERM
{{  # a group is read as a whole: no command can take the rest of the script from stdin
  for attempt in $(seq 0 {job.max_restarts}); do
    echo "attempt $attempt" | tee "$log"
    {shlex.join(create(job))} || exit 1
    unknown=0
    while true; do
      if state=$({shlex.join(describe(job))}); then unknown=0; else unknown=$((unknown + 1)); fi
      if [ "$unknown" = {_MAX_UNKNOWN} ]; then
        echo "gave up: gcloud failed {_MAX_UNKNOWN} times in a row to tell the state of {job.name}" >&2
        give_back
        exit 1
      fi
      case "$state" in
        ACTIVE|FAILED|SUSPENDED|SUSPENDING) break ;;
      esac
      sleep {_POLL_S}
    done
    if [ "$state" = ACTIVE ]; then
      {f"{chr(10)}      ".join(runs)}
      wait
    fi
    give_back
    if grep -qE 'neo_jax exit ({fatal})$' "$log"; then
      exit 1  # a mistake, which another attempt would make again
    fi
    if [ "$(grep -c 'neo_jax exit 0$' "$log")" = {_num_hosts(job)} ]; then
      exit 0
    fi
  done
  exit 1
}} </dev/null
"""


def check(job: Job) -> None:
    """What a TPU VM demands of a Job. Raises UserError."""
    job_lib.check(job)
    if job.target.slice.chip.platform != "tpu":
        raise UserError(f"--backend=tpu_vm: {job.target.name} is no TPU; use --backend=gke or slurm for GPUs")
    if not job.target.slice.chip.vm_runtime:
        raise UserError(f"--backend=tpu_vm: there are no TPU VMs of {job.target.name}; use --backend=gke")
    if not job.image:
        raise UserError("--image: TPU VMs run a container; name the image that holds this repository")
    if not job.zone:
        raise UserError("--zone: name the zone of the TPU VM, such as --zone=us-east5-a")
    for mount in job.mounts:
        if mount.kind == "pvc":
            raise UserError(
                f"--mount={mount.source}:{mount.path}: TPU VMs have no claims; use gs:// or /FOLDER"
            )
    job_lib.check_workdir(job)
    if job.capacity == "flex_start":
        raise UserError("--capacity=flex_start: queued resources have on_demand, spot and reservation")
    job_lib.refuse(
        job, "tpu_vm", "namespace", "queue", "priority", "hours", "placement_policy", "ramdisk", "pathways"
    )


def create(job: Job) -> list[str]:
    """Asks for the machines; returns at once."""
    one = job.target.num_slices == 1
    nodes = (
        [f"--node-id={job.name}"]
        if one
        else [f"--node-count={job.target.num_slices}", f"--node-prefix={job.name}"]
    )
    capacity = {"spot": ["--spot"], "reservation": [f"--reservation={job.reservation}"]}.get(job.capacity, [])
    return [
        *(*(_GCLOUD_ALPHA if job.reservation else _GCLOUD), "queued-resources", "create", job.name),
        *nodes,
        f"--accelerator-type={job.target.slice.vm_type}",
        f"--runtime-version={job.target.slice.chip.vm_runtime}",
        *capacity,
        *_where(job),
    ]


def describe(job: Job) -> list[str]:
    """Prints the state of the queued resource, one word."""
    return [*_GCLOUD, "queued-resources", "describe", job.name, "--format=value(state.state)", *_where(job)]


def run(job: Job) -> list[list[str]]:
    """Runs the container on all machines of a slice until it ends: one command per slice."""
    steps = [*_prepare(job), f"{shlex.join(container(job))}; echo neo_jax exit $?"]
    remote = " && ".join(f"{{ {step}; }}" for step in steps)
    return [
        [*_GCLOUD, "tpu-vm", "ssh", node, "--worker=all", f"--command={remote}", *_where(job)]
        for node in _nodes(job)
    ]


def delete(job: Job) -> list[str]:
    """Gives the machines back."""
    return [*_GCLOUD, "queued-resources", "delete", job.name, "--force", "--quiet", *_where(job)]


def container(job: Job) -> list[str]:
    """What a machine runs."""
    words = ["sudo", "docker", "run", "--rm", f"--name={job.name}", "--privileged", "--net=host"]
    words += ["--ipc=host", f"--stop-timeout={job.grace_s}"]
    for i, mount in enumerate(job.mounts):
        words.append(f"--volume={_host_path(i) if mount.kind == 'gs' else mount.name}:{mount.path}")
    words += [f"--env={name}={value}" for name, value in job.environment(_num_hosts(job)).items()]
    return [*words, job.image, *job.command()]


def _prepare(job: Job) -> list[str]:
    """Lets docker pull from Google's registry, and puts buckets where containers can reach them."""
    registry = job.image.partition("/")[0]
    commands = (
        [f"sudo gcloud auth configure-docker {registry} --quiet"] if registry.endswith("pkg.dev") else []
    )
    buckets = [(i, mount) for i, mount in enumerate(job.mounts) if mount.kind == "gs"]
    commands += [_INSTALL_GCSFUSE] if buckets else []
    for i, mount in buckets:
        path = _host_path(i)
        made = f"sudo mkdir -p {path}"
        folder = ["--only-dir", mount.folder] if mount.folder else []
        mounted = ["sudo", "gcsfuse", "--implicit-dirs", *folder, "-o", "allow_other", mount.name, path]
        commands.append(f"{made} && {{ mountpoint -q {path} || {shlex.join(mounted)}; }}")
    return commands


def _host_path(index: int) -> str:
    return f"/mnt/neo_jax/{index}"


def _nodes(job: Job) -> list[str]:
    """Names of the TPU VMs, one per slice."""
    if job.target.num_slices == 1:
        return [job.name]
    return [f"{job.name}-{i}" for i in range(job.target.num_slices)]


def _num_hosts(job: Job) -> int:
    return job.target.slice.vm_hosts * job.target.num_slices


def _where(job: Job | Run) -> list[str]:
    return [f"--zone={job.zone}", *([f"--project={job.project}"] if job.project else [])]


def submit(job: Job) -> list[str]:
    """The command that takes the script on its stdin; it stays until the run has ended."""
    return ["bash", "-s"]


def status(run: Run) -> list[list[str]]:
    """Commands that show where the run stands."""
    if not run.zone:
        raise UserError("--zone: name the zone of the TPU VM, such as --zone=us-east5-a")
    return [[*_GCLOUD, "queued-resources", "describe", run.name, *_where(run)]]
