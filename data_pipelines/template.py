"""From spans of text and images to pieces of a document: what each family writes around them, what it learns.

A template decides the words, the special tokens and what is supervised; how a picture itself looks in the
token table is its layout's affair. Pieces are tokenised one by one where the family does so.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.errors import Reject
from data_pipelines.schema import Image, Span, Text

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
BOS, EOS = "<s>", "</s>"
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
INTERNVL_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of a document, tokenised on its own, so that its borders are token borders."""

    text: str
    supervised: bool = False
    special: bool = False  # `text` is the name of one special token
    joined: bool = False  # tokenised in one go with the piece before: a token goes where its last letter is
    separator: bool = False  # only separates documents of a row: left out where the document opens the row


IMAGE = Piece("<image>", special=True)  # the next picture


@dataclasses.dataclass
class Turn:
    """What one role says: consecutive texts of one role and one `supervised`, and the images among them."""

    role: str  # "system", "user" or "assistant"
    supervised: bool
    spans: list[Span]

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans if isinstance(span, Text))

    @property
    def num_images(self) -> int:
        return sum(isinstance(span, Image) for span in self.spans)


def turns(spans: Sequence[Span]) -> list[Turn]:
    """Groups spans into turns.

    Text without a role is the assistant's where it is supervised and the user's elsewhere. An image belongs
    to the user's turn beside it, the one before it first; between two texts of one turn it belongs to that
    turn; else it is a user's turn of its own.
    """
    found: list[Turn] = []
    waiting: list[Span] = []  # images whose turn is not known yet
    for span in spans:
        if isinstance(span, Image):
            if found and found[-1].role == "user":
                found[-1].spans.append(span)
            else:
                waiting.append(span)
            continue
        role = span.role or ("assistant" if span.supervised else "user")
        same = bool(found) and (found[-1].role, found[-1].supervised) == (role, span.supervised)
        if same:
            found[-1].spans += [*waiting, span]
        elif role == "user" or not waiting:
            found.append(Turn(role, span.supervised, [*waiting, span]))
        else:
            found += [Turn("user", False, waiting), Turn(role, span.supervised, [span])]
        waiting = []
    return [*found, Turn("user", False, waiting)] if waiting else found


def with_timestamps(spans: Sequence[Span]) -> list[Span]:
    """Writes "[mm:ss.ff]:" before and a newline after each frame of a video."""
    role = "user" if any(isinstance(span, Text) and span.role for span in spans) else ""
    out: list[Span] = []
    for span in spans:
        if isinstance(span, Image) and span.timestamp is not None:
            minutes, seconds = divmod(round(span.timestamp * 100), 6000)
            out += [
                Text(f"[{minutes:02}:{seconds // 100:02}.{seconds % 100:02}]:", role),
                span,
                Text("\n", role),
            ]
        else:
            out.append(span)
    return out


def with_numbers(spans: Sequence[Span]) -> list[Span]:
    """Writes "Image-1: " before and a newline after each image, if there are several and no video."""
    images = [span for span in spans if isinstance(span, Image)]
    if len(images) < 2 or any(image.timestamp is not None for image in images):
        return list(spans)
    role = "user" if any(isinstance(span, Text) and span.role for span in spans) else ""
    out: list[Span] = []
    number = 0
    for span in spans:
        if isinstance(span, Image):
            number += 1
            out += [Text(f"Image-{number}: ", role), span, Text("\n", role)]
        else:
            out.append(span)
    return out


# Spans, how much each image was shrunk, whether to stop where the assistant would speak -> pieces.
Template = Callable[[Sequence[Span], Sequence[float], bool], list[Piece]]


def plain(spans: Sequence[Span], scales: Sequence[float], prompt: bool) -> list[Piece]:
    """The spans as they are; after the last supervised text comes a supervised <|im_end|>."""
    pieces = [
        IMAGE if isinstance(span, Image) else Piece(span.text, span.supervised and not prompt)
        for span in spans
    ]
    if pieces and pieces[-1].supervised:
        pieces.append(Piece(IM_END, supervised=True, special=True))
    return pieces


