"""HTML from nested calls: everything is escaped and closed because a tree is built, not text."""

import base64
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1d21; --soft: #5b616b; --paper: #ffffff;
  --panel: #f4f5f7; --line: #d8dbe0; --link: #0058a3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ec; --soft: #a5abb5; --paper: #15171b;
  --panel: #1f2227; --line: #3a3f47; --link: #7db8f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 0.4rem; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; }
p { margin: 0.5rem 0; max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: 0.875rem; }
.missing { border-left: 3px solid var(--line); padding-left: 0.7rem; }
.scroll { overflow: auto; max-height: 32rem; }
table { border-collapse: collapse; font-size: 0.875rem; width: max-content; }
th, td { min-width: 4rem; max-width: 18rem; padding: 0.25rem 0.8rem 0.25rem 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
.grid { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.strip { display: flex; gap: 0.8rem; overflow-x: auto; }
.strip figure { flex: 0 0 11rem; }
figure { margin: 0; }
img { display: block; width: 100%; max-width: 36rem; height: auto; }
svg { display: block; width: 100%; max-width: 36rem; height: auto; }
svg text { fill: currentColor; }
pre { background: var(--panel); padding: 0.6rem; margin: 0.4rem 0; overflow-x: auto;
  font-size: 0.8125rem; border-radius: 4px; }
p code { display: inline-block; max-width: 100%; }
.run { white-space: nowrap; }
.swatch { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 2px; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; list-style: none; padding: 0;
  margin: 0.5rem 0; }
"""


def element(tag: str, *children, **attributes: str) -> ElementTree.Element:
    """<tag> with these children: texts, elements, or lists of them; `class_` means class."""
    made = ElementTree.Element(tag, {k.rstrip("_"): v for k, v in attributes.items()})
    for child in _flat(children):
        if not isinstance(child, str):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + child
        else:
            made.text = (made.text or "") + child
    return made


def _flat(children):
    for child in children:
        if isinstance(child, (list, tuple)):
            yield from _flat(child)
        else:
            yield child


def table(head: Sequence, rows: Iterable[Sequence]) -> ElementTree.Element:
    """A table that scrolls by itself if it is wider than the page; a row's first cell heads it."""
    body = [
        element("tr", element("th", first, scope="row"), [element("td", cell) for cell in rest])
        for first, *rest in rows
    ]
    top = element("tr", [element("th", cell, scope="col") for cell in head])
    whole = element("table", element("thead", top), element("tbody", body))
    return element("div", whole, class_="scroll", tabindex="0")


def image(kind: str, content: bytes, alt: str) -> ElementTree.Element:
    """A picture inside the page: its MIME type, its file, and what it shows."""
    data = base64.b64encode(content).decode()
    return element("img", src=f"data:{kind};base64,{data}", alt=alt)


def page(title: str, sections: dict[str, list]) -> str:
    """A whole page: ASCII text, so no reader needs to guess its encoding.

    Args:
      title: of the page.
      sections: {heading: its content}, linked at the top.
    """
    anchors = {heading: heading.lower().replace(" ", "-") for heading in sections}
    links = [element("a", heading, href=f"#{anchor}") for heading, anchor in anchors.items()]
    body = [
        element("section", element("h2", heading, id=anchors[heading]), content)
        for heading, content in sections.items()
    ]
    viewport = "width=device-width, initial-scale=1"
    root = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content=viewport),
            element("title", title),
            element("link", rel="icon", href="data:,"),  # or a browser asks the server for one
            element("style", _STYLE),
        ),
        element("body", element("h1", title), element("nav", links), element("main", body)),
        lang="en",
    )
    text = ElementTree.tostring(root, encoding="us-ascii", method="html").decode()
    return f"<!DOCTYPE html>\n{text}\n"
