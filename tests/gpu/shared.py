"What the scripts share: options, a training of a few steps, the machine. They run on a CPU too, with few images: that shows that they work, its numbers mean nothing."
import json, sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]/'bench'))
import torch
from fastai.vision.all import Callback, CancelFitException

from cifar_cam.all import change_recipe, data_path, find_recipe, recipe_dls, recipe_learner, shapes_path
from turns import BEST, keep, machine, options, seconds

__all__ = ['BEST', 'collect', 'data_for', 'learner', 'loaders', 'options', 'seconds', 'StopAt', 'synchronize']


def data_for(data, folder):
    "The images called `data`; 'few': three hundred drawn ones"
    return shapes_path(Path(folder)/'few', n_train=300, n_test=100) if data == 'few' else data_path(data)


def collect(benchmark, rows, device, path=None, **about):
    "Print each row, and write all of them to `path` as soon as there is a new one: what is cut off keeps what it has measured"
    res = dict(benchmark=benchmark, **machine(device), **about, rows=[], ratios={})
    for row in rows:
        print(json.dumps(row), flush=True)
        res['rows'].append(row)
        keep(res, path)
    return res


def synchronize(device):
    if torch.device(device).type == 'cuda': torch.cuda.synchronize()


class StopAt(Callback):
    "End the training before its step number `n`"
    order,run_valid = 95,False
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.train_iter >= self.n: raise CancelFitException


@cache
def loaders(r, data, device): return recipe_dls(r, data, device=torch.device(device), hold_out=False)


def learner(name, data, device, cbs=(), precision='auto', seed=0, **changes):
    "The Learner of a recipe whose learning rates are given, for some steps"
    r = find_recipe(name, **{'lr': .05, 'lr_min': .005, 'epochs': 2, **changes})
    of_data = change_recipe(r, lr=.05, lr_min=.005, epochs=1, resize='', deterministic=False)  # the loaders are those of other trainings too
    return recipe_learner(r, loaders(of_data, data, device), seed=seed, cbs=list(cbs), precision=precision)
