"""The backends by name. Adding one: a module with `render`, and its line here."""

import dataclasses
from collections.abc import Callable, Mapping

from launch import gke
from launch.job import Job, Mount


@dataclasses.dataclass(frozen=True)
class Backend:
    """How a Job becomes a file of its kind, and where a run keeps its folder unless told."""

    render: Callable[[Job], str]
    kind: str  # what the text is: "jobset" or "shell"
    workdir: str = "/workdir/{name}"
    mounts: tuple[Mount, ...] = ()  # unless the user gives some


BACKENDS: Mapping[str, Backend] = {
    # One claim of shared storage (Filestore, Lustre) that the owner of the cluster makes once.
    "gke": Backend(gke.render, "jobset", mounts=(Mount("pvc://neo-jax", "/workdir"),)),
}
