"""Rule filters: each stage takes an Example and returns it, or raises Reject with a reason.

The rules are those of the published web corpora, every threshold a field: ALIGN (Jia et al. 2021, section 3:
image size and aspect, length of the text), LAION-400M (Schuhmann et al. 2021: bytes of the image, characters
of the text, language) and Gopher (Rae et al. 2021, table A1: repetition).
"""

import collections
import dataclasses
import functools
import re
from typing import Any, Protocol

from data_pipelines import images
from data_pipelines.errors import DataError, Reject
from data_pipelines.schema import Example

WORD = re.compile(r"\w+")


class Stage(Protocol):
    """A pure step of a build: a frozen dataclass whose fields are recorded and go into the recipe's hash."""

    def __call__(self, example: Example) -> Example:
        """Returns the example, changed or not. Raises Reject to leave it out."""


@dataclasses.dataclass(frozen=True)
class TextLength:
    """Rejects texts outside the limits ("text_length"); white space at both ends does not count."""

    min_chars: int = 5  # LAION
    max_chars: int = 1_000_000
    min_words: int = 1
    max_words: int = 1_000_000
    only_with_images: bool = False  # leave text-only documents alone

    def __call__(self, example: Example) -> Example:
        if self.only_with_images and not example.images:
            return example
        text = text_of(example)
        num_words = len(words(text))
        for number, low, high, noun in (
            (len(text), self.min_chars, self.max_chars, "characters"),
            (num_words, self.min_words, self.max_words, "words"),
        ):
            if not low <= number <= high:
                raise Reject("text_length", f"{number} {noun} are not in {low}..{high}")
        return example


@dataclasses.dataclass(frozen=True)
class ImageSize:
    """Rejects documents with an image outside the limits; reads headers only.

    Reasons: "too_small" (bytes or the shorter side), "too_many_bytes", "bomb" (pixels), "aspect" (longer side
    over shorter), and what `images.read_header` says of a file that is no image.
    """

    min_side: int = 1
    max_aspect: float = images.Limits.max_aspect  # ALIGN: 3
    min_bytes: int = 0  # LAION: 5000
    max_bytes: int = images.Limits.max_bytes
    max_pixels: int = images.Limits.max_pixels

    def __call__(self, example: Example) -> Example:
        limits = images.Limits(self.max_pixels, self.max_bytes, self.min_side, self.max_aspect)
        for image in example.images:
            images.read_header(image.data, limits=limits)
            if len(image.data) < self.min_bytes:
                raise Reject("too_small", f"an image of {len(image.data)} bytes: less than {self.min_bytes}")
        return example


@dataclasses.dataclass(frozen=True)
class Decodable:
    """Decodes every image once, so that damaged files are counted here and not in a training run."""

    def __call__(self, example: Example) -> Example:
        for image in example.images:
            images.decode(image.data)
        return example


@dataclasses.dataclass(frozen=True)
class Language:
    """Rejects texts that py3langid finds in none of `languages` ("language").

    Args:
        languages: two-letter codes.
        min_probability: of the language found; below it the text counts as of no language.
        min_chars: shorter texts pass: nobody can tell the language of "Opel Corsa 1.2".
    """

    languages: tuple[str, ...]
    min_probability: float = 0.5
    min_chars: int = 20

    def __call__(self, example: Example) -> Example:
        text = text_of(example)
        if len(text) < self.min_chars:
            return example
        language, probability = _identifier().classify(text)
        if language not in self.languages or probability < self.min_probability:
            wanted = ", ".join(self.languages)
            raise Reject("language", f"{language} with probability {probability:.2f}, wanted {wanted}")
        return example


@dataclasses.dataclass(frozen=True)
class Repetition:
    """Rejects texts that repeat themselves ("repetition"), by Gopher's measures.

    Args:
        max_line_share: share of lines that occurred before.
        max_word_share: share of words that are the commonest one; of texts of `min_words` words or more.
        max_gram_share: share of characters in the commonest run of `gram` words, if it occurs more than once.
        gram: words in a run.
        min_words: shorter texts are not measured.
    """

    max_line_share: float = 0.3
    max_word_share: float = 0.4
    max_gram_share: float = 0.3
    gram: int = 2
    min_words: int = 10

    def __call__(self, example: Example) -> Example:
        text = text_of(example)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        all_words = words(text)
        if len(all_words) < self.min_words:
            return example
        self._check("lines that occurred before", 1 - len(set(lines)) / len(lines), self.max_line_share)
        _, most = collections.Counter(all_words).most_common(1)[0]
        self._check("words that are the same", most / len(all_words), self.max_word_share)
        grams = collections.Counter(zip(*(all_words[i:] for i in range(self.gram)), strict=False))
        run, times = max(grams.items(), key=lambda item: (item[1] * len("".join(item[0])), item[0]))
        share = times * len("".join(run)) / len("".join(all_words)) if times > 1 else 0.0
        self._check(f"characters in one run of {self.gram} words", share, self.max_gram_share)
        return example

    def _check(self, what: str, share: float, limit: float) -> None:
        if share > limit:
            raise Reject("repetition", f"{share:.0%} {what}, more than {limit:.0%}")


@dataclasses.dataclass(frozen=True)
class NotEmpty:
    """Rejects documents without text ("empty_text"), and with `needs_image` those without image ("empty")."""

    needs_image: bool = False

    def __call__(self, example: Example) -> Example:
        if not text_of(example):
            raise Reject("empty_text", "no text, or nothing but white space")
        if self.needs_image and not example.images:
            raise Reject("empty", "no image")
        return example


def text_of(example: Example) -> str:
    """All text of a document, one line per span, without white space at both ends."""
    return "\n".join(span.text for span in example.texts).strip()


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return WORD.findall(text.lower())


@functools.cache
def _identifier() -> Any:
    """py3langid's model, read once per process."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DataError(
            "the filter Language needs py3langid: install the extra `build` (pip install -e '.[build]')"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
