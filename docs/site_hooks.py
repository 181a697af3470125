"""Hooks of mkdocs.yml: pages link to the repository's files as they lie there, and the site has those files too.

A paragraph that is only a link to a file of examples/ shows that file in the site. The first mention of a public name
in a page links to the reference.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parents[1]
ALSO = [
    "*.md",
    "CITATION.cff",
    "examples/*",
    "examples/recipes/*",
    "benchmarks/NOTES.md",
    "benchmarks/results/**/*.md",
    "benchmarks/results/**/*.png",
]


def on_files(files, config):
    """README.md becomes the front page; the files of ALSO keep their paths."""
    for path in sorted(path for pattern in ALSO for path in ROOT.glob(pattern) if path.is_file()):
        name = "index.md" if path == ROOT / "README.md" else path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, "code.css", content=HtmlFormatter().get_style_defs(".highlight")))
    return files


def in_reference():
    """The names that have an entry in the reference."""
    return re.findall(r"^::: mla_ext\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)


def with_reference(markdown):
    """Where a page first mentions `name`, outside of code, headings and links, it becomes a link."""
    names = set(in_reference())

    def linked(mention):
        if mention[1] not in names:
            return mention[0]
        names.remove(mention[1])
        return f"[{mention[0]}][mla_ext.{mention[1]}]"

    parts = re.split(r"(^```.*?^```|^#.*?$)", markdown, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [re.sub(r"(?<!\[)`(?:mla_ext\.)?(\w+)(?:\([^`]*\))?`", linked, prose) for prose in parts[::2]]
    return "".join(parts)


def with_source(link):
    return f"{link[0]}\n\n```python\n{(ROOT / link[1]).read_text(encoding='utf-8')}```"


def on_page_markdown(markdown, page, config, files):
    """In the site, the files beside docs/ in the repository lie beside its pages."""
    markdown = re.sub(r"^\[(examples/\w+\.py)\]\(.*\)$", with_source, markdown, flags=re.MULTILINE)
    markdown = with_reference(markdown)
    if Path(page.file.abs_src_path).is_relative_to(config.docs_dir):
        to_pages = "../" * page.file.src_uri.count("/")
        return markdown.replace(f"]({to_pages}../README.md", f"]({to_pages}index.md").replace(
            f"](../{to_pages}", f"]({to_pages}"
        )
    return markdown.replace("](docs/", "](")
