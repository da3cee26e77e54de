"""Stopping a run politely: SIGINT and SIGTERM ask it to save and leave.

One process of several may be asked; all must stop at the same step. So every process puts whether it was
asked into a small sum over all devices, once per step, and reads the sum of the step before: what it reads,
all read. While a process compiles or waits for its first data there are no steps; then it tells the others
through the watch, and those that have not begun leave with it.
"""

import queue
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax import mesh as mesh_lib
from neo_jax.watch import LEAVING, Watch

T = TypeVar("T")
_POLL_S = 0.05


class Interrupted(Exception):
    """All processes are to leave; raised where there are no steps to be counted."""


class Interrupt:
    """Context that turns the first SIGINT or SIGTERM into a request; the second one kills as usual.

    Attributes:
        asked: name of the signal that this process received.
        agreed: all processes know of a request, to this one or another, and stop at the same place.
        abandoned: work goes on in a thread that nothing can stop: end with distributed.leave.
    """

    # With what they usually do.
    SIGNALS: ClassVar[dict[int, Any]] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }

    def __init__(self, watch: Watch) -> None:
        self.asked: str | None = None
        self.agreed = False
        self.abandoned = False
        self._watch = watch
        self._sum: jax.Array | None = None
        self._barriers = 0

    @property
    def reason(self) -> str:
        return self.asked or "signal to another process"

    def poll(self, mesh: jax.sharding.Mesh) -> bool:
        """Whether all processes agree to stop here; all must call it equally often. Waits for no step."""
        if self._watch.group.count == 1:
            self.agreed = self.asked is not None
        elif not self.agreed:
            before, self._sum = self._sum, _count(mesh, self.asked is not None)
            self.agreed = before is not None and int(before) > 0
        return self.agreed

    def patiently(self, work: Callable[[], T]) -> T:
        """What `work` returns, computed in another thread, so that a signal is seen meanwhile.

        For what goes before the first of some steps: compiling, first data. Once it has returned in all
        processes (`together`), only `poll` stops them.

        Raises:
            Interrupted: this process was asked, or another one left.
        """
        return self._wait(work, lambda: self.asked is not None or self._left())

    def together(self, name: str, timeout_s: float) -> None:
        """A barrier. Raises Interrupted if a process will not come as it left."""
        if self._watch.group.count == 1:
            return
        self._barriers += 1
        name = f"{name} (barrier {self._barriers})"
        self._wait(lambda: self._watch.group.barrier(name, timeout_s), self._left)

    def _left(self) -> bool:
        return LEAVING in self._watch.notices

    def _wait(self, work: Callable[[], T], leave: Callable[[], bool]) -> T:
        results: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                results.put((work(), None))
            except BaseException as error:
                results.put((None, error))

        threading.Thread(target=run, daemon=True).start()
        while True:
            try:
                result, error = results.get(timeout=_POLL_S)
            except queue.Empty:
                if leave():
                    self._watch.notify(LEAVING, self.reason)
                    self.agreed = self.abandoned = True
                    raise Interrupted from None
            else:
                if error is not None:
                    raise error
                return result  # type: ignore[return-value]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.SIGNALS.items():
            signal.signal(number, handler)

    def __enter__(self) -> "Interrupt":
        for number in self.SIGNALS:
            signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()


def _count(mesh: jax.sharding.Mesh, asked: bool) -> jax.Array:
    """How many devices belong to processes that were asked; being computed."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh_lib.AXES))
    own = jax.make_array_from_callback((mesh.size,), sharding, lambda _: np.full(1, asked, np.int32))
    return jax.jit(jnp.sum, out_shardings=mesh_lib.replicated(mesh))(own)
