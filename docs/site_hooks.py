"""Hooks of mkdocs.yml: pages link to the repository's files as they lie there, and the site has those files too."""

from __future__ import annotations

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
ALSO = ["SECURITY.md", "benchmarks/NOTES.md", "benchmarks/results/**/*.md", "benchmarks/results/**/*.png"]


def on_files(files, config):
    """README.md becomes the front page; the files of ALSO keep their paths."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme.replace("](docs/", "](")))
    for path in sorted(path for pattern in ALSO for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """In the site, what lies beside docs/ in the repository lies beside the pages."""
    return markdown.replace("](../README.md", "](index.md").replace("](../", "](")
