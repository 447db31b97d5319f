"""How many operations a training step of each recipe gives a device to do: python tests/bench/launches.py [--json PATH]

A GPU works through a queue of kernels; a small network's step is over when the processor has filled the queue, so what counts is the number of entries. They are counted without a GPU, on the
device in plain Python of `tests/second_device.py` (PyTorch from 2.14 on): an operation that makes a kernel run counts once, views and empty memory do not count. A real GPU may need more than one kernel for an
operation on a list of tensors. The numbers depend on neither the batch size nor the machine. `waits` are places at which the processor would have to wait for the device."""
import os, sys
from collections import Counter
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

os.environ.setdefault('MPLBACKEND', 'Agg')
sys.path.insert(0, str(Path(__file__).parents[1]))
from second_device import Device
import torch
from fastai.vision.all import Callback, CancelFitException

from cifar_cam.all import find_recipe, has_bf16, recipe_dls, recipe_learner, RECIPES, shapes_path
from turns import keep, machine, options

PARTS = 'loader', 'forward', 'loss', 'backward', 'optimizer', 'callbacks'


class Count(Callback):
    "Launches of each part of each step, and the waits of all but the first step"
    order = 200  # after all others: what callbacks do at an event belongs to the part that ends with it
    def __init__(self, steps): self.steps,self.rows,self.waits = steps,[],0
    def _end(self, part):
        self.rows[-1][part] += sum(Device.launches.values())
        if len(self.rows) > 1: self.waits += len(Device.waits)
        Device.clear()
    def before_train(self):
        Device.clear()
        self.rows.append(Counter())
    def before_batch(self):
        if self.training: self._end('loader')
    def after_pred(self):
        if self.training: self._end('forward')
    def after_loss(self):
        if self.training: self._end('loss')
    def after_backward(self): self._end('backward')
    def after_step(self): self._end('optimizer')
    def after_batch(self):
        if not self.training: return
        self._end('callbacks')
        if len(self.rows) > self.steps: raise CancelFitException
        self.rows.append(Counter())


def count(name, data, steps=3, half=False, **changes):
    "One row: launches of a step, by part"
    r = find_recipe(name, **{'bs': 4, 'lr': .01, 'lr_min': .001, 'epochs': 2, 'hold_out': .4, **changes})
    counted = Count(steps)
    with Device():
        dls = recipe_dls(r, data, device=torch.device('npu'), num_workers=0)
        learn = recipe_learner(r, dls, cbs=[counted], bf16=half)
        with learn.no_bar(), learn.no_logging(): learn.fit(2, .01)
    parts = {p: median(row[p] for row in counted.rows[1:]) for p in PARTS}
    return dict(recipe=name, **parts, launches=sum(parts.values()), waits=counted.waits/steps)


def measure(data=None, recipes=tuple(RECIPES), steps=3, half=False, **changes):
    "A row for each recipe; `half`: under bfloat16 autocast, which adds the conversions of the weights"
    with TemporaryDirectory() as tmp:
        data = data or shapes_path(Path(tmp), n_train=40, n_test=10)
        rows = [count(name, data, steps, half, **changes) for name in recipes]
    return dict(benchmark='launches', steps=steps, precision='bfloat16' if half else 'float32', **machine(), rows=rows, ratios={})


def main():
    p = options(__doc__, steps=3)
    p.add_argument('--half', action='store_true', help='under bfloat16 autocast')
    p.add_argument('--recipes', nargs='+', default=list(RECIPES), choices=list(RECIPES))
    a = p.parse_args()
    res = measure(recipes=a.recipes, steps=a.steps, half=a.half)
    print('| recipe | ' + ' | '.join(PARTS) + ' | together | waits |\n|' + '---|'*(len(PARTS) + 3))
    for r in res['rows']: print(f"| {r['recipe']} | " + ' | '.join(f'{r[p]:.0f}' for p in PARTS) + f" | {r['launches']:.0f} | {r['waits']:.0f} |")
    keep(res, a.json)


if __name__ == '__main__': main()
