"""The quickstart's record: a drawing with captions in many languages, an Example in each of them."""

import dataclasses
from collections.abc import Mapping

import msgpack

from data_pipelines import text
from data_pipelines.errors import Reject
from data_pipelines.schema import Example, Image, Text

Caption = tuple[str, tuple[str, ...]]  # label, tags


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One image and its captions, as stored in a record."""

    id: str  # "source/concept"
    source: str
    concept: str  # lower-case codepoints joined by "-"
    image: bytes  # encoded image file, RGBA
    captions: Mapping[str, Caption]  # by locale

    def example(self, locale: str) -> Example:
        """The picture, the prompt of `locale` and its caption, which is supervised."""
        label, tags = self.captions[locale]
        caption = [Text(piece, supervised=True) for piece in text.caption_pieces(label, tags)]
        return Example(self.id, self.source, (Image(self.image), Text(text.prompt_text(locale)), *caption))

    def to_bytes(self) -> bytes:
        """Serialises to msgpack; equal drawings give equal bytes."""
        captions = {k: [label, list(tags)] for k, (label, tags) in sorted(self.captions.items())}
        return msgpack.packb([self.id, self.source, self.concept, self.image, captions])

    @classmethod
    def from_bytes(cls, record: bytes) -> "Drawing":
        """Reads a record back. Raises Reject("bad_record") if it is no Drawing."""
        try:
            id_, source, concept, image, captions = msgpack.unpackb(record)
            captions = {locale: (label, tuple(tags)) for locale, (label, tags) in captions.items()}
        except (ValueError, TypeError, AttributeError, msgpack.UnpackException) as error:
            raise Reject("bad_record", f"{len(record)} bytes that are not a Drawing: {error}") from error
        return cls(id_, source, concept, image, captions)
