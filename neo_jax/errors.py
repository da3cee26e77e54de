"""How a command ends: exit codes, and mistakes of the user told in one line.

A module raises `UserError` where the user can put something right (config, file, image, workdir).
Every command ends with

    if __name__ == "__main__":
        errors.main_guard(main)

which prints such an error as one line. Anything else is our own bug and keeps its traceback.
"""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from data_pipelines.errors import DataError

EXIT_OK = 0
EXIT_USER_ERROR = 1
EXIT_USAGE = 2  # what argparse exits with
EXIT_INTERRUPTED = 3  # SIGINT or SIGTERM, after saving
EXIT_NONFINITE = 4  # more non-finite steps than train.max_nonfinite_steps
EXIT_HANG = 42  # nothing went on, or another process of the run was lost: start all again (watch.py)
EXIT_FAULT = 43  # of devices, network or storage, nobody's mistake: start all again

# Faults that the user can mend: no permission, read-only, no space left, a file where a folder should be.
_MENDABLE_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR}
# Faults that may pass by themselves, of a network or a file system behind one.
_PASSING_ERRNOS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED}
_PASSING_ERRNOS |= {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}

# What JAX's errors begin with when devices or the network between them fail. The two that may mean anything
# are such a fault unless they are about compiling. Others, RESOURCE_EXHAUSTED and INVALID_ARGUMENT among
# them, are of a program that fails again.
_PASSING_STATUSES = ("UNAVAILABLE", "ABORTED", "CANCELLED", "DATA_LOSS", "DEADLINE_EXCEEDED")
_VAGUE_STATUSES = ("INTERNAL", "UNKNOWN")


class UserError(ValueError):
    """A mistake the user can correct; the message says what was wrong, where, and what to do."""

    exit_code = EXIT_USER_ERROR


class SaveFailed(UserError):
    """A checkpoint could not be written (no permission, no space). Its threads may wait on for 20 minutes."""


class SaveFault(SaveFailed):
    """A checkpoint could not be written, by a fault that may pass."""

    exit_code = EXIT_FAULT


class ProcessLost(UserError):
    """Another process of the run did not come to where all meet: nobody's mistake, start all again."""

    exit_code = EXIT_HANG


def main_guard(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Runs `main` on the command line and exits with the code it returns (None is 0).

    `UserError`, `DataError` and mendable `OSError`s become one line on stderr and exit code 1; what may pass
    keeps its traceback and ends with EXIT_FAULT. When nobody reads its output any more (`| head`) it ends by
    SIGPIPE, as other tools do.
    """
    try:
        try:
            code = main(sys.argv[1:])
        finally:
            sys.stdout.flush()  # not when Python exits, where a closed pipe could not be caught
    except BrokenPipeError:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        print(flush=True)  # ends the process, unless another pipe is broken
        raise
    except Exception as error:
        message = explain(error)
        if message is None:
            if not may_pass(error):
                raise
            traceback.print_exception(error)
            end_now(exit_code(error))
        print(f"error: {message}", file=sys.stderr)
        if isinstance(error, SaveFailed):
            end_now(exit_code(error))
        sys.exit(exit_code(error))
    sys.exit(code)


def end_at_sigterm() -> None:
    """From now on SIGTERM ends this process with EXIT_INTERRUPTED: there is nothing to save yet.

    To process 1 of a container, as Python is there, a signal without a handler does nothing.
    """
    signal.signal(signal.SIGTERM, _end_at_sigterm)


def _end_at_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"SIGTERM: nothing begun; the same command goes on\n")
    os._exit(EXIT_INTERRUPTED)


def end_now(code: int) -> NoReturn:
    """Ends the process at once, with threads that still run and cannot be stopped."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_code(error: BaseException) -> int:
    """The code that a command ends with for an error."""
    if isinstance(error, UserError):
        return error.exit_code
    return EXIT_FAULT if may_pass(error) else EXIT_USER_ERROR


def may_pass(error: BaseException) -> bool:
    """Whether the same command may go well the next time, with nothing mended."""
    if isinstance(error, OSError):
        return error.errno in _PASSING_ERRNOS
    if type(error).__name__ != "JaxRuntimeError":  # this module does not import JAX
        return False
    text = str(error)
    return text.startswith(_PASSING_STATUSES) or (
        text.startswith(_VAGUE_STATUSES) and "compil" not in text.lower()
    )


def explain(error: BaseException) -> str | None:
    """The one line that tells a user's mistake; None for what is none."""
    if isinstance(error, UserError | DataError):
        message = str(error)
    elif isinstance(error, OSError) and error.errno in _MENDABLE_ERRNOS:
        message = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error.strerror)
    else:
        return None
    return " ".join(message.split())
