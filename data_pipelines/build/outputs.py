"""What a record of the output is: a document, or a packed row."""

import dataclasses
import functools
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from data_pipelines import images, pack, rows, text
from data_pipelines.build.filters import text_of
from data_pipelines.build.items import Kept, Rejected
from data_pipelines.build.statistics import Statistics
from data_pipelines.documents import DocumentRules, resize_from_config
from data_pipelines.errors import Reject
from data_pipelines.records import to_bytes
from data_pipelines.resize import Resize
from data_pipelines.schema import Document, Example


class Writing(Protocol):
    """The making of one shard."""

    statistics: Statistics
    rejects: list[Rejected]

    def records(self, kept: Iterable[Kept]) -> Iterator[bytes]:
        """Yields the shard's records; what cannot be one goes to `rejects`."""


class Form(Protocol):
    """A form of output: a frozen dataclass with a `form`, "examples" or "rows"."""

    form: str

    def start(self, tokenizer_json: str, sources: list[str]) -> Writing:
        """Begins a shard."""

    def describe(self) -> dict[str, Any]:
        """What a reader of the shards must know, for the manifest."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """One record per document, `Example.to_bytes`: packed while training, one set of shards per source."""

    form = "examples"

    def start(self, tokenizer_json: str, sources: list[str]) -> Writing:
        return _ExampleWriting(tokenizer_of(tokenizer_json))

    def describe(self) -> dict[str, Any]:
        return {}


class _ExampleWriting:
    def __init__(self, tokenizer: text.Tokenizer):
        self._tokenizer = tokenizer
        self.statistics, self.rejects = Statistics(), []  # type: Statistics, list[Rejected]

    def records(self, kept: Iterable[Kept]) -> Iterator[bytes]:
        for one in kept:
            try:
                observe(self.statistics, one.example)
            except Reject as reject:  # an image that no stage looked at
                self.rejects.append(rejected(one, reject))
                continue
            num_tokens = len(self._tokenizer.encode(text_of(one.example)))
            self.statistics.count("text_tokens", num_tokens)
            self.statistics.observe("text_tokens", num_tokens)
            yield to_bytes(one.example)


def rejected(one: Kept, reject: Reject) -> Rejected:
    """A record that a shard cannot hold."""
    return Rejected(one.place, one.example.id, one.example.source, reject.reason, str(reject))


def observe(statistics: Statistics, example: Example) -> None:
    """Counts a document and the sizes of its images as they are stored. Raises Reject if one is no image."""
    sizes = [images.open_image(image.data, example.id).size for image in example.images]
    statistics.count("documents")
    statistics.count("images", len(sizes))
    for width, height in sizes:
        statistics.observe("image_aspect", width / height)
        statistics.observe("image_pixels", width * height)


@functools.lru_cache(maxsize=1)
def tokenizer_of(tokenizer_json: str) -> text.Tokenizer:
    """The tokenizer of a tokenizer.json's content."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(tokenizer_json)
        file.flush()
        return text.Tokenizer(file.name)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows packed now, `rows.to_record`: the fields are those of a config and of one of its stages."""

    row_tokens: int
    row_patches: int
    resize: Resize
    limits: images.Limits = images.Limits()  # noqa: RUF009, a frozen value
    template: str = "chatml"
    layout: str = "neo"
    coords: str = "thw"
    delta: float = 1.0
    reduction: str = "token"
    number_images: bool = False
    form = "rows"

    @classmethod
    def from_config(cls, config: Any, stage: Any) -> "Rows":
        """The rows that a stage of a config would train on."""
        data, coords = config.data, config.model.coords
        return cls(
            row_tokens=stage.row_tokens,
            row_patches=stage.row_patches,
            resize=resize_from_config(config, stage),
            limits=images.Limits(
                data.max_image_pixels, data.max_image_bytes, data.min_image_side, data.max_aspect
            ),
            template=data.template,
            layout=data.layout,
            coords=coords.kind,
            delta=coords.delta,
            reduction=stage.loss_reduction,
            number_images=data.number_images,
        )

    def start(self, tokenizer_json: str, sources: list[str]) -> Writing:
        return _RowWriting(self, tokenizer_of(tokenizer_json), sources)

    def describe(self) -> dict[str, Any]:
        return {"rows": self.shape.to_json()}

    @property
    def shape(self) -> rows.RowShape:
        return rows.RowShape(self.row_tokens, self.row_patches, self.resize, self.limits)


class _RowWriting:
    def __init__(self, output: Rows, tokenizer: text.Tokenizer, sources: list[str]):
        self._output, self._sources = output, sources
        self._rules = DocumentRules(
            tokenizer,
            output.resize,
            limits=output.limits,
            template=output.template,
            layout=output.layout,
            coords=output.coords,
            delta=output.delta,
            reduction=output.reduction,
            number_images=output.number_images,
        )
        self.statistics, self.rejects = Statistics(), []  # type: Statistics, list[Rejected]

    def records(self, kept: Iterable[Kept]) -> Iterator[bytes]:
        documents: list[Document] = []
        files: dict[int, list[rows.RowImage]] = {}
        for one in kept:
            example = one.example
            try:
                document = self._document(example)
            except Reject as reject:
                self.rejects.append(rejected(one, reject))
                continue
            observe(self.statistics, example)
            for name, values in (("tokens", document.tokens), ("patches", document.patch_hw)):
                self.statistics.count(name, len(values))
                self.statistics.observe(name, len(values))
            documents.append(document)
            to = self._output.resize.for_images(len(example.images))
            files[id(document)] = [rows.RowImage(image.data, to.max_pixels) for image in example.images]
        budgets = pack.row_budgets(self._output.row_tokens, self._output.row_patches)
        for row in pack.pack_rows(documents, budgets):
            self.statistics.count("rows")
            images_of_row = [image for document in row for image in files[id(document)]]
            yield rows.to_record(row, images_of_row, self._output.shape)

    def _document(self, example: Example) -> Document:
        """Raises Reject for what cannot be a document, does not fit into a row, or cannot be decoded."""
        document = self._rules.document(example, source_id=self._sources.index(example.source))
        for size, budget, reason, noun in (
            (len(document.tokens), self._output.row_tokens, "too_long", "tokens"),
            (len(document.patch_hw), self._output.row_patches, "too_many_patches", "image tokens"),
        ):
            if size > budget:
                raise Reject(reason, f"{size} {noun}, a row holds {budget}")
        document.load_patches()  # a row that cannot be decoded would stop a training run
        return document
