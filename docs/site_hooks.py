"""Hooks of mkdocs.yml: pages link to the repository's files as they lie there, and the site has those files too.

A paragraph that is only a link to a file of examples/ shows that file in the site.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
ALSO = [
    "*.md",
    "CITATION.cff",
    "examples/*",
    "benchmarks/NOTES.md",
    "benchmarks/results/**/*.md",
    "benchmarks/results/**/*.png",
]


def on_files(files, config):
    """README.md becomes the front page; the files of ALSO keep their paths."""
    for path in sorted(path for pattern in ALSO for path in ROOT.glob(pattern) if path.is_file()):
        name = "index.md" if path == ROOT / "README.md" else path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def with_source(link):
    return f"{link[0]}\n\n```python\n{(ROOT / link[1]).read_text(encoding='utf-8')}```"


def on_page_markdown(markdown, page, config, files):
    """In the site, the files beside docs/ in the repository lie beside its pages."""
    markdown = re.sub(r"^\[(examples/\w+\.py)\]\(.*\)$", with_source, markdown, flags=re.MULTILINE)
    if Path(page.file.abs_src_path).is_relative_to(config.docs_dir):
        to_pages = "../" * page.file.src_uri.count("/")
        return markdown.replace(f"]({to_pages}../README.md", f"]({to_pages}index.md").replace(
            f"](../{to_pages}", f"]({to_pages}"
        )
    return markdown.replace("](docs/", "](")
