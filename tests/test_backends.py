"""A backend is a file, or another package's entry point; the optimizer names none."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mla_ext
from mla_ext import backends
from mla_ext.backends import Backend

PACKAGE = Path(mla_ext.__file__).parent
MINE = '''
from mla_ext.backends.reference import Reference


class Mine(Reference):
    """The reference under another name, which "auto" prefers; it counts its steps."""

    name = "mine"
    preference = 100
    steps = 0

    def head_step_(self, step):
        Mine.steps += 1
        super().head_step_(step)
'''
USE = """
import torch, mla_ext
from mla_ext import backends
head = torch.nn.Linear(4, 3)
optimizer = mla_ext.ProjectedSGD(head.parameters(), lr=0.1)
optimizer.attach(head)
for _ in range(3):
    head(torch.randn(5, 4)).sum().backward()
    optimizer.step()
print(next(iter(backends.BACKENDS)), type(backends.BACKENDS["mine"]).steps, mla_ext.build_info()["backends"][0])
"""


def run(folder: Path) -> str:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{USE}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_a_file_in_the_folder_adds_a_backend(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "mla_ext", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "mla_ext" / "backends" / "mine.py").write_text(MINE)
    assert run(tmp_path) == "mine 3 mine"


def test_an_entry_point_of_another_package_adds_a_backend(tmp_path):
    (tmp_path / "other.py").write_text(MINE)
    facts = tmp_path / "other-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[mla_ext.backends]\nmine = other:Mine\n")
    shutil.copytree(PACKAGE, tmp_path / "mla_ext", ignore=shutil.ignore_patterns("__pycache__"))
    assert run(tmp_path) == "mine 3 mine"


def test_the_optimizer_names_no_backend():
    for file in ("optimizer.py", "head_state.py", "loading.py", "ops.py", "step.py", "projection.py", "observation.py"):
        text = (PACKAGE / file).read_text(encoding="utf-8")
        assert not re.search(r'backends\.(cpu|cuda|triton|reference)|"(cpu|cuda|triton|reference)"', text), file


def test_every_backend_is_complete_and_has_its_own_name():
    assert {name: backend.name for name, backend in backends.BACKENDS.items()} == {n: n for n in backends.BACKENDS}
    assert set(backends.BACKENDS) >= {"cpu", "cuda", "triton", "reference"}
    assert all(isinstance(backend, Backend) for backend in backends.BACKENDS.values())
    preferences = [backend.preference for backend in backends.BACKENDS.values()]
    assert preferences == sorted(preferences, reverse=True) and len(set(preferences)) == len(preferences)


def test_an_incomplete_backend_cannot_be_made():
    class Half(Backend):
        name = "half"

        def unusable(self, device: torch.device) -> str | None:
            return None

    with pytest.raises(TypeError, match="abstract"):
        Half()


def test_an_unknown_name_is_refused_in_the_same_words_everywhere():
    head = torch.nn.Linear(2, 2)
    for call in (
        lambda: mla_ext.ProjectedSGD(head.parameters(), backend="gpu"),
        lambda: mla_ext.entropy_fusion(torch.ones(1, 1, 1), backend="gpu"),
        lambda: backends.choose("gpu", torch.device("cpu")),
    ):
        with pytest.raises(ValueError, match=r"backend: expected 'auto' or one of 'cpu', .*, got 'gpu'"):
            call()


def test_the_optimizer_loads_no_data_or_training_module():
    code = "import sys; from mla_ext import ProjectedSGD; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "mla_ext.optimizer" in loaded
    assert not [name for name in loaded if name.startswith(("mla_ext.multimodal", "mla_ext.triton_kernels"))]


def test_every_public_name_is_there():
    assert {name for name in mla_ext.__all__ if getattr(mla_ext, name, None) is None} == set()
    assert set(mla_ext.__all__) <= set(dir(mla_ext))
    with pytest.raises(AttributeError, match="no attribute 'ProjectedSDG'"):
        mla_ext.ProjectedSDG  # noqa: B018
