"""The processes of a run: how they find each other, and what only one of them does.

A launcher starts the same command N times; the environment it gives makes one run of them:

    NEO_JAX_NUM_PROCESSES   how many it started; checked, whoever tells the rest
    NEO_JAX_COORDINATOR     host:port of process 0, and ...
    NEO_JAX_PROCESS_ID      ... 0 to N - 1: both or none, where JAX does not know the launcher

Without the last two, JAX's own detectors are asked: SLURM under srun, TPU VMs, GKE, Open MPI.
"""

import contextlib
import dataclasses
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import (
    distributed as jax_distributed,
)  # no public way leads to the coordination service's client
from ml_collections import ConfigDict

from neo_jax import mesh as mesh_lib
from neo_jax.errors import ProcessLost, UserError, end_now

NUM_PROCESSES, COORDINATOR, PROCESS_ID = "NEO_JAX_NUM_PROCESSES", "NEO_JAX_COORDINATOR", "NEO_JAX_PROCESS_ID"
START_TIMEOUT_S = 300  # for all processes to call
# JAX would abort the process, naming nobody: left to watch.py, which is faster.
_JAX_HEARTBEAT_TIMEOUT_S = 24 * 3600
_SHUTDOWN_TIMEOUT_S = 60


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes of this run, seen from one of them."""

    index: int
    count: int
    host: str

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.index == 0

    @property
    def client(self) -> Any:
        """Of JAX's coordination service; only where there are several processes."""
        return jax_distributed.global_state.client

    def describe(self, mesh: jax.sharding.Mesh) -> str:
        """The first line that this process logs; all must ask for it, each waits for all."""
        hosts = 1
        if self.count > 1:
            self.client.key_value_set(f"neo_jax/host/{self.index}", self.host)
            self.barrier("start", START_TIMEOUT_S)
            hosts = len({host for _, host in self.client.key_value_dir_get("neo_jax/host/")})
        axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        share = mesh_lib.share(mesh)
        return (
            f"process {self.index} of {self.count} on {self.host} ({hosts} host{'s' * (hosts > 1)} in all): "
            f"{jax.local_device_count()} of {mesh.size} {jax.default_backend()} devices, mesh {axes}, "
            f"loads part {share.index + 1} of {share.count} of every batch's rows"
        )

    def barrier(self, name: str, timeout_s: float) -> None:
        """Waits for all processes; every name can be used once.

        Raises:
            ProcessLost: not all came in time; the missing are named.
        """
        if self.count == 1:
            return
        client = self.client
        client.key_value_set(f"neo_jax/barrier/{name}/{self.index}", self.host)
        try:
            client.wait_at_barrier(f"neo_jax/{name}", int(timeout_s * 1000))
        except jax.errors.JaxRuntimeError as error:
            came = {
                int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(f"neo_jax/barrier/{name}/")
            }
            missing = sorted(set(range(self.count)) - came)
            raise ProcessLost(
                f"process {self.index} waited {timeout_s:g} s at {name!r} for {_processes(missing)}: "
                "see what they log, and start all again"
            ) from error

    def tell(self, name: str, value: str) -> None:
        """Process 0 lets all others know something; every name can be used once."""
        if self.count > 1:
            self.client.key_value_set(f"neo_jax/told/{name}", value)

    def told(self, name: str) -> str:
        """What process 0 told, in another one that was let go on after it."""
        return self.client.blocking_key_value_get(f"neo_jax/told/{name}", 1000 * START_TIMEOUT_S)

    @contextlib.contextmanager
    def in_turn(self, name: str, timeout_s: float) -> Iterator[None]:
        """Process 0 goes first, then all others at once: what it writes is there when they look."""
        if not self.leads:
            self.barrier(name, timeout_s)
        yield
        if self.leads:
            self.barrier(name, timeout_s)


