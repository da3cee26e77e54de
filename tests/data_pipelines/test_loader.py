"""The loader on the real quickstart data: exact resume, whole epochs, the batch contract."""

import dataclasses
import itertools
import json
from collections import Counter

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from data_pipelines import build, images, loader, pack, schema, sources, text
from data_pipelines.drawing import Drawing
from data_pipelines.errors import DataError
from data_pipelines.resize import Resize
from data_pipelines.sources import Options


@pytest.fixture
def config(quickstart_data):
    """The quickstart config, free to change, with one small stage."""
    config = ConfigDict(quickstart_data).copy_and_resolve_references().unlock()
    config.data.window = 64
    return config


@pytest.fixture
def stage():
    return base.stage(10, batch_size=4, row_tokens=256, row_patches=128)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def take(stream, n):
    return list(itertools.islice(stream, n))


def shown_names(monkeypatch) -> list[str]:
    """Records the name of every document that is laid out."""
    names: list[str] = []
    fill_row = pack._fill_row

    def spy(arrays, row, dropped):
        names.extend(document.name for document in row)
        fill_row(arrays, row, dropped)

    monkeypatch.setattr(pack, "_fill_row", spy)
    return names


def test_batch_contract(config, stage):
    with loader.train_loader(config, stage, seed=0) as stream:
        batch = next(stream)
        assert stream.source_names == ["fluent", "noto", "openmoji", "twemoji"]
    side = config.model.embed.patch_size * config.model.embed.merge_size
    shapes = schema.batch_shapes(stage.batch_size, stage.row_tokens, stage.row_patches, side**2 * 3)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == shapes

    is_patch = batch["kinds"] == schema.PATCH
    manifest = build.ensure(config.data)
    tokenizer = text.Tokenizer(f"{config.data.path}/{manifest['tokenizer']['file']}")
    np.testing.assert_array_equal(is_patch, batch["tokens"] == tokenizer.image_context)
    np.testing.assert_array_equal(is_patch, batch["patch_index"] >= 0)
    np.testing.assert_array_equal(is_patch, batch["image_ids"] > 0)
    for b in range(stage.batch_size):
        shown = batch["patch_hw"][b][batch["patch_index"][b][is_patch[b]]]
        np.testing.assert_array_equal(shown, batch["coords"][b][is_patch[b]][:, 1:])
    same_document = np.diff(batch["segment_ids"], axis=1) == 0
    inside = same_document & (batch["segment_ids"][:, 1:] > 0)
    np.testing.assert_array_equal(batch["targets"][:, :-1][inside], batch["tokens"][:, 1:][inside])
    assert not batch["loss_weights"][:, :-1][~inside].any()


def test_resume_is_exact_twice(config, stage):
    with loader.train_loader(config, stage, seed=3) as stream:
        straight = take(stream, 12)
    with loader.train_loader(config, stage, seed=3) as stream:
        assert all(map(same, take(stream, 5), straight[:5]))
        state = json.loads(json.dumps(stream.get_state()))
    with loader.train_loader(config, stage, seed=3) as stream:
        stream.set_state(state)
        assert json.loads(json.dumps(stream.get_state())) == state
        assert all(map(same, take(stream, 3), straight[5:8]))
        state = json.loads(json.dumps(stream.get_state()))
    with loader.train_loader(config, stage, seed=3) as stream:
        take(stream, 1)
        stream.set_state(state)
        assert all(map(same, take(stream, 4), straight[8:]))


@pytest.mark.parametrize("prefetch", [0, 4])
def test_every_position_resumes_the_same_with_and_without_prefetch(config, stage, prefetch):
    config.data.prefetch = 2
    with loader.train_loader(config, stage, seed=1) as stream:
        straight = take(stream, 8)
    config.data.prefetch = prefetch
    with loader.train_loader(config, stage, seed=1) as stream:
        states = [stream.get_state()]
        for expected in straight:
            assert same(next(stream), expected)
            states.append(stream.get_state())
    for k in (0, 1, 3, 7):
        with loader.train_loader(config, stage, seed=1) as stream:
            stream.set_state(states[k])
            assert same(next(stream), straight[k])


def test_seeds_give_other_orders(config, stage):
    with loader.train_loader(config, stage, seed=0) as a, loader.train_loader(config, stage, seed=1) as b:
        assert not same(next(a), next(b))


def test_state_of_another_stream_is_refused(config, stage):
    with loader.train_loader(config, stage, seed=0) as stream:
        state = stream.get_state()
    with loader.train_loader(config, stage, seed=1) as stream, pytest.raises(DataError, match="position"):
        stream.set_state(state)


