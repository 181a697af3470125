"""What the README and the guides say is so: blocks run, commands and links exist, the site builds."""

import html
import importlib.util
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import anchors, prose

import mla_ext
from mla_ext import backends
from mla_ext.multimodal import cli

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language):
    return [
        pytest.param(code, id=f"{page.name}-{number}")
        for page in PAGES
        for number, code in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL))
    ]


PYTHON = blocks("python")


@pytest.mark.filterwarnings("ignore")  # other libraries' own
@pytest.mark.parametrize("code", PYTHON)
def test_blocks_run(code, tmp_path, monkeypatch):
    needs = re.match(r"# needs: (\w+)", code)
    if needs and importlib.util.find_spec(needs[1]) is None:
        pytest.skip(f"no {needs[1]} here")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, "documentation", "exec"), {"__name__": "documentation"})


def check_command(line):
    """Raises AssertionError for a command, a target, a module or an option that does not exist."""
    words = shlex.split(line, comments=True)
    while re.match(r"\w+=", words[0]):
        name = words.pop(0).partition("=")[0]
        assert name in (ROOT / "CMakeLists.txt").read_text("utf-8") + (ROOT / "setup.py").read_text("utf-8"), name
    program, *arguments = words
    modules = [module for flag, module in itertools.pairwise(words) if flag == "-m"]
    if program == "mla-ext" or modules == ["mla_ext"]:
        arguments = words[words.index("mla_ext") + 1 :] if modules else arguments
        try:
            cli._parser().parse_args(arguments)
        except ValueError as error:
            raise AssertionError(f"{line}: {error}") from error
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text("utf-8")
        for word in arguments:
            pattern = rf"^{word.partition('=')[0]} \??=" if "=" in word else rf"^{word}:"
            assert re.search(pattern, makefile, flags=re.MULTILINE), word
    elif modules:
        folder = ROOT / modules[0].replace(".", "/")
        source = (folder / "__main__.py" if folder.is_dir() else folder.with_suffix(".py")).read_text("utf-8")
        assert [word for word in arguments if word.startswith("--") and f'"{word}"' not in source] == []
    else:
        assert program in {"pip", "git", "cd"}, program


@pytest.mark.parametrize("block", blocks("sh"))
def test_commands_exist(block):
    for line in block.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            check_command(line)


@pytest.mark.parametrize(
    "line",
    ["mla-ext train --data x --speed 3", "make tee", "python -m benchmarks.speed.head_step --slow", "mla_ext info"],
)
def test_a_command_that_does_not_exist_is_seen(line):
    with pytest.raises(AssertionError):
        check_command(line)


