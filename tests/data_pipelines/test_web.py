"""The loader on a folder of img2dataset with broken records: rejects, processes, shards that go wrong."""

import hashlib
import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base
from data_pipelines import loader, pack, rejects as rejects_lib
from data_pipelines.errors import DataError
from tests.data_pipelines import web


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("web")


@pytest.fixture(scope="module")
def bad(folder) -> set[str]:
    """Ids of the records that are no documents."""
    return set(web.write_tars(folder / "tars", shards=3, records=40))


@pytest.fixture
def config(folder, bad) -> ConfigDict:
    return web.config(folder, web=base.source("webdataset", str(folder / "tars"), max_rejected=1.0))


def shown_names(monkeypatch) -> list[str]:
    """Records the name of every document that is laid out."""
    names: list[str] = []
    fill_row = pack._fill_row

    def spy(arrays, row, dropped):
        before = len(dropped)
        fill_row(arrays, row, dropped)
        lost = {id(one.document) for one in dropped[before:]}
        names.extend(document.name for document in row if id(document) not in lost)

    monkeypatch.setattr(pack, "_fill_row", spy)
    return names


def test_broken_records_are_counted_and_the_others_served(config, bad, monkeypatch):
    names = shown_names(monkeypatch)
    config.data.window = 120  # all there are
    rejects = []
    with loader.train_loader(config, config.stage.only, seed=0) as stream:
        while len({*names, *bad}) < 120:
            next(stream)
            rejects += stream.take_rejects()
    assert set(names).isdisjoint(bad) and {reject.id for reject in rejects} == bad
    reasons = {reject.id: reject.reason for reject in rejects}
    numbers = {int(id_.partition("#")[2]) % 10: reason for id_, reason in reasons.items()}
    assert numbers == {0: "missing_image", 1: "truncated", 2: "truncated", 3: "empty_text"}
    assert {f"{r.shard}#{r.record}" for r in rejects} == {r.id for r in rejects}
    counts = rejects_lib.count(rejects)
    assert counts["web"]["00000.tar"].keys() == {"missing_image", "truncated", "empty_text"}
    total = sum(n for shards in counts.values() for shard in shards.values() for n in shard.values())
    assert total == len(rejects)
    assert rejects_lib.add(counts, rejects_lib.count([])) == counts
    assert rejects_lib.count(rejects * 2) == rejects_lib.add(counts, counts)


def test_a_budget_of_rejects_stops_the_run_and_names_the_record(config, tmp_path):
    config.data.sources.web.max_rejected = 0.0
    with (
        pytest.raises(
            DataError,
            match=r"source web: 1 of \d+ records were rejected, .* = 0.0 allows; .*\.tar, record \d+",
        ),
        loader.train_loader(config, config.stage.only, seed=0) as stream,
    ):
        next(stream)


def test_rejects_go_to_the_quarantine_file(config, bad, tmp_path):
    config.data.quarantine = str(tmp_path / "new" / "rejects.jsonl")
    with loader.train_loader(config, config.stage.only, seed=0) as stream:
        for _ in range(12):
            next(stream)
        expected = stream.take_rejects()
    lines = [json.loads(line) for line in Path(config.data.quarantine).read_text().splitlines()]
    assert lines == [reject._asdict() for reject in expected] and len(lines) > 10
    assert {line["id"] for line in lines} <= bad
    assert lines[0].keys() == {"source", "shard", "record", "id", "reason", "message"}


def digests(stream, steps: int) -> list[str]:
    return [
        hashlib.sha256(b"".join(row[name].tobytes() for name in sorted(row))).hexdigest()
        for batch in itertools.islice(stream, steps)
        for row in rows_of(batch)
    ]


def rows_of(batch):
    return [{name: array[b] for name, array in batch.items()} for b in range(len(batch["tokens"]))]


def test_worker_processes_give_the_same_rows(config):
    config.data.prefetch = 2
    with loader.train_loader(config, config.stage.only, seed=5) as stream:
        first, state = digests(stream, 3), stream.get_state()
        expected, rejects = digests(stream, 6), stream.take_rejects()
        after = stream.get_state()
    config.data.workers = 2
    with loader.train_loader(config, config.stage.only, seed=5) as stream:
        assert digests(stream, 3) == first
        assert stream.get_state() == state
        stream.take_rejects()
        stream.set_state(json.loads(json.dumps(state)))
        assert digests(stream, 6) == expected
        assert stream.get_state() == after
        assert {reject.id for reject in stream.take_rejects()} <= {reject.id for reject in rejects}


def test_errors_of_worker_processes_are_data_errors(config):
    config.data.workers = 1
    config.data.sources.web.max_rejected = 0.0
    with (
        pytest.raises(DataError, match="source web: 1 of"),
        loader.train_loader(config, config.stage.only, seed=0) as s,
    ):
        next(s)


PROCESS = """
import json, pickle, sys
sys.path.insert(0, ".")
from tests.data_pipelines.test_web import digests
from data_pipelines import loader

with open(sys.argv[1], "rb") as file:
    config = pickle.load(file)
index, count, steps, state = json.loads(sys.argv[2])
stage = config.stage.only
with loader.train_loader(config, stage, seed=1, process_index=index, process_count=count) as stream:
    if state is not None:
        stream.set_state(state)
    print(json.dumps([digests(stream, steps), stream.get_state(), len(stream.take_rejects())]))
"""


