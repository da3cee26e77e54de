"""How the fields of a record become the spans of a document: one pure function per form.

A field is found by its name, or by a dotted name inside a dict ("json.caption"); the first name that is there
counts. An image is bytes, a dict {"bytes", "path"} as Hugging Face stores it, a path, or a list of these.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_pipelines.errors import Reject
from data_pipelines.images import check_declared
from data_pipelines.schema import Image, Span, Text

IMAGE_FIELDS = ("image", "images", "jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "image_bytes", "img")
TEXT_FIELDS = ("caption", "text", "txt", "TEXT", "json.caption", "json.text")
TURN_FIELDS = ("conversations", "messages", "json.conversations", "json.messages")
QUESTION_FIELDS = ("question", "json.question")
ANSWER_FIELDS = ("answer", "answers", "multiple_choice_answer", "label", "json.answer", "json.answers")
TIME_FIELDS = ("timestamps", "json.timestamps")
RATE_FIELDS = ("fps", "json.fps")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
ROLES |= {"system": "system"}
MARKER = "<image>"  # stands for the next image in the text of a conversation
_FRAME = re.compile(r"(\d+)\.(?:jpe?g|png|webp|avif)")  # a frame in a tar: KEY.0.jpg, KEY.1.jpg

Fields = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Look:
    """Where a record's fields are."""

    images: tuple[str, ...] = IMAGE_FIELDS
    texts: tuple[str, ...] = TEXT_FIELDS
    fetch: Callable[[str], bytes] | None = None  # reads an image by its path; raises Reject("missing_image")

    def find(self, fields: Fields, names: Sequence[str]) -> Any:
        """The first of these fields that there is, or None."""
        for name in names:
            value: Any = fields
            for part in (name,) if name in fields else name.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is not None:
                return value
        return None

    def text(self, fields: Fields, names: Sequence[str]) -> str:
        """The text of a field, stripped. Raises Reject if there is none."""
        return clean(self.find(fields, names))

    def image(self, value: Any, declared: str = "") -> Image:
        """One image, whose field or path (`declared`) may name its format.

        Raises Reject if it is none or cannot be found.
        """
        if isinstance(value, Mapping):
            data, path = value.get("bytes"), value.get("path")
            value, declared = data if data is not None else path, path or declared
        if isinstance(value, str):
            declared = value
            value = value if self.fetch is None else self.fetch(value)
        if value is None or isinstance(value, str):
            raise Reject("missing_image", f"no bytes for image {value!r}")
        if not isinstance(value, bytes | bytearray | memoryview):
            raise Reject("bad_record", f"an image is {type(value).__name__}, not bytes or a path")
        data = bytes(value)
        check_declared(data, declared)
        return Image(data)

    def all_images(self, fields: Fields) -> list[Image]:
        """The record's images, in order; none if it has no such field."""
        for name in self.images:
            value = self.find(fields, (name,))
            if value is not None:
                values = value if isinstance(value, list | tuple) else [value]
                return [self.image(one, name) for one in values]
        return []


def caption(fields: Fields, look: Look) -> list[Span]:
    """Its images, then its text, which is supervised."""
    images = look.all_images(fields)
    if not images:
        raise Reject("missing_image", f"none of the fields {', '.join(look.images)}")
    return [*images, Text(look.text(fields, look.texts), supervised=True)]


def text(fields: Fields, look: Look) -> list[Span]:
    """Its text, all of it supervised."""
    return [Text(look.text(fields, look.texts), supervised=True)]


def interleaved(fields: Fields, look: Look) -> list[Span]:
    """OBELICS: lists `images` and `texts` of one length, where each place holds one of the two."""
    images, texts = look.find(fields, ("images", "json.images")), look.find(fields, ("texts", "json.texts"))
    if not isinstance(images, list | tuple) or not isinstance(texts, list | tuple):
        raise Reject("bad_record", "`images` and `texts` are not both lists")
    if len(images) != len(texts):
        raise Reject("bad_record", f"{len(images)} places in `images`, {len(texts)} in `texts`")
    spans: list[Span] = []
    for image, words in zip(images, texts, strict=True):
        if image is not None:
            spans.append(look.image(image))
        if words is not None and str(words).strip():
            spans.append(Text(clean(words), supervised=True))
    if not spans:
        raise Reject("empty", "no image and no text in `images` and `texts`")
    return spans


