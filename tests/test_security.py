"""What the package may not do: run code from files, or start a shell."""

import ast
from pathlib import Path

import pytest
import torch

import mla_ext
from mla_ext.multimodal import checkpoint

SOURCES = sorted(Path(mla_ext.__file__).parent.rglob("*.py"))
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "breakpoint"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "subprocess", "pty", "code", "runpy", "requests"}
FORBIDDEN_MODULES |= {"urllib", "http", "socket", "ctypes"}
FORBIDDEN_FUNCTIONS = {"os.system", "os.popen", "os.execv", "os.spawnv", "os.fork"}
REQUIRED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}


def violations(source):
    """What of the lists above a module does, as (line, what)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if getattr(node, "level", 0) == 0:
                yield from ((node.lineno, n) for n in names if n.partition(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in FORBIDDEN_CALLS | FORBIDDEN_FUNCTIONS or keywords.get("shell", "False") != "False":
                yield node.lineno, name
            if name in REQUIRED and keywords.get(REQUIRED[name][0]) != str(REQUIRED[name][1]):
                yield node.lineno, name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_module_runs_what_it_reads(path):
    assert list(violations(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')",
        "import pickle",
        "from subprocess import run",
        "os.system('true')",
        "start('true', shell=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_scan_sees(code):
    assert len(list(violations(code))) == 1


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"settings": Malicious(tmp_path / "written"), "best": {}}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"expected a checkpoint of a training run"):
        checkpoint.load(tmp_path / "last.pt")
    assert not (tmp_path / "written").exists()
