"""Links a library on a new Linux so that it runs on an old one: the symbols of glibc 2.28 and of GCC 8's libstdc++.

The linker takes the newest version of a symbol that it finds. So it is shown libraries of glibc 2.28, which Zig makes
(`pip install ziglang`): they hold names and versions, and no code. The few things of a newer libstdc++ are compiled
into the library. GCC's toolsets in the manylinux containers do the same.
"""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

GLIBC = (2, 28)  # PyTorch's own wheels need it

# What GCC's headers call and GCC 8's libstdc++ does not have.
NEWER = """
#include <sstream>

extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;  // false: count atomically
}

namespace std {
void __throw_bad_array_new_length() { __throw_bad_alloc(); }
}  // namespace std

template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();
"""


def is_newer() -> bool:
    """Whether this machine's glibc is newer than what the wheels are for."""
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(map(int, version.split("."))) > GLIBC


def environment(python: Path, folder: Path, compiler: str) -> dict[str, str]:
    """The variables of a build for old systems; `python` has ziglang, and `folder` takes the files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty.c").write_text("")
    (folder / "newer.cpp").write_text(NEWER)
    target = f"x86_64-linux-gnu.{'.'.join(map(str, GLIBC))}"
    zig = [python, "-m", "ziglang", "cc", "-target", target, "-shared", "-o", "empty.so", "empty.c"]
    cache = {"ZIG_GLOBAL_CACHE_DIR": str(folder / "cache"), "ZIG_LOCAL_CACHE_DIR": str(folder / "cache")}
    subprocess.run(zig, cwd=folder, env={**os.environ, **cache}, check=True)
    libm = max((folder / "cache").glob("o/*/libm.so.6"), key=lambda path: path.stat().st_mtime)
    static = subprocess.check_output([compiler, "-print-file-name=libc_nonshared.a"], text=True).strip()
    for name in ("libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"):
        beside = static if name == "libc.so.6" else ""  # the part of libc that is never in the shared library
        script = folder / f"{name.partition('.')[0]}.so"  # as -l looks for it
        script.write_text(f"GROUP({libm.with_name(name)} {beside})\n")
    newer = folder / "newer.o"
    subprocess.run([compiler, "-O2", "-fPIC", "-c", folder / "newer.cpp", "-o", newer], check=True)
    toolchain = folder / "toolchain.cmake"  # for the libraries alone: with this no program can be linked
    toolchain.write_text(f'set(CMAKE_MODULE_LINKER_FLAGS_INIT "-L{folder} {newer}")\n')
    return {"CMAKE_TOOLCHAIN_FILE": str(toolchain)}
