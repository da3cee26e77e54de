"""Pathways on GKE, experimental: one controller runs the program, the slices only execute.

A JobSet of two jobs. `pathways-head` is one pod without accelerators: the training command, and beside it the
resource manager and the proxy that JAX talks to instead of devices. `worker` has a pod per TPU host, with
Pathways' server image in place of ours. Our image needs the package `pathwaysutils`.
"""

from launch import pods
from launch.job import Job
from launch.pods import Manifest
from neo_jax.errors import UserError

PROXY_IMAGE = "us-docker.pkg.dev/cloud-tpu-v2-images/pathways/proxy_server:latest"
SERVER_IMAGE = "us-docker.pkg.dev/cloud-tpu-v2-images/pathways/server:latest"
HEAD, WORKER = "pathways-head", "worker"
_PROXY_PORT, _MANAGER_PORT, _MANAGER_PEER_PORT, _WORKER_PORT, _WORKER_PEER_PORT = (
    29000,
    29001,
    29002,
    29005,
    29006,
)
_COORDINATOR_LABEL = "metadata.labels['jobset.sigs.k8s.io/coordinator']"
_INSTANCES = {"v5e": "tpuv5e", "v5p": "tpuv5", "v6e": "tpuv6e", "tpu7x": "tpu7x"}


def check(job: Job) -> None:
    """What Pathways demands of a Job for GKE. Raises UserError."""
    if job.target.slice.chip.platform != "tpu":
        raise UserError("--pathways: is for TPUs; leave it out")
    if not job.pathways.startswith("gs://"):
        raise UserError(f"--pathways={job.pathways}: must be a folder in Cloud Storage, gs://BUCKET/FOLDER")
    if job.ramdisk:
        raise UserError(
            "--ramdisk: has no use with --pathways, as the slices hold no checkpoints; leave one out"
        )


def replicated_jobs(job: Job) -> list[Manifest]:
    """The two child jobs."""
    return [_head(job), _workers(job)]


def policies() -> Manifest:
    """Fields of the JobSet's spec: workers ask the head, and it alone says when the run has ended."""
    return {
        "coordinator": {"replicatedJob": HEAD},
        "startupPolicy": {"startupPolicyOrder": "InOrder"},
        "successPolicy": {"operator": "All", "targetReplicatedJobs": [HEAD]},
    }


def _head(job: Job) -> Manifest:
    scratch = f"--gcs_scratch_location={job.pathways}"
    address = pods.from_field("PATHWAYS_HEAD", _COORDINATOR_LABEL)
    instance = f"{_INSTANCES[job.target.slice.chip.name]}:{job.target.slice.shape_text}"
    proxy = _sidecar(
        "pathways-proxy",
        PROXY_IMAGE,
        [
            f"--server_port={_PROXY_PORT}",
            f"--resource_manager_address=$(PATHWAYS_HEAD):{_MANAGER_PORT}",
            scratch,
        ],
        [address],
        (_PROXY_PORT,),
        {"cpu": "16", "memory": "100G"},
    )
    manager = _sidecar(
        "pathways-rm",
        SERVER_IMAGE,
        [
            *(f"--server_port={_MANAGER_PORT}", scratch, "--node_type=resource_manager"),
            *(f"--instance_count={job.target.num_slices}", f"--instance_type={instance}"),
        ],
        [
            pods.from_field("HOST_ADDRESS", _COORDINATOR_LABEL),
            pods.from_field("JOBSET_NAME", "metadata.annotations['jobset.sigs.k8s.io/jobset-name']"),
            pods.from_field(
                "REPLICATED_JOB_NAME", "metadata.annotations['jobset.sigs.k8s.io/replicatedjob-name']"
            ),
            {"name": "TPU_SKIP_MDS_QUERY", "value": "true"},
        ],
        (_MANAGER_PORT, _MANAGER_PEER_PORT),
        {"cpu": "8", "memory": "32G"},
    )
    environment = job.environment(num_processes=1)
    environment.pop("LIBTPU_INIT_ARGS", None)  # there is no libtpu in this process
    environment |= {
        "JAX_PLATFORMS": "proxy",
        "XCLOUD_ENVIRONMENT": "GCP",
        "JAX_BACKEND_TARGET": f"grpc://$(PATHWAYS_HEAD):{_PROXY_PORT}",
    }
    train = pods.without_empty(
        {
            "name": pods.CONTAINER,
            "image": job.image,
            "command": [pods.literal(word) for word in _command(job)],
            "env": [
                address,  # before the one that refers to it
                *(
                    {"name": name, "value": value if name == "JAX_BACKEND_TARGET" else pods.literal(value)}
                    for name, value in environment.items()
                ),
            ],
            "volumeMounts": pods.volume_mounts(job),
        }
    )
    pod = pods.pod(job, [train], accelerated=False)
    pod["spec"]["initContainers"] = [manager, proxy]
    hostname = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "kubernetes.io/hostname"}
    return {
        "name": HEAD,
        "replicas": 1,
        "template": {"metadata": {"annotations": hostname}, "spec": pods.child_job(pod, 1)},
    }


