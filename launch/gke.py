"""Google Kubernetes Engine: a JobSet of one child job per TPU slice, or of one job of GPU hosts.

Who is who: on TPUs GKE's webhook injects TPU_WORKER_ID, TPU_WORKER_HOSTNAMES and, for several slices,
MEGASCALE_*, which JAX reads by itself. On GPUs the manifest names the first pod and each pod's own index.

How it ends: an exit code of FATAL_EXIT_CODES fails the JobSet at once; any other failure of a pod (a signal,
an eviction, a lost machine) fails its job and restarts the whole JobSet, `max_restarts` times. Python is
process 1 of its container, with no shell around it, and so gets SIGTERM. That does nothing
to a process 1 unless handled: neo_jax.train handles it before it imports anything else.

Quotas, queues and node pools belong to the owner of the cluster: the manifest only names them.
"""

from typing import Any

import yaml

from launch import job as job_lib, pathways, pods
from launch.job import Job, Run
from launch.pods import TPU_PORTS, Manifest
from neo_jax.errors import UserError

API_VERSION = "jobset.x-k8s.io/v1alpha2"
GPU_COORDINATOR_PORT = 6002
MAX_FLEX_HOURS = 7 * 24
TTL_S = 12 * 3600  # a finished JobSet and its logs stay this long

_POD_SUFFIX = len("-abcde")  # what Kubernetes appends to the names of pods
_MAX_NAME = 63


def render(job: Job) -> str:
    """The manifest as YAML, with the node pools it expects as a comment.

    Raises:
        UserError: the job is none for GKE; the message names the flag.
    """
    check(job)
    place = job.target.slice
    pools = f"{job.target.num_slices} node pool(s) of {place.num_hosts} x {place.machine}"
    if place.chip.platform == "gpu":
        pools = f"{job.target.num_hosts} nodes of machine type {place.machine}"
    elif place.num_hosts > 1:
        pools += f", topology {place.shape_text}"
    return f"# {job.name} on {job.target.name}: {pools}\n" + dump(manifest(job))


