"""A packed row, drawn from the arrays that the model gets: its strip, its attention mask, its documents."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from data_pipelines import schema, text
from data_pipelines.page.markup import Html, element, image, join

Row = dict[str, np.ndarray]  # the fields of schema.batch_shapes without their leading B

# Colours that keep apart on a light and on a dark page; alpha 0 shows the page.
NOTHING, TEXT_ODD, TEXT_EVEN, IMAGE, IMAGE_AHEAD, PADDING = range(6)
MASK_COLOURS = np.array(
    [
        (0, 0, 0, 0),
        (62, 127, 214, 255),
        (126, 178, 240, 255),
        (240, 170, 60, 255),
        (205, 80, 20, 255),
        (140, 140, 140, 90),
    ],
    np.uint8,
)
MASK_LEGEND = (
    (TEXT_ODD, "the query's own document, up to itself (odd documents)"),
    (TEXT_EVEN, "the same, even documents"),
    (IMAGE, "the query's own image, up to itself"),
    (IMAGE_AHEAD, "the rest of its own image: the only look ahead"),
    (PADDING, "padding: sees only padding, is never trained on"),
)
STRIP_COLOURS = np.array(
    [(140, 140, 140, 90), (126, 178, 240, 255), (240, 170, 60, 255), (47, 158, 106, 255)], np.uint8
)
STRIP_LEGEND = ("padding", "text that is given", "image tokens", "text that is learnt")
# None, odd, even.
DOCUMENT_COLOURS = np.array([(0, 0, 0, 0), (86, 96, 108, 255), (170, 178, 188, 255)], np.uint8)
IMAGE_COLOURS = np.array([(0, 0, 0, 0), (205, 80, 20, 255), (240, 170, 60, 255)], np.uint8)
MAX_PICTURE = 400  # pixels per side; larger pictures are shrunk for the page
MAX_WIDTH = 1024  # pixels; the mask of a longer row is drawn of every n-th token


def mask_figure(row: Row, starts: np.ndarray, ends: np.ndarray) -> Html:
    """The [L, L] mask: queries downwards, keys from left to right, a strip of the row beside each.

    Args:
        row: fields of `schema.batch_shapes` for one row.
        starts, ends: int [L], the keys starts[i] <= j < ends[i] that query i sees.
    """
    real = row["segment_ids"] > 0
    share = (ends - starts)[real].sum() / len(real) ** 2
    num_documents, num_images = int(row["segment_ids"].max()), int(row["image_ids"].max())
    alt = (
        f"Attention mask of a row of {len(real)} tokens: {num_documents} documents as triangles along the "
        f"diagonal, {num_images} images as squares in them, nothing outside"
    )
    shown = np.arange(0, len(real), -(-len(real) // MAX_WIDTH))
    picture = Image.fromarray(MASK_COLOURS[_mask_codes(row, starts, ends, shown)])
    looks_ahead = bool((ends > np.arange(1, len(real) + 1)).any())
    legend = [
        element("li", _swatch(MASK_COLOURS[code]), words)
        for code, words in MASK_LEGEND
        if code != IMAGE_AHEAD or looks_ahead
    ]
    strip = _strip(row)
    down = strip.transpose(Image.Transpose.TRANSPOSE)
    words = (
        f"Line i shows what token i attends: {share:.1%} of the {len(real)} x {len(real)} pairs. Two "
        "integers per token, the first and the last key, say it all. The strips show each token's kind."
    )
    return element(
        "figure",
        element(
            "div",
            image(strip, "The row as keys, from left to right", class_="keys"),
            image(down, "The row as queries, downwards", class_="queries"),
            element("div", image(picture, alt, class_="mask"), _document_names(row)),
            class_="masked",
        ),
        element("figcaption", element("p", words), element("ul", legend, class_="swatches")),
        class_="mask-figure",
    )


def row_figure(row: Row, source_names: list[str], tokenizer: text.Tokenizer, side: int) -> Html:
    """The row's budgets and its documents: pictures rebuilt from `patches`, tokens shaded by loss weight."""
    num_tokens, num_patches = len(row["tokens"]), len(row["patches"])
    used_tokens, used_patches = int((row["segment_ids"] > 0).sum()), int((row["patch_index"] >= 0).sum())
    documents = [
        _document(row, segment, source_names, tokenizer, side)
        for segment in range(1, int(row["segment_ids"].max()) + 1)
    ]
    padding = element(
        "div",
        element("h4", "Padding"),
        element(
            "p",
            f"{num_tokens - used_tokens} of {num_tokens} tokens, "
            f"{num_patches - used_patches} of {num_patches} image tokens",
        ),
        class_="document padding",
    )
    legend = [
        element("li", _swatch(colour), words)
        for colour, words in zip(STRIP_COLOURS, STRIP_LEGEND, strict=True)
    ]
    return element(
        "figure",
        image(
            _bordered_strip(row),
            f"The row as a strip of {num_tokens} tokens, coloured by kind, document and image",
            class_="strip",
        ),
        element("ul", legend, class_="swatches"),
        element(
            "p",
            "Upper band: kinds of tokens. Middle: documents; lower: images; neighbours differ in shade.",
            class_="note",
        ),
        element("div", documents, padding, class_="documents"),
    )


