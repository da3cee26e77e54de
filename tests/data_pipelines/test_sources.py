"""Every kind of source, on files written by the tools that write them in the wild."""

import io
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from array_record.python import array_record_module
from PIL import Image as PillowImage

from data_pipelines import files, records as records_lib
from data_pipelines.errors import DataError, Reject
from data_pipelines.schema import Example, Image, Text
from data_pipelines.sources import Options, Source, open_source


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    PillowImage.new("RGB", (8 + i % 5, 9), (i % 256, 7, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def img2dataset_members(shard: int, records: int) -> dict[str, bytes]:
    """What img2dataset's "webdataset" output holds, a failed download (only .json) among it."""
    members = {}
    for i in range(records):
        key = f"{shard:05}{i:04}"
        meta = {"caption": f"picture {key}", "url": "http://x/y.png", "key": key, "status": "success"}
        if i == 1:
            members[f"{key}.json"] = json.dumps(meta | {"status": "failed_to_download"}).encode()
            continue
        members[f"{key}.jpg"] = png(i)
        members[f"{key}.txt"] = meta["caption"].encode()
        members[f"{key}.json"] = json.dumps(meta).encode()
    return members


def source(kind: str, path: object, tmp_path: Path, **fields: object) -> Source:
    return open_source(Options("web", kind, str(path), index_path=str(tmp_path / "index"), **fields))


def outcomes(opened: Source) -> list[Example | str]:
    """Each record's document, or the reason why there is none."""
    found: list[Example | str] = []
    for i in range(len(opened)):
        try:
            found.append(opened.example(i))
        except Reject as reject:
            found.append(reject.reason)
    return found


def spans(opened: Source) -> list[object]:
    return [one if isinstance(one, str) else one.spans for one in outcomes(opened)]


# WebDataset


def test_img2dataset_folder(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"{shard:05}.tar", img2dataset_members(shard, 4))
    opened = source("webdataset", tmp_path, tmp_path)
    assert len(opened) == 12 and opened.shards == ["00000.tar", "00001.tar", "00002.tar"]
    found = outcomes(opened)
    assert [i for i, one in enumerate(found) if one == "missing_image"] == [1, 5, 9]
    assert found[6].id == "00001.tar#2"
    assert found[6].spans == (Image(png(2)), Text("picture 000010002", supervised=True))
    assert opened.locate(6) == (1, 2)


def test_multi_part_keys_long_names_and_what_webdataset_reads(tmp_path):
    long = "folder/" + "n" * 120  # has a header member of its own
    members = {"a/000.jpg": b"one", "a/000.seg.png": png(2), "a/000.txt": b"first", f"{long}.jpg": b"three"}
    members |= {f"{long}.txt": b"second", "b/000.jpg": b"four", "b/000.txt": b"third"}
    write_tar(tmp_path / "x.tar", members)
    opened = source("webdataset", tmp_path / "x.tar", tmp_path)
    expected = [
        {name: data for name, data in sample.items() if not name.startswith("__")}
        for sample in webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)
    ]
    assert [dict(opened.fields(opened[i])) for i in range(len(opened))] == expected
    seg = source("webdataset", tmp_path / "x.tar", tmp_path, image_fields=("seg.png",))
    assert seg.example(0).images == (Image(png(2)),)


def test_a_tar_written_by_webdataset(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        for i in range(3):
            writer.write({"__key__": f"k{i}", "png": png(i), "txt": f"text {i}"})
    assert [one.texts[0].text for one in outcomes(source("webdataset", tmp_path, tmp_path))] == [
        "text 0",
        "text 1",
        "text 2",
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:1800], "damaged at byte 1536"),
        (lambda data: data[:2300], "cut off"),
        (lambda data: b"x" * 600 + data[600:], "not a tar"),
        (lambda data: data[:3072] + b"\x07" * 512 + data[3584:], "damaged at byte 3072"),
        (lambda data: b"", "not a tar|empty"),
        (lambda data: bytes(10240), "without records"),
        (lambda data: data[:3072] + bytes(512) + data[3584:], "zeros at byte 3072 .* byte 3584 is none"),
        (lambda data: data + data, r"zeros at byte 7680 .* byte 10240 is none"),
        (lambda data: data[:3072] + bytes(2 << 20), "nothing but zeros from byte 3072"),
        (lambda data: data[:3072] + bytes(2 << 20) + data, "zeros at byte 3072 .* byte 2100224 is none"),
    ],
)
def test_damaged_tars_are_named(tmp_path, damage, message):
    write_tar(tmp_path / "x.tar", {f"{i}.jpg": bytes([i]) * 700 for i in range(1, 6)})
    (tmp_path / "x.tar").write_bytes(damage((tmp_path / "x.tar").read_bytes()))
    with pytest.raises(DataError, match=f"x.tar: .*({message})"):
        source("webdataset", tmp_path, tmp_path)


