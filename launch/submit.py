"""The only part of launch that changes anything: it gives a file to the cluster's own command.

Nothing here is retried or guessed: what the command says is what the user sees.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from neo_jax.errors import UserError


def submit(argv: Sequence[str], text: str, *, dry_run: bool) -> None:
    """Runs `argv` with the text on its stdin, or shows both.

    Raises:
        UserError: the command is not here, or failed.
    """
    if dry_run:
        print(f"{text}# dry run; this would be given to: {shlex.join(argv)}")
        return
    _run(argv, text)


def show(commands: Sequence[Sequence[str]]) -> None:
    """Runs commands that only tell something.

    Raises:
        UserError: one is not here, or failed.
    """
    for argv in commands:
        _run(argv, "")


def _run(argv: Sequence[str], text: str) -> None:
    if shutil.which(argv[0]) is None:
        raise UserError(f"{argv[0]} is not here: install it, or `render` the file and submit it elsewhere")
    # A script's `python` is the one that runs this.
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    code = subprocess.run(argv, input=text, text=True, env={**os.environ, "PATH": path}).returncode
    if code:
        raise UserError(f"{shlex.join(argv)} failed with exit code {code}; what it said is above")
