"""What sources of every kind have in common."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module

from data_pipelines import files, records as records_lib
from data_pipelines.errors import DataError
from data_pipelines.schema import Example, Image
from tests.data_pipelines.source_files import (
    LLAVA,
    img2dataset_members,
    outcomes,
    png,
    source,
    spans,
    write_tar,
)


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "array_record", "json"])
def test_the_size_of_documents_is_known_before_they_are_read(tmp_path, kind):
    noise = [np.random.default_rng(i).bytes(20_000) for i in range(250)]
    folder = tmp_path / kind
    folder.mkdir()
    if kind == "webdataset":
        write_tar(
            folder / "x.tar",
            {f"{i}.{n}": d for i in range(250) for n, d in (("jpg", noise[i]), ("txt", b"t"))},
        )
    elif kind == "parquet":
        texts = ["the same words " * 1000] * 250  # compressed they are nothing
        pq.write_table(pa.table({"jpg": noise, "caption": texts}), folder / "x.parquet", use_dictionary=False)
    elif kind == "array_record":
        writer = array_record_module.ArrayRecordWriter(str(folder / "x.array_record"), "group_size:1")
        for i, data in enumerate(noise):
            writer.write(records_lib.to_bytes(Example(str(i), "s", (Image(data),))))
        writer.close()
    else:
        lines = [{"image": f"{i}.png", "caption": "t"} for i in range(250)]
        (folder / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
        for i, data in enumerate(noise):
            (folder / f"{i}.png").write_bytes(png(i) + data)
    expected = 250 * (35_000 if kind == "parquet" else 20_000)
    assert expected * 0.95 < source(kind, folder, tmp_path).num_bytes < expected * 1.15


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def test_urls_read_like_local_files(tmp_path, memory):
    write_tar(tmp_path / "0.tar", img2dataset_members(0, 3))
    pq.write_table(pa.table({"jpg": [png(1)], "caption": ["c"]}), tmp_path / "0.parquet")
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "data.json").write_text(json.dumps(LLAVA))
    for kind, pattern, fields in (
        ("webdataset", "*.tar", {}),
        ("parquet", "*.parquet", {}),
        ("json", "data.json", {"form": "conversation"}),
    ):
        for file in tmp_path.iterdir():
            if file.is_file():
                memory.pipe(f"/{kind}/{file.name}", file.read_bytes())
        local = source(kind, tmp_path / pattern, tmp_path, **fields)
        remote = source(kind, f"memory://{kind}/{pattern}", tmp_path, **fields)
        assert spans(remote) == spans(local) and len(local) > 0
        assert remote.shards == local.shards and remote.identity == local.identity


def test_a_url_without_its_package_says_which(tmp_path):
    with pytest.raises(DataError, match=r"gs://bucket/x\.tar: .*gcsfs"):
        source("webdataset", "gs://bucket/x.tar", tmp_path)
    with pytest.raises(DataError, match=r"unknown kind 'tar'; there are .*webdataset"):
        source("tar", "x", tmp_path)
    with pytest.raises(DataError, match="unknown form 'chat'"):
        source("json", "x", tmp_path, form="chat")
    with pytest.raises(DataError, match="no such file"):
        source("webdataset", tmp_path / "nowhere", tmp_path)


@pytest.mark.parametrize("change", ["grown", "deleted", "replaced"])
def test_a_shard_that_changes_under_a_running_job_is_an_error(tmp_path, change):
    path = tmp_path / "0.tar"
    write_tar(path, img2dataset_members(0, 3))
    opened = source("webdataset", tmp_path, tmp_path)
    opened.example(0)
    if change == "grown":
        path.write_bytes(path.read_bytes() + bytes(512))
    elif change == "deleted":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(DataError, match=r"0.tar: (changed while it was being read|missing)"):
        opened.example(0)


def test_sources_cross_process_borders(tmp_path):
    write_tar(tmp_path / "0.tar", img2dataset_members(0, 3))
    opened = source("webdataset", tmp_path, tmp_path)
    again = pickle.loads(pickle.dumps(opened))
    assert outcomes(again) == outcomes(opened) and again.identity == opened.identity


def test_an_index_is_built_once(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", img2dataset_members(0, 3))
    source("webdataset", tmp_path, tmp_path)
    monkeypatch.setattr(files.File, "open", lambda _: pytest.fail("the tar was scanned again"))
    assert len(source("webdataset", tmp_path, tmp_path)) == 3


MEMORY = """
import resource, sys
import numpy as np
from data_pipelines.sources import Options, open_source

kind = sys.argv[1]
opened = open_source(Options("web", sys.argv[1], sys.argv[2], form="text", index_path=sys.argv[3]))
assert len(opened) == 100_000
order = np.random.default_rng(0).permutation(len(opened))
for i in range(len(opened)):
    opened.example(i if kind == "parquet" else int(order[i]))
    if i == 10_000:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["json", "parquet", pytest.param("webdataset", marks=pytest.mark.slow)])
def test_memory_stays_flat_over_100_000_records(tmp_path, kind):
    if kind == "json":
        (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "line {i}"}}\n' for i in range(100_000)))
    elif kind == "parquet":
        table = pa.table({"text": [f"line {i}" for i in range(100_000)]})
        pq.write_table(table, tmp_path / "x.parquet", row_group_size=1000)
    else:
        for shard in range(10):
            members = {f"{i:05}.txt": b"line %d" % i for i in range(10_000)}
            write_tar(tmp_path / f"{shard}.tar", members)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", MEMORY, kind, str(tmp_path), str(tmp_path / "index")]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
    assert int(result.stdout) < 8 << 10, "kB by which the process grew over the last 90,000 records"


def test_order_is_a_shuffle_of_every_epoch(tmp_path):
    from data_pipelines.shuffle import Order

    blocks = np.append(0, np.cumsum(np.random.default_rng(0).integers(1, 9, 40)))
    n = int(blocks[-1])
    for order in (Order(n, 5), Order(n, 5, blocks)):
        epochs = [[order(epoch * n + i) for i in range(n)] for epoch in range(3)]
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2] != sorted(epochs[2])
        assert order(2 * n + 7) == epochs[2][7]
    assert [Order(n, None)(i) for i in range(2 * n)] == [*range(n)] * 2
