"""Messages end with a link to a page and a heading that exist."""

import ast
import re
from pathlib import Path

import pytest
import torch
from pages import anchors

import mla_ext
from mla_ext import links

ROOT = Path(__file__).parents[1]
CALLS = [
    pytest.param(node, id=f"{path.stem}-{node.lineno}")
    for path in sorted((ROOT / "mla_ext").rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text("utf-8")))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "see"
]


def leads_somewhere(target):
    page, _, heading = target.partition("#")
    path = ROOT / "docs" / f"{page}.md"
    return path.is_file() and heading in anchors(path.read_text("utf-8"))


@pytest.mark.parametrize("call", CALLS)
def test_every_link_leads_somewhere(call):
    assert leads_somewhere(call.args[0].value)


def test_a_link_that_leads_nowhere_is_seen():
    assert len(CALLS) >= 12
    assert not leads_somewhere("nowhere#install") and not leads_somewhere("install#nowhere")
    assert not leads_somewhere("install")


def test_the_site_is_linked_where_there_is_one(monkeypatch):
    monkeypatch.setattr(links, "SITE", "https://docs.example")
    assert links.see("rank#the-algebra") == ". See https://docs.example/rank/#the-algebra"
    monkeypatch.setattr(links, "SITE", None)
    assert links.see("rank#the-algebra") == ". See docs/rank.md#the-algebra"


@pytest.mark.parametrize(
    ("urls", "site"),
    [([], None), (["Source, https://a.example/"], None), (["Documentation, https://d.example/"], "https://d.example")],
)
def test_the_site_is_the_one_of_the_metadata(monkeypatch, urls, site):
    class Metadata:
        def get_all(self, name, otherwise):
            return urls if name == "Project-URL" else otherwise

    monkeypatch.setattr(links, "metadata", lambda name: Metadata())
    assert links._site() == site


def test_a_checkout_that_was_not_installed_has_no_site(monkeypatch):
    def missing(name):
        raise links.PackageNotFoundError

    monkeypatch.setattr(links, "metadata", missing)
    assert links._site() is None


HEAD = torch.nn.Linear(4, 3)
MISTAKES = {
    "alpha": lambda: mla_ext.ProjectedSGD(HEAD.parameters(), lr=0.1, alpha=0),
    "alpha_scale": lambda: mla_ext.ProjectedSGD(HEAD.parameters(), lr=0.1, alpha_scale="weights"),
    "rank": lambda: mla_ext.ProjectedSGD(HEAD.parameters(), lr=0.1, rank=1),
    "normalize": lambda: mla_ext.ProjectedSGD(HEAD.parameters(), lr=0.1, rank=2, normalize=True),
    "head": lambda: mla_ext.ProjectedSGD(HEAD.parameters(), lr=0.1).attach(torch.nn.ReLU()),
    "head.weight": lambda: mla_ext.ProjectedSGD(HEAD.parameters(), lr=0.1).attach(torch.nn.Linear(4, 3)),
    "backend": lambda: mla_ext.backends.choose("cuda", torch.device("cpu")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_message_still_names_its_argument_and_ends_with_a_link(name):
    with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
        MISTAKES[name]()
    message = str(error.value)
    assert message.startswith(f"{name}: ")
    assert re.search(r"[^.\s]\. See \S+#[a-z0-9-]+$", message)
