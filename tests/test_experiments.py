"The notebooks of the published experiments, from top to bottom, on drawn images: one line of each is changed"
import ast, json, re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from cifar_cam import images
from cifar_cam.core import InputError
from cifar_cam.models import MODELS
from cifar_cam.experiment import run_recipe
from cifar_cam.shapes import shapes_path

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT/'nbs'/'experiments').glob('*.ipynb'))


def code(notebook):
    "The code cells of a notebook, IPython's magics replaced by `pass`"
    cells = [c['source'] for c in json.loads(notebook.read_text())['cells'] if c['cell_type']=='code']
    return [''.join(re.sub(r'^( *)%.*', r'\1pass', l) for l in c) for c in cells]


@pytest.mark.parametrize('notebook', NOTEBOOKS + [ROOT/'nbs'/'000_tour.ipynb'], ids=lambda p: p.stem)
def test_a_notebook_of_calls_has_no_definition(notebook):
    for cell in code(notebook):
        assert not any(isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Lambda)) for n in ast.walk(ast.parse(cell)))


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_an_experiment_opens_in_colab_and_installs_only_when_needed(notebook):
    [repository] = re.findall('Repository = "https://github.com/(.*)"', (ROOT/'pyproject.toml').read_text())
    assert f'https://colab.research.google.com/github/{repository}/blob/main/nbs/experiments/{notebook.name}' in notebook.read_text()
    assert code(notebook)[0]==code(ROOT/'nbs'/'000_tour.ipynb')[0] and f"'git+https://github.com/{repository}'" in code(notebook)[0]


@pytest.mark.parametrize('notebook', [pytest.param(o, marks=() if o.stem=='davidnet' else pytest.mark.slow) for o in NOTEBOOKS], ids=lambda p: p.stem)
def test_an_experiment_runs_on_drawn_images_by_one_changed_line(notebook, narrow, tmp_path, tmp_path_factory, monkeypatch):
    if notebook.stem=='resnet18-onecycle': pytest.importorskip('tensorboard')
    home = tmp_path_factory.getbasetemp()/'fastai'
    monkeypatch.setattr(images, 'shapes_path', lambda: shapes_path(home, n_train=600, n_test=100))
    for arch in 'resnet18', 'davidnet': monkeypatch.setitem(MODELS, arch, narrow)
    monkeypatch.chdir(tmp_path)
    cells,names = code(notebook),{}
    [line] = re.findall(r"data, epochs = 'cifar10', \w+", '\n'.join(cells))
    for c in cells:
        exec(c.replace(line, "data, epochs = 'shapes', 1"), names)
        plt.close('all')
    run = names['run']
    assert run.finished and run.recipe.name==notebook.stem and run.metrics['images']==100 and run.published is None
    assert run.path.parent==Path('runs') and (run.path/'tensorboard').exists()==(notebook.stem=='resnet18-onecycle')


def test_the_tour_runs_with_a_narrow_network(narrow, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, 'davidnet', narrow)
    monkeypatch.chdir(tmp_path)
    names = {}
    for c in code(ROOT/'nbs'/'000_tour.ipynb'):
        exec(c.replace('fit_one_cycle(24', 'fit_one_cycle(2').replace('pct_start=5/24', 'pct_start=1/2'), names)
        plt.close('all')
    assert len(names['interp'].preds)==100 and names['learn'].epochs_done==2


def test_tensorboard_shows_the_losses_and_the_learning_rate(shapes, narrow, tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    monkeypatch.setitem(MODELS, 'resnet18', narrow)
    run = run_recipe('resnet18-onecycle', shapes, tmp_path, tensorboard=True, epochs=2, lr=.01, bs=50)
    logs = event_accumulator.EventAccumulator(str(run.path/'tensorboard')).Reload()
    values = {tag: [e.value for e in logs.Scalars(tag)] for tag in logs.Tags()['scalars']}
    assert len(values['train_loss'])==len(values['lr_0'])==2*len(run.dls.train)
    assert max(values['lr_0'])==pytest.approx(.01, rel=.1)
    assert values['valid_loss']==pytest.approx(list(run.history.valid_loss), rel=1e-4) and len(values['accuracy'])==2


def test_weights_and_biases_gets_each_step_and_each_epoch(shapes, narrow, tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setitem(MODELS, 'resnet18', narrow)
    logged,init = [],wandb.init
    def begin(**kwargs):
        run = init(**kwargs)
        log = run.log
        monkeypatch.setattr(run, 'log', lambda numbers, step: (logged.append((step, numbers)), log(numbers, step=step)))
        return run
    monkeypatch.setattr(wandb, 'init', begin)
    run = run_recipe('resnet18-onecycle', shapes, tmp_path, wandb=True, epochs=2, lr=.01, bs=50)
    steps = [n for _,n in logged if 'valid_loss' not in n]
    rows = [n for _,n in logged if 'valid_loss' in n]
    assert len(steps)==2*len(run.dls.train) and max(n['lr'] for n in steps)==pytest.approx(.01, rel=.1)
    assert [n['valid_loss'] for n in rows]==pytest.approx(list(run.history.valid_loss), rel=1e-4)
    assert [n['epoch'] for n in rows]==[1, 2] and list((tmp_path/'wandb').rglob('*.wandb')) and run.env['wandb']


def test_without_the_package_weights_and_biases_is_one_line_and_nothing_is_left(shapes, narrow, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, 'resnet18', narrow)
    monkeypatch.setattr('cifar_cam.history.find_spec', lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'cifar_cam\[wandb\]'"):
        run_recipe('resnet18-onecycle', shapes, tmp_path/'runs', wandb=True, epochs=1, lr=.01, bs=50)
    assert not (tmp_path/'runs').exists()
