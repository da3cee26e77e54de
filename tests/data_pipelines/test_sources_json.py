"""JSON lists and lines, and the forms in which records become documents."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import DataError, Reject
from data_pipelines.schema import Image, Text
from tests.data_pipelines.source_files import LLAVA, png, source, spans

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
