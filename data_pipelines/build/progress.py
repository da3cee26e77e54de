"""A progress line: rewritten in place on a terminal, one line every few seconds in a log."""

import sys
import time

LOG_SECONDS = 10.0
TERMINAL_SECONDS = 0.2


class Progress:
    """Counts items up to a total and prints rate and remaining time on stderr."""

    def __init__(self, label: str, total: int):
        self._label, self._total, self._done = label, total, 0
        self._terminal = sys.stderr.isatty()
        self._start = self._printed = time.monotonic()

    def advance(self) -> None:
        self._done += 1
        now = time.monotonic()
        finished = self._done == self._total
        if not finished and now - self._printed < (TERMINAL_SECONDS if self._terminal else LOG_SECONDS):
            return
        self._printed = now
        rate = self._done / max(now - self._start, 1e-9)
        eta = (self._total - self._done) / rate
        line = f"{self._label}: {self._done}/{self._total}, {rate:.0f}/s, {eta:.0f} s left"
        end = "\n" if finished or not self._terminal else "\r"
        print(f"{line:<70}" if self._terminal else line, end=end, file=sys.stderr, flush=True)
