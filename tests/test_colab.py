"Colab and Kaggle: the first cell of a notebook, the package beside what is installed there, runs in a folder that is synced"
import json, os, re, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [ROOT/'nbs'/'000_tour.ipynb'] + [p for p in sorted((ROOT/'nbs'/'experiments').glob('*.ipynb')) if p.stem!='speed']


def first_cell(notebook):
    cells = json.loads(notebook.read_text())['cells']
    return ''.join(next(c['source'] for c in cells if c['cell_type']=='code'))


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_for_colab_begin_with_the_same_cell(notebook):
    [repository] = re.findall('Repository = "(.*)"', (ROOT/'pyproject.toml').read_text())
    assert f"'git+{repository}'" in first_cell(notebook) and first_cell(notebook)==first_cell(NOTEBOOKS[0])


@pytest.mark.parametrize('pypi_has_it', [True, False])
def test_the_first_cell_installs_from_pypi_or_else_from_the_repository(pypi_has_it, monkeypatch):
    asked = []
    def found(name): return object() if asked and (pypi_has_it or asked[-1].startswith('git+')) else None
    monkeypatch.setattr('importlib.util.find_spec', found)
    monkeypatch.setattr('subprocess.run', lambda command: asked.append(command[-1]))
    exec(first_cell(NOTEBOOKS[0]), {})
    assert asked==['cifar_cam', 'git+https://github.com/cifar-cam/cifar_cam'][:1 if pypi_has_it else 2]


def test_the_first_cell_installs_nothing_where_the_package_is(monkeypatch):
    monkeypatch.setattr('subprocess.run', lambda command: pytest.fail('pip was run'))
    exec(first_cell(NOTEBOOKS[0]), {})


def pretend_installed(site, **versions):
    for name,v in versions.items():
        info = site/f'{name}-{v}.dist-info'
        info.mkdir(parents=True)
        (info/'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {v}\n')
        (info/'INSTALLER').write_text('pip\n')
        (info/'RECORD').write_text('')


def imported(site, first=''):
    "What an import of the package says, with the packages that `site` pretends to have in front of the real ones"
    code = f"{first}\nimport cifar_cam, sys\nprint('fastai' in sys.modules)"
    path = os.pathsep.join([str(site), str(ROOT)])
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': path})
    return done.stdout.split() or done.stderr.strip().splitlines()[-1]


@pytest.fixture
def site(tmp_path):
    "Pretends that cifar_cam and fastai are installed with what they ask for; the tests add versions"
    pretend_installed(tmp_path, cifar_cam='0.1.0')
    with open(tmp_path/'cifar_cam-0.1.0.dist-info'/'METADATA', 'a') as f:
        f.write('Requires-Dist: fastai>=2.8.12\nRequires-Dist: fastai-tools>=9; extra == "dev"\n')
    return tmp_path


def pretend_fastai(site, version, fastcore):
    pretend_installed(site, fastai=version, fastcore=fastcore)
    with open(site/f'fastai-{version}.dist-info'/'METADATA', 'a') as f: f.write('Requires-Dist: fastcore<3,>=2.2.22\n')


@pytest.mark.parametrize('version', ['2.8.12', '2.8.12.post1', '2.10', '3.0rc1', '2.8.12.dev0'])
def test_beside_a_new_enough_fastai_the_import_is_quiet_and_imports_no_fastai(site, version):
    pretend_fastai(site, version, '2.2.22')
    assert imported(site)==['False']


@pytest.mark.parametrize('version', ['2.8.8', '2.8', '2.8.2.post3', '1.0.61', '2.7.19'])
def test_beside_too_old_a_fastai_the_import_is_one_line_that_says_what_to_install(site, version):
    pretend_fastai(site, version, '2.2.12')
    assert imported(site)==f"ImportError: cifar_cam needs fastai>=2.8.12, and {version} is installed: pip install 'fastai>=2.8.12'"


def test_beside_a_fastcore_that_is_too_old_for_fastai_too(site):
    pretend_fastai(site, '2.8.12', '2.2.12')
    assert imported(site)=="ImportError: fastai needs fastcore>=2.2.22, and 2.2.12 is installed: pip install 'fastcore>=2.2.22'"


@pytest.mark.parametrize('package, old, new', [('fastai', '2.8.8', '2.8.12'), ('fastcore', '2.2.12', '2.2.41')])
def test_a_session_that_imported_the_old_one_before_it_was_raised_has_to_be_restarted(site, package, old, new):
    pretend_fastai(site, '2.8.12', '2.2.41')
    first = f"import sys, types; sys.modules['{package}'] = types.ModuleType('{package}'); sys.modules['{package}'].__version__ = '{old}'"
    said = imported(site, first)
    assert said.startswith(f'ImportError: {package} {new} is installed, but this session imported {old} before') and 'restart' in said
    assert 'restart' not in imported(site, first.replace(f"'{old}'", f"'{new}'"))


def test_a_checkout_without_metadata_is_not_held_to_anything():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import cifar_cam; print(cifar_cam.__version__)"
    done = subprocess.run([sys.executable, '-S', '-c', code], capture_output=True, text=True, env={'PATH': os.environ['PATH']})
    assert done.returncode==0 and done.stdout.strip(), done.stderr
