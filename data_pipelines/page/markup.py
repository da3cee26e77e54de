"""HTML built from Python values. Text that is not `Html` is escaped: data cannot break the page."""

import base64
import html
import io
from collections.abc import Iterable
from typing import TypeAlias

from PIL import Image

VOID = {"img", "meta"}  # written without a closing tag


class Html(str):
    """A string that is markup already."""


Child: TypeAlias = "str | int | float | Iterable[Child] | None"


def element(tag: str, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """`<tag attribute="...">children</tag>`.

    A trailing underscore of an attribute is dropped (`class_`), inner ones become "-" (`data_unit`). None and
    False leave an attribute out, True writes its name only.
    """
    written = "".join(
        f" {_name(key)}" if value is True else f' {_name(key)}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{tag}{written}>" if tag in VOID else f"<{tag}{written}>{join(*children)}</{tag}>")


def join(*children: Child) -> Html:
    """Children one after the other, nested iterables flattened, None left out."""
    return Html("".join(_written(child) for child in children))


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]], caption: str) -> Html:
    """A table whose first column names the row; wider than the page it scrolls by itself."""
    header = element("tr", [element("th", cell, scope="col") for cell in head])
    body = []
    for first, *rest in rows:
        body.append(element("tr", element("th", first, scope="row"), [element("td", cell) for cell in rest]))
    grid = element("table", element("thead", header), element("tbody", body), aria_label=caption)
    return join(element("p", caption, class_="note"), element("div", grid, class_="scroll", tabindex=0))


def image(picture: Image.Image, alt: str, *, lossless: bool = True, **attributes: str | int | None) -> Html:
    """An <img> that carries its pixels in a data URI: PNG, or WebP where small losses do not matter."""
    data = io.BytesIO()
    if lossless:
        picture.save(data, "PNG", optimize=True)
    else:
        picture.save(data, "WEBP", quality=82)
    kind = "png" if lossless else "webp"
    source = f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
    return element("img", src=source, alt=alt, width=picture.width, height=picture.height, **attributes)


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _written(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str | int | float):
        return html.escape(str(child))
    return join(*child)