def start(mesh: ConfigDict, environ: Mapping[str, str] = os.environ) -> Group:
    """Joins the processes that the launcher started, and starts the devices of config.mesh.

    On a CPU these are simulated, an equal share of mesh.num_devices in every process. Call it before anything
    of JAX is used, in every process.

    Raises:
        UserError: the environment contradicts itself, the others do not answer, or the processes are not as
            many as the launcher says.
    """
    _join(environ)
    state = jax_distributed.global_state
    joined = state.num_processes if state.client is not None else 1
    if mesh.num_devices % joined:
        raise UserError(
            f"mesh.num_devices: {mesh.num_devices} is not divisible by the {joined} processes of this run"
        )
    if mesh.num_devices > joined:
        jax.config.update("jax_num_cpu_devices", mesh.num_devices // joined)
    check_count(joined, environ)
    if jax.process_count() != joined:
        raise UserError(
            f"{joined} processes were started, but their devices belong to {jax.process_count()}: start one "
            "process on every host of the slice"
        )
    return Group(jax.process_index(), joined, socket.gethostname())


def check_count(joined: int, environ: Mapping[str, str]) -> None:
    """Raises UserError if the launcher started another number of processes than have joined."""
    advice = {
        NUM_PROCESSES: f"set {COORDINATOR} and {PROCESS_ID}, too, or use a launcher that JAX knows",
        "SLURM_NTASKS": f"start it with srun, or set {NUM_PROCESSES}=1 to run it alone",
    }
    name = next((name for name in advice if name in environ), None)
    if name is not None and _number(environ, name) != joined:
        raise UserError(f"{name}={environ[name]}, but this run has {joined} process(es): {advice[name]}")


def _join(environ: Mapping[str, str]) -> None:
    """Starts `jax.distributed` if the environment is that of a launcher."""
    # Signals are ours (interrupt.py).
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    given = {name for name in (COORDINATOR, PROCESS_ID) if name in environ}
    if given:
        if missing := {NUM_PROCESSES, COORDINATOR, PROCESS_ID} - environ.keys():
            raise UserError(
                f"{given.pop()} is set, but {', '.join(sorted(missing))} not: set all three or none"
            )
        arguments: dict[str, Any] = {
            "coordinator_address": environ[COORDINATOR],
            "num_processes": _number(environ, NUM_PROCESSES),
            "process_id": _number(environ, PROCESS_ID),
            "cluster_detection_method": "deactivate",
        }
        if arguments["process_id"] >= arguments["num_processes"]:
            raise UserError(
                f"{PROCESS_ID}={environ[PROCESS_ID]} is not below {NUM_PROCESSES}={environ[NUM_PROCESSES]}"
            )
        if ":" not in environ[COORDINATOR]:
            raise UserError(f"{COORDINATOR}={environ[COORDINATOR]}: expected host:port")
    elif environ.get(NUM_PROCESSES) == "1":
        return
    else:
        arguments = {}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Kubernetes environment detected")
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=START_TIMEOUT_S,
                heartbeat_timeout_seconds=_JAX_HEARTBEAT_TIMEOUT_S,
                shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT_S,
            )
    except ValueError as error:
        if not arguments and "coordinator_address" in str(error):
            return  # JAX's detectors found no launcher
        raise UserError(f"cannot join the processes of this run: {error}") from error
    except RuntimeError as error:
        raise UserError(
            f"cannot join the processes of this run: {str(error).partition(chr(10))[0]}"
        ) from error


def leave(code: int) -> NoReturn:
    """Ends the process at once, with threads that still run and cannot be stopped."""
    jax.distributed.shutdown()
    end_now(code)


def _number(environ: Mapping[str, str], name: str) -> int:
    if not environ[name].isdecimal():
        raise UserError(f"{name}={environ[name]}: expected a whole number")
    return int(environ[name])


def _processes(indices: list[int]) -> str:
    return ("process " if len(indices) == 1 else "processes ") + ", ".join(map(str, indices))
