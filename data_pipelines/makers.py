"""From a raw record to documents: by a config's rules for any source, by its own for the drawings."""

import dataclasses
from typing import Any

import numpy as np

from data_pipelines import pack, text
from data_pipelines.dataset import Data
from data_pipelines.documents import DocumentRules
from data_pipelines.drawing import Drawing
from data_pipelines.errors import DataError
from data_pipelines.overlong import POLICIES
from data_pipelines.pack import Budgets
from data_pipelines.schema import Document, Example
from data_pipelines.sources import Source
from data_pipelines.sources.drawings import DrawingSource


@dataclasses.dataclass(frozen=True)
class ExampleMaker:
    """Documents of the records of one source.

    Attributes:
        source: gives an Example for a raw record.
        source_id: its number in `source_ids`.
        rules: template, layout, resize, limits.
        policy: one of POLICIES, for documents that no row holds.
        budgets: of a row.
        augment: draw background and framing of images.
    """

    source: Source
    source_id: int
    rules: DocumentRules
    policy: str
    budgets: Budgets
    augment: bool

    def for_training(self, raw: Any, id_: str, rng: np.random.Generator) -> list[Document]:
        """Raises Reject."""
        seed = int(rng.integers(2**63)) if self.augment else None
        return self._documents(self.source.to_example(raw, id_), seed)

    def for_evaluation(self, raw: Any, id_: str, index: int) -> list[Document]:
        """No augmentation. Raises Reject."""
        return self._documents(self.source.to_example(raw, id_), None)

    def _documents(self, example: Example, seed: int | None) -> list[Document]:
        def build(one: Example, max_pixels: int | None) -> Document:
            rng = None if seed is None else np.random.default_rng(seed)
            return self.rules.document(one, source_id=self.source_id, max_pixels=max_pixels, rng=rng)

        made = POLICIES[self.policy](example, build, self.budgets, self.rules.resize.side)
        if len(made) > 1:
            # Its parts lie in rows of different batches: a damaged image is found before any is served, so
            # that a record is either served or rejected, once. They are decoded again when rows are laid out.
            for document in made:
                if len(document.patch_hw):
                    document.load_patches()
        return made


@dataclasses.dataclass(frozen=True)
class DrawingMaker:
    """Documents of the quickstart's drawings; a language is drawn, and how its caption is learnt."""

    source_id: int
    rules: DocumentRules
    locales: tuple[str, ...]
    augment: bool
    tags_share: float
    parallel_share: float

    def for_training(self, raw: bytes, id_: str, rng: np.random.Generator) -> list[Document]:
        """Draws the caption's language and form and, if the config augments, background and framing."""
        drawing = Drawing.from_bytes(raw)
        locales = self._locales_of(drawing)
        locale = locales[rng.integers(len(locales))]
        seed = int(rng.integers(2**63)) if self.augment else None
        whole, parallel = rng.random() < self.tags_share, rng.random() < self.parallel_share
        return [self._document(drawing, locale, seed, whole=whole, parallel=parallel)]

    def for_evaluation(self, raw: bytes, id_: str, index: int) -> list[Document]:
        """No augmentation; the languages take turns."""
        drawing = Drawing.from_bytes(raw)
        locales = self._locales_of(drawing)
        return [self._document(drawing, locales[index % len(locales)], None, whole=True, parallel=False)]

    def _locales_of(self, drawing: Drawing) -> list[str]:
        locales = [locale for locale in self.locales if locale in drawing.captions]
        if not locales:
            raise DataError(f"{drawing.id}: no caption in config.data.locales {self.locales}")
        return locales

    def _document(
        self, drawing: Drawing, locale: str, augment_seed: int | None, *, whole: bool, parallel: bool
    ) -> Document:
        label, tags = drawing.captions[locale]
        return text.caption_document(
            self.rules.tokenizer,
            self.rules.picture(drawing.image, drawing.id, augment_seed=augment_seed),
            locale,
            label,
            tags,
            reduction=self.rules.reduction,
            source_id=self.source_id,
            name=drawing.id,
            whole=whole,
            parallel=parallel,
            layout=self.rules.layout,
            coords=self.rules.coords,
            delta=self.rules.delta,
        )


Maker = ExampleMaker | DrawingMaker


def make_makers(config: Any, stage: Any, data: Data, sources: dict[str, Source]) -> dict[str, Maker]:
    """A maker for each source. Raises DataError if the longest drawing could not be packed."""
    rules = DocumentRules.from_config(config, stage, data.tokenizer)
    budgets = row_budgets(config, stage)
    makers: dict[str, Maker] = {}
    for name, source in sources.items():
        source_id = data.source_names.index(name)
        if isinstance(source, DrawingSource) and data.manifest is not None:
            _check_drawings(config, rules, budgets, data.manifest)
            makers[name] = DrawingMaker(
                source_id,
                rules,
                tuple(config.data.locales),
                config.data.augment,
                stage.tags_share,
                stage.parallel_share,
            )
        else:
            own = dataclasses.replace(rules, template=data.templates[name] or rules.template)
            policy, augment = config.data.overlong, config.data.augment
            makers[name] = ExampleMaker(source, source_id, own, policy, budgets, augment)
    return makers


def row_budgets(config: Any, stage: Any) -> Budgets:
    """What a row of a stage holds at most."""
    return pack.row_budgets(stage.row_tokens, stage.row_patches, config.model.route.visual_share)


def _check_drawings(config: Any, rules: DocumentRules, budgets: Budgets, manifest: dict[str, Any]) -> None:
    """Raises DataError if the longest document of the quickstart's data could not be packed."""
    built, locales = manifest["tokens"]["text_tokens"], config.data.locales
    if unknown := [locale for locale in locales if locale not in built]:
        raise DataError(f"config.data.locales: no captions in {unknown}; the data has {sorted(built)}")
    plan = rules.resize.plan(*manifest["image_hw"])
    patches = plan.rows * plan.cols * plan.num_grids
    words = max(built[locale]["max"] for locale in locales) + 2  # <img> and </img>
    sizes = {"tokens": words + patches, "patches": patches, "visual": patches, "text": words}
    pack.check_fits("the longest document", sizes, budgets)
