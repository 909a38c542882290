"""What the README and the docstrings show runs as shown."""

import doctest
import re
from pathlib import Path

import pytest

from skvi.estimators import gmm, linear, logistic, vae

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["mixture", "autoencoder", "linear", "logistic"])
def test_readme(block, capsys):
    assert len(block.strip().splitlines()) <= 18
    exec(compile(block, str(README), "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("module", [gmm, linear, logistic, vae], ids=lambda module: module.__name__)
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_guide_examples():
    result = doctest.testfile(str(ROOT / "docs" / "guide.md"), module_relative=False)
    assert result.attempted > 0
    assert result.failed == 0
