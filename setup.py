"""Drives CMakeLists.txt, the only build definition. Everything else about the package is in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).resolve().parent
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


class CMakeBuild(build_ext):
    """Configures, builds and installs the libraries beside the package's modules."""

    def run(self) -> None:
        # cmake and ninja from pip lie beside the interpreter, off the PATH of an environment that is not activated.
        self.env = {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])}
        cmake = self.tool("cmake")
        self.tool("ninja")

        package = Path(self.get_ext_fullpath("mla_ext._C")).resolve().parent
        build = SOURCE / "build" / f"cmake-{sys.implementation.cache_tag}"
        # A cache from another environment names compilers, tools and libraries that may be gone: then start afresh.
        cache_key = build / "environment.txt"
        environment = "\n".join([sys.executable, *(f"{name}={os.environ.get(name)}" for name in CACHED)])
        same = cache_key.is_file() and cache_key.read_text() == environment
        cache_key.unlink(missing_ok=True)
        configure = [cmake, "-G", "Ninja", "-S", SOURCE, "-B", build, f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [] if same else ["--fresh"]
        result = subprocess.run(configure, env=self.env, stderr=subprocess.PIPE, text=True)
        if result.returncode:
            sentence = re.search(r"mla_ext: .*?(?=\n\s*\n)", result.stderr, re.DOTALL)
            raise SystemExit(" ".join(sentence[0].split()) if sentence else result.stderr)
        cache_key.write_text(environment)
        sys.stderr.write(result.stderr)
        for command in (["--build", build, "-j", jobs()], ["--install", build, "--strip", "--prefix", package]):
            if subprocess.run([cmake, *command], env=self.env).returncode:
                raise SystemExit("mla_ext: the compilation failed; the compiler's message is above.")

    def tool(self, name: str) -> str:
        """The path of a build tool; ends the build with one sentence where it is missing."""
        path = shutil.which(name, path=self.env["PATH"])
        if path is None:
            raise SystemExit(
                f"mla_ext: building needs {name}, which was not found; run `pip install {name}`, "
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
    ext_modules=[setuptools.Extension("mla_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
