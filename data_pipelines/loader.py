"""From shards to batches, on Grain.

    records -> shuffle, repeat -> mix -> documents -> pack into rows -> batch -> prefetch

Everything before `batch` handles text and image headers only; pixels are decoded when a batch is laid out. So
replaying the stream after a restart is cheap, and a process of many decodes just its own rows.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

from data_pipelines import build, documents, images, pack, text
from data_pipelines.drawing import Drawing
from data_pipelines.errors import DataError
from data_pipelines.schema import Document

ALL = "all"  # the mixture entry that stands for every source by its size
Batch = dict[str, np.ndarray]


class DocumentMaker:
    """Turns a Drawing into a Document by the rules of a config, a stage and a data folder."""

    def __init__(self, config: Any, stage: Any, manifest: dict[str, Any]):
        if config.data.template != "plain":
            raise DataError(f'config.data.template {config.data.template!r}: the only template is "plain"')
        self.side = config.model.embed.patch_size * config.model.embed.merge_size
        self.patch_dim = self.side**2 * 3
        self.tokenizer = text.Tokenizer(
            Path(config.data.path) / manifest["tokenizer"]["file"], config.data.special_tokens
        )
        self._sources: list[str] = manifest["sources"]
        self._locales = tuple(config.data.locales)
        self._augment = config.data.augment
        self._resize = documents.resize_from_config(config, stage)
        self._table = documents.table_rules(config)
        self._reduction = stage.loss_reduction
        self._tags_share = stage.tags_share
        self._parallel_share = stage.parallel_share
        self._check_budgets(stage, manifest)

    def _check_budgets(self, stage: Any, manifest: dict[str, Any]) -> None:
        """Raises DataError if the longest document of the data could not be packed."""
        built = manifest["tokens"]["text_tokens"]
        if unknown := [locale for locale in self._locales if locale not in built]:
            raise DataError(f"config.data.locales: no captions in {unknown}; the data has {sorted(built)}")
        height, width = manifest["image_hw"]
        plan = self._resize.plan(height, width)
        num_patches = plan.rows * plan.cols * plan.num_grids
        num_text = max(built[locale]["max"] for locale in self._locales)
        num_tokens = num_text + num_patches + 2  # <img> and </img>
        pack.check_fits("the longest document", num_tokens, num_patches, stage.row_tokens, stage.row_patches)

    def for_training(self, drawing: Drawing, rng: np.random.Generator) -> Document:
        """Draws the caption's language and form and, if the config augments, background and framing."""
        locales = self._locales_of(drawing)
        locale = locales[rng.integers(len(locales))]
        seed = int(rng.integers(2**63)) if self._augment else None
        whole, parallel = rng.random() < self._tags_share, rng.random() < self._parallel_share
        return self._document(drawing, locale, seed, whole=whole, parallel=parallel)

    def for_evaluation(self, drawing: Drawing, index: int) -> Document:
        """No augmentation; the languages take turns."""
        locales = self._locales_of(drawing)
        return self._document(drawing, locales[index % len(locales)], None, whole=True, parallel=False)

    def _locales_of(self, drawing: Drawing) -> list[str]:
        locales = [locale for locale in self._locales if locale in drawing.captions]
        if not locales:
            raise DataError(f"{drawing.id}: no caption in config.data.locales {self._locales}")
        return locales

    def _document(
        self, drawing: Drawing, locale: str, augment_seed: int | None, *, whole: bool, parallel: bool
    ) -> Document:
        label, tags = drawing.captions[locale]
        picture = images.make_picture(drawing.image, self._resize, name=drawing.id, augment_seed=augment_seed)
        return text.caption_document(
            self.tokenizer,
            picture,
            locale,
            label,
            tags,
            reduction=self._reduction,
            source_id=self._sources.index(drawing.source),
            name=drawing.id,
            whole=whole,
            parallel=parallel,
            **self._table,
        )


@dataclasses.dataclass(frozen=True)
class _ToPackable:
    """Record and random generator -> what Grain's packer counts, and the document it carries along."""

    make: DocumentMaker

    def __call__(self, record: bytes, rng: np.random.Generator) -> dict[str, Any]:
        document = self.make.for_training(Drawing.from_bytes(record), rng)
        return {"tokens": document.tokens, "patches": document.patch_hw, "documents": document}