def _document_names(row: Row) -> Iterator[Html]:
    """The number of each document beside its triangle: to the right where there is room, else to the left."""
    length = len(row["segment_ids"])
    for segment in range(1, int(row["segment_ids"].max()) + 1):
        positions = np.flatnonzero(row["segment_ids"] == segment)
        start, end = 100 * positions[0] / length, 100 * (positions[-1] + 1) / length
        class_, left = ("after", end) if end < 75 else ("before", start)
        yield element(
            "span", f"document {segment}", class_=class_, style=f"left:{left:.1f}%;top:{start:.1f}%"
        )


def _mask_codes(row: Row, starts: np.ndarray, ends: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """int [n, n]: which of MASK_COLOURS each pair of the n shown positions gets."""
    segments, images = row["segment_ids"][shown], row["image_ids"][shown]
    same_image = (images[:, None] == images[None]) & (images[:, None] > 0)
    codes = np.where(segments % 2 == 1, TEXT_ODD, TEXT_EVEN)[:, None]
    codes = np.where(same_image, np.where(shown[:, None] < shown[None], IMAGE_AHEAD, IMAGE), codes)
    codes = np.where(segments[:, None] == 0, PADDING, codes)
    allowed = (starts[shown][:, None] <= shown[None]) & (shown[None] < ends[shown][:, None])
    return np.where(allowed, codes, NOTHING)


def _own_weights(row: Row) -> np.ndarray:
    """float32 [L]: the weight with which each token is predicted, at the position before it."""
    return np.append(np.float32(0), row["loss_weights"][:-1])


def _strip(row: Row) -> Image.Image:
    """One pixel per token, in STRIP_COLOURS."""
    kinds = np.select(
        [row["segment_ids"] == 0, row["kinds"] == schema.PATCH, _own_weights(row) > 0], [0, 2, 3], 1
    )
    return Image.fromarray(STRIP_COLOURS[kinds][None])


def _bordered_strip(row: Row) -> Image.Image:
    """`_strip`, and below it where documents and images begin and end."""
    bands = [np.asarray(_strip(row))]
    for field, colours in (("segment_ids", DOCUMENT_COLOURS), ("image_ids", IMAGE_COLOURS)):
        ids = row[field]
        bands.append(colours[np.where(ids > 0, 2 - ids % 2, 0)][None])
    return Image.fromarray(np.concatenate([bands[0], bands[0], *bands[1:]]))


def _document(row: Row, segment: int, source_names: list[str], tokenizer: text.Tokenizer, side: int) -> Html:
    positions = np.flatnonzero(row["segment_ids"] == segment)
    source = source_names[row["source_ids"][positions[0]]]
    num_patches = int((row["patch_index"][positions] >= 0).sum())
    return element(
        "div",
        element("h4", f"Document {segment}"),
        element("p", f"{source}, {len(positions)} tokens, {num_patches} of them image tokens"),
        element("div", _content(row, positions, tokenizer, side), class_="content"),
        class_="document",
    )


def _content(row: Row, positions: np.ndarray, tokenizer: text.Tokenizer, side: int) -> Iterator[Html]:
    """Tokens in order, with one picture in place of each image's tokens."""
    special = tokenizer.special_tokens
    weights, heaviest = _own_weights(row), row["loss_weights"].max()
    shown = 0
    for position in positions:
        number = int(row["image_ids"][position])
        if number == 0:
            token = int(row["tokens"][position])
            words = special.get(token) or tokenizer.decode([token]).replace("\n", "\u21b5")
            weight = weights[position]
            yield element(
                "span",
                words,
                class_="token special" if token in special else "token",
                style=f"--weight:{weight / heaviest:.2f}" if weight else None,
                title=f"position {position}, id {token}, loss weight {weight:.3g}",
            )
        elif number != shown:
            shown = number
            yield _picture(row, number, side)


def _picture(row: Row, number: int, side: int) -> Html:
    """Image `number` of the row, put together again from its patches; tiles one beside the other."""
    patches = row["patch_index"][(row["image_ids"] == number) & (row["patch_index"] >= 0)]
    hw = row["patch_hw"][patches]
    rows, cols = (int(n) for n in hw.max(axis=0) + 1)
    tiles = len(patches) // (rows * cols)
    pixels: np.ndarray = np.zeros((rows, side, tiles, cols, side, 3), np.uint8)
    for i, ((h, w), patch) in enumerate(zip(hw, row["patches"][patches], strict=True)):
        pixels[h, :, i // (rows * cols), w] = patch.reshape(side, side, 3)
    cols *= tiles
    picture = Image.fromarray(pixels.reshape(rows * side, cols * side, 3))
    large = max(picture.size) > MAX_PICTURE
    if large:
        picture.thumbnail((MAX_PICTURE, MAX_PICTURE))
    alt = f"Image {number} of the row, {rows} x {cols} tokens of {side} x {side} pixels"
    grid = element("span", class_="grid", style=f"--rows:{rows};--cols:{cols}")
    return element("span", image(picture, alt, lossless=not large), grid, class_="patches", title=alt)


def _swatch(colour: np.ndarray) -> Html:
    red, green, blue, alpha = (int(value) for value in colour)
    return join(element("i", style=f"background:rgb({red} {green} {blue} / {alpha / 255:.2f})"), " ")
