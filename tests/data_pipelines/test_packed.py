"""Rows that a build packed: the arrays of online packing, and one number as position on any hosts."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from ml_collections import ConfigDict

from data_pipelines import loader, pack, rows, sources
from data_pipelines.build import inputs, recipes, run
from data_pipelines.build.outputs import Rows
from data_pipelines.dataset import open_data
from data_pipelines.documents import DocumentRules
from data_pipelines.errors import DataError
from tests.data_pipelines import web

BATCH = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ConfigDict:
    """A config that trains on rows packed for it, out of 120 records with broken ones among them."""
    folder = tmp_path_factory.mktemp("packed")
    web.write_tars(folder / "tars", shards=3, records=40)
    c = web.config(folder)
    c.data.path, c.data.recipe, c.data.tokenizer = str(folder / "rows"), "", ""
    c.data.overlong = "shrink_images"
    recipe = dataclasses.replace(
        recipes.keep(),
        output=Rows.from_config(c, c.stage.only),
        tokenizer=str(folder / "tokenizer.json"),
        num_shards=2,
        holdout=0.2,
    )
    options = inputs.parse(f"web=webdataset:{folder / 'tars'}")
    run.run(recipe, [dataclasses.replace(options, index_path=str(folder / "index"))], c.data.path, workers=1)
    return c


def batches(config, count, seed=0, state=None, index=0, hosts=1):
    with loader.train_loader(
        config, config.stage.only, seed=seed, process_index=index, process_count=hosts
    ) as stream:
        if state is not None:
            stream.set_state(state)
        return [next(stream) for _ in range(count)], stream.get_state()


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def manifest(config) -> dict:
    found = open_data(config.data).manifest
    assert found is not None
    return found


def test_a_row_is_what_packing_now_would_make_it(config):
    """Every field, pixels included, against documents made from the input again and stacked."""
    built = manifest(config)
    shape = rows.RowShape.from_json(built["rows"])
    folder = config.data.path.removesuffix("rows")
    tokenizer = open_data(config.data).tokenizer
    rules = DocumentRules.from_config(config, config.stage.only, tokenizer)
    source = sources.open_source(
        sources.Options("web", "webdataset", f"{folder}tars", index_path=f"{folder}index")
    )
    numbers = {source.id_of(i): i for i in range(len(source))}
    stored = open_data(config.data).split("train")["all"]
    assert len(stored) > BATCH
    for index in range(len(stored)):
        documents = [rules.document(source.example(numbers[id_])) for id_ in rows.ids(stored[index])]
        expected = pack.stack([documents], 1, shape.row_tokens, shape.row_patches, shape.patch_dim)
        found = rows.from_record(stored[index], shape)
        assert same(found, {name: array[0] for name, array in expected.items()})


def test_an_epoch_serves_every_row_once_in_a_new_order(config):
    stored = open_data(config.data).split("train")["all"]
    epochs = 2
    count = epochs * len(stored) // BATCH + 1
    served, _ = batches(config, count)
    shown = [row.tobytes() for batch in served for row in batch["tokens"]]
    made = [rows.from_record(stored[i], shape_of(config)) for i in range(len(stored))]
    expected = Counter(row["tokens"].tobytes() for row in made)
    first, second = shown[: len(stored)], shown[len(stored) : 2 * len(stored)]
    assert Counter(first) == Counter(second) == expected
    assert first != second


def shape_of(config):
    return rows.RowShape.from_json(manifest(config)["rows"])


def test_the_same_rows_on_one_two_and_four_hosts_through_two_restarts(config):
    straight, _ = batches(config, 6)
    state, found = None, []
    for hosts in (1, 2, 4):
        parts = [batches(config, 2, state=state, index=index, hosts=hosts) for index in range(hosts)]
        state = loader.merge_states([position for _, position in parts])
        state = json.loads(json.dumps(state))
        for step in range(2):
            names = parts[0][0][step]
            found.append({name: np.concatenate([part[0][step][name] for part in parts]) for name in names})
    assert all(map(same, straight, found))


def test_worker_processes_and_threads_change_nothing(config):
    straight, _ = batches(config, 5)
    other = ConfigDict(config.to_dict())
    other.data.prefetch, other.data.workers = 3, 2
    found, state = batches(other, 5)
    assert all(map(same, straight, found)) and state["lanes"] == {"0": [5]}


def test_going_on_reads_nothing_that_came_before(config, monkeypatch):
    _, state = batches(config, 1)
    far = state | {"lanes": {"0": [10**9]}}
    read = []
    original = sources.array_record.ArrayRecordSource._read
    monkeypatch.setattr(
        sources.array_record.ArrayRecordSource,
        "_read",
        lambda self, shard, record: read.append((shard, record)) or original(self, shard, record),
    )
    batches(config, 1, state=far)
    assert len(read) == BATCH


def test_held_out_rows_come_once_on_any_number_of_hosts(config):
    stage = config.stage.only
    alone = list(loader.eval_batches(config, stage, "val"))
    halves = [
        list(loader.eval_batches(config, stage, "val", process_index=i, process_count=2)) for i in (0, 1)
    ]
    joined = [{n: np.concatenate([a[n], b[n]]) for n in a} for a, b in zip(*halves, strict=True)]
    assert all(map(same, alone, joined))
    documents = sum(int(row.max()) for batch in alone for row in batch["segment_ids"])
    assert documents == sum(manifest(config)["counts"]["val"].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.stage.only.update(row_tokens=512), "row_tokens: built 256, wanted 512"),
        (
            lambda c: c.data.update(template="chatml" if c.data.template != "chatml" else "plain"),
            "template: built",
        ),
        (lambda c: c.data.update(overlong="reject"), "overlong: built shrink_images, wanted reject"),
        (lambda c: c.stage.only.update(mixture=ConfigDict({"web": 1.0})), "mixed when they were built"),
    ],
)
def test_a_config_of_other_rules_is_refused(config, change, message):
    other = ConfigDict(config.to_dict())
    change(other)
    with pytest.raises(DataError, match=message):
        batches(other, 1)


def test_a_position_of_another_seed_is_refused(config):
    _, state = batches(config, 1)
    with pytest.raises(DataError, match="another seed"):
        batches(config, 1, seed=1, state=state)


@pytest.mark.parametrize(
    ("overlong", "row_tokens", "row_patches"), [("shrink_images", 256, 12), ("split_text", 30, 16)]
)
def test_what_no_row_holds_is_shrunk_or_split_when_packed(
    config, tmp_path, overlong, row_tokens, row_patches
):
    """Every row decodes to as many patches as its table says, and nothing is rejected for its size."""
    output = dataclasses.replace(
        Rows.from_config(config, config.stage.only),
        **{"row_tokens": row_tokens, "row_patches": row_patches, "overlong": overlong},
    )
    if overlong == "split_text":
        output = dataclasses.replace(output, resize=output.resize.with_max_pixels(32 * 32))
    folder = config.data.path.removesuffix("rows")
    recipe = dataclasses.replace(recipes.keep(), output=output, tokenizer=f"{folder}tokenizer.json")
    options = inputs.parse(f"web=webdataset:{folder}tars")
    options = dataclasses.replace(options, index_path=f"{folder}index")
    made = run.run(recipe, [options], str(tmp_path / "out"), workers=1)
    assert made["rejects"]["web"].keys().isdisjoint({"too_long", "too_many_patches"})
    source = sources.open_source(sources.Options("all", "array_record", f"{tmp_path}/out/train"))
    filled = [rows.from_record(source[i], output.shape) for i in range(len(source))]
    assert max(int((row["patch_index"] >= 0).sum()) for row in filled) <= row_patches
    names = [name for i in range(len(source)) for name in rows.ids(source[i])]
    assert len(set(names)) == sum(made["counts"]["train"].values())
    if overlong == "split_text":
        assert len(names) > len(set(names)), "a document became several"
