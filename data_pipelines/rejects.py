"""Records that were left out: by source, shard and reason; counted, kept, and a stop when they are many."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from data_pipelines.errors import DataError

Counts = dict[str, dict[str, dict[str, int]]]  # source -> shard -> reason -> number of records
CHARGED_AT_ONCE = 1000  # a source's budget is that of so many records even before it has given them


class Rejected(NamedTuple):
    """One record that was left out."""

    source: str
    shard: str
    record: int  # its number in the shard
    id: str
    reason: str  # one of errors.REASONS
    message: str

    def __str__(self) -> str:
        return f"{self.shard}, record {self.record} ({self.id}): {self.reason}: {self.message}"


def count(rejects: Iterable[Rejected]) -> Counts:
    """Counts rejects for metrics.jsonl."""
    counts: Counts = {}
    for (source, shard, reason), n in sorted(Counter((r.source, r.shard, r.reason) for r in rejects).items()):
        counts.setdefault(source, {}).setdefault(shard, {})[reason] = n
    return counts


def add(a: Counts, b: Counts) -> Counts:
    """Returns the sum of two counts."""
    total = {
        source: {shard: dict(reasons) for shard, reasons in shards.items()} for source, shards in a.items()
    }
    for source, shards in b.items():
        for shard, reasons in shards.items():
            into = total.setdefault(source, {}).setdefault(shard, {})
            for reason, n in reasons.items():
                into[reason] = into.get(reason, 0) + n
    return total


class Budget:
    """Stops a run whose sources give too many rejects.

    Args:
        shares: source -> the largest share of its records that may be rejected. It is charged as of
            CHARGED_AT_ONCE records until there are more, so that one early reject does not stop a run; with 0
            the first one does.
    """

    def __init__(self, shares: Mapping[str, float]):
        self._shares = shares
        self._records: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()

    def charge(self, served: Mapping[str, int], rejects: Iterable[Rejected]) -> None:
        """Adds records. Raises DataError, naming shard and record, when a source exceeds its share."""
        self._records.update(served)
        for reject in rejects:
            name = reject.source
            self._records[name] += 1
            self._rejected[name] += 1
            allowed = self._shares[name] * max(self._records[name], CHARGED_AT_ONCE)
            if self._rejected[name] > allowed:
                raise DataError(
                    f"source {name}: {self._rejected[name]} of {self._records[name]} records were rejected, "
                    f"more than max_rejected = {self._shares[name]} allows; the last was {reject}"
                )


class Quarantine:
    """Appends rejects to a JSONL file, for people to look at. A run that resumes may repeat some lines."""

    def __init__(self, path: str | Path):
        self._path = Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", buffering=1)
        except OSError as error:
            raise DataError(f"quarantine file {path}: cannot be written: {error.strerror}") from error

    def write(self, rejects: Iterable[Rejected]) -> None:
        try:
            for reject in rejects:
                self._file.write(json.dumps(reject._asdict()) + "\n")
        except OSError as error:
            raise DataError(f"quarantine file {self._path}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        self._file.close()
