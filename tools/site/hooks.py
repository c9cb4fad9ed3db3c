"""What mkdocs is told beside mkdocs.yml: pages from outside of docs/, made parts, links and anchors as GitHub has them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pages
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

PARTS = pages.ROOT / "build" / "reference"


def on_config(config: Any) -> Any:
    config.mdx_configs.setdefault("toc", {})["slugify"] = lambda text, separator: pages.slug(text)
    return config


def on_files(files: Files, config: Any) -> Files:
    for path, there in pages.OUTSIDE.items():
        files.append(File.generated(config, there, abs_src_path=str(pages.ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    uri = page.file.src_uri
    source = next((path for path, there in pages.OUTSIDE.items() if there == uri), f"docs/{uri}")
    return pages.for_the_site(source, pages.MADE.sub(lambda match: _made(match[1]), markdown))


def _made(name: str) -> str:
    part = PARTS / f"{name}.md"
    if not part.is_file():
        raise PluginError(
            f"{part} is not there. Build the site by `make docs`, which makes it by tools/site/reference.py."
        )
    return part.read_text(encoding="utf-8")
