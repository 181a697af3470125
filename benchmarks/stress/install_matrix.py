"""Installs the package in every promised way, in throw-away environments, and writes docs/dev/install_matrix.md.

    python -m benchmarks.stress.install_matrix [--list] [NAME ...]

All of them take about two hours and 20 GB of downloads.

Each combination gets a virtual environment with one release of PyTorch, installs the package there, and works in an
empty folder with nothing of the checkout but its tests. Rows of combinations that are not named stay as they were.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from ..commit import commit

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "dev" / "install_matrix.md"
OLDER = {"2.4": "torch==2.4.1", "2.6": "torch==2.6.0", "2.8": "torch==2.8.0"}  # which the kernels do not run in
RELEASES = {**OLDER, "2.10": "torch==2.10.0", "2.11": "torch==2.11.0", "2.13": "torch==2.13.0", "newest": "torch"}
COMPILERS = ("c++", "g++", "clang++")
BUILD_TOOLS = ["setuptools>=77", "cmake", "ninja", "pybind11"]
TEST_TOOLS = ["numpy", "tqdm", "scikit-learn", "matplotlib", "pytest", "hypothesis"]
TESTS = ["test_ops.py", "test_optimizer.py", "test_model.py", "test_reference.py"]

# Five head steps and a fusion by the best backend for CPUs in float32, against the reference in float64.
SMOKE = """
import json, torch, mla_ext
from mla_ext import _library, ops
torch.manual_seed(0)
features, grad, logits = torch.randn(64, 513), torch.randn(6, 513), torch.randn(3, 50, 6)
hyper = ops.Hyperparameters(lr=0.1, momentum=0.9)

def results(backend, dtype):
    W, M, P = torch.ones(6, 513, dtype=dtype), torch.zeros(6, 513, dtype=dtype), torch.eye(513, dtype=dtype)
    step = torch.zeros(())
    for shift in range(5):
        mean = ops.feature_mean(features.to(dtype) + shift, backend=backend)
        ops.head_step_(W, grad.to(dtype), M, P, mean, step, hyper, backend=backend)
    return [W, M, P, *ops.entropy_fusion(logits.to(dtype), backend=backend)]

best = "cpu" if "cpu" in mla_ext.build_info()["backends"] else "reference"
pairs = zip(results(best, torch.float32), results("reference", torch.float64))
error = max(((ours - true).abs().max() / true.abs().max()).item() for ours, true in pairs)
assert error < 1e-5, error
facts = {"backend": best, "file": mla_ext.__file__, "torch": torch.__version__, "gpu": torch.cuda.is_available()}
print(json.dumps(facts | {"cuda_load_error": _library.cuda_load_error, "built": mla_ext.build_info()}))
"""


class Failed(Exception):
    """A combination that should work and does not; `output` is all that the command said."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


class NotHere(Exception):
    """A combination that cannot be tried on this machine."""


@dataclass(frozen=True)
class Row:
    """PyTorch at build time and at run time, what becomes of the CUDA library, and how it ended."""

    built: str
    here: str
    cuda: str
    result: str


@dataclass
class Machine:
    """Where everything is made: one environment at a time, and the wheels built so far."""

    work: Path
    environment: Environment | None = None

    def enter(self, release: str) -> Environment:
        if self.environment is None or self.environment.release != release:
            self.leave()
            self.environment = Environment(release, self.work / "venv", self.work)
        return self.environment

    def leave(self) -> None:
        self.environment = None
        shutil.rmtree(self.work / "venv", ignore_errors=True)

    def source(self) -> Path:
        """A fresh copy of the source tree, by way of an sdist."""
        archive = self.sdist()
        folder = Path(tempfile.mkdtemp(prefix="source-", dir=self.work))
        shutil.unpack_archive(archive, folder)
        return next(folder.iterdir())

    def sdist(self) -> Path:
        folder = self.work / "sdist"
        if not any(folder.glob("*")):
            code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
            self.environment.python("-c", code, cwd=ROOT)
        return next(folder.iterdir())

    def wheel(self, release: str) -> Path:
        """A wheel built without isolation against a release, with the CUDA library where nvcc fits that release."""
        folder = self.work / f"wheel-{release}"
        if not any(folder.glob("*")):
            environment = self.enter(release)
            cuda = "auto" if environment.cuda is None or environment.cuda == nvcc_major() else "off"
            environment.build(self.source(), folder, MLA_EXT_CUDA=cuda)
        return next(folder.iterdir())