def run_processes(config_file: Path, count: int, steps: int, state) -> tuple[list[str], dict, int]:
    """The rows of `steps` batches read by real processes, the position they end at, and how many rejects."""
    root = Path(__file__).parents[2]
    commands = [
        [sys.executable, "-c", PROCESS, str(config_file), json.dumps([i, count, steps, state])]
        for i in range(count)
    ]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for command in commands]
    outputs = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    assert all(process.returncode == 0 for process in running)
    per_step = [
        [rows[i * len(rows) // steps : (i + 1) * len(rows) // steps] for i in range(steps)]
        for rows, _, _ in outputs
    ]
    rows = [digest for i in range(steps) for part in per_step for digest in part[i]]
    return rows, loader.merge_states([state for _, state, _ in outputs]), sum(n for _, _, n in outputs)


def test_four_processes_give_the_rows_of_one_and_one_goes_on(config, tmp_path):
    config.data.lanes = 2  # so that two processes share each
    config.stage.only.mixture = ConfigDict({"web": ((0, 1), (9, 1)), "again": ((0, 0.0), (9, 2))})
    config.data.sources.again = config.data.sources.web.copy_and_resolve_references()
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    with loader.train_loader(config, config.stage.only, seed=1) as stream:
        straight = digests(stream, 12)
        num_rejects = len(stream.take_rejects())
    four, state, first_rejects = run_processes(tmp_path / "config", 4, 8, None)
    assert four == straight[: 8 * 4]
    one, _, second_rejects = run_processes(tmp_path / "config", 1, 4, state)
    assert one == straight[8 * 4 :]
    assert first_rejects + second_rejects == num_rejects, "each is told once, by one process"


@pytest.mark.parametrize("plan", [(2, 2, 2), (1, 2, 4, 1)])
@pytest.mark.parametrize("lanes", [2, 4])
def test_hosts_come_and_go_at_every_restart(config, lanes, plan):
    """What train.py does at each: every process gets the merged position, also of lanes it does not read."""
    config.data.lanes, config.data.prefetch = lanes, 0
    stage = config.stage.only
    with loader.train_loader(config, stage, seed=1) as stream:
        straight = [digests(stream, 1) for _ in range(2 * len(plan))]
    found, state = [], None
    for count in plan:
        streams = [
            loader.train_loader(config, stage, seed=1, process_index=index, process_count=count)
            for index in range(count)
        ]
        for stream in streams:
            if state is not None:
                stream.set_state(state)
        found += [[row for stream in streams for row in digests(stream, 1)] for _ in range(2)]
        state = json.loads(json.dumps(loader.merge_states([stream.get_state() for stream in streams])))
        for stream in streams:
            stream.close()
    assert found == straight


def test_positions_of_processes_that_fell_apart_are_refused(config):
    with loader.train_loader(config, config.stage.only, seed=1, process_count=2) as stream:
        states = [stream.get_state()]
        next(stream)
        states.append(stream.get_state())
    with pytest.raises(DataError, match="not at the same place of lane 0"):
        loader.merge_states(states)


# What is wrong with shards


def test_shards_that_go_wrong_under_a_running_job_are_named(tmp_path):
    web.write_tars(tmp_path / "tars", shards=2, records=20, broken=False)
    config = web.config(tmp_path, web=base.source("webdataset", str(tmp_path / "tars")))
    config.data.window = 10
    shard = tmp_path / "tars" / "00001.tar"
    content = shard.read_bytes()
    for change, message in (
        (lambda: shard.write_bytes(content[:-2048]), r"00001\.tar: changed while it was being read"),
        (shard.unlink, r"00001\.tar: missing"),
    ):
        shard.write_bytes(content)
        with loader.train_loader(config, config.stage.only, seed=0) as stream:
            next(stream)
            change()
            with pytest.raises(DataError, match=message):
                for _ in range(20):
                    next(stream)
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"00001\.tar: "):
        loader.train_loader(config, config.stage.only, seed=0)


def test_evaluation_shows_every_usable_record_once(folder, bad, monkeypatch):
    names = shown_names(monkeypatch)
    source = base.source("webdataset", str(folder / "tars"), split="val", max_rejected=1.0)
    config = web.config(folder, web=source)
    batches = list(loader.eval_batches(config, config.stage.only, "val"))
    assert sorted(names) == sorted({f"{s:05}.tar#{i}" for s in range(3) for i in range(40)} - bad)
    assert {len(batch["tokens"]) for batch in batches} == {4}
    config.data.sources.web.max_rejected = 0.0
    with pytest.raises(DataError, match="source web: 1 of 1 records were rejected"):
        list(loader.eval_batches(config, config.stage.only, "val"))


def test_quickstart_tools_say_that_other_data_is_none(config):
    config.data.sources.web.split = "val"
    with pytest.raises(DataError, match="not the quickstart's drawings"):
        loader.read_drawings(config, "val")
    with pytest.raises(DataError, match="no split 'test'; splits are val"):
        loader.read_drawings(config, "test")
