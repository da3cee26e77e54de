"""Parquet, ArrayRecord and TFDS, on files written by the tools that write them in the wild."""

import io
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module
from PIL import Image as PillowImage

from data_pipelines import records as records_lib
from data_pipelines.errors import DataError
from data_pipelines.schema import Example, Image, Text
from tests.data_pipelines.source_files import (
    outcomes,
    png,
    source,
    spans,
)

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
