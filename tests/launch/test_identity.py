"""Who each process is: the environment that a file gives, as JAX's own cluster detectors read it.

What the cluster adds is put in by hand as its documentation says: GKE's webhook for TPU pods, the downward
API for Kubernetes' fields, srun for its tasks, the metadata server for TPU VMs.
"""

import os
import re
import subprocess

import pytest
import yaml
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster

from launch import gke, job as job_lib, slurm, tpu_vm
from launch.job import Job, Mount
from neo_jax import distributed
from tests.launch import jobs

# What a test machine may have of a real cluster.
_CLUSTER_VARIABLES = re.compile(r"^(SLURM|TPU|MEGASCALE|KUBERNETES|OMPI|JAX_COORD|NEO_JAX|CLOUD_TPU)")


@pytest.fixture
def detect(monkeypatch):
    """Function: environment -> (coordinator, number of processes, this one's id, its devices) or Nones."""

    def detect(environment: dict[str, str], on_tpu: bool):
        for name in [name for name in os.environ if _CLUSTER_VARIABLES.match(name)]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        # libtpu sets this on machines that have a TPU.
        monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", on_tpu)
        monkeypatch.setattr(clusters.cluster, "running_in_cloud_tpu_vm", on_tpu)
        monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", lambda name: "10.0.0.1")
        return clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 300)

    return detect


def pods(manifest: dict) -> list[tuple[int, int, dict[str, str]]]:
    """(job index, pod index, environment) of every pod, fields of the pod put in as Kubernetes would."""
    found = []
    for replicated in manifest["spec"]["replicatedJobs"]:
        spec = replicated["template"]["spec"]
        container = spec["template"]["spec"]["containers"][0]
        for job in range(replicated["replicas"]):
            for pod in range(spec["completions"]):
                fields = {
                    "metadata.annotations['batch.kubernetes.io/job-completion-index']": str(pod),
                    "metadata.labels['jobset.sigs.k8s.io/job-index']": str(job),
                }
                environment = {
                    variable["name"]: variable["value"]
                    if "value" in variable
                    else fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
                    for variable in container["env"]
                }
                found.append((job, pod, environment))
    return found


def gke_webhook(manifest: dict, job: int, pod: int) -> dict[str, str]:
    """What GKE injects into the TPU pods of a JobSet."""
    name = manifest["metadata"]["name"]
    [replicated] = manifest["spec"]["replicatedJobs"]
    hosts, slices = replicated["template"]["spec"]["completions"], replicated["replicas"]
    host = f"{name}-{replicated['name']}-{{}}-{{}}.{name}"
    injected = {
        "TPU_WORKER_ID": str(pod),
        "TPU_WORKER_HOSTNAMES": ",".join(host.format(job, other) for other in range(hosts)),
        "TPU_SKIP_MDS_QUERY": "true",
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    }
    if slices > 1:
        injected["MEGASCALE_COORDINATOR_ADDRESS"] = host.format(0, 0)
        injected |= {"MEGASCALE_NUM_SLICES": str(slices), "MEGASCALE_SLICE_ID": str(job)}
    return injected


@pytest.mark.parametrize(
    ("topology", "num_slices", "processes"),
    [
        ("v5p:4x4x4", 2, 32),
        ("v6e:16x16", 1, 64),
        ("tpu7x:4x4x8", 1, 32),
        ("v6e:2x2", 4, 4),
        ("v6e:2x2", 1, 1),
    ],
)
def test_tpu_pods_of_gke(topology, num_slices, processes, detect, monkeypatch):
    # GKE's metadata server knows nothing of TPUs.
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("not found", 404))
    manifest = yaml.safe_load(gke.render(jobs.job(topology, num_slices)))
    ids, coordinators = [], set()
    for job, pod, environment in pods(manifest):
        environment |= gke_webhook(manifest, job, pod)
        coordinator, count, process_id, devices = detect(environment, on_tpu=True)
        assert count == processes == int(environment["NEO_JAX_NUM_PROCESSES"])
        assert devices is None  # all of the host
        ids.append(process_id)
        coordinators.add(coordinator)
    assert ids == list(range(processes))
    assert coordinators == {"neo-9b-slice-0-0.neo-9b:8482"}


