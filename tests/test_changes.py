"""docs/changes.md names every difference between the public API and that of 0.1.0, tests/data/0.1.0/api.json.

`python tests/test_changes.py FILE`, run on commit 41d24e3, wrote that file.
"""

import argparse
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import pytest

import mla_ext
from mla_ext.multimodal import cli

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "changes.md"
OLD = Path(__file__).parent / "data" / "0.1.0" / "api.json"


def parameters(function):
    """As "lr=0.001": those that may be given by position, and those that are keywords."""
    found = [], []
    for parameter in inspect.signature(function).parameters.values():
        text = str(parameter.replace(annotation=parameter.empty))
        if parameter.name != "self":
            found[parameter.kind is parameter.KEYWORD_ONLY].append(text)
    return list(found)


def members(cls):
    """The public functions and properties that are ours: torch's keep to torch."""
    foreign = {name for base in cls.__mro__ if base.__module__.partition(".")[0] != "mla_ext" for name in vars(base)}
    for name, value in inspect.getmembers(cls, lambda value: inspect.isroutine(value) or isinstance(value, property)):
        if not name.startswith("_") and name not in foreign:
            yield name, parameters(value) if callable(value) else [[], []]


def python_names():
    places = {"": mla_ext} | {f"mla_ext.{name}.": importlib.import_module(f"mla_ext.{name}") for name in MODULES}
    for place, module in places.items():
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        # 0.1.0 had no __all__ in modules; what began with run_ was between its own.
        for name in getattr(module, "__all__", [name for name in own if not name.startswith(("_", "run_"))]):
            value = getattr(module, name)
            if callable(value):
                yield place + name, parameters(value)
            for member, found in members(value) if inspect.isclass(value) else ():
                yield f"{place}{name}.{member}", found


def commands():
    (subparsers,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, parser in subparsers.choices.items():
        flags = [flag for action in parser._actions for flag in action.option_strings if flag not in ("-h", "--help")]
        yield f"mla-ext {name}", [[], flags]


def operators():
    source = re.sub(r'"\s*"', "", (ROOT / "csrc" / "bindings" / "ops.cpp").read_text("utf-8"))
    for name, arguments in re.findall(r'library\.def\(\s*"(\w+)\((.*?)\) ->', source):
        yield f"torch.ops.mla_ext.{name}", [[text.split()[-1] for text in arguments.split(", ")], []]


MODULES = ["ops", "reference"]


def public_api():
    return dict([*python_names(), *commands(), *operators()])


def plain(parameter):
    return parameter.partition("=")[0]


def differences(old, new):
    """Names that are new or gone, and parameters that are, or have another default or place."""
    names = old.keys() ^ new.keys()
    yield from ((name, None) for name in names if name.rpartition(".")[0] not in names)
    for name in old.keys() & new.keys():
        for before, after in zip(old[name], new[name], strict=True):
            yield from ((name, plain(parameter)) for parameter in set(before) ^ set(after))
        before, after = ([plain(parameter) for parameter in api[name][0]] for api in (old, new))
        moved = [one for one, other in zip(before, after, strict=False) if one != other]
        yield from ((name, parameter) for parameter in moved[:1])  # those behind it moved with it


def unnamed(differences, page):
    """Those that have no row: a line that has the name in code, and the parameter."""
    for name, parameter in sorted(differences, key=str):
        lines = [line for line in page.splitlines() if re.search(rf"`{re.escape(name)}[`(]", line)]
        if not [line for line in lines if parameter is None or re.search(rf"`{re.escape(parameter)}[`=]", line)]:
            yield name, parameter


def test_every_change_of_the_public_api_is_named():
    old = json.loads(OLD.read_text("utf-8"))
    assert list(unnamed(differences(old, public_api()), PAGE.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    ("api", "expected"),
    [
        ({"f": [["a", "b=1"], []]}, set()),
        ({}, {("f", None)}),
        ({"f": [["a", "b=1"], []], "g": [[], []]}, {("g", None)}),
        ({"f": [["a", "b=2"], []]}, {("f", "b")}),
        ({"f": [["a", "b=1"], ["c=0"]]}, {("f", "c")}),
        ({"f": [["a", "c=0", "b=1"], []]}, {("f", "b"), ("f", "c")}),
    ],
)
def test_a_change_is_seen(api, expected):
    changes = set(differences({"f": [["a", "b=1"], []]}, api))
    assert changes == expected
    page = "| `f` | `b=1` is now `b=2`; new: `c=0` |\n| `g` | new |"
    assert list(unnamed(changes, page)) == []
    assert list(unnamed(changes, "| f | b, c |")) == sorted(expected, key=str)


if __name__ == "__main__":
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(public_api().items()))
    Path(sys.argv[1]).write_text(f"{{\n{lines}\n}}\n")
