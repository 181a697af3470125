"""Installs the frameworks of docs/frameworks.md in a throw-away environment, and runs their examples and tests there.

So it does with the optional libraries that `make test` does without: torchvision, transformers, PyAV.

    python benchmarks/stress/frameworks.py

Run it with the Python of an environment in which mla_ext and its tests are installed, as `make test-frameworks` does.
The new environment sees the packages of that one, so that only the frameworks are fetched.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORKS = ["lightning", "accelerate", "transformers", "timm", "skorch", "pytorch-ignite", "avalanche-lib"]
ENCODERS_AND_VIDEO = ["torchvision", "av"]  # with transformers, what our extras `vision`, `text` and `prepare` bring
CONSTRAINTS = ["--constraint", ROOT / "constraints.txt", "--constraint", ROOT / "constraints-frameworks.txt"]
TESTS = ["test_frameworks.py", "test_examples.py", "test_balancemm.py"]
TESTS += ["test_library.py", "test_recipes.py", "test_prepare.py"]


def make(folder: Path) -> Path:
    """An environment on top of the one that runs this; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    below = sysconfig.get_path("purelib")
    (packages / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n", encoding="utf-8")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, *CONSTRAINTS, *FRAMEWORKS, *ENCODERS_AND_VIDEO], check=True)
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode != 0:
        # timm imports torchvision, whose wheel on PyPI is built for CUDA. Beside a CPU build of PyTorch its library is
        # not loaded, and then this module fails, which only torch.compile needs.
        (packages / "torchvision" / "_meta_registrations.py").write_text("", encoding="utf-8")
    return python


def main() -> int:
    if sys.version_info < (3, 11):
        sys.exit(f"the frameworks need Python >= 3.11, and this is {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory(prefix="frameworks-") as folder:
        python = make(Path(folder))
        # A framework that cannot be imported fails its tests then, rather than skip them. The networks are tiny, and
        # threads that wait for a busy core take minutes.
        environment = os.environ | {"MLA_EXT_FRAMEWORKS": "1", "MLA_EXT_INSTALLED": "1", "OMP_NUM_THREADS": "1"}
        command = [python, "-m", "pytest", "-q", "-rs", "--durations=5", *TESTS]
        return subprocess.run(command, cwd=ROOT / "tests", env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
