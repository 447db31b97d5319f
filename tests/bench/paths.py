"""The same training from memory and from files: python tests/bench/paths.py [--data cifar10] [--json PATH]

`davidnet` on a part of the training images, the test images whole: once with `cifar_dls`' loaders in memory, which augment whole batches, once with fastai's loaders, which
open and augment image by image. Several seeds of each; both must reach the same accuracy. No times: `loader_cost.py` has those."""
import tempfile
from pathlib import Path
from statistics import mean, stdev

import torch
from fastai.vision.all import Callback, CancelValidException

from cifar_cam.all import cifar_augment, cifar_dls, cifar_learner, data_path, image_files
from turns import BEST, keep, machine, options


def part(path, n, folder):
    "Links to `n` training images, as many of each class, and to all test images"
    files = [f for f in image_files(path) if f.parent.parent.name == 'train']
    classes = sorted({f.parent.name for f in files})
    for c in classes:
        (folder/'train'/c).mkdir(parents=True)
        for f in [f for f in files if f.parent.name == c][:n//len(classes)]: (folder/'train'/c/f.name).symlink_to(f)
    (folder/'test').symlink_to(path/'test')
    return folder


class ValidateLast(Callback):
    "No validation but after the last epoch"
    def before_validate(self):
        if self.epoch < self.n_epoch - 1: raise CancelValidException


def train(path, in_memory, seed, epochs, device):
    "Accuracy of the last epoch on the test images"
    workers = {} if in_memory else dict(num_workers=2)
    dls = cifar_dls(path, cifar_augment(cutout=8), bs=128, in_memory=in_memory, seed=seed, device=torch.device(device), **workers)
    learn = cifar_learner(dls, 'davidnet', seed=seed)
    with learn.no_bar(), learn.no_logging(): learn.fit_triangle(epochs, .003, .1, peak=1, cbs=ValidateLast())
    return dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))['accuracy']


def measure(data='cifar10', n=4000, epochs=4, seeds=2, device='cpu'):
    "A row for each training, mean and standard deviation of both ways"
    with tempfile.TemporaryDirectory() as tmp:
        path = part(data_path(data), n, Path(tmp))
        rows = [dict(run=run, seed=seed, accuracy=train(path, run == 'in memory', seed, epochs, device)) for seed in range(seeds) for run in ('in memory', 'from files')]
    of = {run: [r['accuracy'] for r in rows if r['run'] == run] for run in ('in memory', 'from files')}
    return dict(benchmark='paths', images=n, epochs=epochs, **machine(device), rows=rows, ratios={},
                accuracy={run: dict(mean=mean(a), std=stdev(a) if len(a) > 1 else None) for run,a in of.items()})


def main():
    a = options(__doc__, data='cifar10', device=BEST, seeds=2).parse_args()
    res = measure(a.data, seeds=a.seeds, device=a.device)
    for r in res['rows']: print(f"  {r['run']:12} seed {r['seed']}  {100*r['accuracy']:.2f} %")
    for name,m in res['accuracy'].items(): print(f"{name}: {100*m['mean']:.2f} % ± {100*(m['std'] or 0):.2f}")
    keep(res, a.json)


if __name__ == '__main__': main()
