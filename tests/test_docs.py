"""Every Python block in the README and the guides runs as it stands."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL))
]


@pytest.mark.filterwarnings("ignore")  # other libraries' own
@pytest.mark.parametrize("code", BLOCKS)
def test_blocks_run(code, tmp_path, monkeypatch):
    needs = re.match(r"# needs: (\w+)", code)
    if needs and importlib.util.find_spec(needs[1]) is None:
        pytest.skip(f"{needs[1]} is not installed")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, "documentation", "exec"), {"__name__": "documentation"})


def test_the_drop_in_example_has_ten_lines():
    first = BLOCKS[0].values[0]
    assert "ProjectedSGD" in first and len([line for line in first.splitlines() if line]) <= 10


def test_the_table_of_features_names_tests_that_exist():
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    names = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "drop_in.md").read_text(encoding="utf-8")))
    assert len(names) > 20
    assert {name for name in names if f"def {name}(" not in tests} == set()
