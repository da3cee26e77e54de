"""What happens to a document that no row can hold: one policy per run, each of them a pure function."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from data_pipelines import pack, schema
from data_pipelines.errors import Reject
from data_pipelines.pack import Budgets
from data_pipelines.schema import Document, Example, Text

# Example, largest number of pixels of one image (None = what the stage says) -> its document.
Build = Callable[[Example, int | None], Document]

_SHRINKING_STEPS = 12


def reject(example: Example, build: Build, budgets: Budgets, side: int) -> list[Document]:
    """The document as it is; one that exceeds a budget is rejected."""
    document = build(example, None)
    pack.check_fits(example.id, pack.sizes(document), budgets)
    return [document]


def shrink_images(example: Example, build: Build, budgets: Budgets, side: int) -> list[Document]:
    """All its images get smaller, by the same limit on their pixels, until the document fits.

    Rejected if it does not fit even with images of one token, or if its resize rule makes them no smaller.
    """
    document = build(example, None)
    sizes = pack.sizes(document)
    for _ in range(_SHRINKING_STEPS):
        if _fits(sizes, budgets):
            return [document]
        largest = int(np.bincount(document.image_ids[document.kinds == schema.PATCH], minlength=1).max())
        if largest <= 1:
            break
        limit = max(1, math.floor(largest * _room(sizes, budgets))) * side**2
        document = build(example, limit)
        smaller = pack.sizes(document)
        if smaller["patches"] >= sizes["patches"]:
            break
        sizes = smaller
    pack.check_fits(example.id, sizes, budgets)
    return [document]


def split_text(example: Example, build: Build, budgets: Budgets, side: int) -> list[Document]:
    """It becomes several documents, cut behind a text or, within a long one, at white space.

    Every image stays whole, with the text that follows it. Rejected if an image alone exceeds a budget.
    """
    document = build(example, None)
    sizes = pack.sizes(document)
    if _fits(sizes, budgets):
        return [document]
    parts = _parts(example, sizes, min(budgets[key] / sizes[key] for key in budgets if sizes[key]))
    if parts is None:
        pack.check_fits(example.id, sizes, budgets)
    documents: list[Document] = []
    for part in parts or ():
        try:
            documents += split_text(part, build, budgets, side)
        except Reject as error:
            # A part that is nothing but context, such as a question, teaches nothing by itself.
            if error.reason != "no_target" or part.images:
                raise
    if not documents:
        raise Reject("no_target", f"{example.id}: no part of it is supervised")
    return documents


POLICIES: dict[str, Callable[[Example, Build, Budgets, int], list[Document]]] = {
    "reject": reject,
    "shrink_images": shrink_images,
    "split_text": split_text,
}


def _fits(sizes: Mapping[str, int], budgets: Budgets) -> bool:
    return all(sizes[key] <= budget for key, budget in budgets.items())


def _room(sizes: Mapping[str, int], budgets: Budgets) -> float:
    """The share of its visual tokens that a document may keep, judged from its sizes; below 1."""
    other = {"tokens": sizes["text"], "patches": 0, "visual": 0, "text": sizes["text"]}
    shares = [
        (budget - other[key]) / max(1, sizes[key] - other[key])
        for key, budget in budgets.items()
        if key != "text" and sizes[key] > budget
    ]
    return max(0.0, min([0.97, *shares]))


def _parts(example: Example, sizes: Mapping[str, int], share: float) -> tuple[Example, Example] | None:
    """Two documents out of one, the first with about `share` of its tokens, but not more than half of them.

    It is cut behind a text or where a word starts. None if there is no such place.
    """
    per_letter = sizes["text"] / max(1, sum(len(span.text) for span in example.texts))
    per_image = sizes["visual"] / max(1, len(example.images))
    places: list[tuple[float, int, int]] = []  # tokens before it, span, letters of the span before it
    tokens = 0.0
    for i, span in enumerate(example.spans):
        if isinstance(span, Text):
            places += [(tokens + cut * per_letter, i, cut) for cut in _word_starts(span.text)]
            tokens += len(span.text) * per_letter
            if i + 1 < len(example.spans):
                places.append((tokens, i, len(span.text)))
        else:
            tokens += per_image
    if not places:
        return None
    wanted = tokens * min(0.95 * share, 0.5)
    _, i, cut = min(places, key=lambda place: abs(place[0] - wanted))
    span = example.spans[i]
    assert isinstance(span, Text)
    before = [*example.spans[:i], dataclasses.replace(span, text=span.text[:cut])]
    rest = [dataclasses.replace(span, text=span.text[cut:])] if cut < len(span.text) else []
    after = [*rest, *example.spans[i + 1 :]]
    return dataclasses.replace(example, spans=tuple(before)), dataclasses.replace(example, spans=tuple(after))


def _word_starts(text: str) -> list[int]:
    """Where words start, but for the first letter."""
    return [i for i in range(1, len(text)) if text[i - 1].isspace() and not text[i].isspace()]
