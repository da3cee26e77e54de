"""From an Example to a Document by the rules of a config: resize, template, layout, positions, weights."""

import dataclasses
from typing import Any

import numpy as np

from data_pipelines import text
from data_pipelines.errors import Reject
from data_pipelines.images import DEFAULT_LIMITS, Limits, Picture, make_picture
from data_pipelines.resize import Resize
from data_pipelines.schema import Document, Example, Image, Span
from data_pipelines.template import TEMPLATES, with_numbers, with_timestamps


@dataclasses.dataclass(frozen=True)
class DocumentRules:
    """Everything that decides how an example becomes tokens."""

    tokenizer: text.Tokenizer
    resize: Resize
    limits: Limits = DEFAULT_LIMITS
    template: str = "chatml"  # one of TEMPLATES
    layout: str = "neo"  # one of LAYOUTS
    coords: str = "thw"  # one of POSITIONS
    delta: float = 1.0  # v2pe: how far an image token moves t
    reduction: str = "token"  # see text.reduction_weight
    number_images: bool = False  # "Image-1: " before each of several images

    @classmethod
    def from_config(cls, config: Any, stage: Any, tokenizer: text.Tokenizer) -> "DocumentRules":
        """The rules of one stage of a config."""
        data = config.data
        return cls(
            tokenizer,
            resize_from_config(config, stage),
            limits=Limits(data.max_image_pixels, data.max_image_bytes, data.min_image_side, data.max_aspect),
            template=stage.template or data.template,
            reduction=stage.loss_reduction,
            number_images=data.number_images,
            **table_rules(config, stage),
        )

    def document(
        self,
        example: Example,
        *,
        source_id: int = 0,
        max_pixels: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> Document:
        """The training document of an example.

        Args:
            example: any.
            source_id: index of its data source.
            max_pixels: budget of one picture, for one that would be too long; None = the stage's.
            rng: draws background and framing of each picture; None = white, as it is.

        Raises:
            Reject: "empty", "no_target", or what is wrong with an image as far as headers show.
        """
        if not example.spans:
            raise Reject("empty", f"{example.id}: neither text nor image")
        document = self._build(example, False, source_id, max_pixels, rng)
        if not document.loss_weights.any():
            raise Reject("no_target", f"{example.id}: nothing in it is supervised")
        return document

    def prompt(self, example: Example) -> Document:
        """The example up to where the assistant would speak; nothing is supervised."""
        return self._build(example, True, 0, None, None)

    def picture(
        self, data: bytes, name: str, to: Resize | None = None, augment_seed: int | None = None
    ) -> Picture:
        """One image file by these rules. Raises Reject."""
        return make_picture(data, to or self.resize, name=name, limits=self.limits, augment_seed=augment_seed)

    def _build(
        self,
        example: Example,
        prompt: bool,
        source_id: int,
        max_pixels: int | None,
        rng: np.random.Generator | None,
    ) -> Document:
        to = self.resize if max_pixels is None else self.resize.with_max_pixels(max_pixels)
        to = to.for_images(len(example.images))
        pictures = [
            self.picture(image.data, example.id, to, None if rng is None else int(rng.integers(2**63)))
            for image in example.images
        ]
        spans: list[Span] = [span for span in example.spans if isinstance(span, Image) or span.text]
        spans = with_timestamps(with_numbers(spans) if self.number_images else spans)
        pieces = TEMPLATES[self.template](spans, [picture.scale for picture in pictures], prompt)
        document = text.build_document(
            self.tokenizer,
            pictures,
            pieces,
            layout=self.layout,
            coords=self.coords,
            delta=self.delta,
            reduction=self.reduction,
            source_id=source_id,
            name=example.id,
        )
        return (
            dataclasses.replace(document, loss_weights=np.zeros_like(document.loss_weights))
            if prompt
            else document
        )


def table_rules(config: Any, stage: Any) -> dict[str, Any]:
    """How one stage of a config lays documents out: arguments of text.build_document."""
    coords = config.model.coords
    layout = stage.layout or config.data.layout
    return {"layout": layout, "coords": coords.kind, "delta": coords.delta}


def resize_from_config(config: Any, stage: Any) -> Resize:
    """The resize rule of one stage of a config."""
    data, embed = config.data, config.model.embed
    return Resize(
        data.resize,
        side=embed.patch_size * embed.merge_size,
        min_pixels=stage.min_pixels,
        max_pixels=stage.max_pixels,
        canvas=tuple(data.resize_canvas),
        grid=tuple(data.resize_grid),
        tile=embed.tile_size,
    )
