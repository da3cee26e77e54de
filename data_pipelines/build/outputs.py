"""What a record of the output is: a document, or a packed row."""

import dataclasses
import functools
import os
import runpy
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from data_pipelines import images, pack, rows, text
from data_pipelines.build.filters import text_of
from data_pipelines.build.items import Kept, Rejected, as_json
from data_pipelines.build.statistics import Statistics
from data_pipelines.documents import DocumentRules, resize_from_config, table_rules
from data_pipelines.errors import DataError, Reject, running
from data_pipelines.overlong import POLICIES
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


def observe(statistics: Statistics, example: Example, documents: int = 1) -> None:
    """Counts an example's documents and the sizes of its images, upright.

    Raises Reject if one is no image.
    """
    headers = [images.read_header(image.data, example.id) for image in example.images]
    statistics.count("documents", documents)
    statistics.count("images", len(headers))
    for header in headers:
        statistics.observe("image_aspect", header.width / header.height)
        statistics.observe("image_pixels", header.width * header.height)


@functools.lru_cache(maxsize=1)
def tokenizer_of(tokenizer_json: str, special_tokens: tuple[str, ...] = ()) -> text.Tokenizer:
    """The tokenizer of a tokenizer.json's content."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(tokenizer_json)
        file.flush()
        return text.Tokenizer(file.name, special_tokens)


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
    special_tokens: tuple[str, ...] = ()
    visual_share: float = 0.0
    overlong: str = "reject"
    form = "rows"

    @classmethod
    def from_config(cls, config: Any, stage: Any) -> "Rows":
        """The rows that a stage of a config would train on."""
        data = config.data
        return cls(
            row_tokens=stage.row_tokens,
            row_patches=stage.row_patches,
            resize=resize_from_config(config, stage),
            limits=images.Limits(
                data.max_image_pixels, data.max_image_bytes, data.min_image_side, data.max_aspect
            ),
            template=stage.template or data.template,
            **table_rules(config, stage),
            reduction=stage.loss_reduction,
            number_images=data.number_images,
            special_tokens=tuple(data.special_tokens),
            visual_share=config.model.route.visual_share,
            overlong=data.overlong,
        )

    @classmethod
    def from_config_file(cls, config_file: str, stage: str | None = None) -> "Rows":
        """The same by FILE.py[:ARG] and the stage's name, the last stage by default.

        Raises DataError if it is no config.
        """
        path, _, arg = config_file.partition(":")
        if not os.path.isfile(path):
            raise DataError(f"{path}: no such file")
        with running(path):
            defined = runpy.run_path(path)
            if "get_config" not in defined:
                raise DataError(f"{path}: has no function get_config()")
            config = defined["get_config"](arg) if arg else defined["get_config"]()
        try:
            return cls.from_config(config, config.stage[stage or config.stages[-1]])
        except (KeyError, AttributeError, ValueError) as error:
            raise DataError(f"{config_file}: not a config, or it has no stage {stage}: {error}") from error

    def start(self, tokenizer_json: str, sources: list[str]) -> Writing:
        return _RowWriting(self, tokenizer_of(tokenizer_json, self.special_tokens), sources)

    def describe(self) -> dict[str, Any]:
        return {"rows": self.shape.to_json()}

    def to_json(self) -> dict[str, Any]:
        """The fields, as a recipe's description has them."""
        return as_json(self)

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
        self._budgets = pack.row_budgets(output.row_tokens, output.row_patches, output.visual_share)
        self._files: dict[int, list[rows.RowImage]] = {}  # id() of a document -> its images
        self.statistics, self.rejects = Statistics(), []  # type: Statistics, list[Rejected]

    def records(self, kept: Iterable[Kept]) -> Iterator[bytes]:
        documents: list[Document] = []
        for one in kept:
            try:
                made = self._documents(one.example)
            except Reject as reject:
                self.rejects.append(rejected(one, reject))
                continue
            observe(self.statistics, one.example, len(made))
            for document in made:
                for name, values in (("tokens", document.tokens), ("patches", document.patch_hw)):
                    self.statistics.count(name, len(values))
                    self.statistics.observe(name, len(values))
            documents += made
        for row in pack.pack_rows(documents, self._budgets):
            self.statistics.count("rows")
            images_of_row = [image for document in row for image in self._files[id(document)]]
            yield rows.to_record(row, images_of_row, self._output.shape)

    def _documents(self, example: Example) -> list[Document]:
        """Raises Reject for what cannot be a document, does not fit into a row, or cannot be decoded."""
        source_id = self._sources.index(example.source)
        drafts: list[tuple[Document, list[rows.RowImage]]] = []

        def build(part: Example, max_pixels: int | None) -> Document:
            document = self._rules.document(part, source_id=source_id, max_pixels=max_pixels)
            to = self._output.resize
            to = to if max_pixels is None else to.with_max_pixels(max_pixels)
            to = to.for_images(len(part.images))
            drafts.append((document, [rows.RowImage(image.data, to.max_pixels) for image in part.images]))
            return document

        made = POLICIES[self._output.overlong](example, build, self._budgets, self._output.resize.side)
        files = {id(document): images_ for document, images_ in drafts}
        for document in made:
            if len(document.patch_hw):
                document.load_patches()  # a row that cannot be decoded would stop a training run
            self._files[id(document)] = files[id(document)]
        return made
