"""The backends by name. Adding one: a module with `render`, and its line here."""

import dataclasses
from collections.abc import Callable, Mapping

from launch import gke, slurm, this_machine, tpu_vm
from launch.job import Job, Mount, Run


@dataclasses.dataclass(frozen=True)
class Backend:
    """How a Job becomes a file of its kind, and where a run keeps its folder unless told."""

    render: Callable[[Job], str]
    kind: str  # what the text is: "jobset" or "shell"
    submit: Callable[[Job], list[str]]  # argv of the command that takes the text on its stdin
    status: Callable[[Run], list[list[str]]]
    workdir: str = "/workdir/{name}"
    mounts: tuple[Mount, ...] = ()  # unless the user gives some
    workdir_without_image: str = ""


BACKENDS: Mapping[str, Backend] = {
    # One claim of shared storage (Filestore, Lustre) that the owner of the cluster makes once.
    "gke": Backend(
        gke.render, "jobset", gke.submit, gke.status, mounts=(Mount("pvc://neo-jax", "/workdir"),)
    ),
    # The folder of submission, which the nodes of a cluster share.
    "slurm": Backend(
        slurm.render,
        "shell",
        slurm.submit,
        slurm.status,
        workdir="/workdir/runs/{name}",
        mounts=(Mount(slurm.SUBMIT_FOLDER, "/workdir"),),
        workdir_without_image="runs/{name}",
    ),
    "tpu_vm": Backend(tpu_vm.render, "shell", tpu_vm.submit, tpu_vm.status),
    "local": Backend(
        this_machine.render, "shell", this_machine.submit, this_machine.status, workdir="runs/{name}"
    ),
}