def dump(value: Manifest) -> str:
    """YAML in the order of the dict, without anchors."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1000)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def check(job: Job) -> None:
    """What GKE demands of a Job. Raises UserError."""
    job_lib.check(job)
    if job.target.slice.chip.platform == "cpu":
        raise UserError(f"--backend=gke: {job.target.name} is no accelerator; use --backend=local")
    job_lib.check_workdir(job)
    if not job.image:
        raise UserError("--image: GKE runs containers; name the image that holds this repository")
    if job.pathways:  # the address of the head, a label of all pods, has the name twice
        longest = (_MAX_NAME - len(f"-{pathways.HEAD}-0-0.")) // 2
        why = "the label with the address of Pathways' head stays"
    else:
        longest = _MAX_NAME - len(f"-{_replicated_job(job)}-{_last_pod(job)}") - _POD_SUFFIX
        why = f"the names of {job.target.num_hosts} pods stay"
    if len(job.name) > longest:
        raise UserError(
            f"--name={job.name}: {len(job.name)} characters; at most {longest}, so that {why} within "
            f"{_MAX_NAME}"
        )
    if job.capacity == "flex_start":
        if not job.queue:
            raise UserError(
                "--capacity=flex_start: needs --queue=NAME, the Kueue LocalQueue that provisions it"
            )
        if job.hours > MAX_FLEX_HOURS:
            raise UserError(
                f"--hours={job.hours}: flex-start lends machines for {MAX_FLEX_HOURS} hours at most"
            )
    elif job.hours:
        raise UserError("--hours: GKE limits the time of --capacity=flex_start only; leave it out")
    if job.placement_policy and job.target.slice.chip.platform != "tpu":
        raise UserError("--placement_policy: is for TPU node pools; leave it out")
    if job.ramdisk and job.target.slice.chip.platform != "tpu":
        raise UserError("--ramdisk: GKE has it for TPUs; leave it out")
    if job.ramdisk and (not job.ramdisk.startswith("/") or job.ramdisk in [m.path for m in job.mounts]):
        raise UserError(f"--ramdisk={job.ramdisk}: must be an absolute path that no --mount has")
    if job.pathways:
        pathways.check(job)
    if job.ramdisk and job.target.num_slices < 2:
        raise UserError(
            "--ramdisk: the first slice keeps no checkpoints in memory; take --num_slices=2 or more"
        )
    job_lib.refuse(job, "gke", "zone", "project")


def manifest(job: Job) -> Manifest:
    """The JobSet as plain data."""
    annotations = {}
    if (
        job.target.slice.num_hosts > 1 and not job.pathways
    ):  # a child job has a node pool, which is its slice, to itself
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    if job.capacity == "flex_start" and job.hours:
        annotations["provreq.kueue.x-k8s.io/maxRunDurationSeconds"] = str(3600 * job.hours)
    labels = {"kueue.x-k8s.io/queue-name": job.queue} if job.queue else {}
    return {
        "apiVersion": API_VERSION,
        "kind": "JobSet",
        "metadata": pods.without_empty(
            {"name": job.name, "namespace": job.namespace, "labels": labels, "annotations": annotations}
        ),
        "spec": {
            "ttlSecondsAfterFinished": TTL_S,
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": job.max_restarts,
                "rules": [
                    {
                        "name": "fatal",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": pathways.replicated_jobs(job) if job.pathways else [_workers(job)],
            **(pathways.policies() if job.pathways else {}),
        },
    }


def _workers(job: Job) -> Manifest:
    """The child jobs: one per slice, one for all GPU hosts."""
    gpu = job.target.slice.chip.platform == "gpu"
    count = job.target.num_hosts if gpu else job.target.slice.num_hosts
    return {
        "name": _replicated_job(job),
        "replicas": 1 if gpu else job.target.num_slices,
        "template": {"spec": pods.child_job(pods.pod(job, [_container(job)]), count)},
    }


def _container(job: Job) -> Manifest:
    place = job.target.slice
    gpu = place.chip.platform == "gpu"
    env: list[Manifest] = [
        {"name": name, "value": pods.literal(value)}
        for name, value in job.environment(job.target.num_hosts).items()
    ]
    if gpu:
        first = f"{job.name}-{_replicated_job(job)}-0-0.{job.name}"
        env += [
            {"name": job_lib.COORDINATOR_VARIABLE, "value": f"{first}:{GPU_COORDINATOR_PORT}"},
            pods.from_field(
                job_lib.PROCESS_ID_VARIABLE,
                "metadata.annotations['batch.kubernetes.io/job-completion-index']",
            ),
        ]
    resource = "nvidia.com/gpu" if gpu else "google.com/tpu"
    ports = (GPU_COORDINATOR_PORT,) if gpu else TPU_PORTS
    return {
        "name": pods.CONTAINER,
        "image": job.image,
        "command": [pods.literal(word) for word in job.command()],
        "env": env,
        "ports": [{"containerPort": port} for port in ports],
        "securityContext": {"privileged": True},  # TPU devices; locked memory
        "resources": {"limits": {resource: place.chips_per_host}},
        "volumeMounts": pods.volume_mounts(job),
    }


def _replicated_job(job: Job) -> str:
    return "node" if job.target.slice.chip.platform == "gpu" else "slice"


def _last_pod(job: Job) -> str:
    """ "JOB-POD", the longest of the indices in pods' names."""
    if job.target.slice.chip.platform == "gpu":
        return f"0-{job.target.num_hosts - 1}"
    return f"{job.target.num_slices - 1}-{job.target.slice.num_hosts - 1}"


def submit(job: Job) -> list[str]:
    """The command that takes the manifest on its stdin."""
    return ["kubectl", "create", "--filename=-"]


def status(run: Run) -> list[list[str]]:
    """Commands that show where the run stands."""
    where = f"--namespace={run.namespace}"
    return [
        ["kubectl", "get", "jobset", run.name, where],
        ["kubectl", "get", "pods", f"--selector=jobset.sigs.k8s.io/jobset-name={run.name}", where],
    ]
