"""Google Kubernetes Engine: a JobSet of one child job per TPU slice, or of one job of GPU hosts.

Who is who: on TPUs GKE's webhook injects TPU_WORKER_ID, TPU_WORKER_HOSTNAMES and, for several slices,
MEGASCALE_*, which JAX reads by itself. On GPUs the manifest names the first pod and each pod's own index.

How it ends: an exit code of FATAL_EXIT_CODES fails the JobSet at once; any other failure of a pod (a signal,
an eviction, a lost machine) fails its job and restarts the whole JobSet, `max_restarts` times. Python is
process 1 of its container, with no shell around it, and so gets SIGTERM.

Quotas, queues and node pools belong to the owner of the cluster: the manifest only names them.
"""

from typing import Any

import yaml

from launch import job as job_lib
from launch.job import FATAL_EXIT_CODES, Job, Mount, Run
from neo_jax.errors import UserError

API_VERSION = "jobset.x-k8s.io/v1alpha2"
CONTAINER = "train"
GPU_COORDINATOR_PORT = 6002
TPU_PORTS = (8471, 8431, 8080)  # TPU runtime, its metrics, slice to slice
MAX_FLEX_HOURS = 7 * 24
TTL_S = 12 * 3600  # a finished JobSet and its logs stay this long

_POD_SUFFIX = len("-abcde")  # what Kubernetes appends to the names of pods
_MAX_NAME = 63

Manifest = dict[str, Any]


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
    job_lib.check_workdir(job)
    if not job.image:
        raise UserError("--image: GKE runs containers; name the image that holds this repository")
    longest = _MAX_NAME - len(f"-{_replicated_job(job)}-{_last_pod(job)}") - _POD_SUFFIX
    if len(job.name) > longest:
        raise UserError(
            f"--name={job.name}: {len(job.name)} characters; at most {longest}, so that the names of "
            f"{job.target.num_hosts} pods stay within {_MAX_NAME}"
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
    job_lib.refuse(job, "gke", "zone", "project")


def manifest(job: Job) -> Manifest:
    """The JobSet as plain data."""
    annotations = {}
    if job.target.slice.num_hosts > 1:  # a child job has a node pool, which is its slice, to itself
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    if job.capacity == "flex_start" and job.hours:
        annotations["provreq.kueue.x-k8s.io/maxRunDurationSeconds"] = str(3600 * job.hours)
    labels = {"kueue.x-k8s.io/queue-name": job.queue} if job.queue else {}
    return {
        "apiVersion": API_VERSION,
        "kind": "JobSet",
        "metadata": without_empty(
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
            "replicatedJobs": [_workers(job)],
        },
    }


def _workers(job: Job) -> Manifest:
    """The child jobs: one per slice, one for all GPU hosts."""
    gpu = job.target.slice.chip.platform == "gpu"
    pods = job.target.num_hosts if gpu else job.target.slice.num_hosts
    fatal = {"containerName": CONTAINER, "operator": "In", "values": sorted(FATAL_EXIT_CODES)}
    return {
        "name": _replicated_job(job),
        "replicas": 1 if gpu else job.target.num_slices,
        "template": {
            "spec": {
                "parallelism": pods,
                "completions": pods,
                "completionMode": "Indexed",
                "backoffLimit": 0,
                "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": fatal}]},
                "template": pod(job, [_container(job)]),
            }
        },
    }


def pod(job: Job, containers: list[Manifest]) -> Manifest:
    """A pod template on the job's accelerators: node, network, volumes."""
    selector, tolerations = _node(job)
    gcs = any(mount.kind == "gs" for mount in job.mounts)
    return without_empty(
        {
            "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}} if gcs else {},
            "spec": without_empty(
                {
                    "restartPolicy": "Never",
                    "hostNetwork": True,  # the data-centre network without a bridge in between
                    "dnsPolicy": "ClusterFirstWithHostNet",
                    "terminationGracePeriodSeconds": job.grace_s,
                    "priorityClassName": job.priority,
                    "nodeSelector": selector,
                    "tolerations": tolerations,
                    "containers": containers,
                    "volumes": volumes(job),
                }
            ),
        }
    )