def test_two_epochs_show_every_document_twice(config, stage, monkeypatch):
    manifest = build.ensure(config.data)
    num_train = manifest["counts"]["train"]["twemoji"]
    stage.mixture = ConfigDict({"twemoji": 1.0})
    names = shown_names(monkeypatch)
    monkeypatch.setattr(images, "decode", lambda *_: images.Image.new("RGBA", (1, 1)))  # pixels do not matter
    # Packing lets documents of a window overtake each other, also across the end of an epoch.
    config.data.window = num_train
    config.data.prefetch = 0
    with loader.train_loader(config, stage, seed=0) as stream:
        while len(names) < 2 * num_train:
            next(stream)
    first, second = Counter(names[:num_train]), Counter(names[num_train : 2 * num_train])
    assert len(first) == num_train and set(first.values()) == {1}
    assert first == second
    assert names[:num_train] != names[num_train : 2 * num_train], "the second epoch has its own order"


def test_mixture_weights(config, stage, monkeypatch):
    stage.mixture = ConfigDict({"noto": 3.0, "fluent": 1.0})
    names = shown_names(monkeypatch)
    with loader.train_loader(config, stage, seed=0) as stream:
        take(stream, 20)
    counts = Counter(name.split("/")[0] for name in names)
    assert set(counts) == {"noto", "fluent"}
    assert counts["noto"] / counts["fluent"] == pytest.approx(3, rel=0.15)


def test_source_ids_name_the_source(config, stage):
    stage.mixture = ConfigDict({"openmoji": 1.0})
    with loader.train_loader(config, stage, seed=0) as stream:
        batch = next(stream)
        index = stream.source_names.index("openmoji")
    assert (batch["source_ids"] == np.where(batch["segment_ids"] > 0, index, 0)).all()


def test_processes_together_get_the_rows_of_one(config, stage):
    with loader.train_loader(config, stage, seed=0) as stream:
        whole = take(stream, 3)
    parts = []
    for process in range(2):
        with loader.train_loader(config, stage, seed=0, process_index=process, process_count=2) as stream:
            parts.append(take(stream, 3))
    for batch, first, second in zip(whole, *parts, strict=True):
        assert same(batch, {name: np.concatenate([first[name], second[name]]) for name in batch})
    with pytest.raises(DataError, match="batch_size=4"):
        loader.train_loader(config, stage, seed=0, process_count=3)


def test_eval_batches_show_every_example_once(config, stage, monkeypatch):
    names = shown_names(monkeypatch)
    batches = list(loader.eval_batches(config, stage, "dev"))
    assert sorted(names) == [drawing.id for drawing in loader.read_drawings(config, "dev")]
    assert {batch["tokens"].shape for batch in batches} == {(stage.batch_size, stage.row_tokens)}
    assert all(map(same, batches, loader.eval_batches(config, stage, "dev")))


def test_eval_images_are_on_white(config, stage):
    drawing = loader.read_drawings(config, "dev")[0]
    side = config.model.embed.patch_size * config.model.embed.merge_size
    image = images.flatten(images.decode(drawing.image))
    plan = Resize("neo", side, stage.min_pixels, stage.max_pixels).plan(image.height, image.width)
    pixels = np.asarray(image.resize((plan.width, plan.height), images.Image.Resampling.BICUBIC))
    expected = images.to_patches(pixels, side)
    found = [
        np.array_equal(row[first:][: len(expected)], expected)
        for batch in loader.eval_batches(config, stage, "dev")
        for row, places in zip(batch["patches"], batch["patch_hw"], strict=True)
        for first in np.flatnonzero(~places.any(axis=1))
    ]
    assert any(found)


def test_read_drawings(config):
    drawings = loader.read_drawings(config, "val_combo")
    ids = [drawing.id for drawing in drawings]
    assert ids == sorted(ids)
    drawing = drawings[0]
    assert drawing.id == f"{drawing.source}/{drawing.concept}"
    assert images.decode(drawing.image).size == (config.data.image_size,) * 2
    label, tags = drawing.captions["en"]
    assert label and isinstance(tags, tuple)
    assert Drawing.from_bytes(drawing.to_bytes()) == drawing


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("row_tokens", 40, "exceed row_tokens=40"),
        ("row_patches", 3, "exceed row_patches=3"),
        ("mixture", ConfigDict({"tweemoji": 1.0}), "no source 'tweemoji'.*twemoji"),
        ("mixture", ConfigDict(), "needs a source"),
        ("mixture", ConfigDict({"noto": 1.0, "all": 1.0}), "name it alone"),
        ("loss_reduction", "mean", "loss_reduction 'mean'"),
    ],
)
def test_impossible_stages_fail_before_the_first_batch(config, stage, field, value, message):
    stage[field] = value
    with pytest.raises(DataError, match=message), loader.train_loader(config, stage, seed=0) as stream:
        next(stream)


def test_unknown_split(config, stage):
    with pytest.raises(DataError, match=r"splits are .*val_render"):
        next(iter(loader.eval_batches(config, stage, "test")))


def test_a_drawing_as_text_is_the_words_of_its_caption(config):
    options = Options("captions", "drawings", f"{config.data.path}/dev/*.array_record")
    caption = sources.open_source(options).example(0)
    words = sources.open_source(dataclasses.replace(options, form="text")).example(0)
    assert (len(caption.images), words.images) == (1, ())
    assert words.texts == caption.texts and any(text.supervised for text in words.texts)
