"""The end of a command: the user's mistakes are one line, our own keep their traceback."""

import errno

import pytest

from data_pipelines.errors import DataError
from neo_jax import errors


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
    "error", [ValueError("ours"), OSError(errno.EBADF, "Bad file descriptor"), KeyError("k")]
)
def test_our_own_errors_pass(error: Exception) -> None:
    def main(argv: object) -> None:
        raise error

    with pytest.raises(type(error)):
        errors.main_guard(main)


@pytest.mark.parametrize("code", [None, errors.EXIT_OK, errors.EXIT_INTERRUPTED])
def test_returned_code_is_the_exit_code(code: int | None) -> None:
    with pytest.raises(SystemExit) as caught:
        errors.main_guard(lambda argv: code)
    assert caught.value.code == code
