"""Markdown as the site, GitHub and the tests read it: fences, links, anchors, and which file of the repository a page is.

This file needs no package, so that tests read the pages without building the site.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
# Pages of the site that lie outside of docs/, by their path in the repository.
OUTSIDE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
# Where a page says `<!-- made: NAME -->`, the site has what reference.py prints for NAME.
MADE = re.compile(r"^<!-- made: (\w+) -->$", re.MULTILINE)

_FENCE = re.compile(r"^(?P<indent> *)(?P<mark>```+|~~~+)(?P<language>[\w+-]*)[^\n]*$")
_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]\[]*(?:\[[^\]]*\][^\]\[]*)*)\]\((?P<target>[^()\s]+)\)")
_HEADING = re.compile(r"^(#{1,6}) +(.*?)(?: +#+)?$")
_CODE = re.compile(r"(`+)(?:.+?)\1", re.DOTALL)


@dataclass(frozen=True)
class Fence:
    """One block of code. line: of its first line, from 1. before: the last line above it that is not empty."""

    language: str
    text: str
    line: int
    before: str


def fences(text: str) -> Iterator[Fence]:
    """Every fenced block."""
    opened: tuple[str, str, int, str] | None = None
    lines: list[str] = []
    before = ""
    for number, line in enumerate(text.splitlines(), 1):
        match = _FENCE.match(line)
        if opened is None and match:
            opened, lines = (match["mark"], match["language"], number + 1, before), []
        elif opened is not None and line.strip() == opened[0]:
            yield Fence(opened[1], "".join(f"{one}\n" for one in lines), opened[2], opened[3])
            opened = None
        elif opened is not None:
            lines.append(line)
        if line.strip():
            before = line.strip()


def prose(text: str) -> str:
    """The page with its blocks of code empty; as many lines as before."""
    kept: list[str] = []
    mark: str | None = None
    for line in text.splitlines():
        match = _FENCE.match(line)
        if mark is None and match:
            mark = match["mark"]
            kept.append("")
        elif mark is not None:
            mark = None if line.strip() == mark else mark
            kept.append("")
        else:
            kept.append(line)
    return "\n".join(kept) + "\n"


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading; the site is told to give the same."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    plain = re.sub(r"<[^>]+>", "", plain).replace("`", "").replace("*", "")
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """The anchors of a page; a heading that comes twice gets -1, -2, ... as on GitHub."""
    found: dict[str, int] = {}
    every: set[str] = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for line in prose(text).splitlines():
        match = _HEADING.match(line)
        if match:
            name = slug(match[2])
            count = found.get(name, 0)
            found[name] = count + 1
            every.add(f"{name}-{count}" if count else name)
    return every


@dataclass(frozen=True)
class Link:
    """target: a path relative to the page's own, an anchor, or an address."""

    text: str
    target: str
    line: int


def links(text: str) -> Iterator[Link]:
    """Every link and picture, but for those in code."""
    plain = _CODE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), prose(text))
    for match in _LINK.finditer(plain):
        yield Link(match["text"], match["target"], plain.count("\n", 0, match.start()) + 1)


def is_internal(target: str) -> bool:
    return not re.match(r"[a-z][a-z0-9+.-]*:", target)


def resolved(page: str, target: str) -> tuple[str, str]:
    """The path in the repository and the anchor ("" for none) that a page's link leads to."""
    path, _, anchor = target.partition("#")
    if not path:
        return page, anchor
    return os.path.normpath(PurePosixPath(page).parent / path), anchor


def site_path(path: str) -> str | None:
    """Where the site has a file of the repository; None for one that it has not."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def for_the_site(page: str, text: str) -> str:
    """A page of the repository as the site's generator takes it.

    page: its path in the repository. Links lead to where the site has their files; of a file that it has not, the words stay.
    Lists that follow a paragraph get the empty line that GitHub does not need.
    """
    here = PurePosixPath(site_path(page) or page)

    def moved(match: re.Match[str]) -> str:
        target = match["target"]
        if not is_internal(target) or target.startswith("#"):
            return match[0]
        path, anchor = resolved(page, target)
        there = site_path(path)
        if there is None:
            return match["text"]
        relative = os.path.relpath(there, here.parent)
        return f"{match['picture']}[{match['text']}]({relative}{'#' + anchor if anchor else ''})"

    lines = text.splitlines()
    outside = prose(text).splitlines()
    made: list[str] = []
    for line, plain in zip(lines, outside, strict=True):
        item = re.match(r" *(?:[-*+]|\d+\.) ", plain)
        above = made[-1] if made else ""
        if item and above.strip() and not re.match(r" *(?:[-*+]|\d+\.) |^ +|^#|^\|", above):
            made.append("")
        made.append(_outside_code(line, moved) if plain else line)
    return "\n".join(made) + "\n"


def _outside_code(line: str, moved: Callable[[re.Match[str]], str]) -> str:
    """The line with its links moved, but for those in code. A link's own words may be code, so that is put aside and back."""
    aside = [code[0] for code in _CODE.finditer(line)]
    text = _LINK.sub(moved, _CODE.sub("\0", line))
    back = iter(aside)
    return re.sub("\0", lambda _: next(back), text)
