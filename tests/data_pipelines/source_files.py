"""What the tests of sources write, and how they read it."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image as PillowImage

from data_pipelines.errors import Reject
from data_pipelines.schema import Example
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
