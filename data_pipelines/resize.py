"""How large a picture becomes and how it is cut into tokens: the rule of each model family.

A rule looks at the size alone, so a document's length is known before any pixel is decoded.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from PIL.Image import Resampling

from data_pipelines.errors import Reject

NEO_MAX_ASPECT = 200  # longer side / shorter side


class Plan(NamedTuple):
    """What to do with one picture: sizes in pixels, grids in tokens."""

    height: int  # resize to height x width ...
    width: int
    rows: (
        int  # ... and cut into this grid of tokens; what a last row or column lacks is padded below and right
    )
    cols: int
    tiles: tuple[int, int] = (1, 1)  # (down, across): first cut into tiles, each of them rows x cols tokens
    thumbnail: bool = False  # the whole picture follows as one more tile

    @property
    def num_grids(self) -> int:
        """Grids of rows x cols tokens that the picture becomes, one after the other."""
        return self.tiles[0] * self.tiles[1] + self.thumbnail


@dataclasses.dataclass(frozen=True)
class Resize:
    """A rule with its numbers. `max_pixels` is what a stage changes and what shrinking a document lowers."""

    rule: str  # one of RESIZES
    side: int  # pixels per side of one token
    min_pixels: int
    max_pixels: int
    canvas: tuple[int, int] = (1080, 1920)  # fuyu: (height, width) whose shape bounds the picture
    grid: tuple[int, int] = (336, 14)  # eve: size of the teacher's picture and of its patches
    tile: int = 448  # internvl: pixels per side of a tile

    def plan(self, height: int, width: int) -> Plan:
        """Raises Reject("aspect") where the family refuses pictures of that shape."""
        return RESIZES[self.rule].plan(height, width, self)

    @property
    def most_tokens(self) -> int:
        """Tokens of a picture that has max_pixels, and of its thumbnail where the rule adds one."""
        tokens, tile = self.max_pixels // self.side**2, (self.tile // self.side) ** 2
        return tokens + tile if RESIZES[self.rule].thumbnail and tokens > tile else tokens

    def for_images(self, num_images: int) -> "Resize":
        """The rule for each of a document's pictures: in NEO, several share twice the budget of one."""
        if num_images < 2 or not RESIZES[self.rule].shared:
            return self
        return self.with_max_pixels(self.max_pixels * 2 // num_images)

    def with_max_pixels(self, max_pixels: int) -> "Resize":
        """The same rule with another upper bound, which never falls below the lower one."""
        return dataclasses.replace(self, max_pixels=max(max_pixels, self.min_pixels))


def neo(height: int, width: int, to: Resize) -> Plan:
    """Sides become multiples of a token, the area one between min_pixels and max_pixels.

    The scale of both bounds comes from the original sizes, so growing to `min_pixels` rounds up and may end
    above `max_pixels`.
    """
    if max(height, width) > NEO_MAX_ASPECT * min(height, width):
        raise Reject("aspect", f"{width}x{height} pixels: more than {NEO_MAX_ASPECT} times as long as wide")
    new_height = max(to.side, to.side * round(height / to.side))
    new_width = max(to.side, to.side * round(width / to.side))
    if new_height * new_width > to.max_pixels:
        scale = math.sqrt(height * width / to.max_pixels)
        new_height = max(to.side, to.side * math.floor(height / scale / to.side))
        new_width = max(to.side, to.side * math.floor(width / scale / to.side))
    elif new_height * new_width < to.min_pixels:
        scale = math.sqrt(to.min_pixels / (height * width))
        new_height = to.side * math.ceil(height * scale / to.side)
        new_width = to.side * math.ceil(width * scale / to.side)
    return _whole(new_height, new_width, to.side)


def solo(height: int, width: int, to: Resize) -> Plan:
    """The longer side grows to whole tokens, up to sqrt(max_pixels); the shorter follows, rounded up."""
    longest = max(to.side, _floor(math.isqrt(to.max_pixels), to.side))
    new_long = min(_ceil(max(height, width), to.side), longest)
    return _follow(height, width, new_long, to.side)


def sail(height: int, width: int, to: Resize) -> Plan:
    """As `solo`, but it is the number of tokens that is bounded: both sides shrink to fit max_pixels."""
    plan = _follow(height, width, _ceil(max(height, width), to.side), to.side)
    excess = plan.height * plan.width / to.max_pixels
    if excess <= 1:
        return plan
    new_height, new_width = (
        max(to.side, int(size / math.sqrt(excess) / to.side) * to.side) for size in (plan.height, plan.width)
    )
    return _whole(new_height, new_width, to.side)


def eve(height: int, width: int, to: Resize) -> Plan:
    """The longer side becomes sqrt(max_pixels), the shorter a multiple of the teacher's patch, scaled alike.

    EVE pastes this on a square of the mean colour and crops its convolution to the picture again. As patches
    do not overlap the square changes nothing: the picture alone becomes tokens.
    """
    per_token = to.side // to.grid[1]  # the teacher's patches, enlarged, are whole tokens
    ratio = max(per_token, _floor(math.isqrt(to.max_pixels) // to.grid[0], per_token))
    new_width, new_height, *_ = eve_band(height, width, to.grid)
    return _whole(new_height * ratio, new_width * ratio, to.side)


def eve_band(height: int, width: int, grid: tuple[int, int]) -> tuple[int, int, int, int, int]:
    """A picture in the teacher's square: width, height, then pixels before, across, after its short side."""
    size, patch = grid
    wide = width > height
    band = math.ceil(size * height / width / patch if wide else size * width / height / patch) * patch
    before = (size - band) // patch // 2 * patch
    new_width, new_height = (size, band) if wide else (band, size)
    return new_width, new_height, before, band, size - before - band


def evev2(height: int, width: int, to: Resize) -> Plan:
    """As EVEv2 trains: shrunk to an area of max_pixels if it is larger, then each side rounded to tokens."""
    scale = max(1.0, math.sqrt(width * height) / math.sqrt(to.max_pixels))
    new_height, new_width = (max(round(size / scale / to.side), 1) * to.side for size in (height, width))
    return _whole(new_height, new_width, to.side)


def evev2_eval(height: int, width: int, to: Resize) -> Plan:
    """As EVEv2 is evaluated: shrunk or enlarged to an area of max_pixels, each side rounded up to tokens."""
    scale = math.sqrt(width * height) / math.sqrt(to.max_pixels)
    new_height, new_width = (
        max(math.ceil(size / scale / to.side) * to.side, to.side) for size in (height, width)
    )
    return _whole(new_height, new_width, to.side)


def fuyu(height: int, width: int, to: Resize) -> Plan:
    """Shrunk into the canvas if it is larger, never resized to whole tokens: their rest is padding.

    The canvas is scaled to an area of max_pixels.
    """
    scale = math.sqrt(to.max_pixels / (to.canvas[0] * to.canvas[1]))
    most_height, most_width = (max(to.side, _floor(int(size * scale), to.side)) for size in to.canvas)
    if height > most_height or width > most_width:
        ratio = min(most_height / height, most_width / width)
        height, width = max(1, int(height * ratio)), max(1, int(width * ratio))
    return Plan(height, width, math.ceil(height / to.side), math.ceil(width / to.side))


def internvl(height: int, width: int, to: Resize) -> Plan:
    """Dynamic tiling: the grid of at most max_pixels of tiles whose shape is nearest, and a thumbnail.

    Of grids equally near, the first by number of tiles wins, and a larger one replaces it only if the picture
    has more than half of its pixels.
    """
    most = max(1, to.max_pixels // to.tile**2)
    aspect, area = width / height, width * height
    best, difference = (1, 1), math.inf
    for across, down in _tile_grids(most):
        found = abs(aspect - across / down)
        if found < difference:
            best, difference = (across, down), found
        elif found == difference and area > 0.5 * to.tile**2 * across * down:
            best = (across, down)
    across, down = best
    cells = to.tile // to.side
    return Plan(down * to.tile, across * to.tile, cells, cells, (down, across), thumbnail=across * down > 1)


def _tile_grids(most: int) -> list[tuple[int, int]]:
    """(across, down) of all grids of 1 to `most` tiles, by number of tiles."""
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


def _whole(height: int, width: int, side: int) -> Plan:
    return Plan(height, width, height // side, width // side)


def _follow(height: int, width: int, new_long: int, side: int) -> Plan:
    """The longer side becomes `new_long`, the shorter keeps the shape and is rounded up to tokens."""
    short, long = sorted((height, width))
    new_short = max(side, _ceil(int(new_long * short / long), side))
    return _whole(*((new_short, new_long) if width >= height else (new_long, new_short)), side)


def _ceil(size: float, side: int) -> int:
    return math.ceil(size / side) * side


def _floor(size: int, side: int) -> int:
    return size // side * side


@dataclasses.dataclass(frozen=True)
class Rule:
    """A family's rule, the filter it resizes with, and the value of padding pixels."""

    plan: Callable[[int, int, Resize], Plan]
    filter: Resampling = Resampling.BICUBIC
    padding: int = 0
    shared: bool = False  # the pictures of one document share a budget of pixels
    thumbnail: bool = False  # pictures of several tiles have one more, the whole picture
    width_first: bool = False  # resize the rows' lengths before their number


RESIZES = {
    "neo": Rule(neo, shared=True, width_first=True),
    "solo": Rule(solo, Resampling.BILINEAR),
    "sail": Rule(sail, Resampling.BILINEAR),
    "eve": Rule(eve),
    "evev2": Rule(evev2),
    "evev2_eval": Rule(evev2_eval),
    "fuyu": Rule(fuyu, Resampling.BILINEAR, padding=1),
    "internvl": Rule(internvl, thumbnail=True),
}
