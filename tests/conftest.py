"Data sets that several tests share. Everything is drawn in a temporary folder; nothing of the user's is touched."
import json, multiprocessing, os, shutil, subprocess
from collections import OrderedDict
from pathlib import Path

# pytest-xdist runs two processes; with two threads each they would wait for one another's cores
os.environ.setdefault('OMP_NUM_THREADS', '1')

import matplotlib
import numpy as np
import pytest
from filelock import FileLock # PyTorch needs it too
from PIL import Image

matplotlib.use('Agg')

import torch
from fastai.data.external import fastai_cfg
from torch import nn

from cifar_cam.models import conv_norm, MODELS
from cifar_cam.experiment import run_recipe
from cifar_cam.shapes import shapes_path


def megabytes():
    "Memory that this process holds"
    return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20


@pytest.fixture(autouse=True)
def fastai_home(tmp_path_factory, monkeypatch):
    "fastai's data folder is one temporary folder for the whole test run"
    home = tmp_path_factory.getbasetemp()/'fastai'
    home.mkdir(exist_ok=True)
    monkeypatch.setitem(fastai_cfg().d, 'data', str(home))
    monkeypatch.delenv('CIFAR_CAM_DATA', raising=False)
    return home


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    "A small Shapes10: 300 training and 100 test images"
    return shapes_path(tmp_path_factory.mktemp('shapes'), n_train=300, n_test=100)


@pytest.fixture(scope='session')
def colours(tmp_path_factory):
    "Images of one colour with noise, 40 + 10 in each of 4 classes: any network learns them in a few steps"
    root,rng = tmp_path_factory.mktemp('colours'),np.random.default_rng(0)
    for name,rgb in dict(blue=(40,40,200), green=(40,200,40), grey=(120,120,120), red=(200,40,40)).items():
        for split,n in ('train', 40), ('test', 10):
            (root/split/name).mkdir(parents=True)
            for i in range(n):
                noisy = (rgb + rng.normal(0, 25, (32, 32, 3))).clip(0, 255).astype('uint8')
                Image.fromarray(noisy).save(root/split/name/f'{i}.png')
    return root


@pytest.fixture(scope='session')
def once(tmp_path_factory, worker_id):
    "`once(name, make)`: what `make()` gives, as JSON keeps it; of several test processes the first one makes it, and the others wait"
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id=='master' else base.parent
    def get(name, make):
        with FileLock(base/f'{name}.lock'):
            if not (base/f'{name}.json').exists(): (base/f'{name}.json').write_text(json.dumps(make()))
            return json.loads((base/f'{name}.json').read_text())
    return get


@pytest.fixture
def on_cpu(monkeypatch):
    "Trainings stay on the CPU, whose bits repeat, on a machine with a GPU too; `test_cuda.py` asks for a GPU's"
    monkeypatch.setattr('fastai.torch_core.defaults.use_cuda', False, raising=False)


@pytest.fixture
def undrawn(monkeypatch):
    "Trainings write no figures and no report, which take most of the time of a small one"
    for f in 'draw_run', 'write_report': monkeypatch.setattr(f'cifar_cam.experiment.{f}', lambda run: None)


@pytest.fixture(scope='session')
def narrow():
    "A network for `MODELS` whose last two stages are named and sized as ResNet18's, of few channels: a notebook's story in seconds"
    def network(n_out=10, norm='batch'):
        stages = {f'layer{i}': nn.Sequential(conv_norm(8, 8, norm, pool=i > 2)) for i in range(1, 5)}
        return nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 8, 3, stride=2, padding=1), **stages, avgpool=nn.AdaptiveAvgPool2d(1),
                                         flatten=nn.Flatten(), fc=nn.Linear(8, n_out)))
    return network


@pytest.fixture(scope='session')
def fork():
    "A multiprocessing context whose processes begin with the package imported: a killed one costs its own seconds, not the five of the import"
    if 'forkserver' not in multiprocessing.get_all_start_methods(): pytest.skip('needs a system that can fork')
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['cifar_cam.cli', 'matplotlib.backends.backend_agg', 'pytorch_grad_cam'])
    return context


@pytest.fixture(scope='session')
def few(tmp_path_factory):
    "A very small Shapes10: 100 training and 20 test images"
    return shapes_path(tmp_path_factory.mktemp('few'), n_train=100, n_test=20)


@pytest.fixture(scope='session')
def finished(few, narrow, tmp_path_factory):
    "The folder of a finished run of a narrow network, without figures. To change it, take `run`"
    with pytest.MonkeyPatch.context() as mp:
        mp.setitem(MODELS, 'davidnet', narrow)
        mp.setattr('cifar_cam.experiment.draw_run', lambda run: None)
        mp.setattr('cifar_cam.experiment.write_report', lambda run: None)
        return run_recipe('davidnet', few, tmp_path_factory.mktemp('finished'), epochs=1, bs=10, lr=.05, lr_min=.005).path


@pytest.fixture
def run(finished, narrow, tmp_path, monkeypatch):
    "A copy of `finished`, to be spoiled"
    monkeypatch.setitem(MODELS, 'davidnet', narrow)
    return Path(shutil.copytree(finished, tmp_path/'run'))


@pytest.fixture
def mounted(tmp_path):
    "A function that mounts a small file system in a new folder; skips where that is not allowed"
    made = []
    def mount(name, options):
        (tmp_path/name).mkdir()
        done = subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', tmp_path/name], capture_output=True, text=True) if shutil.which('mount') else None
        if done is None or done.returncode: pytest.skip('needs the right to mount a file system')
        made.append(tmp_path/name)
        return tmp_path/name
    yield mount
    for path in made: subprocess.run(['umount', '-l', path], check=True)


@pytest.fixture(scope='session')
def cifar10():
    "The real CIFAR-10, where CIFAR_CAM_DATA names it"
    data = os.environ.get('CIFAR_CAM_DATA')
    if not data: pytest.skip('needs the real CIFAR-10: set CIFAR_CAM_DATA to its folder or .tgz')
    from cifar_cam.images import cifar_path
    return cifar_path(data)


def pytest_runtest_setup(item):
    if item.get_closest_marker('cuda') and not torch.cuda.is_available(): pytest.skip('needs a CUDA device')
