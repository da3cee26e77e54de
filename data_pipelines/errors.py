"""The two errors of the data side: DataError stops what runs, Reject leaves out one record."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Why a record may be left out -> what that means. Counted per source and shard under these names.
REASONS = {
    # the record
    "bad_record": "lacks a field, or a field has another type than its source kind says",
    "bad_json": "is not JSON, or JSON of another shape than its source kind says",
    "bad_text": "its text is not UTF-8",
    "empty_text": "has no text, or nothing but white space",
    "empty": "has neither text nor image",
    "missing_image": "names an image that is not there",
    "image_count": "its <image> markers and its images differ in number",
    "bad_turns": "its conversation has an unknown role, or no answer",
    "bad_place": "a box or point in its text is no such thing, or is in no single image",
    "no_target": "nothing in it is supervised",
    # the image
    "not_image": "its bytes are no image of a known format",
    "wrong_mime": "its bytes are another kind of file than its name or declared type says",
    "truncated": "the image file ends before its pixels do",
    "damaged": "the image file cannot be decoded",
    "bomb": "the image has more pixels than the limit",
    "too_many_bytes": "the image file is larger than the limit",
    "too_small": "the image has fewer pixels on a side than the limit",
    "aspect": "the image is longer for its width than the limit",
    # its size as a document
    "too_long": "has more tokens than a row holds",
    "too_many_patches": "has more image tokens than a row holds",
    # filters of an offline build
    "text_length": "its text is shorter or longer than the limits",
    "language": "its text is not in a wanted language",
    "repetition": "its text repeats itself",
    "duplicate_image": "an image with the same bytes or pixels came before",
    "similar_image": "an image that looks the same came before",
    "duplicate_text": "the same text came before",
    "similar_text": "a text of nearly the same words came before",
    "score": "a score is on the wrong side of its threshold",
}


class DataError(ValueError):
    """Data on disk, in a package or given by the user cannot be used.

    The message is one readable line: what is wrong, where, and what to do. Commands print it and exit with 1.
    """


class Reject(DataError):
    """One record cannot be used: it is counted under `reason`, one of REASONS, and the work goes on.

    The message says what is wrong with it, as in "640x2 pixels: more than 200 times as long as wide"; who
    counts it adds the source, shard and record.
    """

    def __init__(self, reason: str, message: str):
        if reason not in REASONS:
            raise KeyError(f"{reason!r} is no reason; add it to REASONS with its meaning")
        super().__init__(message.encode(errors="backslashreplace").decode())  # it may quote what is no UTF-8
        self.reason = reason

    def __reduce__(self) -> tuple[type["Reject"], tuple[str, str]]:
        return Reject, (self.reason, str(self))  # it crosses process borders


@contextmanager
def running(file: str | Path) -> Iterator[None]:
    """Raises whatever goes wrong in a Python file of the user's as a DataError that names its line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{file}: {mistake_in(file, error)}") from error


def mistake_in(file: str | Path, error: Exception) -> str:
    """As "line N: KIND: message", where line N of `file` raised the error or called what did."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno))
    # Who runs a file may have made its name absolute.
    lines = [line for name, line in frames if os.path.realpath(name) == os.path.realpath(file)]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {error}"
