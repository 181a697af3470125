"""The package as people get it: sdist, wheel, what is in them, and what they say when something is missing."""

import email
import json
import os
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import run

import mla_ext
from mla_ext import _library

ROOT = Path(__file__).resolve().parents[1]


def python(code, *path):
    return run(sys.executable, "-c", code, PYTHONPATH=os.pathsep.join(map(str, path)), cwd=path[0])


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    result = run(sys.executable, "-c", code, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    (archive,) = folder.iterdir()
    return archive


def unpack(sdist, folder):
    assert run("tar", "-xf", sdist, "-C", folder).returncode == 0
    (source,) = folder.iterdir()
    return source


@pytest.fixture(scope="module")
def built(sdist, tmp_path_factory):
    """The unpacked sdist that the wheel is built in."""
    return unpack(sdist, tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    """An unpacked sdist in which builds are tried that fail."""
    return unpack(sdist, tmp_path_factory.mktemp("unpacked"))


@pytest.mark.skipif("MLA_EXT_INSTALLED" not in os.environ, reason="for `make test`, which installs the package")
def test_these_are_tests_of_the_installed_package():
    installed = Path(sysconfig.get_path("platlib"))
    assert Path(mla_ext.__file__).is_relative_to(installed)
    measured = run(sys.executable, "-c", "import benchmarks, mla_ext; print(mla_ext.__file__)", cwd=ROOT)
    assert Path(measured.stdout.strip()).is_relative_to(installed), measured.stderr


def build_wheel(source, folder, **environment):
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder]
    return run(sys.executable, "-m", "pip", "wheel", *options, source, **{"MLA_EXT_CUDA": "off", **environment})


@pytest.fixture(scope="module")
def wheel(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    library = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    write(built / "build" / library / "mla_ext" / "removed.py", "")  # a module of an earlier build
    result = build_wheel(built, folder)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--no-index", "--target", folder]
    result = run(sys.executable, "-m", "pip", "install", *options, wheel)
    assert result.returncode == 0, result.stderr
    return folder


def python_files(folder):
    return {str(path.relative_to(folder)) for path in (folder / "mla_ext").rglob("*.py")}


def test_sdist_holds_the_sources_and_no_build_products(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile", "constraints.txt", "LICENSE"}
    expected |= {"mla_ext/py.typed", "csrc/bindings/module.cpp", "tests/test_packaging.py"} | python_files(ROOT)
    assert expected <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build.json")) or name.startswith("build")]


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    libraries = {name for name in names if name.startswith("mla_ext/_C.") and name.endswith(".so")}
    assert len(libraries) == 1
    assert names - libraries == python_files(ROOT) | {"mla_ext/py.typed", "mla_ext/_build.json"}


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    assert (metadata["Name"], metadata["Version"]) == ("mla_ext", mla_ext.__version__)
    assert metadata["License-Expression"] == "MIT"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Summary"]
    required = [value for value in metadata.get_all("Requires-Dist") if "extra ==" not in value]
    assert required == ["torch>=2.4", "numpy", "tqdm"]
    assert set(metadata.get_all("Provides-Extra")) == {"demo", "prepare", "test", "lint", "docs", "vision", "text"}
    entry_points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert entry_points.split() == ["[console_scripts]", "mla-ext", "=", "mla_ext.multimodal.cli:main"]


def test_installed_wheel_runs_its_compiled_operations(installed):
    code = """
import json, torch, mla_ext
from mla_ext import ops
logits = torch.randn(3, 5, 4)
ours, plain = (ops.entropy_fusion(logits, backend=name)[0] for name in ("cpu", "reference"))
same = torch.allclose(ours, plain, atol=1e-5)
print(json.dumps([mla_ext.__file__, bool(same), mla_ext.build_info()]))
"""
    result = python(code, installed)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    file, same, info = json.loads(result.stdout)
    assert Path(file).is_relative_to(installed)
    assert same
    assert info["version"] == mla_ext.__version__
    assert info["cuda"] is None and info["archs"] == []
    assert info["cpu_isa"] in ("baseline", "avx2", "avx512")
    assert {"cpu", "reference"} <= set(info["backends"])
    assert info["torch"] and info["compiler"]


def test_kernels_share_no_code_between_instruction_sets(wheel, built):
    """The linker keeps one copy of an inline function: were it AVX-512's, the library would fail on other CPUs."""
    objects = list(built.glob("build/cmake-*/CMakeFiles/kernels_*.dir/csrc/cpu/kernels.cpp.o"))
    assert objects
    for path in objects:
        isa = path.parents[2].name.removeprefix("kernels_").removesuffix(".dir")
        symbols = run("nm", "--defined-only", "--demangle", path).stdout.splitlines()
        functions = [symbol.split(maxsplit=2)[2] for symbol in symbols if symbol.split()[1] in "WTu"]
        assert functions
        assert [name for name in functions if f"mla_ext::cpu::{isa}::" not in name] == []


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def fake_torch(folder, version, cuda=None):
    write(folder / "torch" / "__init__.py", "from .version import __version__")
    write(folder / "torch" / "version.py", f"__version__ = {version!r}\ncuda = {cuda!r}")


def fails_to_build(unpacked, tmp_path, mode="require", **environment):
    """What the build prints when it cannot be done, with tmp_path ahead of the installed packages."""
    environment |= {"PYTHONPATH": str(tmp_path), "MLA_EXT_BUILD": mode}
    result = run(sys.executable, "setup.py", "build_ext", cwd=unpacked, **environment)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result.stderr


def installs_without_kernels(unpacked, tmp_path, **environment):
    """What the build writes into _build.json where something is missing; it has said the same."""
    build = tmp_path / "build"
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", build]
    result = run(*command, cwd=unpacked, PYTHONPATH=str(tmp_path), **{"MLA_EXT_BUILD": "auto", **environment})
    assert result.returncode == 0, result.stderr
    (note,) = (path for path in build.rglob("*") if path.is_file())
    assert note.relative_to(build) == Path("mla_ext/_build.json")
    (missing,) = json.loads(note.read_text()).values()
    assert result.stderr.count("mla_ext: installing without the compiled kernels") == 1
    assert f"To have them: {missing}" in result.stderr and "MLA_EXT_BUILD=require" in result.stderr
    return missing


def test_build_without_torch_says_so_through_pip(unpacked, tmp_path):
    write(tmp_path / "sitecustomize.py", "import sys; sys.modules['torch'] = None")
    result = build_wheel(unpacked, tmp_path / "wheel", PYTHONPATH=str(tmp_path), MLA_EXT_BUILD="require")
    assert result.returncode != 0
    output = result.stdout + result.stderr
    assert "Traceback" not in output
    assert "mla_ext: building needs PyTorch >= 2.10, which" in output
    assert "does not have; run `pip install torch`" in output


def test_build_with_an_old_torch(unpacked, tmp_path):
    fake_torch(tmp_path, "2.9.1+cpu")
    output = fails_to_build(unpacked, tmp_path)
    assert "mla_ext: building needs PyTorch >= 2.10, but" in output
    assert "has 2.9.1+cpu; run `pip install --upgrade torch`" in output
    missing = installs_without_kernels(unpacked, tmp_path)
    assert missing in " ".join(output.split()) and missing.endswith("run `pip install --upgrade torch`.")


def test_build_without_a_compiler(unpacked, tmp_path):
    output = fails_to_build(unpacked, tmp_path, CXX="/nonexistent/c++")
    assert "mla_ext: building needs a C++17 compiler and found none that works; install g++ or clang++" in output
    assert "found none that works" in fails_to_build(unpacked, tmp_path, "auto", CXX="/nonexistent/c++")  # it was named
    missing = installs_without_kernels(unpacked, tmp_path, PATH=str(tmp_path), CXX="")
    assert missing.startswith("building needs a C++17 compiler, and none was found; install g++ or clang++")


def test_a_compiler_that_rejects_the_sources(unpacked, tmp_path):
    """It is there, so nothing is quietly left out."""
    compiler = tmp_path / "c++"
    write(compiler, '#!/bin/sh\ncase "$*" in *csrc*) echo no such thing >&2; exit 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    output = fails_to_build(unpacked, tmp_path, "auto", MLA_EXT_CUDA="off", CXX=str(compiler))
    assert "mla_ext: the compilation failed" in output and "MLA_EXT_BUILD=off installs without" in output


def test_an_unknown_build_mode(unpacked, tmp_path):
    output = fails_to_build(unpacked, tmp_path, "yes")
    assert "mla_ext: MLA_EXT_BUILD: expected auto, require or off, got 'yes'" in output


def test_who_asks_for_cuda_requires_a_build(unpacked, tmp_path):
    fake_torch(tmp_path, "2.9.1+cpu")
    output = fails_to_build(unpacked, tmp_path, "auto", MLA_EXT_CUDA="on")
    assert "mla_ext: building needs PyTorch >= 2.10, but" in output


def test_a_wheel_without_kernels(unpacked, tmp_path):
    """It needs no compiler, fits every platform, and holds the Python part alone."""
    result = build_wheel(unpacked, tmp_path / "wheel", MLA_EXT_BUILD="off", PATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    (wheel,) = (tmp_path / "wheel").iterdir()
    assert wheel.name == f"mla_ext-{mla_ext.__version__}-py3-none-any.whl"
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == python_files(ROOT) | {"mla_ext/py.typed", "mla_ext/_build.json"}
    zipfile.ZipFile(wheel).extractall(tmp_path / "here")
    reason = (
        "it was installed without its compiled kernels: this build has none (MLA_EXT_BUILD=off); unset that, if you "
        "set it, then install"
    )
    assert reason in python(USE_REFERENCE, tmp_path / "here").stderr


@pytest.mark.parametrize("tool", ["cmake", "ninja"])
def test_build_without_tool(unpacked, tmp_path, tool):
    hide = (
        f"import shutil; which = shutil.which; shutil.which = lambda n, **k: None if n == {tool!r} else which(n, **k)"
    )
    write(tmp_path / "sitecustomize.py", hide)
    output = fails_to_build(unpacked, tmp_path)
    assert f"mla_ext: building needs {tool}, which was not found; run `pip install {tool}`" in output
    assert installs_without_kernels(unpacked, tmp_path).startswith(f"building needs {tool}, which was not found")


def test_build_with_cuda_but_no_nvcc(unpacked, tmp_path):
    output = fails_to_build(unpacked, tmp_path, MLA_EXT_CUDA="on", CUDACXX="/nonexistent/nvcc")
    assert "mla_ext: MLA_EXT_CUDA=on, but no nvcc that works was found; install the CUDA toolkit" in output


def test_build_with_an_unknown_cuda_choice(unpacked, tmp_path):
    assert "MLA_EXT_CUDA: expected auto, on or off, got 'yes'" in fails_to_build(unpacked, tmp_path, MLA_EXT_CUDA="yes")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_build_with_another_cuda_than_torch(unpacked, tmp_path):
    fake_torch(tmp_path, "2.10.0", cuda="11.8")
    write(tmp_path / "torch" / "lib" / "libtorch_cpu.so", "")
    output = fails_to_build(unpacked, tmp_path, MLA_EXT_CUDA="auto")
    assert "mla_ext: nvcc is of CUDA" in output
    assert "but PyTorch 2.10.0 is built for CUDA 11.8; set CUDA_HOME to a CUDA 11 toolkit" in output


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_build_with_an_unknown_gpu_architecture(unpacked, tmp_path):
    output = fails_to_build(unpacked, tmp_path, MLA_EXT_CUDA="on", TORCH_CUDA_ARCH_LIST="9.0;Hopper")
    assert "TORCH_CUDA_ARCH_LIST: expected a list like '8.0;9.0a;10.0+PTX', got 'Hopper'" in output


def test_import_with_an_old_torch(installed, tmp_path):
    fake_torch(tmp_path, "2.3.1+cpu")
    result = python("import mla_ext", tmp_path, installed)
    assert "ImportError: mla_ext needs PyTorch >= 2.4, but 2.3.1+cpu is installed" in result.stderr


USE_REFERENCE = """
import torch, mla_ext
from mla_ext import ops
assert ops.entropy_fusion(torch.zeros(2, 3, 4))[0].shape == (3, 4)
assert mla_ext.build_info()["backends"] == ["reference"], mla_ext.build_info()
assert mla_ext.build_info()["cpu_isa"] is None
try:
    ops.entropy_fusion(torch.zeros(2, 3, 4), backend="cpu")
except RuntimeError as error:
    print(error)
"""


def copy_without_libraries(folder):
    shutil.copytree(ROOT / "mla_ext", folder / "mla_ext", ignore=shutil.ignore_patterns("_C*.so", "_build.json"))


@pytest.mark.parametrize("note", [None, "torn", "[]", '{"torch": "2.13.0", "cuda": null}'])
def test_unbuilt_checkout_works_on_the_reference_and_warns_once(tmp_path, note):
    """Nor does a note help that is damaged, or of a build of before there could be several CUDA libraries."""
    copy_without_libraries(tmp_path)
    if note is not None:
        (tmp_path / "mla_ext" / "_build.json").write_text(note)
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    result = python(USE_REFERENCE, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("Warning: ") == 1
    reason = f"{tmp_path / 'mla_ext'} holds no compiled library with its _build.json; run `pip install -e {tmp_path}`"
    assert f"RuntimeWarning: mla_ext runs on its slower PyTorch reference: {reason}" in result.stderr
    assert reason in result.stdout


@pytest.mark.parametrize(
    ("version", "facts", "reason"),
    [
        (
            "2.4.1+cu121",
            {},
            "need PyTorch >= 2.10, and 2.4.1+cu121 is installed; run `pip install --upgrade torch`, then ",
        ),
        ("2.9.1", {"torch": "2.13.0"}, "and 2.9.1 is installed; run `pip install --upgrade torch`"),
        (
            "2.13.0",
            {"missing": "no compiler; install one."},
            "without its compiled kernels: no compiler; install one, then ",
        ),
        ("2.10.0", {}, "holds no compiled library"),
        ("2.10.0", {"torch": "2.13.0"}, None),
        ("nightly", {"torch": "2.13.0"}, None),
    ],
)
def test_whether_there_are_kernels_to_load(version, facts, reason):
    found = _library.nothing_to_load(facts, version)
    assert found is None if reason is None else reason in found


def test_an_installation_without_kernels_says_so_at_first_use(tmp_path):
    """Not at import, and not again; the note of the build tells why."""
    copy_without_libraries(tmp_path)
    note = {"missing": "building needs a C++17 compiler, and none was found; install g++ or clang++."}
    (tmp_path / "mla_ext" / "_build.json").write_text(json.dumps(note))
    result = python("import mla_ext, mla_ext.multimodal.cli", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    result = python(USE_REFERENCE, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("Warning: ") == 1
    assert "without its compiled kernels: building needs a C++17 compiler, and none was found" in result.stderr
    assert "install g++ or clang++, then install mla_ext again in this environment" in result.stdout


def truncated(library, facts):
    library.write_bytes(library.read_bytes()[:5000])


def missing(library, facts):
    library.unlink()


def of_another_python(library, facts):
    library.rename(library.with_name("_C.cpython-39-x86_64-linux-gnu.so"))
    facts["python"] = "3.9.1"


def of_another_processor(library, facts):
    content = bytearray(library.read_bytes())
    content[18:20] = b"\xf3\x00"  # e_machine of an ELF file: RISC-V
    library.write_bytes(content)
    facts["platform"] = "Linux riscv64"


def of_a_newer_torch(library, facts):
    library.write_bytes(library.read_bytes().replace(b"aoti_torch_", b"aoti_later_"))
    facts["torch"] = "2.99.0"


def copy_installed(installed, folder):
    """A copy of the package to damage, its library, and what _build.json says of it."""
    shutil.copytree(installed / "mla_ext", folder / "mla_ext")
    (library,) = (folder / "mla_ext").glob("_C.*.so")
    return library, json.loads((folder / "mla_ext" / "_build.json").read_text())


@pytest.mark.parametrize("damage", [truncated, missing, of_another_python, of_another_processor, of_a_newer_torch])
def test_library_that_cannot_be_loaded_says_what_it_was_built_for(installed, tmp_path, damage):
    library, facts = copy_installed(installed, tmp_path)
    damage(library, facts)
    (tmp_path / "mla_ext" / "_build.json").write_text(json.dumps(facts))
    result = python(USE_REFERENCE, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("Warning: ") == 1
    built = f"Python {facts['python']}, PyTorch {facts['torch']}, no CUDA on {facts['platform']}"
    assert f"built for {built}, this is Python {sys.version.split()[0]}, PyTorch {torch.__version__}" in result.stderr
    assert "install mla_ext again in this environment" in result.stderr
    assert "install mla_ext again in this environment" in result.stdout  # and so says the backend that was asked for


def test_facts_that_cannot_be_read(installed, tmp_path):
    copy_installed(installed, tmp_path)
    (tmp_path / "mla_ext" / "_build.json").write_text('{"python": ')
    result = python(USE_REFERENCE, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("Warning: ") == 1
    assert "holds no compiled library with its _build.json" in result.stderr


CUDA_LIBRARY_FAILS = """
import torch
torch.version.cuda = "13.0"
import mla_ext
print(mla_ext.build_info()["backends"])
mla_ext.entropy_fusion(torch.zeros(2, 3, 4), backend="cpu")
"""


def test_a_cuda_library_that_fails_leaves_the_cpu_library(installed, tmp_path):
    _, facts = copy_installed(installed, tmp_path)
    (tmp_path / "mla_ext" / "_build.json").write_text(json.dumps({**facts, "cuda": {"13.2": ["sm_90"]}}))
    (tmp_path / "mla_ext" / "_C_cuda13.so").write_bytes(b"not a library")
    result = python(CUDA_LIBRARY_FAILS, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("Warning: ") == 1
    assert "mla_ext runs without its CUDA kernels: its library was built for" in result.stderr
    assert f"PyTorch {facts['torch']}, CUDA 13.2 on" in result.stderr
    assert f"PyTorch {torch.__version__}, CUDA 13.0 on" in result.stderr
    assert "'cpu'" in result.stdout


def test_make_refuses_an_old_python(tmp_path):
    old = tmp_path / "python"
    write(old, '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.2 && exit 0\nexit 1\n')
    old.chmod(0o755)
    result = run("make", f"PYTHON={old}", f"VENV={tmp_path}/venv", f"{tmp_path}/venv/bin/python", cwd=ROOT)
    assert result.returncode != 0
    assert f"mla_ext needs Python >= 3.10, but PYTHON={old} is: Python 3.8.2" in result.stderr
    assert not (tmp_path / "venv").exists()