def test_a_tar_may_be_padded_to_a_megabyte(tmp_path):
    write_tar(tmp_path / "x.tar", {f"{i}.jpg": b"x" * 700 for i in range(3)})
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[: 3 * 1536].ljust(1 << 20, b"\0"))
    assert len(source("webdataset", tmp_path, tmp_path)) == 3


# Parquet


def test_parquet_of_image_bytes_and_captions(tmp_path):
    for shard in range(2):
        n = 5 + shard
        columns = {"jpg": [png(i) for i in range(n)], "caption": [f"{shard} {i}" for i in range(n)]}
        columns["caption"][3] = None
        pq.write_table(pa.table(columns), tmp_path / f"{shard}.parquet", row_group_size=2)
    opened = source("parquet", tmp_path, tmp_path)
    found = outcomes(opened)
    assert len(found) == 11 and found[3] == found[8] == "empty_text"
    assert found[7].id == "1.parquet#2"
    assert found[7].spans == (Image(png(2)), Text("1 2", supervised=True))
    assert opened.blocks.tolist() == [0, 2, 4, 5, 7, 9, 11]
    assert [opened[i] for i in (10, 0, 7)] == [opened[10], opened[0], opened[7]]


def test_hugging_face_image_structs(tmp_path):
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    one = pa.array([{"bytes": png(1), "path": "a.png"}, {"bytes": None, "path": "b.png"}], struct)
    many = pa.array(
        [[{"bytes": png(2), "path": None}, {"bytes": png(3), "path": None}], []], pa.list_(struct)
    )
    text = pa.array(["first", "second"])
    pq.write_table(pa.table({"image": one, "text": text}), tmp_path / "one.parquet")
    pq.write_table(pa.table({"images": many, "text": text}), tmp_path / "many.parquet")
    assert spans(source("parquet", tmp_path / "one.parquet", tmp_path)) == [
        (Image(png(1)), Text("first", supervised=True)),
        "missing_image",
    ]
    assert spans(source("parquet", tmp_path / "many.parquet", tmp_path)) == [
        (Image(png(2)), Image(png(3)), Text("first", supervised=True)),
        "missing_image",
    ]
    (tmp_path / "b.png").write_bytes(png(9))
    rooted = source("parquet", tmp_path / "one.parquet", tmp_path, image_root=str(tmp_path))
    assert rooted.example(1).images == (Image(png(9)),)