class Environment:
    """A virtual environment with a release of PyTorch, the build tools and the test tools."""

    def __init__(self, release: str, folder: Path, work: Path) -> None:
        self.release, self.folder, self.work = release, folder, work
        run([sys.executable, "-m", "venv", folder], work)
        constraints = work / "constraints.txt"
        pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        own = re.compile(r"(torch|triton|setuptools|sympy)==")  # each release of PyTorch has its own
        constraints.write_text("\n".join(line for line in pinned if not own.match(line)))
        self.pip("install", RELEASES[release], *BUILD_TOOLS)  # together: PyTorch has a say in setuptools
        self.pip("install", "--constraint", constraints, RELEASES[release], *BUILD_TOOLS, *TEST_TOOLS)
        facts = "import torch; print(torch.__version__, (torch.version.cuda or 'none').split('.')[0])"
        self.torch, cuda = self.python("-c", facts).split()
        self.cuda = None if cuda == "none" else cuda

    def python(self, *arguments: str | Path, cwd: Path | None = None, **variables: str) -> str:
        return run([self.folder / "bin" / "python", *arguments], cwd or self.work, **variables)

    def pip(self, *arguments: str | Path, **variables: str) -> str:
        options = ["--no-cache-dir", "--disable-pip-version-check", *arguments]
        return self.python("-m", "pip", *options, TMPDIR=str(self.work), **variables)

    def build(self, source: Path, folder: Path, isolation: bool = False, **variables: str) -> None:
        options = [] if isolation else ["--no-build-isolation"]
        self.pip("wheel", "--no-deps", *options, "--wheel-dir", folder, source, **variables)

    def files(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}

    def try_out(
        self, *install: str | Path, editable: Path | None = None, kernels: bool = True, **variables: str
    ) -> Row:
        """Installs, uses, tests and uninstalls the package; raises Failed at the first thing that is not right."""
        before = self.files()
        self.pip("install", *install, **variables)
        try:
            self.pip("check")
            return self.use(editable, kernels)
        finally:
            self.pip("uninstall", "--yes", "mla_ext")
            left = [name for name in self.files() - before if "mla_ext" in name or "__pycache__" not in name]
            if left:
                raise Failed(f"uninstalling left {left}")

    def use(self, editable: Path | None, kernels: bool) -> Row:
        away = Path(tempfile.mkdtemp(prefix="away-", dir=self.work))
        shutil.copytree(ROOT / "tests", away / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", away)
        run([self.folder / "bin" / "mla-ext", "info"], away)
        facts = json.loads(self.python("-W", "error", "-c", SMOKE, cwd=away))
        if not Path(facts["file"]).is_relative_to(editable or self.folder):
            raise Failed(f"mla_ext was imported from {facts['file']}")
        run([self.folder / "bin" / "mla-ext", "train", "--data", "digits", "--epochs", "1", "--no-progress"], away)
        tests = run([self.folder / "bin" / "pytest", "-q", *(f"tests/{name}" for name in TESTS)], away)
        shutil.rmtree(away)
        built = facts["built"]
        if (facts["backend"] == "cpu") != kernels:
            raise Failed(f"the best backend is {facts['backend']}")
        loads = f"CUDA {built['cuda']}, {' '.join(built['archs'])}: loads{'' if facts['gpu'] else ', no GPU to run on'}"
        passed = re.search(r"\d+ passed.*?(?= in )", tests)[0]
        return Row(built["torch"] or "–", facts["torch"], facts["cuda_load_error"] or loads, passed)


def run(command: list[str | Path], cwd: Path, **variables: str) -> str:
    """The standard output of a command that knows nothing of the caller's Python and build settings."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MLA_EXT_"))}
    environment = {**inherited, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        output = f"{done.stdout}\n{done.stderr}".strip() or f"exit status {done.returncode}"
        print(output, file=sys.stderr)
        raise Failed(output.splitlines()[-1], output)
    return done.stdout


def nvcc_major() -> str | None:
    nvcc = shutil.which("nvcc")
    return nvcc and re.search(r"release (\d+)", subprocess.run([nvcc, "-V"], capture_output=True, text=True).stdout)[1]


def path_without(names: Collection[str], folder: Path) -> str:
    """A PATH with every program but these: folders that hold one are replaced by links to the rest of them."""
    parts = []
    for number, part in enumerate(os.environ["PATH"].split(os.pathsep)):
        if any((Path(part) / name).exists() for name in names):
            mirror = folder / str(number)
            mirror.mkdir(parents=True)
            for program in Path(part).iterdir():
                if program.name not in names:
                    (mirror / program.name).symlink_to(program)
            part = str(mirror)
        parts.append(part)
    return os.pathsep.join(parts)


def require(holds: object, reason: str) -> None:
    if not holds:
        raise NotHere(reason)


# ---- The combinations -----------------------------------------------------------------------------------------------


def wheel(built: str, here: str) -> Callable[[Machine], Row]:
    def check(machine: Machine) -> Row:
        path = machine.wheel(built)
        return machine.enter(here).try_out(path)

    return check


def sdist(machine: Machine) -> Row:
    environment = machine.enter("2.13")
    return environment.try_out("--no-build-isolation", machine.sdist(), MLA_EXT_CUDA="off")


def editable(machine: Machine) -> Row:
    environment = machine.enter("2.13")
    source = machine.source()
    return environment.try_out("--no-build-isolation", "--editable", source, editable=source, MLA_EXT_CUDA="off")


def isolated(machine: Machine) -> Row:
    environment = machine.enter("2.13")
    folder = Path(tempfile.mkdtemp(prefix="isolated-", dir=machine.work))
    environment.build(machine.source(), folder, isolation=True)
    return environment.try_out(next(folder.iterdir()))


def no_nvcc(machine: Machine) -> Row:
    environment = machine.enter("2.11")
    require(environment.cuda, f"needs a CUDA build, and PyTorch 2.11 is {environment.torch} here")
    path = path_without(["nvcc"], machine.work / "programs")
    row = environment.try_out("--no-build-isolation", machine.source(), PATH=path)
    if "no nvcc that works was found" not in row.cuda:
        raise Failed(f"built without nvcc, but: {row.cuda}")
    return row


def cpu_torch(choice: str) -> Callable[[Machine], Row]:
    def check(machine: Machine) -> Row:
        environment = machine.enter("2.13")
        require(nvcc_major(), "needs nvcc")
        require(environment.cuda is None, f"needs a build without CUDA, and PyTorch 2.13 is {environment.torch} here")
        return environment.try_out("--no-build-isolation", machine.source(), MLA_EXT_CUDA=choice)

    return check


def older(release: str) -> Callable[[Machine], Row]:
    """The Python part alone: with this PyTorch the build says what is missing, and goes on."""
    return lambda machine: machine.enter(release).try_out("--no-build-isolation", machine.source(), kernels=False)


def no_compiler(machine: Machine) -> Row:
    path = path_without(COMPILERS, machine.work / "uncompiled")
    return machine.enter("2.13").try_out("--no-build-isolation", machine.source(), kernels=False, PATH=path)


def other_cuda(machine: Machine) -> Row:
    environment = machine.enter("2.10")
    require(nvcc_major(), "needs nvcc")
    require(environment.cuda not in (None, nvcc_major()), f"nvcc and PyTorch {environment.torch} are of one CUDA")
    try:
        environment.build(machine.source(), machine.work / "refused")
    except Failed as failure:
        if "mla_ext: nvcc is of CUDA" not in failure.output:
            raise
        return Row("–", environment.torch, "–", "refused, with the three ways out")
    raise Failed("the build went on with an nvcc of another CUDA than PyTorch's")


# In an order that makes few environments: each release first builds its wheel and tries those that are there already.
COMBINATIONS: dict[str, tuple[str, Callable[[Machine], Row]]] = {}


for release in OLDER:
    COMBINATIONS[release] = (f"`pip install`, PyTorch {release}: the Python part", older(release))


def add_wheels(here: str, *built: str) -> None:
    for release in built:
        COMBINATIONS[f"{release}-in-{here}"] = (f"wheel built with PyTorch {release}, in {here}", wheel(release, here))


add_wheels("2.10", "2.10")
COMBINATIONS["other-cuda"] = ("build with nvcc of another CUDA than PyTorch's", other_cuda)
add_wheels("2.11", "2.10", "2.11")
COMBINATIONS["no-nvcc"] = ("`pip install`, PyTorch with CUDA but no nvcc", no_nvcc)
add_wheels("2.13", "2.10", "2.11", "2.13")
COMBINATIONS["sdist"] = ("`pip install` of the sdist", sdist)
COMBINATIONS["no-compiler"] = ("`pip install`, no C++ compiler: the Python part", no_compiler)
COMBINATIONS["editable"] = ("`pip install -e`", editable)
COMBINATIONS["cpu-torch"] = ("`pip install`, nvcc but PyTorch without CUDA", cpu_torch("auto"))
COMBINATIONS["cpu-torch-cuda-on"] = ("the same with `MLA_EXT_CUDA=on`", cpu_torch("on"))
COMBINATIONS["isolated"] = ("wheel built with build isolation", isolated)
add_wheels("newest", "2.10", "2.11", "2.13", "newest")
add_wheels("2.13", "newest")
add_wheels("2.11", "2.13", "newest")
add_wheels("2.10", "2.11", "2.13", "newest")

# ---- The page -------------------------------------------------------------------------------------------------------

PREFACE = """# Where it was installed

For every row the package was installed in a virtual environment without it; `pip check` and `mla-ext info` ran; the
compiled CPU operations, or plain PyTorch's where there are none, were held to the reference in float64; `mla-ext train`
made an epoch on the built-in data; the tests passed from a copy in an otherwise empty folder ({tests});
and `pip uninstall` left no file of the package. Wheels are built with `--no-build-isolation` unless the row says
otherwise.

Written by `make install-matrix` (`make install-matrix ONLY="sdist editable"` for some of the rows; the others stay).
"""
HEADER = "| name | combination | built with | runs in | CUDA library | result | on |\n|---|---|---|---|---|---|---|\n"
LIMITS = """
Not covered by the table: running the CUDA library, which needs a GPU (`make gpu-check` there); other platforms than
the one in the rows' last column; other releases of Python; builds of PyTorch that PyPI does not have (ROCm, other CUDA
versions, a CPU build of every release).
"""


def recorded() -> dict[str, str]:
    """The rows of the page, by name."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    return {match[1]: match[0] for match in re.finditer(r"^\| `(\S+)` .*$", text, flags=re.MULTILINE)}


