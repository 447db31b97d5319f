"""Colab and Kaggle: the first cell of a notebook, the package next to what is installed there, and runs in a synced
folder such as Google Drive"""
import io, json, os, re, shutil, subprocess, sys, threading
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from packaging.version import Version
from PIL import Image
from safetensors.torch import load
from torch import nn

from cifar_cam import experiment
from cifar_cam.core import InputError
from cifar_cam.models import MODELS
from cifar_cam.recipe import Recipe
from cifar_cam.run import fit_run, load_run

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [ROOT/'nbs'/'000_tour.ipynb', *sorted((ROOT/'nbs'/'experiments').glob('*.ipynb'))]


def first_cell(notebook):
    cells = json.loads(notebook.read_text())['cells']
    return ''.join(next(c['source'] for c in cells if c['cell_type']=='code'))


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_for_colab_begin_with_the_same_cell(notebook):
    "All notebooks for Colab start with the same install cell, the one that the docs show"
    [repository] = re.findall('Repository = "(.*)"', (ROOT/'pyproject.toml').read_text())
    assert first_cell(notebook) in (ROOT/'docs'/'colab-kaggle-gpus.md').read_text()
    assert f"'git+{repository}'" in first_cell(notebook) and first_cell(notebook)==first_cell(NOTEBOOKS[0])


@pytest.mark.parametrize('pypi_has_it', [True, False])
def test_the_first_cell_installs_from_pypi_or_else_from_the_repository(pypi_has_it, monkeypatch):
    "The first cell installs from PyPI, or from the repository if PyPI does not have the package"
    asked = []
    def found(name): return object() if asked and (pypi_has_it or asked[-1].startswith('git+')) else None
    monkeypatch.setattr('importlib.util.find_spec', found)
    monkeypatch.setattr('subprocess.run', lambda command: asked.append(command[-1]))
    exec(first_cell(NOTEBOOKS[0]), {})
    assert asked==['cifar_cam', 'git+https://github.com/cifar-cam/cifar_cam'][:1 if pypi_has_it else 2]


def test_the_first_cell_installs_nothing_where_the_package_is(monkeypatch):
    "The first cell installs nothing if the package is already there"
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
    "With a recent enough fastai installed, `import cifar_cam` prints nothing and does not import fastai"
    pretend_fastai(site, version, '2.2.22')
    assert imported(site)==['False']


@pytest.mark.parametrize('version', ['2.8.8', '2.8', '2.8.2.post3', '1.0.61', '2.7.19'])
def test_beside_too_old_a_fastai_the_import_is_one_line_that_says_what_to_install(site, version):
    "With an older fastai, the import raises a one-line `ImportError` that gives the `pip install` command"
    pretend_fastai(site, version, '2.2.12')
    assert imported(site)==f"ImportError: cifar_cam needs fastai>=2.8.12, and {version} is installed: pip install 'fastai>=2.8.12'"


def test_beside_a_fastcore_that_is_too_old_for_fastai_too(site):
    "With a fastcore too old for the installed fastai, the `ImportError` gives the `pip install` command too"
    pretend_fastai(site, '2.8.12', '2.2.12')
    assert imported(site)=="ImportError: fastai needs fastcore>=2.2.22, and 2.2.12 is installed: pip install 'fastcore>=2.2.22'"


@pytest.mark.parametrize('package, old, new', [('fastai', '2.8.8', '2.8.12'), ('fastcore', '2.2.12', '2.2.41')])
def test_a_session_that_imported_the_old_one_before_it_was_raised_has_to_be_restarted(site, package, old, new):
    "If the session imported fastai or fastcore before you upgraded it, the error tells you to restart the session"
    pretend_fastai(site, '2.8.12', '2.2.41')
    first = f"import sys, types; sys.modules['{package}'] = types.ModuleType('{package}'); sys.modules['{package}'].__version__ = '{old}'"
    said = imported(site, first)
    assert said.startswith(f'ImportError: {package} {new} is installed, but this session imported {old} before') and 'restart' in said
    assert 'restart' not in imported(site, first.replace(f"'{old}'", f"'{new}'"))


