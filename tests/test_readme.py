"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(code):
    torch.manual_seed(0)
    exec(compile(code, str(README), "exec"), {})


def test_the_drop_in_example_has_ten_lines():
    assert len([line for line in BLOCKS[0].splitlines() if line]) <= 10