def _command(job: Job) -> list[str]:
    """The training command in a Python that knows the platform "proxy"."""
    python, _, module, *arguments = job.command()
    start = (
        "import pathwaysutils, runpy; pathwaysutils.initialize(); "
        f"runpy.run_module('{module}', run_name='__main__', alter_sys=True)"
    )
    return [python, "-c", start, *arguments]


def _workers(job: Job) -> Manifest:
    place = job.target.slice
    slice_fields = [
        pods.from_field("PATHWAYS_HEAD", _COORDINATOR_LABEL),
        pods.from_field("MEGASCALE_COORDINATOR_ADDRESS", _COORDINATOR_LABEL),
        pods.from_field(
            "MEGASCALE_NUM_SLICES", "metadata.labels['jobset.sigs.k8s.io/replicatedjob-replicas']"
        ),
        pods.from_field("MEGASCALE_SLICE_ID", "metadata.labels['jobset.sigs.k8s.io/job-index']"),
    ]
    flags = job.environment(num_processes=1).get("LIBTPU_INIT_ARGS")
    server = {
        "name": "pathways-worker",
        "image": SERVER_IMAGE,
        "args": [
            f"--server_port={_WORKER_PORT}",
            f"--resource_manager_address=$(PATHWAYS_HEAD):{_MANAGER_PORT}",
            f"--gcs_scratch_location={job.pathways}",
        ],
        "env": [
            *slice_fields,
            {"name": "XCLOUD_ENVIRONMENT", "value": "GCP"},
            *([{"name": "LIBTPU_INIT_ARGS", "value": flags}] if flags else []),
        ],
        "ports": [{"containerPort": port} for port in (_WORKER_PORT, _WORKER_PEER_PORT, *pods.TPU_PORTS)],
        "securityContext": {"privileged": True},
        "resources": {"limits": {"google.com/tpu": place.chips_per_host}},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    pod = pods.pod(job, [server])
    pod.pop("metadata", None)
    # The server reads no data and writes no checkpoints; it shares /tmp with its host.
    pod["spec"]["volumes"] = [{"name": "tmp", "hostPath": {"path": "/tmp", "type": "DirectoryOrCreate"}}]
    nodepool = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    template: Manifest = {"spec": pods.child_job(pod, place.num_hosts, fatal=False)}
    if place.num_hosts > 1:
        template = {"metadata": {"annotations": nodepool}, **template}
    return {"name": WORKER, "replicas": job.target.num_slices, "template": template}


def _sidecar(
    name: str,
    image: str,
    args: list[str],
    env: list[Manifest],
    ports: tuple[int, ...],
    limits: dict[str, str],
) -> Manifest:
    """A container that starts before the training command and runs beside it."""
    return {
        "name": name,
        "image": image,
        "args": args,
        "env": env,
        "ports": [{"containerPort": port} for port in ports],
        "resources": {"limits": limits},
        "restartPolicy": "Always",
    }
