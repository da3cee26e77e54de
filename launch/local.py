"""N processes of one run on this machine, as a cluster would start them on N machines.

    python -m launch.local --processes=2 --config=FILE.py --workdir=DIR \\
        --config.mesh.num_devices=2 --config.mesh.data=2

All flags but the first are those of neo_jax.train.
Every process gets the environment that neo_jax/distributed.py reads. The runner shows their output with the
process's number in front, passes signals on, and ends as the group does.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO

from neo_jax.errors import UserError, main_guard

GRACE_S = 30.0  # for the others, once one process has ended other than well


def processes(command: Sequence[str], count: int, port: int) -> list[tuple[list[str], dict[str, str]]]:
    """(argv, what is added to the environment) of every process.

    Args:
        command: argv of one process; all run the same.
        count: how many.
        port: a free port of this machine, on which process 0 coordinates.
    """
    shared = {"NEO_JAX_NUM_PROCESSES": str(count), "NEO_JAX_COORDINATOR": f"127.0.0.1:{port}"}
    return [(list(command), shared | {"NEO_JAX_PROCESS_ID": str(index)}) for index in range(count)]


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Processes:
    """Running processes of one group. Use as a context manager: leaving it kills those that still run."""

    def __init__(self, commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], output: IO[str]):
        self.running = [
            subprocess.Popen(
                argv,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            for argv, environment in commands
        ]
        self._lock = threading.Lock()
        self._readers = [
            threading.Thread(target=self._copy, args=(index, process, output), daemon=True)
            for index, process in enumerate(self.running)
        ]
        for reader in self._readers:
            reader.start()

    def _copy(self, index: int, process: subprocess.Popen[str], output: IO[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with self._lock:
                output.write(f"[{index}] {line}")
                output.flush()

    def send(self, number: int) -> None:
        """Passes a signal on to every process."""
        for process in self.running:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self, output: IO[str], grace_s: float = GRACE_S) -> int:
        """The exit code of the group: of the first process that ended other than well, else 0.

        After that one the others have `grace_s` to end by themselves. What a signal killed counts as 128 +
        its number, as in a shell, and is told.
        """
        code, deadline = 0, float("inf")
        left = dict(enumerate(self.running))
        while left:
            for index, process in list(left.items()):
                ended = process.poll()
                if ended is None:
                    continue
                del left[index]
                if ended < 0:
                    print(
                        f"process {index} was killed by {signal.Signals(-ended).name}",
                        file=output,
                        flush=True,
                    )
                    ended = 128 - ended
                if ended and not code:
                    code, deadline = ended, time.monotonic() + grace_s
            if time.monotonic() > deadline:
                print(f"processes {', '.join(map(str, left))} did not end by themselves: killed", file=output)
                self.kill()
            time.sleep(0.05)
        for reader in self._readers:
            reader.join()
        return code

    def kill(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.kill()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for process in self.running:
            process.wait()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.local",
        description=f"{__doc__.partition(chr(10))[0]} Further flags, --config and --workdir among them, are "
        "those of neo_jax.train.",
    )
    parser.add_argument("--processes", type=int, required=True, help="how many processes to start")
    args, rest = parser.parse_known_args(argv)
    if args.processes < 1:
        raise UserError(f"--processes={args.processes}: must be at least 1")
    return run([sys.executable, "-m", "neo_jax.train", *rest], args.processes)


def run(command: Sequence[str], count: int, grace_s: float = GRACE_S) -> int:
    """Runs `count` processes of a command to their end; returns the group's exit code."""
    with Processes(processes(command, count, free_port()), sys.stdout) as group:

        def forward(number: int, frame: FrameType | None) -> None:
            group.send(number)

        previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return group.wait(sys.stdout, grace_s)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


if __name__ == "__main__":
    main_guard(main)