def test_a_checkout_without_metadata_is_not_held_to_anything():
    "A source checkout without installed metadata imports without a version check"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import cifar_cam; print(cifar_cam.__version__)"
    done = subprocess.run([sys.executable, '-S', '-c', code], capture_output=True, text=True, env={'PATH': os.environ['PATH']})
    assert done.returncode==0 and done.stdout.strip(), done.stderr


# --- the workflows

def steps():
    "(workflow, job, the Pythons it runs on, its commands)"
    for f in sorted((ROOT/'.github'/'workflows').glob('*.yml')):
        for name,job in yaml.safe_load(f.read_text())['jobs'].items():
            [python] = [s['with']['python-version'] for s in job['steps'] if 'setup-python' in s.get('uses', '')]
            yield f.stem, name, job['strategy']['matrix']['python'] if 'matrix.python' in python else [python], [s['run'] for s in job['steps'] if 'run' in s]


def test_the_workflows_run_scripts_that_are_there_on_every_python_that_is_claimed():
    "The CI workflows run scripts that exist, on every Python version from the lowest supported one up"
    lowest = re.search('requires-python = ">=(.*)"', (ROOT/'pyproject.toml').read_text())[1]
    for workflow,job,pythons,commands in steps():
        for c in commands: assert os.access(ROOT/c.split()[0], os.X_OK), f'{workflow}, {job}: {c}'
    everything = next(pythons for w,j,pythons,commands in steps() if commands==['.ci/run'])
    assert everything[0]==lowest and everything==[f'3.{m}' for m in range(10, 10 + len(everything))]
    assert {c.split(' $')[0] for *_,commands in steps() for c in commands}=={'.ci/run', 'tests/versions.sh lowest', 'tests/versions.sh newest', 'tests/colab.sh python'}


def test_the_page_names_each_job_of_the_workflows():
    "The docs page on Colab, Kaggle and GPUs lists each CI job with its commands and Python versions"
    page = (ROOT/'docs'/'colab-kaggle-gpus.md').read_text()
    for workflow,job,pythons,commands in steps():
        [row] = [l for l in page.splitlines() if l.startswith(f'| {workflow}, {job} ')]
        for words in *commands, *(pythons[0], pythons[-1]): assert words.split(' $')[0] in row, row


def test_the_versions_of_colab_are_older_than_what_the_package_asks_for_or_fit():
    "Of the packages in the recorded list of Colab's versions, only fastai is older than `cifar_cam` requires"
    # Else the list is stale in the other direction: the first cell would change what the page says stays
    versions = dict(l.split('==') for l in (ROOT/'tests'/'colab-versions.txt').read_text().split() if '==' in l)
    asked = re.search('^requirements = (.*)', (ROOT/'settings.ini').read_text(), re.M)[1].split()
    too_old = {name for name,lowest in (r.split('>=') for r in asked if '>=' in r and ';' not in r)
               if name in versions and Version(versions[name]) < Version(lowest)}
    assert too_old=={'fastai'}


# --- a folder on Drive: a program copies what it sees there, whenever; a session ends; another goes on from the copy

RECIPE = dict(arch='tiny', epochs=4, bs=10, lr=.0005, schedule='plateau', patience=1, keep_best=True)
READ = {'.json': json.loads, '.csv': lambda b: pd.read_csv(io.BytesIO(b)), '.pt': lambda b: torch.load(io.BytesIO(b), weights_only=True),
        '.safetensors': load, '.png': lambda b: Image.open(io.BytesIO(b)).load(), '.html': lambda b: b.decode().rstrip().index('</html>'),
        '.txt': lambda b: b.decode().rindex('Estimated Total Size')} # torchinfo's last line but one


def tiny(n_out=10, norm='batch'):
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
                         nn.Dropout(.1), nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(200, n_out))


@pytest.fixture
def drive(tmp_path, monkeypatch):
    "The folder of runs on a Drive; no figures are drawn but by the one test that looks at them"
    monkeypatch.setitem(MODELS, 'tiny', tiny)
    monkeypatch.setattr(experiment, 'draw_run', lambda run: None)
    monkeypatch.setattr(experiment, 'write_report', lambda run: None)
    return tmp_path/'My Drive'/'runs'


def train(data, out):
    "Chosen by the test images, of which there are enough for the epochs to differ"
    return experiment.run_recipe(Recipe('drive', **RECIPE), data, out, published_protocol=True, device='cpu')