def record(name: str, row: Row) -> None:
    sources = f"mla_ext {commit() or 'without a commit'}"
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    where = f"{datetime.date.today()}, {sources}, {python}"
    cells = [f"`{name}`", COMBINATIONS[name][0], row.built, row.here, row.cuda, row.result, where]
    rows = recorded() | {name: f"| {' | '.join(cells)} |"}
    table = HEADER + "\n".join(rows[name] for name in COMBINATIONS if name in rows) + "\n"
    missing = [f"`{name}`" for name in COMBINATIONS if name not in rows]
    if missing:
        table += f"\nNot tried yet: {', '.join(missing)}.\n"
    preface = PREFACE.format(tests=", ".join(f"`{name}`" for name in TESTS))
    PAGE.write_text("\n".join([preface, table + LIMITS]), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="combinations to try (default: all)")
    parser.add_argument("--list", action="store_true", help="print the names and do nothing")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name:<20}{what}" for name, (what, _) in COMBINATIONS.items()))
        return 0
    unknown = set(arguments.names) - set(COMBINATIONS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(COMBINATIONS)}")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="mla_ext-install-") as work:
        machine = Machine(Path(work))
        for name in arguments.names or COMBINATIONS:
            start = time.monotonic()
            try:
                row = COMBINATIONS[name][1](machine)
            except NotHere as reason:
                row = Row("–", "–", "–", f"not tried: {reason}")
            except Failed as failure:
                failed += 1
                here = machine.environment.torch if machine.environment else "–"
                row = Row("–", here, "–", f"**failed**: {str(failure).replace(work, '…')}")
            record(name, row)
            print(
                f"{name}: {row.result} ({row.built} in {row.here}; {row.cuda}; {time.monotonic() - start:.0f} s)",
                flush=True,
            )
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
