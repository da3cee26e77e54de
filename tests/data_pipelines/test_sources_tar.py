"""Tars in the manner of WebDataset, as img2dataset and webdataset write them."""

import json

import pytest
import webdataset

from data_pipelines.errors import DataError
from data_pipelines.schema import Image, Text
from tests.data_pipelines.source_files import img2dataset_members, outcomes, png, source, spans, write_tar


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


def test_video_frames_in_a_tar(tmp_path):
    members = {"v.1.jpg": png(2), "v.0.jpg": png(1), "v.10.jpg": png(3), "v.txt": b"a film"}
    members["v.json"] = json.dumps({"timestamps": [0, 1.5, 9]}).encode()
    write_tar(tmp_path / "v.tar", members)
    assert spans(source("webdataset", tmp_path, tmp_path, form="video")) == [
        (Image(png(1), 0.0), Image(png(2), 1.5), Image(png(3), 9.0), Text("a film", supervised=True))
    ]