def test_parquet_values_that_python_has_not(tmp_path):
    """They cost a record only where a form looks."""
    no_text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 2, 3], np.int32)), pa.py_buffer(b"\xff\xfea")]
    )
    columns = {
        "nanoseconds": pa.array([1, 0], pa.timestamp("ns")),
        "far": pa.array([2**48, 0], pa.timestamp("s")),
        "day": pa.array([2**30, 0], pa.date32()),
        "no_text": no_text,
        "text": ["a", "b"],
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    for field, expected in {
        "text": [(Text("a", supervised=True),), (Text("b", supervised=True),)],
        "no_text": ["bad_text", (Text("a", supervised=True),)],
        "nanoseconds": ["bad_record", "bad_record"],
        "far": ["bad_record", "bad_record"],
        "day": ["bad_record", "bad_record"],
    }.items():
        opened = source("parquet", tmp_path, tmp_path, form="text", text_fields=(field,))
        assert spans(opened) == expected, field


def test_a_json_column_beside_others(tmp_path):
    columns = {"json": ['{"caption": "a"}', "{"], "far": pa.array([2**48, 0], pa.timestamp("s"))}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    expected = [(Text("a", supervised=True),), "bad_json"]
    assert spans(source("parquet", tmp_path, tmp_path, form="text")) == expected


def test_damaged_parquet_is_named(tmp_path):
    pq.write_table(pa.table({"jpg": [b"x"], "caption": ["y"]}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: damaged, or not Parquet"):
        source("parquet", tmp_path, tmp_path)


# ArrayRecord, TFDS


def test_array_record_of_examples(tmp_path):
    examples = [Example(f"id {i}", "origin", (Image(png(i)), Text(str(i)))) for i in range(4)]
    records = [*(records_lib.to_bytes(example) for example in examples), b"garbage"]
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    assert outcomes(source("array_record", tmp_path, tmp_path)) == [*examples, "bad_record"]
    (tmp_path / "b.array_record").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"b\.array_record: not a readable ArrayRecord file"):
        source("array_record", tmp_path, tmp_path)


PREPARE = """
import io, sys
import tensorflow_datasets as tfds
from PIL import Image

class Pictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(6), "test": self._generate_examples(2)}

    def _generate_examples(self, n):
        for i in range(n):
            buffer = io.BytesIO()
            Image.new("RGB", (8 + i, 8)).save(buffer, "PNG")
            buffer.seek(0)
            yield str(i), {"image": buffer, "caption": f"caption {i}"}

Pictures(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


def test_a_data_set_prepared_by_tfds(tmp_path):
    subprocess.run([sys.executable, "-c", PREPARE, str(tmp_path)], check=True, capture_output=True)
    folder = tmp_path / "pictures" / "1.0.0"
    opened = source("tfds", folder, tmp_path)
    found = outcomes(opened)
    sizes = {one.texts[0].text: PillowImage.open(io.BytesIO(one.images[0].data)).size for one in found}
    assert sizes == {f"caption {i}": (8 + i, 8) for i in range(6)}
    assert len(source("tfds", folder, tmp_path, split="test")) == 2
    assert opened.num_bytes == sum(len(records_lib.to_bytes(one)) for one in found)
    with pytest.raises(DataError, match="split 'dev'"):
        source("tfds", folder, tmp_path, split="dev")
    assert "tensorflow" not in sys.modules


# JSON


LLAVA = [
    {
        "id": "1",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": '<image>\nWhat is [this], "really"? {\\'},
            {"from": "gpt", "value": "A cat."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    },
    {"id": "2", "image": "gone.png", "conversations": [{"from": "gpt", "value": "x"}]},
    {"id": "3", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"id": "4", "image": ["a.png", "b.png"], "conversations": [{"from": "gpt", "value": "two"}]},
    {"id": "5", "image": "a.png", "conversations": [{"from": "gpt", "value": "<image><image>"}]},
    {"id": "6", "conversations": [{"from": "alien", "value": "?"}]},
    {"id": "7", "conversations": []},
    {"id": "8", "conversations": [{"from": "human", "value": "no answer"}]},
    {"id": "9", "conversations": [{"from": "gpt", "value": "\ud83d"}]},
    {"id": "10", "conversations": [{"from": "gpt", "value": "  "}]},
    ["no object"],
]
EXPECTED = [
    (
        Image(png(1)),
        Text('What is [this], "really"? {\\', "user"),
        Text("A cat.", "assistant", True),
        Text("Sure?", "user"),
        Text("Yes.", "assistant", True),
    ),
    "missing_image",
    (Text("Hi", "user"), Text("Hello", "assistant", True)),
    (Image(png(1)), Image(png(2)), Text("two", "assistant", True)),
    "image_count",
    "bad_turns",
    "bad_turns",
    "bad_turns",
    "bad_text",
    "empty_text",
    "bad_json",
]


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


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("where", ["list", "lines"])
def test_llava_conversations_and_an_image_folder(tmp_path, indent, where):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(2))
    if where == "list":
        (tmp_path / "data.json").write_text(json.dumps(LLAVA, indent=indent))
    else:
        (tmp_path / "data.jsonl").write_text("\n\n".join(map(json.dumps, LLAVA)))  # blank lines do not count
    assert spans(source("json", tmp_path, tmp_path, form="conversation")) == EXPECTED


def test_json_lines_that_are_none(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n{"text": \n{"text": "b\xff"}\n{"text": "c"}')
    assert spans(source("json", tmp_path, tmp_path, form="text")) == [
        (Text("a", supervised=True),),
        "bad_json",
        "bad_json",
        (Text("c", supervised=True),),
    ]


@pytest.mark.parametrize("data", [b'[{"a": 1}, {"a": 2}', b'["x', b"", b"   "])
def test_cut_off_json_is_named(tmp_path, data):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(DataError, match=r"x\.json: (cut off|an empty file)|has no records"):
        source("json", tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b'[{"text": "a"}]\n[{"text": "b"}]', "byte 16, where '\\['"),
        (b'[1]\n{"text": "b"}\n', "byte 4, where '{'"),
        (b'[{"text": "a"}, {"text": "b"}}\n', "byte 29, where '}'"),
        (b"\xef\xbb\xbf[1]\0\0", "byte 6, where"),
    ],
)
def test_what_follows_a_list_is_named(tmp_path, data, place):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(DataError, match=rf"x\.json: neither one list nor JSON lines: .* {place}"):
        source("json", tmp_path, tmp_path)


def test_lines_may_begin_with_one_that_is_a_list(tmp_path):
    (tmp_path / "x.jsonl").write_text('[1]\n{"text": "a"}\n')
    expected = ["bad_json", (Text("a", supervised=True),)]
    assert spans(source("json", tmp_path, tmp_path, form="text")) == expected


@pytest.mark.parametrize(("name", "data"), [("x.json", b'[{"text": "a"}]'), ("x.jsonl", b'{"text": "a"}\n')])
def test_byte_order_marks(tmp_path, name, data):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data)
    assert spans(source("json", tmp_path, tmp_path, form="text")) == [(Text("a", supervised=True),)]
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        (tmp_path / name).write_bytes(("\ufeff" + data.decode()).encode(encoding))
        with pytest.raises(DataError, match=rf"{name}: UTF-16 or UTF-32; convert it to UTF-8"):
            source("json", tmp_path, tmp_path)


def test_forms(tmp_path):
    image = {"bytes": None, "path": "a.png"}
    (tmp_path / "a.png").write_bytes(png(1))
    records = {
        "interleaved": {"images": [None, "a.png", None], "texts": ["before", None, "after"]},
        "vqa": {"image": image, "question": "Colour?", "answers": ["red", "blue", "blue"]},
        "text": {"text": " words "},
        "video": {"images": ["a.png", "a.png"], "fps": 2.0, "caption": "it moves"},
    }
    expected = {
        "interleaved": (
            Text("before", supervised=True),
            Image(png(1)),
            Text("after", supervised=True),
        ),
        "vqa": (Image(png(1)), Text("Colour?", "user"), Text("blue", "assistant", True)),
        "text": (Text("words", supervised=True),),
        "video": (Image(png(1), 0.0), Image(png(1), 0.5), Text("it moves", supervised=True)),
    }
    for form, record in records.items():
        (tmp_path / f"{form}.jsonl").write_text(json.dumps(record))
        assert spans(source("json", tmp_path / f"{form}.jsonl", tmp_path, form=form)) == [expected[form]], (
            form
        )
    broken = {
        "interleaved": [{"images": [None], "texts": []}, {"images": [None], "texts": [None]}, {"texts": "x"}],
        "vqa": [{"question": "?"}, {"answer": "!"}],
        "video": [
            {"images": ["a.png"], "caption": "x"},
            {"images": ["a.png"], "timestamps": ["x"], "caption": "x"},
        ],
    }
    reasons = {
        "interleaved": ["bad_record", "empty", "bad_record"],
        "vqa": ["empty_text", "empty_text"],
        "video": ["bad_record", "bad_record"],
    }
    for form, lines in broken.items():
        (tmp_path / f"{form}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert spans(source("json", tmp_path / f"{form}.jsonl", tmp_path, form=form)) == reasons[form], form


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_image_paths_that_no_file_can_have(tmp_path, kind):
    records = [{"image": "a\0.png", "text": "x"}, {"image": "a\ud800.png", "text": "x"}]
    if kind == "json":
        (tmp_path / "x.json").write_text(json.dumps(records))
    else:
        pq.write_table(pa.Table.from_pylist(records[:1]), tmp_path / "x.parquet")
    opened = source(kind, tmp_path, tmp_path, image_root=str(tmp_path))
    assert set(spans(opened)) == {"missing_image"}
    with pytest.raises(Reject) as rejected:
        opened.example(len(opened) - 1)
    rejected.value.args[0].encode()  # can be printed


@pytest.mark.parametrize(
    "times",
    [
        '"timestamps": [0, NaN]',
        '"timestamps": [0, -Infinity]',
        '"timestamps": [0, 1e307]',
        f'"timestamps": [0, {10**400}]',
        f'"timestamps": ["0", "{10**400}"]',
        '"fps": 1e-320',
    ],
)
def test_times_of_frames_that_are_none(tmp_path, times):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "x.json").write_text(f'[{{"images": ["a.png", "a.png"], "caption": "x", {times}}}]')
    assert spans(source("json", tmp_path, tmp_path, form="video")) == ["bad_record"]


def test_video_frames_in_a_tar(tmp_path):
    members = {"v.1.jpg": png(2), "v.0.jpg": png(1), "v.10.jpg": png(3), "v.txt": b"a film"}
    members["v.json"] = json.dumps({"timestamps": [0, 1.5, 9]}).encode()
    write_tar(tmp_path / "v.tar", members)
    assert spans(source("webdataset", tmp_path, tmp_path, form="video")) == [
        (Image(png(1), 0.0), Image(png(2), 1.5), Image(png(3), 9.0), Text("a film", supervised=True))
    ]


# What all have in common


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