class Sync(threading.Thread):
    "Reads every file of a folder whose time or size is another than before, as a program does that copies to the cloud"
    def __init__(self, folder):
        super().__init__(daemon=True)
        self.folder,self.seen,self.copies,self.ended = folder,{},[],threading.Event()
    def run(self):
        while not self.ended.wait(.001): self.look()
    def look(self):
        for f in list(self.folder.rglob('*')):
            try:
                now = f.stat().st_mtime_ns,f.stat().st_size,f.stat().st_ino
                if f.is_dir() or f.name.startswith('.') or self.seen.get(f)==now: continue
                self.seen[f] = now
                self.copies.append((f.name, f.read_bytes()))
            except FileNotFoundError: pass # renamed between two looks


def test_whatever_a_program_that_syncs_reads_is_a_whole_file(colours, drive, monkeypatch):
    "A sync program that copies files during training reads whole files only, at any moment"
    monkeypatch.undo()
    monkeypatch.setitem(MODELS, 'tiny', tiny)
    drive.mkdir(parents=True)
    sync = Sync(drive)
    sync.start()
    try: run = train(colours, drive)
    finally:
        sync.ended.set()
        sync.join()
    sync.look()
    for name,data in sync.copies: READ[Path(name).suffix](data)
    assert {n for n,_ in sync.copies} >= {f.name for f in run.path.rglob('*') if f.is_file()}
    assert not list(drive.rglob('.*'))


def stop_after(monkeypatch, name, n):
    "As when Colab takes the machine back: nothing is written after the `n`th file of this name"
    replace,left = os.replace,[n]
    def mortal(src, dst):
        replace(src, dst)
        left[0] -= Path(dst).name==name
        if not left[0]: raise KeyboardInterrupt
    monkeypatch.setattr(os, 'replace', mortal)


def interrupted(colours, drive, monkeypatch, name='checkpoint.pt', n=2):
    with monkeypatch.context() as m:
        stop_after(m, name, n)
        with pytest.raises(KeyboardInterrupt): train(colours, drive)
    return next(drive.iterdir())


def same(run, whole):
    for f in 'metrics.json', 'weights.safetensors', 'best.safetensors': assert (run.path/f).read_bytes()==(whole.path/f).read_bytes(), f
    columns = ['epoch', 'train_loss', 'valid_loss', 'valid_accuracy', 'lr']
    pd.testing.assert_frame_equal(run.history[columns], whole.history[columns])


def test_a_new_session_goes_on_from_the_copy_that_drive_kept(colours, drive, tmp_path, monkeypatch):
    "A new session resumes from the copy on Google Drive to the numbers of an uninterrupted run"
    whole = train(colours, tmp_path/'whole')
    begun = interrupted(colours, drive, monkeypatch)
    other = tmp_path/'content'/'drive'/begun.name
    shutil.copytree(begun, other)
    shutil.rmtree(drive)
    for name in ('desktop.ini', 'history (1).csv', 'metrics (1).json', '.DS_Store'): (other/name).write_text('of the sync') # whatever lies there
    assert not load_run(other).finished and list(load_run(other).history.epoch)==[1, 2]
    same(experiment.run_or_resume(Recipe('drive', **RECIPE), colours, other, published_protocol=True, device='cpu'), whole)


@pytest.mark.parametrize('name', ['checkpoint.pt', 'history.csv', 'best.safetensors'])
def test_a_file_that_was_not_copied_in_time_changes_no_number_in_silence(colours, drive, tmp_path, monkeypatch, name):
    "If a file was not synced in time, resuming gives the same numbers or an `InputError` that names the file"
    # The machine was gone when the cloud had all of the last epoch but `name`, which is the first epoch's
    whole = train(colours, tmp_path/'whole')
    begun = interrupted(colours, drive, monkeypatch, n=1)
    first = (begun/name).read_bytes()
    with monkeypatch.context() as m:
        stop_after(m, 'checkpoint.pt', RECIPE['epochs'] - 1)
        with pytest.raises(KeyboardInterrupt): fit_run(begun)
    (begun/name).write_bytes(first)
    try: run = fit_run(begun)
    except InputError as e: assert name in str(e)
    else: same(run, whole)
