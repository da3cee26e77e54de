"""Jobs that the tests of launch share, each with a file in tests/launch/golden.

A change of what a backend writes shows up there as a diff. To accept it: python -m tests.launch.jobs
"""

import dataclasses
from pathlib import Path

from launch import fit
from launch.backends import BACKENDS
from launch.job import Job, Mount, target_of

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[2]
CONFIG = "configs/neo_9b.py"
CLAIM = (Mount("pvc://neo-jax", "/workdir"),)


def job(topology: str, num_slices: int = 1, **changes) -> Job:
    """A run of NEO-9B on that topology."""
    target = target_of(topology, num_slices)
    base = Job(
        name="neo-9b",
        config=CONFIG,
        target=target,
        workdir="/workdir/neo-9b",
        image="registry.example/neo_jax:1",
        overrides=fit.fields(str(ROOT / CONFIG), (), target),
        mounts=CLAIM,
    )
    return dataclasses.replace(base, **changes)


def cases() -> dict[str, tuple[str, Job]]:
    """File name -> (backend, job)."""
    bucket = (Mount("gs://runs", "/workdir"), Mount("/mnt/disks/ssd", "/scratch"))
    return {
        "gke_v5p_4x4x4_x2.yaml": ("gke", job("v5p:4x4x4", 2)),
        "gke_v6e_16x16_spot.yaml": (
            "gke",
            job("v6e:16x16", capacity="spot", queue="tpu-queue", priority="high", mounts=bucket),
        ),
        "gke_v6e_2x2_x4_flex.yaml": (
            "gke",
            job("v6e:2x2", 4, capacity="flex_start", queue="flex", hours=24, flags="sparse_core"),
        ),
        "gke_tpu7x_4x4x8_reservation.yaml": (
            "gke",
            job("tpu7x:4x4x8", capacity="reservation", reservation="res-1", placement_policy="cube"),
        ),
        "gke_h100_64.yaml": ("gke", job("h100:64", env=(("NCCL_DEBUG", "WARN"),))),
        "gke_v5p_4x4x4_x2_pathways.yaml": (
            "gke",
            job("v5p:4x4x4", 2, pathways="gs://runs/pathways", queue="tpu-queue"),
        ),
        "gke_v6e_16x16_x2_ramdisk.yaml": ("gke", job("v6e:16x16", 2, ramdisk="/ramdisk")),
        "gke_b200_8.yaml": ("gke", job("b200:8", flags="none")),
        "slurm_h100_64.sh": (
            "slurm",
            job(
                "h100:64",
                image="registry.example#neo_jax:1",
                mounts=(Mount("$SLURM_SUBMIT_DIR", "/workdir"), Mount("/data/my corpus", "/data")),
                queue="gpu",
                priority="high",
                hours=48,
                capacity="reservation",
                reservation="res-1",
            ),
        ),
        "slurm_h200_8.sh": (
            "slurm",
            job("h200:8", image="", mounts=(), workdir="runs/neo-9b", env=(("GREETING", "it's"),)),
        ),
        "local_cpu_2.sh": ("local", job("cpu:2", image="", mounts=(), workdir="runs/neo-9b")),
        "tpu_vm_v6e_4x4_x2_spot.sh": (
            "tpu_vm",
            job("v6e:4x4", 2, capacity="spot", zone="us-east5-b", mounts=(Mount("gs://runs", "/workdir"),)),
        ),
        "tpu_vm_v5p_4x4x4_reserved.sh": (
            "tpu_vm",
            job(
                "v5p:4x4x4",
                capacity="reservation",
                reservation="res-1",
                image="us-docker.pkg.dev/p/r/neo_jax:1",
                zone="us-east5-a",
                project="lab",
                mounts=(Mount("/mnt/nfs", "/workdir"),),
            ),
        ),
    }


def render(name: str) -> str:
    backend, one = cases()[name]
    return BACKENDS[backend].render(one)


if __name__ == "__main__":
    for file in GOLDEN.iterdir():
        file.unlink()
    for file_name in cases():
        (GOLDEN / file_name).write_text(render(file_name))