def chatml(spans: Sequence[Span], scales: Sequence[float], prompt: bool) -> list[Piece]:
    """NEO: <|im_start|>role, newline, text, <|im_end|>, newline. The assistant's header is not supervised."""
    pieces: list[Piece] = []
    for turn in turns(spans):
        header, words = Piece(f"{turn.role}\n"), _in_place(turn)
        if not turn.supervised and words and not words[0].special:  # the reference tokenises it in one go
            header, words = Piece(header.text + words[0].text), words[1:]
        pieces += [Piece(IM_START, special=True), header, *words]
        pieces += [Piece(IM_END, turn.supervised, special=True), Piece("\n", turn.supervised)]
    return [*pieces, Piece(IM_START, special=True), Piece("assistant\n")] if prompt else pieces


def internlm2(spans: Sequence[Span], scales: Sequence[float], prompt: bool) -> list[Piece]:
    """InternVL's "internlm2-chat": <s>, a system text, turns as in `chatml` without a newline behind them.

    A turn is tokenised in one go, without blanks around its text; the answer and its <|im_end|> are learnt.
    """
    conversation = turns(spans)
    if not conversation or conversation[0].role != "system":
        conversation.insert(0, Turn("system", False, [Text(INTERNVL_SYSTEM)]))
    pieces = [Piece(BOS, special=True)]
    for turn in conversation:
        pieces += [Piece(IM_START, special=True), Piece(f"{turn.role}\n")]
        pieces += _joined(_stripped(_in_place(turn)), turn.supervised)
        pieces.append(Piece(IM_END, turn.supervised, special=True))
    return [*pieces, Piece(IM_START, special=True), Piece("assistant\n")] if prompt else pieces


def vicuna(
    spans: Sequence[Span], scales: Sequence[float], prompt: bool, *, bos: str, end: str
) -> list[Piece]:
    """EVE: a system text, then "USER: question ASSISTANT: answer" and an end token, both of which are learnt.

    A turn's images come first, a newline behind each, except frames of a video, which stay with their times.
    """
    first, *others = turns(spans) or [Turn("user", False, [])]
    system, rest = (first.text, others) if first.role == "system" else (VICUNA_SYSTEM, [first, *others])
    pieces = [Piece(bos, special=True)] if bos else []
    pieces.append(Piece(f"{system} "))
    for turn in rest:
        if turn.role == "assistant":
            pieces.append(Piece("ASSISTANT:", joined=True))
            pieces += _joined([Piece(" "), *_in_place(turn)], turn.supervised)
            pieces.append(Piece(end, turn.supervised, special=True))
        else:
            pieces.append(Piece("USER: ", joined=True))
            pieces += _joined([*_images_first(turn), Piece(" ")], False)
    return [*pieces, Piece("ASSISTANT:", joined=True)] if prompt else pieces


def eve_plain(spans: Sequence[Span], scales: Sequence[float], prompt: bool) -> list[Piece]:
    """EVE's first two stages: <s>, images, caption and newline; only the supervised text is kept."""
    return [Piece(BOS, special=True), *_images(spans), *_caption(_learnt(spans), prompt)]


def evev2_plain(spans: Sequence[Span], scales: Sequence[float], prompt: bool) -> list[Piece]:
    """EVEv2's first two stages: images, the caption without blanks around it, a newline."""
    return [*_images(spans), *_caption(_learnt(spans).strip(), prompt)]


def solo(spans: Sequence[Span], scales: Sequence[float], prompt: bool) -> list[Piece]:
    """SOLO's pre-training: the spans as they are, all text is learnt, a <s> separates documents."""
    spoken = [IMAGE if isinstance(span, Image) else Piece(span.text, not prompt) for span in spans]
    return [Piece(BOS, special=True, separator=True), *spoken]


def solo_sft(spans: Sequence[Span], scales: Sequence[float], prompt: bool) -> list[Piece]:
    """SOLO's instruction tuning: images, <s>, "[INST] question [/INST]", answer, </s>; answers are learnt.

    A system text opens the first question.
    """
    pieces, system = [*_images(spans), Piece(BOS, special=True)], ""
    for turn in turns(spans):
        words = turn.text.strip()
        if turn.role == "system":
            system = f"{words}\n\n"
        elif turn.role == "user":
            pieces.append(Piece(f"[INST] {system}{words} [/INST]"))
            system = ""
        else:
            pieces += [Piece(turn.text, turn.supervised), Piece(EOS, turn.supervised, special=True)]
    return pieces