def conversation(fields: Fields, look: Look) -> list[Span]:
    """LLaVA's `conversations` or `messages`; <image> in a text is the next image, the answers are supervised.

    Without any <image> the images come first, as in the data of InternVL and NEO.
    """
    turns = look.find(fields, TURN_FIELDS)
    if isinstance(turns, bytes | str):
        turns = parse_json(turns)
    if not isinstance(turns, list | tuple) or not turns:
        raise Reject("bad_turns", f"none of {', '.join(TURN_FIELDS)} is a list of turns")
    images = look.all_images(fields)
    said = [_turn(turn) for turn in turns]
    markers = sum(words.count(MARKER) for _, words in said)
    if markers not in (len(images), 0):
        raise Reject("image_count", f"{markers} {MARKER} markers for {len(images)} images")
    if not any(role == "assistant" for role, _ in said):
        raise Reject("bad_turns", "no answer")
    rest = iter(images)
    spans: list[Span] = [] if markers else list(images)
    for role, words in said:
        pieces = words.split(MARKER)
        for i, piece in enumerate(pieces):
            if piece.strip() or (len(pieces) == 1):
                spans.append(Text(clean(piece), role, supervised=role == "assistant"))
            if i + 1 < len(pieces):
                spans.append(next(rest))
    return spans


def _turn(turn: Any) -> tuple[str, str]:
    """Role and text of a turn {"from", "value"} or {"role", "content"}."""
    if not isinstance(turn, Mapping):
        raise Reject("bad_turns", f"a turn is {type(turn).__name__}, not a dict")
    role = ROLES.get(turn.get("from", turn.get("role")))
    words = turn.get("value", turn.get("content"))
    if role is None or not isinstance(words, str):
        raise Reject("bad_turns", f"a turn without a known role or text: {str(turn)[:80]}")
    return role, words


def vqa(fields: Fields, look: Look) -> list[Span]:
    """Its images, a question, and its answer; of several answers the most frequent, then the first."""
    answer = look.find(fields, ANSWER_FIELDS)
    if isinstance(answer, list | tuple):
        answers = [one.get("answer") if isinstance(one, Mapping) else one for one in answer]
        answer = max(answers, key=answers.count, default=None)
    question = Text(look.text(fields, QUESTION_FIELDS), "user")
    return [*look.all_images(fields), question, Text(clean(answer), "assistant", supervised=True)]


def video(fields: Fields, look: Look) -> list[Span]:
    """Frames with their times in seconds, then a conversation or a caption.

    Frames are the images in order or, in a tar, the members KEY.0.jpg, KEY.1.jpg; times are `timestamps`, or
    follow from `fps`.
    """
    numbered = sorted((int(match[1]), name) for name in fields if (match := _FRAME.fullmatch(str(name))))
    frames = [look.image(fields[name], name) for _, name in numbered] or look.all_images(fields)
    times, rate = look.find(fields, TIME_FIELDS), look.find(fields, RATE_FIELDS)
    if times is None and isinstance(rate, int | float) and rate > 0:
        times = [i / rate for i in range(len(frames))]
    if not isinstance(times, list | tuple) or not frames or len(times) != len(frames):
        raise Reject("bad_record", f"{len(frames)} frames; `timestamps` of that number, or `fps`, is missing")
    try:
        timed: list[Span] = [
            Image(frame.data, float(time)) for frame, time in zip(frames, times, strict=True)
        ]
    except (TypeError, ValueError, OverflowError) as error:
        raise Reject("bad_record", f"`timestamps` or `fps` are no usable numbers: {error}") from error
    if look.find(fields, TURN_FIELDS) is None:
        return [*timed, Text(look.text(fields, look.texts), supervised=True)]
    without_images = Look(images=(), texts=look.texts)
    return [*timed, *conversation(fields, without_images)]


def parse_json(data: bytes | str) -> Any:
    """Raises Reject("bad_json") if it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Reject("bad_json", f"not JSON: {error}") from error


def clean(value: Any) -> str:
    """Text without white space around it. Raises Reject if it is none, or cannot be written as UTF-8."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise Reject("bad_text", f"not UTF-8: {error}") from error
    if value is None or not str(value).strip():
        raise Reject("empty_text", "no text")
    if not isinstance(value, str | int | float):
        raise Reject("bad_record", f"a text is {type(value).__name__}")
    words = str(value).strip()
    try:
        words.encode()
    except UnicodeEncodeError as error:  # half a character, from JSON's \\ud83d
        raise Reject("bad_text", "not UTF-8: half a surrogate pair") from error
    return words


FORMS: dict[str, Callable[[Fields, Look], list[Span]]] = {
    "caption": caption,
    "text": text,
    "interleaved": interleaved,
    "conversation": conversation,
    "vqa": vqa,
    "video": video,
}
