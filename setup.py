"""Drives CMakeLists.txt, the only build definition. Everything else about the package is in pyproject.toml.

MLA_EXT_BUILD = auto     compile the kernels; where a compiler or PyTorch >= 2.10 is missing, install without
                require  compile them, or fail
                off      install without them

What is there and fails, as a compiler does that rejects the sources, fails the build in every mode but off.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

SOURCE = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")
# What CMake reads once and keeps in its cache.
CACHED = ["PATH", "PYTHONPATH", "CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX", "CUDA_HOME"]


def jobs() -> str:
    """MAX_JOBS, or one job per CPU as long as each has 2 GiB of memory."""
    if os.environ.get("MAX_JOBS"):
        return os.environ["MAX_JOBS"]
    cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    try:
        available = int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) / 2**20
    except (OSError, TypeError):
        return str(cpus)
    return str(max(1, min(cpus, int(available / 2))))


def build_mode() -> str:
    """MLA_EXT_BUILD. Who asks for the CUDA kernels requires the build that makes them."""
    mode = os.environ.get("MLA_EXT_BUILD") or "auto"
    if mode not in ("auto", "require", "off"):
        raise SystemExit(f"mla_ext: MLA_EXT_BUILD: expected auto, require or off, got {mode!r}.")
    return "require" if mode == "auto" and os.environ.get("MLA_EXT_CUDA") == "on" else mode


class Missing(Exception):
    """Something that the kernels are compiled with is not there."""


def note_missing(package: Path, reason: str) -> None:
    """What the package tells its user who has no kernels."""
    (package / "_build.json").write_text(json.dumps({"missing": reason}, indent=2) + "\n", encoding="utf-8")


class PythonBuild(build_py):
    """Notes in a build without kernels that they were not wanted."""

    def run(self) -> None:
        super().run()
        if build_mode() == "off" and not self.editable_mode:
            reason = "this build has none (MLA_EXT_BUILD=off); unset that, if you set it"
            note_missing(Path(self.build_lib) / "mla_ext", reason)


class CMakeBuild(build_ext):
    """Configures, builds and installs the libraries beside the package's modules."""

    def run(self) -> None:
        try:
            self.build_libraries()
        except Missing as missing:
            if build_mode() == "require":
                raise SystemExit(f"mla_ext: {missing}") from None
            self.do_without(str(missing))

    def do_without(self, reason: str) -> None:
        """Leaves word for the package, which works without the kernels and tells its user once."""
        package = Path(self.get_ext_fullpath("mla_ext._C")).resolve().parent
        package.mkdir(parents=True, exist_ok=True)
        note_missing(package, reason)
        sys.stderr.write(
            "\nmla_ext: installing without the compiled kernels; everything works, more slowly on a CPU.\n"
            f"To have them: {reason}\nMLA_EXT_BUILD=require makes this an error.\n\n"
        )

    def build_libraries(self) -> None:
        # cmake and ninja from pip lie beside the interpreter, off the PATH of an environment that is not activated.
        self.env = {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])}
        cmake = self.tool("cmake")
        self.tool("ninja")
        if not os.environ.get("CXX") and not any(shutil.which(name, path=self.env["PATH"]) for name in COMPILERS):
            raise Missing(
                "building needs a C++17 compiler, and none was found; install g++ or clang++, or set CXX to yours."
            )

        package = Path(self.get_ext_fullpath("mla_ext._C")).resolve().parent
        build = SOURCE / "build" / f"cmake-{sys.implementation.cache_tag}"
        # A cache from another environment names compilers, tools and libraries that may be gone: then start afresh.
        cache_key = build / "environment.txt"
        environment = "\n".join([sys.executable, *(f"{name}={os.environ.get(name)}" for name in CACHED)])
        same = cache_key.is_file() and cache_key.read_text() == environment
        cache_key.unlink(missing_ok=True)
        note = build / "missing.txt"  # written by CMakeLists.txt
        note.unlink(missing_ok=True)
        configure = [cmake, "-G", "Ninja", "-S", SOURCE, "-B", build, f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [] if same else ["--fresh"]
        result = subprocess.run(configure, env=self.env, stderr=subprocess.PIPE, text=True)
        if note.is_file():
            raise Missing(note.read_text(encoding="utf-8"))
        if result.returncode:
            sentence = re.search(r"mla_ext: .*?(?=\n\s*\n)", result.stderr, re.DOTALL)
            raise SystemExit(" ".join(sentence[0].split()) if sentence else result.stderr)
        cache_key.write_text(environment)
        sys.stderr.write(result.stderr)
        for command in (["--build", build, "-j", jobs()], ["--install", build, "--strip", "--prefix", package]):
            if subprocess.run([cmake, *command], env=self.env).returncode:
                raise SystemExit(
                    "mla_ext: the compilation failed; the compiler's message is above. "
                    "MLA_EXT_BUILD=off installs without the compiled kernels."
                )

    def tool(self, name: str) -> str:
        """The path of a build tool; raises Missing where there is none."""
        path = shutil.which(name, path=self.env["PATH"])
        if path is None:
            raise Missing(
                f"building needs {name}, which was not found; run `pip install {name}`, "
                "or build without --no-build-isolation."
            )
        return path


if int(setuptools.__version__.split(".")[0]) < 77:  # older ones reject `license = "MIT"` with a page of text
    raise SystemExit(
        f"mla_ext: building needs setuptools >= 77, but {sys.executable} has {setuptools.__version__}; "
        "run `pip install --upgrade setuptools`, or build without --no-build-isolation."
    )
for stale in (SOURCE / "build").glob("lib*"):  # setuptools never removes from there what is gone from the sources
    shutil.rmtree(stale)
setuptools.setup(
    ext_modules=[] if build_mode() == "off" else [setuptools.Extension("mla_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": PythonBuild},
)