class Loader:
    """An endless iterator of training batches with an exact, JSON-able position."""

    def __init__(self, dataset: grain.IterDataset, source_names: list[str], identity: str):
        self.source_names = source_names
        self._iterator: Any = iter(dataset)
        self._identity = identity

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        """Returns the next batch (fields: `schema.batch_shapes`); this process's rows only."""
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch handed out, whatever has been prefetched."""
        return {"identity": self._identity, "position": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position. Raises DataError if it was taken on other data, seed, stage or mixture."""
        if state.get("identity") != self._identity:
            raise DataError("the saved data position is of other data, another seed or other stage settings")
        self._iterator.set_state(state["position"])

    def close(self) -> None:
        """Stops the prefetching thread. There are no batches after this."""
        self._iterator.close()
        self._iterator = iter(())  # Grain's own iterator complains if it lives until Python exits

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def train_loader(
    config: Any, stage: Any, *, seed: int, process_index: int = 0, process_count: int = 1
) -> Loader:
    """Returns the training stream of a stage.

    Order and augmentation are a pure function of `seed` and the position. The rows of all processes together
    do not depend on `process_count`.

    Args:
        config: the whole config.
        stage: the stage's part of it.
        seed: any non-negative integer.
        process_index, process_count: this process gets its share of each batch's rows.

    Raises:
        DataError: if the data cannot be used, the mixture is impossible, or a document exceeds a budget.
    """
    manifest = build.ensure(config.data)
    make = DocumentMaker(config, stage, manifest)
    own_rows = _own_rows(stage.batch_size, process_index, process_count)
    shuffle_seed, document_seed, packing_seed = np.random.SeedSequence(seed).generate_state(3).tolist()

    def lay_out(rows: list[dict[str, Any]]) -> Batch:
        documents = [list(row["documents"]) for row in rows[own_rows]]
        return pack.stack(documents, len(documents), stage.row_tokens, stage.row_patches, make.patch_dim)

    if not stage.mixture or min(stage.mixture.values()) <= 0:
        raise DataError(
            f"stage.mixture {dict(stage.mixture)}: name at least one source, with weights above 0"
        )
    streams = []
    for source in stage.mixture:
        paths = _shard_paths(config, manifest, source)
        records = grain.MapDataset.source(grain.sources.ArrayRecordDataSource(paths))
        if config.data.shuffle:
            records = records.shuffle(shuffle_seed)  # anew in every epoch
        streams.append(records.repeat())
    mixed = grain.MapDataset.mix(streams, list(stage.mixture.values()))
    documents = mixed.random_map(_ToPackable(make), seed=document_seed)
    rows = grain.experimental.BestFitPackIterDataset(
        # No read-ahead here: the whole pipeline runs in the one prefetching thread below.
        documents.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
        length_struct={"tokens": stage.row_tokens, "patches": stage.row_patches},
        num_packing_bins=config.data.packing_bins,
        seed=packing_seed,
        shuffle_bins=config.data.shuffle,
        meta_features=("documents",),
    )
    batches = rows.batch(stage.batch_size, batch_fn=lay_out)
    if config.data.prefetch:
        batches = grain.experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=config.data.prefetch
        )
    return Loader(batches, manifest["sources"], _stream_identity(config, stage, seed, manifest))


def _stream_identity(config: Any, stage: Any, seed: int, manifest: dict[str, Any]) -> str:
    """Returns a hash of all that decides which documents are where in the stream."""
    data, embed = config.data, config.model.embed
    decides = {
        "data_hash": manifest["data_hash"],
        "seed": seed,
        "locales": list(data.locales),
        "mixture": list(stage.mixture.items()),
        "side": embed.patch_size * embed.merge_size,
    }
    decides |= {name: data[name] for name in ("template", "augment", "shuffle", "packing_bins")}
    budgets = ("batch_size", "row_tokens", "row_patches", "min_pixels", "max_pixels")
    decides |= {name: stage[name] for name in budgets}
    return build.json_hash(decides)


def eval_batches(
    config: Any, stage: Any, split: str, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Yields every document of a split once, in batches of stage.batch_size rows; the last has empty rows.

    Stored order, white background, no augmentation. Raises DataError like `train_loader`.
    """
    manifest = build.ensure(config.data)
    make = DocumentMaker(config, stage, manifest)
    own_rows = _own_rows(stage.batch_size, process_index, process_count)
    drawings = _read_split(config, manifest, split)
    documents = [make.for_evaluation(drawing, i) for i, drawing in enumerate(drawings)]
    rows = pack.pack_rows(documents, stage.row_tokens, stage.row_patches)
    num_own = own_rows.stop - own_rows.start
    for start in range(0, len(rows), stage.batch_size):
        part = rows[start : start + stage.batch_size][own_rows]
        yield pack.stack(part, num_own, stage.row_tokens, stage.row_patches, make.patch_dim)


def read_drawings(config: Any, split: str) -> list[Drawing]:
    """Returns every drawing of a split, sorted by id. Raises DataError if the data cannot be used."""
    return _read_split(config, build.ensure(config.data), split)


def _read_split(config: Any, manifest: dict[str, Any], split: str) -> list[Drawing]:
    records = grain.sources.ArrayRecordDataSource(_shard_paths(config, manifest, ALL, split))
    return sorted(
        (Drawing.from_bytes(records[i]) for i in range(len(records))), key=lambda drawing: drawing.id
    )


def _shard_paths(config: Any, manifest: dict[str, Any], source: str, split: str = "train") -> list[str]:
    shards = [
        shard for shard in manifest["shards"] if shard["split"] == split and source in (ALL, shard["source"])
    ]
    if not shards:
        splits = sorted({shard["split"] for shard in manifest["shards"]})
        raise DataError(
            f"{config.data.path} has no source {source!r} in split {split!r}; sources are {ALL}, "
            f"{', '.join(manifest['sources'])}, splits are {', '.join(splits)}"
        )
    return [str(Path(config.data.path) / shard["file"]) for shard in shards]


def _own_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size % process_count:
        raise DataError(f"batch_size={batch_size} is not a multiple of the {process_count} processes")
    n = batch_size // process_count
    return slice(process_index * n, (process_index + 1) * n)
