import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from cifar_cam.models import MODELS

ROOT = Path(__file__).parents[1]


def test_the_notebook_code_of_readme_runs(shapes, narrow, tmp_path, monkeypatch):
    [code] = re.findall(r'```python\n(.*?)```', (ROOT/'README.md').read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    assert 'def ' not in code and 'class ' not in code and code.count("'shapes'") == 1
    monkeypatch.setitem(MODELS, 'davidnet', narrow)
    exec(code.replace("'shapes'", repr(str(shapes))), {})
    plt.close('all')


def test_the_files_that_readme_points_to_are_there():
    for link in re.findall(r'\]\(([^)#]+)\)', (ROOT/'README.md').read_text()):
        if '://' not in link: assert (ROOT/link).exists(), link
