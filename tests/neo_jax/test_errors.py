"""The end of a command: the user's mistakes are one line, our own keep their traceback."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from data_pipelines.errors import DataError
from neo_jax import errors
from neo_jax.checkpoint import Checkpoints


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            errors.UserError("model.num_layers: must be positive,\n got 0"),
            "model.num_layers: must be positive, got 0",
        ),
        (DataError("shard x is truncated"), "shard x is truncated"),
        (PermissionError(errno.EACCES, "Permission denied", "/runs"), "/runs: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device", "/runs/a"), "/runs/a: No space left on device"),
    ],
)
def test_user_errors_are_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: object) -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        errors.main_guard(main)
    assert caught.value.code == errors.EXIT_USER_ERROR
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("ours"),
        OSError(errno.EBADF, "Bad file descriptor"),
        BrokenPipeError(errno.EPIPE, "a worker's, not that of the output"),
        KeyError("k"),
    ],
)
def test_our_own_errors_pass(error: Exception) -> None:
    def main(argv: object) -> None:
        raise error

    with pytest.raises(type(error)):
        errors.main_guard(main)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: connection to slice 1 lost"), errors.EXIT_FAULT),
        (jax.errors.JaxRuntimeError("INTERNAL: NCCL operation ncclAllReduce failed"), errors.EXIT_FAULT),
        (jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile TPU kernel"), errors.EXIT_USER_ERROR),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), errors.EXIT_USER_ERROR),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes"), errors.EXIT_USER_ERROR),
        (ValueError("UNAVAILABLE: ours"), errors.EXIT_USER_ERROR),
        (OSError(errno.ESTALE, "Stale file handle"), errors.EXIT_FAULT),
        (OSError(errno.EIO, "Input/output error"), errors.EXIT_FAULT),
        (OSError(errno.ENOSPC, "No space left on device"), errors.EXIT_USER_ERROR),
    ],
)
def test_faults_that_may_pass_have_a_code_of_their_own(error: Exception, code: int, tmp_path: Path) -> None:
    assert errors.exit_code(error) == code
    if isinstance(error, OSError):  # while saving
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            assert errors.exit_code(checkpoints._failed(3, error)) == code


def test_a_fault_that_may_pass_keeps_its_traceback() -> None:
    script = "from neo_jax import errors\ndef main(argv): raise OSError(5, 'Input/output error')\n"
    result = subprocess.run(
        [sys.executable, "-c", script + "errors.main_guard(main)"], capture_output=True, text=True
    )
    assert result.returncode == errors.EXIT_FAULT
    assert result.stderr.startswith("Traceback") and result.stderr.endswith("Input/output error\n")


@pytest.mark.parametrize("code", [None, errors.EXIT_OK, errors.EXIT_INTERRUPTED])
def test_returned_code_is_the_exit_code(code: int | None) -> None:
    with pytest.raises(SystemExit) as caught:
        errors.main_guard(lambda argv: code)
    assert caught.value.code == code


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("main", ["print(1)", "print('1' * 10**6)", "exit(print(1))"])
def test_a_command_ends_quietly_when_nobody_reads_its_output(main: str, unbuffered: str) -> None:
    """Little output, which Python keeps until the end; much; and argparse's way of ending after --help."""
    program = f"from neo_jax import errors; input(); errors.main_guard(lambda argv: {main})"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == -signal.SIGPIPE