def fuyu(spans: Sequence[Span], scales: Sequence[float], prompt: bool) -> list[Piece]:
    """Fuyu: images, <s>, prompt, <0x04>, answer, |ENDOFTEXT|; boxes and points follow the image's size."""
    pieces = [*_images(spans), Piece(BOS, special=True)]
    speaking = False
    for turn in turns(spans):
        speaking = turn.role == "assistant"
        if speaking:
            pieces += [Piece("<0x04>", special=True), *_places(turn.text, scales, turn.supervised)]
            pieces.append(Piece("|ENDOFTEXT|", turn.supervised, special=True))
        else:
            pieces += _places(turn.text, scales, False)
    return pieces if speaking and not prompt else [*pieces, Piece("<0x04>", special=True)]


TEMPLATES: dict[str, Template] = {
    "plain": plain,
    "chatml": chatml,
    "internlm2": internlm2,
    "vicuna": functools.partial(vicuna, bos=BOS, end=EOS),
    "eve_plain": eve_plain,
    "evev2": functools.partial(vicuna, bos="", end=IM_END),
    "evev2_plain": evev2_plain,
    "solo": solo,
    "solo_sft": solo_sft,
    "fuyu": fuyu,
}


def _images(spans: Sequence[Span]) -> list[Piece]:
    return [IMAGE for span in spans if isinstance(span, Image)]


def _learnt(spans: Sequence[Span]) -> str:
    return "".join(span.text for span in spans if isinstance(span, Text) and span.supervised)


def _caption(caption: str, prompt: bool) -> list[Piece]:
    return [] if prompt else [Piece(f"{caption}\n", supervised=True)]


def _in_place(turn: Turn) -> list[Piece]:
    """The turn's texts, run together, and its images where they stand."""
    pieces: list[Piece] = []
    for span in turn.spans:
        if isinstance(span, Image):
            pieces.append(IMAGE)
        elif pieces and not pieces[-1].special:
            pieces[-1] = Piece(pieces[-1].text + span.text, turn.supervised)
        else:
            pieces.append(Piece(span.text, turn.supervised))
    return pieces


def _images_first(turn: Turn) -> list[Piece]:
    """The turn's images, a newline behind each, and its text without blanks around it."""
    images = [span for span in turn.spans if isinstance(span, Image)]
    if not images or any(image.timestamp is not None for image in images):
        return _in_place(turn)
    pieces = [piece for _ in images for piece in (IMAGE, Piece("\n"))]
    words = turn.text.strip()
    return [*pieces, Piece(words)] if words else pieces[:-1]


def _stripped(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces of a turn without blanks before the first and behind the last."""
    texts = [piece.text for piece in pieces]
    if texts:
        texts[0] = texts[0].lstrip()
        texts[-1] = texts[-1].rstrip()
    changed = [dataclasses.replace(piece, text=text) for piece, text in zip(pieces, texts, strict=True)]
    return [piece for piece in changed if piece.text]


def _joined(pieces: Sequence[Piece], supervised: bool) -> list[Piece]:
    return [piece if piece.special else Piece(piece.text, supervised, joined=True) for piece in pieces]


_PLACE = re.compile(r"<(box|point)>(.*?)</\1>", re.DOTALL)
_MARKS = {"box": ("<0x00>", "<0x01>", 4), "point": ("<0x02>", "<0x03>", 2)}  # before, after, how many numbers


def _places(text: str, scales: Sequence[float], supervised: bool) -> list[Piece]:
    """<box>y1, x1, y2, x2</box> and <point>x, y</point> become tokens, in halves of resized pixels."""
    if not scales:
        return [Piece(text, supervised)]
    pieces, end = [], 0
    for match in _PLACE.finditer(text):
        if len(scales) > 1:
            raise Reject(
                "bad_place", f"{match[0]!r} in a document of {len(scales)} images: in which of them?"
            )
        opening, closing, count = _MARKS[match[1]]
        try:
            numbers = [float(number) for number in match[2].split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != count:
            raise Reject("bad_place", f"{match[0]!r}: a {match[1]} has {count} numbers")
        # The reference keeps the scale in 32 bits and rounds halves to even.
        scaled = np.round(np.array(numbers) / 2 * float(np.float32(scales[0]))).astype(int)
        pieces.append(Piece(text[end : match.start()], supervised))
        pieces += [Piece(name, supervised, special=True) for name in (opening, *map(str, scaled), closing)]
        end = match.end()
    return [piece for piece in (*pieces, Piece(text[end:], supervised)) if piece.text]
