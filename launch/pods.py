"""Parts of Kubernetes manifests: pods on the nodes of a Job, their volumes, child jobs of a JobSet."""

from typing import Any

from launch.job import FATAL_EXIT_CODES, Job, Mount

TPU_PORTS = (8471, 8431, 8080)  # TPU runtime, its metrics, slice to slice
CONTAINER = "train"  # name of the container that runs the training command
_RAMDISK_DRIVER = "multitier-checkpoint.csi.storage.gke.io"

Manifest = dict[str, Any]


def child_job(pod: Manifest, count: int, *, fatal: bool = True) -> Manifest:
    """The spec of a child job: `count` pods at once, each with its index, all or none.

    `fatal`: exit codes of FATAL_EXIT_CODES fail the job for good.
    """
    codes = {"containerName": CONTAINER, "operator": "In", "values": sorted(FATAL_EXIT_CODES)}
    policy = {"rules": [{"action": "FailJob", "onExitCodes": codes}]}
    return {
        "parallelism": count,
        "completions": count,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        **({"podFailurePolicy": policy} if fatal else {}),
        "template": pod,
    }


def pod(job: Job, containers: list[Manifest], *, accelerated: bool = True) -> Manifest:
    """A pod template on the nodes with the job's accelerators, or on any: network, grace, volumes."""
    selector, tolerations = _node(job) if accelerated else ({}, [])
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
    """Shared memory (Grain's workers hand batches over in it), the mounts, and the checkpoint ramdisk."""
    shm = {"name": "shm", "emptyDir": {"medium": "Memory"}}
    mounts = [{"name": f"mount-{i}", **_source(mount)} for i, mount in enumerate(job.mounts)]
    ramdisk = [{"name": "ramdisk", "csi": {"driver": _RAMDISK_DRIVER}}] if job.ramdisk else []
    return [shm, *mounts, *ramdisk]


def volume_mounts(job: Job) -> list[Manifest]:
    """Where a container finds the volumes."""
    shm = {"name": "shm", "mountPath": "/dev/shm"}
    mounts = [{"name": f"mount-{i}", "mountPath": mount.path} for i, mount in enumerate(job.mounts)]
    ramdisk = [{"name": "ramdisk", "mountPath": job.ramdisk}] if job.ramdisk else []
    return [shm, *mounts, *ramdisk]


def _source(mount: Mount) -> Manifest:
    if mount.kind == "gs":
        attributes = {
            "bucketName": mount.name,
            "mountOptions": "implicit-dirs" + (f",only-dir={mount.folder}" if mount.folder else ""),
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


def literal(text: str) -> str:
    """Kubernetes replaces $(NAME) in commands and values; what the user wrote stays as it is."""
    return text.replace("$(", "$$(")
