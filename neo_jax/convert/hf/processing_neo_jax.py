"""From prompts and pictures to the token table that NeoJaxForConditionalGeneration reads.

The modules imported here from the same folder (documents, layout, resize, ...) are the ones that laid out the
training data, copied when the model was exported: a prompt is tokenised, resized and placed exactly as in
training.
"""

import io
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import torch
from transformers import BatchFeature, ProcessorMixin

from .documents import DocumentRules
from .images import Limits
from .resize import Resize
from .schema import Document, Example, Image, Span, Text
from .text import Tokenizer

IMAGE_MARK = "<image>"
Picture: TypeAlias = PIL.Image.Image | str | bytes


class NeoJaxProcessor(ProcessorMixin):
    """Args:
    tokenizer: the exported tokenizer.
    rules: fields of DocumentRules and, under "resize" and "limits", of those.
    """

    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer: Any = None, rules: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(tokenizer, **kwargs)
        self.rules = rules or {}

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        return_tensors: str = "pt",
        **_: Any,
    ) -> BatchFeature:
        """Prompts of the user, ready to be answered.

        Args:
            text: a prompt or several; "<image>" stands where a picture goes; pictures without a mark come
                first.
            images: pictures of the prompt, or one list of them per prompt: PIL images, file names or bytes.

        Returns:
            input_ids, attention_mask, kinds, image_ids [B, L], coords [B, L, 3], and of all pictures in order
            patches [P, pixels] uint8 and patch_hw [P, 2]. Shorter prompts are padded on the left.
        """
        prompts = [text] if isinstance(text, str) or text is None else list(text)
        if images is None:
            images = [[] for _ in prompts]
        elif not isinstance(images, (list, tuple)):
            images = [[images]]
        elif not images or not isinstance(images[0], (list, tuple)):
            images = [images]
        rules = self._document_rules()
        documents = [
            rules.prompt(Example(f"prompt {number}", "user", _spans(prompt or "", list(pictures))))
            for number, (prompt, pictures) in enumerate(zip(prompts, images, strict=True), start=1)
        ]
        return BatchFeature(_batch(documents), tensor_type=return_tensors)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "kinds", "image_ids", "coords", "patches", "patch_hw"]

    def _document_rules(self) -> DocumentRules:
        rules = dict(self.rules)
        resize = {name: tuple(x) if isinstance(x, list) else x for name, x in rules.pop("resize").items()}
        limits = Limits(**rules.pop("limits"))
        tokenizer = Tokenizer.from_json(self.tokenizer.backend_tokenizer.to_str())
        return DocumentRules(tokenizer, Resize(**resize), limits, **rules)


def _spans(prompt: str, pictures: list[Picture]) -> tuple[Span, ...]:
    """The prompt as spans of the user's turn."""
    if prompt.count(IMAGE_MARK) < len(pictures):
        prompt = IMAGE_MARK * (len(pictures) - prompt.count(IMAGE_MARK)) + prompt
    pieces = prompt.split(IMAGE_MARK)
    if len(pieces) - 1 != len(pictures):
        raise ValueError(f"{len(pieces) - 1} {IMAGE_MARK} marks for {len(pictures)} images")
    spans: list[Span] = [Text(pieces[0], role="user")]
    for picture, piece in zip(pictures, pieces[1:], strict=True):
        spans += [Image(_encoded(picture)), Text(piece, role="user")]
    return tuple(spans)


def _encoded(picture: Picture) -> bytes:
    """An image file, without loss."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str):
        with open(picture, "rb") as file:
            return file.read()
    png = io.BytesIO()
    picture.save(png, "PNG")
    return png.getvalue()


def _batch(documents: Sequence[Document]) -> dict[str, Any]:
    length = max(len(document.tokens) for document in documents)

    def padded(name: str) -> torch.Tensor:
        arrays = [getattr(document, name) for document in documents]
        widths = [[(length - len(array), 0)] + [(0, 0)] * (array.ndim - 1) for array in arrays]
        return torch.from_numpy(np.stack([np.pad(a, w) for a, w in zip(arrays, widths, strict=True)]))

    kinds = padded("kinds").long()
    batch = {
        "input_ids": padded("tokens").long(),
        "attention_mask": (kinds > 0).long(),
        "kinds": kinds,
        "image_ids": padded("image_ids").long(),
        "coords": padded("coords"),
    }
    if any(len(document.patch_hw) for document in documents):
        shown = [document for document in documents if len(document.patch_hw)]
        batch["patches"] = torch.from_numpy(np.concatenate([document.load_patches() for document in shown]))
        batch["patch_hw"] = torch.from_numpy(np.concatenate([document.patch_hw for document in shown])).long()
    return batch