def dead_links(page, text):
    """Relative links of a page that lead to no file, or to no heading of one; and paths it names that do not exist."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text("utf-8") if path else text)):
            yield link
    for path in re.findall(r"`((?:benchmarks|csrc|docs|examples|mla_ext|tests)/[\w./]*)`", prose(text)):
        if not (ROOT / path).exists():
            yield path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert list(dead_links(page, page.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    "text",
    [
        "[a](docs/nowhere.md)",
        "[a](docs/install.md#nowhere)",
        "# One heading\n[a](#another)",
        "```sh\n# a comment\n```\n[a](#a-comment)",
        "![a](nowhere.png)",
        "`tests/test_nothing.py`",
    ],
)
def test_a_dead_link_is_seen(text):
    assert len(list(dead_links(ROOT / "README.md", text))) == 1


@pytest.mark.parametrize("text", ["# One `heading`, here\n[a](#one-heading-here)", "[a](docs/install.md#cuda)"])
def test_a_link_to_a_heading_is_found(text):
    assert list(dead_links(ROOT / "README.md", text)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_in_plain_english(page):
    """Phrases that readers whose first language is not English stumble over."""
    stilted = r"(?:^|[.:] )Of\b|\bbut for\b|\bmend(?:s|ed)?\b|nothing else is to|\bis to be had\b"
    assert re.findall(stilted, prose(page.read_text("utf-8")), flags=re.MULTILINE) == []


def test_the_guide_lists_every_function_of_a_backend():
    page = (ROOT / "docs" / "backends.md").read_text("utf-8")
    functions = [name for name, value in vars(backends.Backend).items() if callable(value) and name[0] != "_"]
    assert len(functions) >= 6 and [name for name in functions if f"`{name}(" not in page] == []


@pytest.mark.parametrize("path", sorted((ROOT / "mla_ext").rglob("[!_]*.py")), ids=lambda path: path.name)
def test_public_modules_say_what_is_public(path):
    assert "\n__all__ = [" in path.read_text("utf-8")


def test_changelog_and_citations_name_this_version():
    changelog, citation = ((ROOT / name).read_text("utf-8") for name in ("CHANGELOG.md", "CITATION.cff"))
    version, date = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", changelog, flags=re.MULTILINE).groups()
    assert changelog.index(f"## {version}") == changelog.index("## ") and version == mla_ext.__version__
    assert f"\nversion: {version}\ndate-released: {date}\n" in citation
    assert f"version = {{{mla_ext.__version__}}}" in README
    assert "2311.10707" in citation and "2311.10707" in README


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gradient is projected" in (tmp_path / "index.html").read_text("utf-8")
    reference = (tmp_path / "api" / "index.html").read_text("utf-8")
    assert 'id="mla_ext.projected.ProjectedOptimizer.attach"' in reference
    assert "zeroredundancyoptimizer" in (tmp_path / "search" / "search_index.json").read_text("utf-8")
    assert 'href="../api/#mla_ext.ProjectedSGD"' in (tmp_path / "drop_in" / "index.html").read_text("utf-8")
    functions = [name for name in mla_ext.__all__ if not name.startswith("__")]
    assert [name for name in functions if f'id="mla_ext.{name}"' not in reference] == []
    pages = "".join(page.read_text("utf-8") for page in tmp_path.rglob("*.html"))
    site = html.unescape(re.sub("<[^>]*>", "", pages))  # without the colours of the code
    code = {path.name: path.read_text("utf-8").strip() for path in (ROOT / "examples").glob("*.py")}
    assert code and [name for name in code if code[name] not in site] == []


def test_the_drop_in_example_has_eight_lines():
    first = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)[1]
    assert "attach" in first and len([line for line in first.splitlines() if line]) <= 8


def test_the_first_screen_says_what_it_is():
    """What it is, what it is not, how to install and use it, what it gives: before the first heading."""
    screen = README.partition("\n## ")[0]
    assert all(part in screen for part in ("ProjectedSGD", "multi-head latent attention", "pip install", "| method |"))
    assert len(screen.splitlines()) <= 60


@pytest.mark.parametrize("page", ["drop_in.md", "elsewhere.md", "faq.md"])
def test_the_tables_of_a_page_name_tests_that_exist(page):
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    names = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / page).read_text(encoding="utf-8")))
    assert len(names) > 20
    assert {name for name in names if f"def {name}(" not in tests} == set()


def test_every_row_of_ours_names_its_test():
    page = (ROOT / "docs" / "elsewhere.md").read_text(encoding="utf-8")
    ours = page.partition("## What this package does")[2].partition("\n## ")[0]
    rows = [line for line in ours.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    assert [row for row in rows if "`test_" not in row.rpartition(" | ")[2]] == []


def test_every_answer_names_its_page_and_its_test():
    answers = re.split(r"^### ", (ROOT / "docs" / "faq.md").read_text("utf-8"), flags=re.MULTILINE)[1:]
    assert len(answers) > 20
    assert [answer for answer in answers if "](" not in answer] == []
    assert [answer for answer in answers if "`test_" not in answer and "Nobody has tried" not in answer] == []


def test_every_example_is_in_the_gallery():
    page = (ROOT / "docs" / "examples.md").read_text("utf-8")
    files = [path for path in (ROOT / "examples").rglob("*") if path.suffix in (".py", ".toml")]
    links = [f"](../{path.relative_to(ROOT).as_posix()})" for path in files]
    assert len(links) > 10 and [link for link in links if link not in page] == []


def test_the_table_of_dependencies_is_that_of_pyproject():
    """Every package that pyproject.toml names has one row, and every row a package; each names its licence and date."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    project = settings["project"]
    lists = [settings["build-system"]["requires"], project["dependencies"], *project["optional-dependencies"].values()]
    named = {re.match(r"[\w-]+", requirement)[0] for requirement in itertools.chain(*lists)} - {project["name"]}
    page = (ROOT / "docs" / "dev" / "dependencies.md").read_text("utf-8")
    table = page.partition("| name |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    assert sorted(row[0] for row in rows) == sorted(named)
    assert [row for row in rows if len(row) != 6 or not all(row) or not re.fullmatch(r"\d{4}-\d\d-\d\d", row[4])] == []
