"""A watch over the processes of a run: none waits for ever, and the message says for whom.

Two threads per process. One writes a sign of life into the coordination service's key-value store every
second and reads what others have to tell; process 0 also looks at everybody's. The other, which waits for
nobody, ends the process

    when itself makes no progress for as long as it said it may take (a hang), with the stacks of all threads,
    when another process is silent (dead, stopped, cut off), failed, or process 0 does not answer.

Collectives do not end by themselves when a process is missing, and none of this can be left to the main
thread: it is in one of them.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any, NoReturn

import jax

from neo_jax.distributed import Group
from neo_jax.errors import EXIT_HANG, exit_code, explain

_BEATS, _NOTICES = "neo_jax/beat/", "neo_jax/notice/"
LEAVING = "leaving"  # notice of a process that was asked to stop before it took part in anything


class Watch:
    """Context in which this process is watched. Its threads end it with os._exit: nothing else may be alive.

    Args:
        silence_timeout_s: how long a process may give no sign of life.
        start_timeout_s: how long the first phase may take.
    """

    def __init__(self, group: Group, silence_timeout_s: float, start_timeout_s: float):
        self.group, self.silence_timeout_s = group, silence_timeout_s
        self._interval = min(1.0, silence_timeout_s / 5)
        self._done = threading.Event()
        self._verdict = threading.Lock()  # one of the threads, or the main one, tells the end
        self.notices: dict[str, str] = {}
        self._others: dict[int, tuple[dict[str, Any], float]] = {}  # process -> its last sign of life, when
        self._heard = time.monotonic()  # when the coordination service last answered
        self.progress("start", start_timeout_s)

    def progress(self, phase: str, limit_s: float) -> None:
        """Says that something was finished, and that `phase`, which begins now, takes `limit_s` at most."""
        self._phase = (phase, limit_s, time.monotonic())

    def notify(self, name: str, text: str) -> None:
        """Tells all processes something, once; they see it in `notices` within seconds."""
        if self.group.count > 1:
            self.group.client.key_value_set(_NOTICES + name, text, allow_overwrite=True)

    # Threads

    def _beat(self) -> None:
        number = 0
        while not self._done.wait(self._interval):
            number += 1
            sign = {"number": number, "host": self.group.host, "phase": self._phase[0]}
            try:
                self._exchange(sign)
            except jax.errors.JaxRuntimeError:
                continue  # _check counts the seconds since it last worked
            self._heard = time.monotonic()

    def _exchange(self, sign: dict[str, Any]) -> None:
        client = self.group.client
        client.key_value_set(f"{_BEATS}{self.group.index}", json.dumps(sign), allow_overwrite=True)
        self.notices = {key.removeprefix(_NOTICES): text for key, text in client.key_value_dir_get(_NOTICES)}
        if self.group.leads:
            for key, text in client.key_value_dir_get(_BEATS):
                index, found = int(key.removeprefix(_BEATS)), json.loads(text)
                if index not in self._others or self._others[index][0]["number"] != found["number"]:
                    self._others[index] = (found, time.monotonic())

    def _check(self) -> None:
        while not self._done.wait(self._interval):
            now = time.monotonic()
            phase, limit_s, since = self._phase
            if now - since > limit_s:
                self._hang(phase, limit_s)
            if self.group.count == 1:
                continue
            for name, text in sorted(self.notices.items()):
                if name != LEAVING:
                    told = json.loads(text)
                    self._end(told["text"], told["code"])
            if now - self._heard > self.silence_timeout_s:
                self._end(
                    f"process 0, which coordinates, has not answered for {self.silence_timeout_s:g} s: it is "
                    "dead, stopped or cut off; start all again",
                    EXIT_HANG,
                )
            for index, (sign, heard) in sorted(self._others.items()):
                if now - heard > self.silence_timeout_s and index != self.group.index:
                    text = (
                        f"process {index} on {sign['host']} has given no sign of life for "
                        f"{self.silence_timeout_s:g} s, since it was at {sign['phase']!r}: it is dead, "
                        "stopped or cut off; start all again"
                    )
                    self._tell(text, EXIT_HANG)
                    self._end(text, EXIT_HANG)

    def _hang(self, phase: str, limit_s: float) -> NoReturn:
        with self._verdict:
            faulthandler.dump_traceback(all_threads=True)
        where = "" if self.group.count == 1 else f"process {self.group.index} on {self.group.host}: "
        behind = ", ".join(
            f"process {i} at {sign['phase']!r}" for i, (sign, _) in sorted(self._others.items())
        )
        text = (
            f"{where}{phase!r} has taken more than {limit_s:g} s: a hang; the stacks of all threads are above"
        )
        if behind:
            text += f"; last seen: {behind}"
        self._tell(text, EXIT_HANG)
        self._end(text, EXIT_HANG)

    def _tell(self, text: str, code: int) -> None:
        """Gives the others the reason of this end; in a thread, as the service may not answer."""
        if self.group.count == 1:
            return

        def tell() -> None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # then they find out by the silence
                self.notify(f"end/{self.group.index}", json.dumps({"text": text, "code": code}))

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        teller.join(self._interval)
        if self.group.leads:
            time.sleep(3 * self._interval)  # the notice is in this process: it lives until they have read it

    def _end(self, text: str, code: int) -> NoReturn:
        self._verdict.acquire()
        print(f"error: {text}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)

    # Context

    def __enter__(self) -> "Watch":
        targets = [self._check] if self.group.count == 1 else [self._check, self._beat]
        self._threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.group.count > 1 and error is not None:
            self._fail(error)
        self._done.set()
        for thread in self._threads:
            thread.join(self.silence_timeout_s)

    def _fail(self, error: BaseException) -> NoReturn:
        """Ends this process for an error, and tells the others, who would wait for it."""
        message = explain(error)
        if message is None:
            if isinstance(error, jax.errors.JaxRuntimeError | ValueError):
                # Mostly the echo of another process's end: the threads are about to name it and end this one.
                # It is a ValueError from programs that run in this thread (allocator.py).
                time.sleep(self.silence_timeout_s + 5 * self._interval)
            traceback.print_exception(error)
            message = f"{type(error).__name__}: {error}".partition("\n")[0]
        text = f"process {self.group.index} on {self.group.host} failed: {message}"
        self._tell(text, exit_code(error))
        self._end(message, exit_code(error))
