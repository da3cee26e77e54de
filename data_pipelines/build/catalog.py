"""What the local engine knows of a build's records, in an SQLite file: memory does not grow with them.

    kept      a record that passed the stages: where it lies, its rank in the shuffle, its output shard
    evidence  what a dedup rule compares a record by
    keys      a key of a record under a rule; records that share one are candidates
    lost      a record that a rule leaves out, and the id of the one that stays

A build that goes on makes it anew.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from data_pipelines.build import dedup, flow
from data_pipelines.build.items import Rejected, Target
from data_pipelines.build.recipe import Recipe
from data_pipelines.errors import DataError

_TABLES = """
    create table kept (shard, record, position, id, source, rank, target_split, target_source, target_shard,
        primary key (shard, record)) without rowid;
    create table evidence (rule, shard, record, evidence, primary key (rule, shard, record)) without rowid;
    create table keys (rule, key, shard, record);
    create table lost (shard, record, id, source, rule, stays, primary key (shard, record)) without rowid;
"""


class Entry(NamedTuple):
    """A record that an input shard's ingest file holds."""

    record: int
    id: str
    source: str
    order: bytes


class Keys(NamedTuple):
    """What a dedup rule has found in such a record."""

    rule: int
    keys: list[bytes]
    evidence: bytes
    record: int


class Position(NamedTuple):
    """Where a record lies: in the ingest file of an input shard."""

    shard: int
    position: int
    record: int  # its number in the input shard


class Catalog:
    """The file at `path`: first `new`, then `add` for each input shard, then `drop_duplicates`; then read."""

    def __init__(self, path: Path):
        self.path = path

    def new(self) -> None:
        """An empty one; what a killed build has left is dropped."""
        self.path.unlink(missing_ok=True)
        with self._open() as db:
            db.executescript(_TABLES)

    def add(self, recipe: Recipe, shard: int, entries: Iterable[Entry], found: Iterable[Keys]) -> None:
        """The kept records of an input shard, in the order of its ingest file."""
        with self._open() as db:
            for position, entry in enumerate(entries):
                target = flow.target_of(recipe, entry.source, entry.order)
                row = (shard, entry.record, position, entry.id, entry.source, entry.order, *target)
                db.execute("insert into kept values (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            for rule, keys, evidence, record in found:
                db.execute("insert into evidence values (?, ?, ?, ?)", (rule, shard, record, evidence))
                rows = ((rule, key, shard, record) for key in keys)
                db.executemany("insert into keys values (?, ?, ?, ?)", rows)

    def drop_duplicates(self, recipe: Recipe) -> None:
        """Moves the records that dedup rules leave out from `kept` to `lost`.

        A record that several rules leave out is counted for the first of them.
        """
        with self._open() as db:
            db.execute("create index by_key on keys (rule, key)")
            groups = db.execute("select rule, key from keys group by rule, key having count(*) > 1")
            for rule, key in groups:
                members = db.execute(
                    "select shard, record, id, evidence from keys join kept using (shard, record) "
                    "join evidence using (rule, shard, record) where rule = ? and key = ?",
                    (rule, key),
                )
                group = (dedup.Candidate((shard, record), *rest) for shard, record, *rest in members)
                for loser in dedup.losers(recipe.dedup[rule], group):
                    db.execute(
                        "insert into lost select shard, record, id, source, ?, ? from kept "
                        "where shard = ? and record = ? on conflict do update set "
                        "rule = excluded.rule, stays = excluded.stays "
                        "where (excluded.rule, excluded.stays) < (rule, stays)",
                        (rule, loser.kept, *loser.place),
                    )
            db.execute("delete from kept where (shard, record) in (select shard, record from lost)")
            db.execute("create index by_target on kept (target_split, target_source, target_shard)")

    def lost(self, recipe: Recipe, shard: int) -> list[Rejected]:
        """The records of an input shard that dedup rules leave out."""
        with self._open() as db:
            rows = db.execute("select rule, stays, record, id, source from lost where shard = ?", (shard,))
            return [
                flow.superfluous(recipe, rule, stays, (shard, record), id_, source)
                for rule, stays, record, id_, source in rows
            ]

    def first(self, count: int) -> list[Position]:
        """The first records of the shuffled order."""
        return self._positions("order by rank, shard, record limit ?", count)

    def of(self, target: Target) -> list[Position]:
        """The records of an output shard, by where they lie."""
        return self._positions(
            "where target_split = ? and target_source = ? and target_shard = ? order by shard, position",
            *target,
        )

    def targets(self) -> list[Target]:
        with self._open() as db:
            columns = "target_split, target_source, target_shard"
            rows = db.execute(f"select distinct {columns} from kept order by {columns}")
            return [Target(*row) for row in rows]

    def sources(self) -> list[str]:
        with self._open() as db:
            return [source for (source,) in db.execute("select distinct source from kept order by source")]

    def _positions(self, which: str, *values: int | str) -> list[Position]:
        with self._open() as db:
            rows = db.execute(f"select shard, position, record from kept {which}", values)
            return [Position(*row) for row in rows]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Commits at the end. Errors of SQLite become DataErrors that name the file."""
        try:
            with closing(sqlite3.connect(self.path)) as db, db:
                # What a kill leaves half-written is not read again: nothing to journal or to wait for.
                db.executescript("pragma journal_mode = off; pragma synchronous = off")
                yield db
        except sqlite3.Error as error:
            raise DataError(f"{self.path}: {error}") from error
