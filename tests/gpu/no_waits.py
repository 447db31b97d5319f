"""Does a step wait for the GPU, and does all that follows a training run there? Six minutes: python tests/gpu/no_waits.py [--data few] [--json PATH]

Steps 2 to 5 of every recipe run under CUDA's own check, which raises at whatever waits; then evaluation, a gallery and all CAM methods."""
from tempfile import TemporaryDirectory

import torch
from fastai.vision.all import Callback

from cifar_cam.all import CamInterpretation, cam_maps, evaluate_learner, METHODS, RECIPES
from shared import BEST, collect, data_for, learner, options, StopAt


class Strict(Callback):
    "CUDA raises where a step from the second to the fifth waits"
    order,run_valid = 90,False
    def __init__(self, device): self.on = torch.device(device).type == 'cuda'
    def _set(self, mode):
        if self.on: torch.cuda.set_sync_debug_mode(mode)
    def after_batch(self): self._set('error' if 1 <= self.train_iter < 5 else 'default')
    def after_fit(self): self._set('default')
    after_cancel_fit = after_train = after_fit


def attempt(f):
    try: return dict(ok=True, result=f())
    except Exception as e: return dict(ok=False, error=f'{type(e).__name__}: {e}'[:300])
    finally:
        if torch.cuda.is_available(): torch.cuda.set_sync_debug_mode('default')


def rows(data, device, bs=None):
    changes = dict(bs=bs) if bs else {}
    def steps(name):
        learn = learner(name, data, device, [Strict(device), StopAt(6)], **changes)
        with learn.no_logging(): learn.fit(1, .01)
    for name in RECIPES: yield dict(run=f'steps of {name}', **attempt(lambda: steps(name)))
    learn = learner('davidnet', data, device, [StopAt(6)], **changes)
    with learn.no_logging(): learn.fit(1, .01)
    yield dict(run='evaluation', **attempt(lambda: evaluate_learner(learn, learn.dls[-1])['accuracy']))
    yield dict(run='gallery', **attempt(lambda: CamInterpretation.from_learner(learn).plot_cams(2, 'correct') and None))
    x = learn.dls.one_batch()[0][:2]
    for m in METHODS: yield dict(run=f'cam {m}', **attempt(lambda: list(cam_maps(learn.model, x, m).maps.shape)))


def main():
    a = options(__doc__, data='few', device=BEST, bs=0).parse_args()
    with TemporaryDirectory() as tmp: collect('no_waits', rows(data_for(a.data, tmp), a.device, a.bs), a.device, a.json)


if __name__ == '__main__': main()
