"""The frame of a page: head, title, links to its sections, footer; style sheet and script inlined."""

from collections.abc import Sequence

from data_pipelines.page.markup import Child, Html, element, join
from data_pipelines.page.style import CSS, SCRIPT


def page(title: str, lead: str, top: Child, sections: Sequence[tuple[str, Child]], footer: Child) -> str:
    """The whole page as text.

    Args:
        title: of the browser's tab, and the first heading.
        lead: one sentence below it.
        top: what comes before the sections.
        sections: (heading, content) each.
        footer: what made the page.
    """
    anchors = [heading.lower().replace(" ", "-") for heading, _ in sections]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(CSS)),
    )
    links = [
        element("a", heading, href=f"#{anchor}")
        for anchor, (heading, _) in zip(anchors, sections, strict=True)
    ]
    body = element(
        "body",
        element(
            "main",
            element(
                "header",
                element("h1", title),
                element("p", lead, class_="lead"),
                element("nav", links, aria_label="Sections"),
            ),
            top,
            [
                element("section", element("h2", heading), content, id=anchor)
                for anchor, (heading, content) in zip(anchors, sections, strict=True)
            ],
        ),
        element("footer", footer),
        element("script", Html(SCRIPT)),
    )
    return join(Html("<!doctype html>\n"), element("html", head, body, lang="en")) + "\n"
