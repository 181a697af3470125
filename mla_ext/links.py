"""Links from messages to the pages that say more."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, metadata

__all__ = ["see"]


def _site() -> str | None:
    """Where the pages are published: the URL that pyproject.toml names Documentation, if it names one."""
    try:
        urls = metadata("mla_ext").get_all("Project-URL", [])
    except PackageNotFoundError:  # a checkout that was not installed
        return None
    named = dict(url.split(", ", 1) for url in urls)
    return named["Documentation"].rstrip("/") if "Documentation" in named else None


SITE = _site()


def see(target: str) -> str:
    """The end of a message: a link to `target`, "page#heading", in the site or else in the sources.

    The heading is as links write it: in small letters, with "-" between words.
    """
    page, _, heading = target.partition("#")
    return f". See docs/{page}.md#{heading}" if SITE is None else f". See {SITE}/{page}/#{heading}"
