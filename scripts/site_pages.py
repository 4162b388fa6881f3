"""Hooks of `mkdocs build`: pages of the site that lie outside `docs/`, and links between them."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "README.md": "readme.md",
    "bench/RESULTS.md": "results.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "models/assets/README.md": "assets_readme.md",
}
"""Files of the repository that the site shows, and their pages."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside `docs/`."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between pages of the site."""
    up = "../" * page.file.src_uri.count("/")
    for source, target in sorted(OUTSIDE.items(), reverse=True):  # models/assets/README.md before README.md
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(source)}", f"]({up}{target}", markdown)
    if page.file.src_uri in OUTSIDE.values():
        markdown = re.sub(r"\]\((?:\.\./)*docs/", "](", markdown)
    return markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns a notebook's links to Markdown files into links to their pages, which only Markdown pages get otherwise."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return re.sub(r'href="([\w./]+)\.md"', r'href="\1.html"', html)
