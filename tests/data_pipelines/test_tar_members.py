"""The quick reading of tar members against Python's tarfile."""

import tarfile

import numpy as np
import webdataset

from data_pipelines.sources import webdataset as webdataset_lib
from tests.data_pipelines.source_files import png, write_tar


def test_members_are_those_that_tarfile_finds(tmp_path):
    """Of a plain record, one of webdataset's, one of other members, and of a thousand damaged ones."""
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        writer.write({"__key__": "k", "png": png(1), "txt": "text"})
    write_tar(tmp_path / "x.tar", {"k.jpg": b"a" * 700, "k.txt": b"", "k.json": b"{}"})
    with tarfile.open(tmp_path / "y.tar", "w") as tar:
        for name, kind in (
            ("k.jpg", tarfile.SYMTYPE),
            ("n" * 150 + ".txt", tarfile.REGTYPE),
            ("d", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere"
            tar.addfile(info)
    whole = [(tmp_path / name).read_bytes() for name in ("w.tar", "x.tar", "y.tar")]
    plain = [tar[: -(-len(tar.rstrip(b"\0")) // 512) * 512] for tar in whole]
    found = [webdataset_lib._plain_members(record) for record in plain]
    assert found[:2] == [webdataset_lib._any_members(record) for record in plain[:2]]
    assert found[2] is None  # tarfile's affair
    rng = np.random.default_rng(0)
    for record in plain[:2] * 500:
        damaged = bytearray(record[: len(record) - int(rng.integers(2)) * 100])
        place = int(rng.choice([0, 512, 1024])) + int(rng.integers(512))
        damaged[min(place, len(damaged) - 1)] = int(rng.integers(256))
        members = webdataset_lib._plain_members(bytes(damaged))
        if members is not None:
            assert members == webdataset_lib._any_members(bytes(damaged))
