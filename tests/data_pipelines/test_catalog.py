"""The catalog of a local build against dicts in memory."""

import dataclasses
import hashlib
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings, strategies as st

from data_pipelines.build import dedup, flow
from data_pipelines.build.catalog import Catalog, Entry, Keys, Position
from data_pipelines.build.recipe import Recipe
from data_pipelines.errors import DataError


@dataclasses.dataclass(frozen=True)
class Near:
    """Candidates whose evidence, one byte, differs by at most one."""

    reason: str

    def keys(self, example):
        return dedup.NO_KEYS

    def similar(self, one, other):
        return abs(one[0] - other[0]) <= 1


RECIPE = Recipe("r", dedup=(Near("first"), Near("second")), num_shards=3, holdout=0.3)
few_keys = st.lists(st.sampled_from([b"a", b"b", b"c"]), min_size=1, max_size=2, unique=True)
rule_keys = st.none() | st.tuples(few_keys, st.integers(0, 4))
# Per input shard: its records, some of them rejected before, each with what either rule finds in it.
shards = st.lists(st.lists(st.tuples(st.booleans(), rule_keys, rule_keys), max_size=8), max_size=4)


@settings(max_examples=60)
@given(shards)
def test_equals_dicts(shards):
    kept, keys = {}, defaultdict(list)  # place -> (position, entry); (rule, key) -> candidates
    with TemporaryDirectory() as folder:
        catalog = Catalog(Path(folder) / "catalog")
        catalog.new()
        for number, records in enumerate(shards):
            entries, found = [], []
            for record, (passes, *rules) in enumerate(records):
                if not passes:
                    continue
                id_, source = f"{number}-{record}", "pq"[record % 2]
                entry = Entry(record, id_, source, hashlib.sha256(id_.encode()).digest()[:16])
                kept[number, record] = (len(entries), entry)
                entries.append(entry)
                for rule, one in enumerate(rules):
                    if one is None:
                        continue
                    found.append(Keys(rule, one[0], bytes([one[1]]), record))
                    for key in one[0]:
                        candidate = dedup.Candidate((number, record), id_, bytes([one[1]]))
                        keys[rule, key].append(candidate)
            catalog.add(RECIPE, number, entries, found)
        catalog.drop_duplicates(RECIPE)

        lost = {}
        for (rule, _), group in keys.items():
            for place, stays in dedup.losers(RECIPE.dedup[rule], group):
                lost[place] = min((rule, stays), lost.get(place, (rule, stays)))
        wanted = defaultdict(set)
        for place, (rule, stays) in lost.items():
            entry, reason = kept[place][1], ("first", "second")[rule]
            wanted[place[0]].add((place, entry.id, entry.source, reason, f"{stays} came before"))
        for number in range(len(shards)):
            assert set(map(tuple, catalog.lost(RECIPE, number))) == wanted[number]
        staying = {place: found for place, found in kept.items() if place not in lost}
        targets = defaultdict(list)
        for (number, record), (position, entry) in sorted(staying.items()):
            target = flow.target_of(RECIPE, entry.source, entry.order)
            targets[target].append(Position(number, position, record))
        assert catalog.targets() == sorted(targets)
        assert {target: catalog.of(target) for target in targets} == targets
        assert catalog.sources() == sorted({entry.source for _, entry in staying.values()})
        shuffled = sorted(staying, key=lambda place: (staying[place][1].order, place))
        assert catalog.first(5) == [Position(n, staying[n, r][0], r) for n, r in shuffled[:5]]


def test_damaged_file_is_named(tmp_path):
    (tmp_path / "catalog").write_bytes(b"no database" * 100)
    with pytest.raises(DataError, match="catalog: file is not a database"):
        Catalog(tmp_path / "catalog").sources()
