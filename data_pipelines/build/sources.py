"""What the quickstart is made of: drawings of one concept in four styles, captions in many languages.

A concept is a Unicode sequence. Its key is the codepoints in lower-case hex without leading zeros and without
the presentation mark fe0f, joined by "-"; every package spells it a little differently.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence

from data_pipelines.build.packages import Package, read_files
from data_pipelines.drawing import Caption
from data_pipelines.errors import DataError

Files = dict[str, bytes]


@dataclasses.dataclass(frozen=True)
class Style:
    """One drawing style: a package and how to get concept -> image file bytes (WebP or SVG) out of it."""

    package: Package
    drawings: Callable[[Files], dict[str, bytes]]
    licence: str
    credit: str


def concept_key(codepoints: str) -> str:
    """Normalises "0023-FE0F-20E3" to "23-20e3"."""
    parts = [part.lstrip("0") for part in codepoints.lower().split("-")]
    return "-".join(part for part in parts if part != "fe0f")


def _named_by_hex(folder: str, suffix: str) -> Callable[[Files], dict[str, bytes]]:
    """Reads packages whose files are named `<folder><hex><suffix>`."""

    def drawings(files: Files) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for path in sorted(files):
            stem = path.removeprefix(folder).removesuffix(suffix)
            if path == f"{folder}{stem}{suffix}" and "/" not in stem:
                found.setdefault(concept_key(stem), files[path])
        return found

    return drawings


def _iconify(files: Files) -> dict[str, bytes]:
    """Reads an icon set: chars.json names a concept's icon, maybe by an alias; icons.json has SVGs."""
    icons = json.loads(files["icons.json"])
    width, height = icons["width"], icons["height"]
    found: dict[str, bytes] = {}
    for codepoints, name in sorted(json.loads(files["chars.json"]).items()):
        while name in icons["aliases"]:
            name = icons["aliases"][name]["parent"]
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icons["icons"][name]["body"]}</svg>'
        )
        found.setdefault(concept_key(codepoints), svg.encode())
    return found


STYLES: dict[str, Style] = {
    "fluent": Style(
        Package(
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        ),
        _named_by_hex("assets/", ".webp"),
        "MIT",
        "Fluent Emoji by Microsoft, packaged by LobeHub",
    ),
    "noto": Style(
        Package(
            "@iconify-json/noto",
            "1.2.9",
            "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        ),
        _iconify,
        "Apache-2.0",
        "Noto Emoji by Google, packaged by Iconify",
    ),
    "twemoji": Style(
        Package(
            "@twemoji/svg",
            "15.0.0",
            "sha512-ZSPef2B6nBaYnfgdTbAy4jgW95o7pi2xPGwGCU+WMTxo7J6B1lMPTWwSq/wTuiMq+N0khQ90CcvYp1wFoQpo/w==",
        ),
        _named_by_hex("", ".svg"),
        "CC-BY-4.0",
        "Twemoji by Twitter, Inc and other contributors",
    ),
    "openmoji": Style(
        Package(
            "openmoji",
            "17.0.0",
            "sha512-EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w==",
        ),
        _named_by_hex("color/svg/", ".svg"),
        "CC-BY-SA-4.0",
        "OpenMoji, the open-source emoji and icon project",
    ),
}

CAPTIONS = Package(
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)
CAPTIONS_CREDIT = {"licence": "MIT", "credit": "Emojibase by Miles Johnson, from Unicode CLDR"}


def read_captions(locales: Sequence[str]) -> dict[str, dict[str, Caption]]:
    """Returns concept -> locale -> caption. A skin-tone variant has its own label and its base's tags.

    Raises DataError if a locale is not in the package.
    """
    files = read_files(CAPTIONS)
    available = sorted(path.split("/")[0] for path in files if path.endswith("/data.json"))
    captions: dict[str, dict[str, Caption]] = {}
    for locale in locales:
        if locale not in available:
            raise DataError(f"locale {locale!r} is not in {CAPTIONS.spec}, which has {', '.join(available)}")
        for entry in json.loads(files[f"{locale}/data.json"]):
            tags = tuple(entry.get("tags", ()))
            for variant in (entry, *entry.get("skins", ())):
                captions.setdefault(concept_key(variant["hexcode"]), {})[locale] = (variant["label"], tags)
    return captions