def _container(job: Job) -> Manifest:
    place = job.target.slice
    gpu = place.chip.platform == "gpu"
    env: list[Manifest] = [
        {"name": name, "value": _literal(value)}
        for name, value in job.environment(job.target.num_hosts).items()
    ]
    if gpu:
        first = f"{job.name}-{_replicated_job(job)}-0-0.{job.name}"
        env += [
            {"name": job_lib.COORDINATOR_VARIABLE, "value": f"{first}:{GPU_COORDINATOR_PORT}"},
            from_field(
                job_lib.PROCESS_ID_VARIABLE,
                "metadata.annotations['batch.kubernetes.io/job-completion-index']",
            ),
        ]
    resource = "nvidia.com/gpu" if gpu else "google.com/tpu"
    ports = (GPU_COORDINATOR_PORT,) if gpu else TPU_PORTS
    return {
        "name": CONTAINER,
        "image": job.image,
        "command": [_literal(word) for word in job.command()],
        "env": env,
        "ports": [{"containerPort": port} for port in ports],
        "securityContext": {"privileged": True},  # TPU devices; locked memory
        "resources": {"limits": {resource: place.chips_per_host}},
        "volumeMounts": volume_mounts(job),
    }


def _node(job: Job) -> tuple[dict[str, str], list[Manifest]]:
    """Labels of the nodes, and the taints of theirs that do not matter."""
    place = job.target.slice
    if place.chip.platform == "gpu":
        selector = {"cloud.google.com/gke-accelerator": place.chip.gke_accelerator}
        tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    else:
        selector = {
            "cloud.google.com/gke-tpu-accelerator": place.chip.gke_accelerator,
            "cloud.google.com/gke-tpu-topology": place.shape_text,
            "cloud.google.com/gke-accelerator-count": str(place.chips_per_host),
        }
        tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
    if job.placement_policy:
        selector["cloud.google.com/placement-policy-name"] = job.placement_policy
    if job.capacity == "spot":
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"})
    elif job.capacity == "reservation":
        selector["cloud.google.com/reservation-name"] = job.reservation
    elif job.capacity == "flex_start":
        selector["cloud.google.com/gke-queued"] = "true"
        tolerations.append(
            {"key": "cloud.google.com/gke-queued", "operator": "Exists", "effect": "NoSchedule"}
        )
    return selector, tolerations


def volumes(job: Job) -> list[Manifest]:
    """Shared memory (Grain's workers hand batches over in it) and the mounts."""
    shm = {"name": "shm", "emptyDir": {"medium": "Memory"}}
    return [shm, *({"name": f"mount-{i}", **_source(mount)} for i, mount in enumerate(job.mounts))]


def volume_mounts(job: Job) -> list[Manifest]:
    shm = {"name": "shm", "mountPath": "/dev/shm"}
    return [
        shm,
        *({"name": f"mount-{i}", "mountPath": mount.path} for i, mount in enumerate(job.mounts)),
    ]


def _source(mount: Mount) -> Manifest:
    if mount.kind == "gs":
        attributes = {
            "bucketName": mount.name,
            "mountOptions": "implicit-dirs",
            "hostNetworkPodKSA": "true",  # identity of the pod, although it is on the host's network
        }
        return {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
    if mount.kind == "pvc":
        return {"persistentVolumeClaim": {"claimName": mount.name}}
    return {"hostPath": {"path": mount.name, "type": "Directory"}}


def from_field(name: str, path: str) -> Manifest:
    """An environment variable that takes a field of the pod."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def without_empty(fields: Manifest) -> Manifest:
    """The fields that say something: Kubernetes reads null and {} as mistakes or noise."""
    return {key: value for key, value in fields.items() if value not in ("", {}, [], None)}


def _literal(text: str) -> str:
    """Kubernetes replaces $(NAME) in commands and values; what the user wrote stays as it is."""
    return text.replace("$(", "$$(")


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
