"""Hooks of mkdocs: links of notebooks lead to pages, every link leads somewhere, nothing is fetched."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mkdocs.exceptions import PluginError


def on_post_page(output: str, page: Any, config: Any) -> str:
    """mkdocs knows links in Markdown; what a notebook's cells say is made by another."""
    if not page.file.src_uri.endswith(".py"):
        return output
    return re.sub(r'(href="(?!https?:)[^"#]*)\.md(["#])', r"\1.html\2", output)


def on_post_build(config: Any) -> None:
    """Reads every page that was built.

    Raises:
        PluginError: a link or picture that leads nowhere, or a script, style or picture of another host.
    """
    root = Path(config["site_dir"])
    pages = {path: _Page(path) for path in root.rglob("*.html")}
    wrong = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its links are those of a site at the root of a host
        for link, loads in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if loads and parts.scheme != "data":
                    wrong.append(f"{path.relative_to(root)}: loads {link[:80]}")
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = to in pages and (not parts.fragment or unquote(parts.fragment) in pages[to].ids)
            if not (there or (to not in pages and to.is_file())):
                wrong.append(f"{path.relative_to(root)}: {link} leads nowhere")
    if wrong:
        raise PluginError("\n".join(wrong))


class _Page(HTMLParser):
    """The links of a page, each with whether a browser loads it by itself, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[tuple[str, bool]] = []
        self.ids: set[str] = {""}
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {str(found[name]) for name in ("id", "name") if found.get(name)}
        if found.get("src"):
            self.links.append((str(found["src"]), True))
        if found.get("href"):
            loads = tag == "link" and found.get("rel") in ("stylesheet", "preload")
            self.links.append((str(found["href"]), loads))
