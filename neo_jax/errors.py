"""How a command ends: exit codes, and mistakes of the user told in one line.

A module raises `UserError` where the user can put something right (config, file, image, workdir).
Every command ends with

    if __name__ == "__main__":
        errors.main_guard(main)

which prints such an error as one line. Anything else is our own bug and keeps its traceback.
"""

import errno
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from data_pipelines.errors import DataError

EXIT_OK = 0
EXIT_USER_ERROR = 1
EXIT_USAGE = 2  # what argparse exits with
EXIT_INTERRUPTED = 3  # SIGINT or SIGTERM, after saving
EXIT_NONFINITE = 4  # more non-finite steps than train.max_nonfinite_steps

# Faults that the user can mend: no permission, read-only, no space left, a file where a folder should be.
_MENDABLE_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR}


class UserError(ValueError):
    """A mistake the user can correct; the message says what was wrong, where, and what to do."""


def main_guard(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Runs `main` on the command line and exits with the code it returns (None is 0).

    `UserError`, `DataError` and mendable `OSError`s become one line on stderr and exit code 1.
    """
    try:
        code = main(sys.argv[1:])
    except (UserError, DataError) as error:
        message = str(error)
    except OSError as error:
        if error.errno not in _MENDABLE_ERRNOS:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        message = f"{where}{error.strerror}"
    else:
        sys.exit(code)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)
