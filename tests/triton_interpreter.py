"""Makes Triton's interpreter (TRITON_INTERPRET=1) as accurate as a GPU; as a pytest plugin, for the parity suite."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float


def _convert_float(data, source, target, rounding_mode):
    """Every GPU rounds float32 to the nearest bfloat16; the interpreter would cut it off."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert(data, source, target, rounding_mode)
    with np.errstate(all="ignore"):
        rounded = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16)


def install():
    interpreter._convert_float = _convert_float


def pytest_configure(config):
    install()
    # NumPy, on the values that a kernel masks out.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")
