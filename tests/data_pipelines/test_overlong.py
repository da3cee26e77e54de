"""Documents that no row holds: the three policies."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs import base
from data_pipelines import pack, schema
from data_pipelines.dataset import open_data
from data_pipelines.errors import Reject
from data_pipelines.makers import make_makers
from data_pipelines.schema import Document
from tests.data_pipelines import web


def long_text(words: int) -> str:
    return " ".join(web.WORDS[i % len(web.WORDS)] for i in range(words))


@pytest.fixture
def overlong_config(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(4):
        (tmp_path / "data" / f"{i}.jpg").write_bytes(web.picture(rng, (80, 64)))
    records = [
        {"text": long_text(700)},
        {"images": ["0.jpg"], "texts": [None]},
        {"images": ["0.jpg", None, "1.jpg", None], "texts": [None, long_text(300), None, long_text(200)]},
    ]
    for i, record in enumerate(records):
        record.setdefault("images", [None])
        record.setdefault("texts", [record.pop("text", None)])
        (tmp_path / "data" / f"{i}.jsonl").write_text(json.dumps(record))
    source = base.source("json", str(tmp_path / "data"), form="interleaved", max_rejected=1.0)
    config = web.config(tmp_path, web=source)
    config.data.augment = False
    config.data.window = 4
    return config


def outcome(config, policy) -> tuple[dict[str, list[Document]], dict[str, str]]:
    """Each record's documents and the rejected ones' reasons, by file."""
    config.data.overlong = policy
    data = open_data(config.data)
    source = data.split("train")["web"]
    maker = make_makers(config, config.stage.only, data, {"web": source})["web"]
    made, reasons = {}, {}
    for i in range(len(source)):
        name = source.id_of(i)[0]
        try:
            made[name] = maker.for_training(source[i], source.id_of(i), np.random.default_rng(0))
        except Reject as reject:
            reasons[name] = reject.reason
    for documents in made.values():
        for document in documents:
            budgets = pack.row_budgets(256, config.stage.only.row_patches)
            pack.check_fits(document.name, pack.sizes(document), budgets)
    return made, reasons


def letters_in(config, documents) -> str:
    tokenizer = open_data(config.data).tokenizer
    pieces = [tokenizer.decode(d.tokens[(d.kinds == schema.TEXT)].tolist()) for d in documents]
    return "".join("".join(pieces).split())


def test_overlong_documents_are_rejected(overlong_config):
    made, reasons = outcome(overlong_config, "reject")
    assert reasons == {"0": "too_long", "1": "no_target", "2": "too_long"}
    assert made == {}


def test_overlong_text_is_split_without_losing_a_word(overlong_config):
    made, reasons = outcome(overlong_config, "split_text")
    assert reasons == {"1": "no_target"}
    assert len(made["0"]) >= 3
    assert letters_in(overlong_config, made["0"]) == long_text(700).replace(" ", "")
    assert letters_in(overlong_config, made["2"]) == (long_text(300) + long_text(200)).replace(" ", "")
    assert sum(d.image_ids.max() for d in made["2"]) == 2, "both images are there, each once"


def test_a_damaged_image_rejects_all_parts_at_once(overlong_config):
    folder = Path(overlong_config.data.sources.web.path)
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:-400])
    made, reasons = outcome(overlong_config, "split_text")
    assert reasons == {"1": "no_target", "2": "truncated"}
    assert made.keys() == {"0"}, "not even the part before the image"


def test_images_shrink_until_the_document_fits(overlong_config):
    one = {"images": ["0.jpg", None], "texts": [None, long_text(20)]}
    (Path(overlong_config.data.sources.web.path) / "3.jsonl").write_text(json.dumps(one))
    overlong_config.stage.only.row_patches = 8
    _, reasons = outcome(overlong_config, "reject")
    assert reasons["3"] == "too_many_patches"
    _, reasons = outcome(overlong_config, "split_text")
    assert reasons["3"] == "too_many_patches", "an image is not split"
    made, reasons = outcome(overlong_config, "shrink_images")
    assert reasons == {"0": "too_long", "1": "no_target", "2": "too_long"}
    (document,) = made["3"]
    assert 4 <= len(document.patch_hw) <= 8
    assert len(document.load_patches()) == len(document.patch_hw)