def test_gpu_pods_of_gke():
    """JAX cannot find out here, so the manifest says it in the words of neo_jax.distributed."""
    assert (*(distributed.NUM_PROCESSES, distributed.COORDINATOR, distributed.PROCESS_ID),) == (
        job_lib.NUM_PROCESSES_VARIABLE,
        job_lib.COORDINATOR_VARIABLE,
        job_lib.PROCESS_ID_VARIABLE,
    )
    manifest = yaml.safe_load(gke.render(jobs.job("h100:64")))
    found = [environment for _, _, environment in pods(manifest)]
    assert [environment["NEO_JAX_PROCESS_ID"] for environment in found] == [str(i) for i in range(8)]
    assert {environment["NEO_JAX_NUM_PROCESSES"] for environment in found} == {"8"}
    # The DNS name that JobSet gives the first pod: <jobset>-<replicated job>-<job>-<pod>.<jobset>
    assert {environment["NEO_JAX_COORDINATOR"] for environment in found} == {"neo-9b-node-0-0.neo-9b:6002"}
    [replicated] = manifest["spec"]["replicatedJobs"]
    assert replicated["name"] == "node" and manifest["spec"]["network"]["publishNotReadyAddresses"] is True


def exported(script: str) -> dict[str, str]:
    """The environment in which the script would call srun."""
    prologue = script[: script.index("code=0")]
    done = subprocess.run(
        ["bash", "-c", prologue + "\nenv -0"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        check=True,
    )
    pairs = (pair.split("=", 1) for pair in done.stdout.decode().split("\0") if pair)
    return {name: value for name, value in pairs if name not in ("PATH", "PWD", "SHLVL", "_")}


def test_tasks_of_srun(detect):
    script = slurm.render(jobs.cases()["slurm_h100_64.sh"][1])
    nodes, tasks = (int(re.search(rf"--{name}=(\d+)", script)[1]) for name in ("nodes", "ntasks-per-node"))
    environment = exported(script)
    batch = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": str(nodes * tasks)}
    assert detect(environment | batch, on_tpu=False) == (None, None, None, None)  # not under srun
    ids = []
    for rank in range(nodes * tasks):
        srun = {
            "SLURM_STEP_NODELIST": "node[003-010]",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank % tasks),
        }
        coordinator, count, process_id, devices = detect(environment | batch | srun, on_tpu=False)
        assert coordinator == f"node003:{4711 % 2**12 + 65535 - 2**12 + 1}"
        assert count == 64 == int(environment["NEO_JAX_NUM_PROCESSES"])
        assert devices == [rank % tasks]  # a GPU each
        ids.append(process_id)
    assert ids == list(range(64))


@pytest.mark.parametrize(
    ("topology", "num_slices", "hosts"), [("v5p:4x4x4", 1, 16), ("v6e:4x4", 2, 4), ("v6e:2x4", 1, 1)]
)
def test_machines_of_a_tpu_vm(topology, num_slices, hosts, detect, monkeypatch):
    """`hosts`: of a slice, as the metadata server lists them."""
    job: Job = jobs.job(topology, num_slices, zone="z", mounts=(Mount("gs://runs", "/workdir"),))
    flags = [word.removeprefix("--env=") for word in tpu_vm.container(job) if word.startswith("--env=")]
    environment = dict(flag.split("=", 1) for flag in flags)
    assert "--net=host" in tpu_vm.container(job)  # the metadata server and the other machines are in reach
    ids = []
    for index in range(num_slices):
        for worker in range(hosts):
            multislice = (
                ""
                if num_slices == 1
                else (
                    f"MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1'\nMEGASCALE_NUM_SLICES: '{num_slices}'\n"
                    f"MEGASCALE_SLICE_ID: '{index}'\n"
                )
            )
            metadata = {
                "agent-worker-number": str(worker),
                "worker-network-endpoints": ",".join(f"w:{i}:10.0.{index}.{i + 1}" for i in range(hosts)),
                "tpu-env": f"ZONE: 'z'\n{multislice}",
            }
            monkeypatch.setattr(
                cloud_tpu_cluster, "get_metadata", lambda key, found=metadata: (found[key], 200)
            )
            coordinator, count, process_id, devices = detect(environment, on_tpu=True)
            assert coordinator == "10.0.0.1:8482"
            assert count == hosts * num_slices == int(environment["NEO_JAX_NUM_PROCESSES"])
            assert devices is None
            ids.append(process_id)
    assert ids == list(range(hosts * num_slices))
