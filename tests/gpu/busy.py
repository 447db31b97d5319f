"""How busy is the GPU in a step? Five minutes: python tests/gpu/busy.py [--data cifar10] [--json PATH]

Twenty steps of DavidNet and of speedrun at 20 and at 32 pixels: milliseconds, kernels and the share of the time in which a kernel runs; then without cuDNN's choice by speed, without the fused
optimizer, and in float32, which is without channels-last."""
import time
from contextlib import nullcontext
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from torch.profiler import profile, ProfilerActivity

from cifar_cam import optimizers
from shared import BEST, collect, data_for, learner, options, StopAt, synchronize

RUNS = {'davidnet': dict(name='davidnet'), 'speedrun, 32 pixels': dict(name='speedrun', resize=''), 'speedrun, 20 pixels': dict(name='speedrun', resize='20')}
WAYS = 'as it is', 'no choice by speed', 'not fused', 'float32'


class Timed(StopAt):
    "The seconds from the end of the first step to the end of step `n`, the queue included"
    def after_batch(self):
        if self.train_iter in (1, self.n):
            synchronize(self.dls.device)
            self.seconds = time.perf_counter() - (0 if self.train_iter==1 else self.seconds)
        super().after_batch()


def some_steps(learn, n):
    timed = Timed(n)
    with learn.no_bar(), learn.no_logging(): learn.fit(50, .01, cbs=timed)
    return timed.seconds/(n - 1)


def row(run, way, data, device, steps, changes):
    not_fused = patch.object(optimizers, '_first_device', lambda params: torch.device('cpu')) if way == 'not fused' else nullcontext()
    plain = patch('cifar_cam.learner.fast_convolutions', nullcontext) if way == 'no choice by speed' else nullcontext()
    how = dict(RUNS[run], **changes)
    with not_fused, plain:
        learn = learner(how.pop('name'), data, device, precision='float32' if way == 'float32' else 'auto', **how)
        some_steps(learn, 5)
        took = some_steps(learn, steps)
        cuda = torch.device(device).type == 'cuda'
        with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA]*cuda]) as p:
            some_steps(learn, steps)
            synchronize(device)
    kernels = [e for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA] if cuda else []
    busy = sum(e.time_range.elapsed_us() for e in kernels)/1e6/steps
    return dict(run=run, way=way, ms_per_step=1000*took, kernels_per_step=len(kernels)/steps, busy_share=busy/took)


def main():
    a = options(__doc__, data='cifar10', device=BEST, steps=20, bs=0).parse_args()
    changes = dict(bs=a.bs) if a.bs else {}
    with TemporaryDirectory() as tmp:
        data = data_for(a.data, tmp)
        collect('busy', (row(run, way, data, a.device, a.steps, changes) for run in RUNS for way in WAYS), a.device, a.json, steps=a.steps)


if __name__ == '__main__': main()
