"""A process that trains and computes CAMs all day leaves no hooks, figures, open files or threads behind, and its
memory does not grow"""
import gc, os
from contextlib import redirect_stdout
from multiprocessing import Pipe

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from cifar_cam.cam import cam_maps
from cifar_cam.models import davidnet, MODELS
from cifar_cam.recipe import Recipe
from cifar_cam.experiment import run_recipe
from cifar_cam.shapes import shapes_path
from conftest import megabytes

METHODS = 'gradcam', 'eigencam', 'layercam', 'finercam', 'fullgrad'


def left():
    "What lives in this process"
    gc.collect()
    there = [type(o) for o in gc.get_objects()]
    return dict(tensors=sum(issubclass(t, torch.Tensor) for t in there), networks=sum(issubclass(t, nn.Module) for t in there),
                figures=len(plt.get_fignums()), files=len(os.listdir('/proc/self/fd')), threads=len(os.listdir('/proc/self/task')))


def hooks(model):
    kinds = '_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'
    return sum(len(getattr(m, k)) for m in model.modules() for k in kinds)


def repeat(pipe, prepare, args, n):
    "Do one thing `n` times, quietly; send what lives, and megabytes, after each"
    readings = []
    with open(os.devnull, 'w') as nowhere, redirect_stdout(nowhere):
        do = prepare(*args)
        for i in range(n):
            do(i)
            readings.append((left(), megabytes()))
    pipe.send(readings)


def narrow(n_out=10, norm='batch'):
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(200, n_out))


def trainings(data, out):
    MODELS['narrow'] = narrow
    recipe = Recipe('narrow', 'narrow', epochs=1, bs=10, lr='find', schedule='plateau')
    return lambda i: run_recipe(recipe, data, out, seed=i, device='cpu')


def cams():
    model,x = davidnet(),torch.randn(2, 3, 32, 32)
    def call(i):
        cam_maps(model, x, METHODS[i%len(METHODS)])
        assert not hooks(model) and all(p.grad is None and p.requires_grad for p in model.parameters()) and model.training
        with pytest.raises(ValueError): cam_maps(model, x, METHODS[i%len(METHODS)], targets=99)
        assert not hooks(model)
    return call


def readings(fork, prepare, args, n):
    mine,theirs = Pipe()
    p = fork.Process(target=repeat, args=(theirs, prepare, args, n))
    p.start()
    theirs.close()
    try: return mine.recv()
    finally: p.join()


def check(what, found, warm):
    "Nothing is left behind by any call after the first `warm`; the slope of the memory over the same calls"
    lives,memory = zip(*found[warm:])
    assert all(o==lives[0] for o in lives), f'{what}: {lives[0]} → {next(o for o in lives if o!=lives[0])}'
    slope = np.polyfit(range(len(memory)), memory, 1)[0]
    print(f'{what}: {memory[0]:.0f} MB after {warm + 1}, {memory[-1]:.0f} MB after {len(found)}: {slope:+.3f} MB each')
    return slope


@pytest.fixture
def few(tmp_path): return shapes_path(tmp_path, n_train=100, n_test=20)


@pytest.mark.slow
def test_a_training_leaves_nothing_behind(fork, few, tmp_path):
    "Repeated trainings leave no tensors, networks, figures, open files or threads behind"
    check('trainings', readings(fork, trainings, (few, tmp_path/'runs'), 3), 1)


@pytest.mark.slow
def test_a_map_leaves_nothing_behind(fork):
    "Repeated CAM calls, failed ones included, leave no hooks, tensors, figures, open files or threads behind"
    check('CAM calls', readings(fork, cams, (), 3*len(METHODS)), len(METHODS))


@pytest.mark.slow
def test_twenty_trainings_and_two_hundred_maps_leave_nothing_behind(fork, few, tmp_path):
    "Memory grows by less than 1 MB per training over 20 trainings, and 0.05 MB per CAM call over 200 calls"
    assert check('trainings', readings(fork, trainings, (few, tmp_path/'runs'), 20), 5) < 1
    assert check('CAM calls', readings(fork, cams, (), 200), 50) < .05
