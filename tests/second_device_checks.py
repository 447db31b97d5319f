"""What `test_second_device.py` asserts about, in a process of its own: python tests/second_device_checks.py FOLDER [CHECK ...]

Prints a line of JSON for each check: its name, and what it found or the error that ended it."""
import json, os, sys, traceback
from collections import OrderedDict
from pathlib import Path
from statistics import median

os.environ.setdefault('MPLBACKEND', 'Agg')

from second_device import Device
import torch
from fastai.data.external import fastai_cfg
from fastai.vision.all import Callback, CancelTrainException, nn

from cifar_cam.all import cifar_dls, cifar_learner, find_recipe, recipe_dls, recipe_learner, RECIPES, shapes_path
from cifar_cam import optimizers
from cifar_cam.models import conv_norm, MODELS

NPU = torch.device('npu')


def narrow(n_out=10, norm='batch'):
    "The stages of ResNet18, of few channels; the same weights every time"
    torch.manual_seed(0)
    stages = {f'layer{i}': nn.Sequential(conv_norm(8, 8, norm, pool=i > 2)) for i in range(1, 5)}
    return nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 8, 3, stride=2, padding=1), **stages, avgpool=nn.AdaptiveAvgPool2d(1),
                                     flatten=nn.Flatten(), fc=nn.Linear(8, n_out)))


class Steps(Callback):
    "Note what waits in each step but the first, which may set things up, and between the steps of an epoch and those of the next"
    order = 200
    def before_fit(self): self.waits,self.launches,self.between = [],[],[]
    def before_train(self):
        self.between += [list(Device.waits)]
        Device.clear()
    def after_batch(self):
        if not self.training: return
        if self.iter:
            self.waits += [(self.iter, *w) for w in Device.waits]
            self.launches.append(sum(Device.launches.values()))
        Device.clear()
        if self.iter > 3: raise CancelTrainException
    def after_fit(self): self.between = [*self.between[1:], list(Device.waits)]


def steps(data, recipe, precision='float32', epochs=1, **changes):
    "Waits of the steps of a training, launches of the median step, waits of each epoch outside of its steps"
    r = find_recipe(recipe, bs=4, lr=.01, lr_min=.001, epochs=epochs, hold_out=.4, resize='24' if recipe == 'speedrun' else '', **changes)
    noted = Steps()
    learn = recipe_learner(r, recipe_dls(r, data, device=NPU, num_workers=0), cbs=[noted], precision=precision)
    Device.clear()
    with learn.no_logging(): learn.fit(epochs, .01)
    return dict(waits=noted.waits, launches=median(noted.launches), steps=len(noted.launches), between=noted.between,
                loss=float(learn.recorder.values[-1][0]))


def step_of(recipe, precision='float32', **changes): return lambda data: steps(data, recipe, precision, **changes)


def trained(data):
    dls = cifar_dls(data, bs=8, device=NPU)
    learn = cifar_learner(dls, narrow(), precision='float32')
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
    return learn


def losses(data):
    "The same training in each precision, on this device and on the CPU"
    def loss(device, precision):
        learn = cifar_learner(cifar_dls(data, bs=8, device=torch.device(device)), narrow(), precision=precision, opt='muon')
        with learn.no_bar(), learn.no_logging(): learn.fit(2, .02)
        return float(learn.recorder.values[-1][0])
    return {precision: loss('npu', precision) for precision in ('float32', 'bfloat16', 'float16')} | dict(cpu=loss('cpu', 'float32'))


def evaluation(data):
    "A network that nobody has moved to the device, as one from a run folder is"
    from cifar_cam.all import evaluate_learner
    dls = cifar_dls(data, bs=8, device=NPU)
    learn = cifar_learner(dls, narrow(), precision='float32')
    return evaluate_learner(learn, dls[-1], 'flip-translate')['accuracy']


def gallery(data):
    from cifar_cam.all import CamInterpretation
    interp = CamInterpretation.from_learner(trained(data))
    interp.plot_top_losses(2)
    interp.plot_cams(2, 'top_losses')
    interp.plot_confusion_matrix()
    return len(interp.preds)


def all_methods(data):
    "name → the error, for each CAM method that does not work"
    from cifar_cam.cam import cam_maps, METHODS
    learn,wrong = trained(data),{}
    x = learn.dls.one_batch()[0][:2]
    for method in METHODS:
        try: assert cam_maps(learn.model, x, method, min_px=2).maps.shape == (2, 32, 32)
        except Exception as e: wrong[method] = f'{type(e).__name__}: {e}'
    return wrong


def scorecard(data):
    from cifar_cam.all import score_cams
    card = score_cams(trained(data), ['gradcam'], n=2, montages=0, min_px=2, min_prob=.1, progress=False)
    return list(card.text().index)


def whole_run(data):
    "Finder, training, checkpoint, best weights, figures, report; then the network is made ready to be shipped"
    import cifar_cam.run
    from cifar_cam.all import run_recipe, ship_run
    cifar_cam.run._device = lambda name: NPU
    r = find_recipe('resnet18-plateau', arch='narrow', bs=4, lr='find', epochs=1, hold_out=.4)
    run = run_recipe(r, data, Path(data).parent/'runs')
    shipped = ship_run(run, Path(data).parent/'shipped')
    return dict(report=(run.path/'report.html').exists(), shipped=shipped.metrics['images'])


def benchmark(data):
    "What the benchmark of CAM methods measures"
    sys.path.insert(0, str(Path(__file__).parent/'bench'))
    import cam_cost
    return len(cam_cost.measure('narrow', bs=2, rounds=1, methods=('gradcam',), device='npu')['rows'])


CHECKS = {**{f'step {name}': step_of(name) for name in RECIPES},
          'step davidnet float16': step_of('davidnet', 'float16', arch='narrow'), 'step speedrun float16': step_of('speedrun', 'float16', arch='narrow'),
          'step davidnet bfloat16': step_of('davidnet', 'bfloat16', arch='narrow'),
          'losses': losses, 'evaluation': evaluation, 'gallery': gallery, 'all methods': all_methods, 'scorecard': scorecard,
          'whole run': whole_run, 'benchmark': benchmark}


def main():
    folder,names = Path(sys.argv[1]),sys.argv[2:] or CHECKS
    fastai_cfg().d['data'] = str(folder/'fastai')
    MODELS['narrow'] = narrow
    optimizers._product_type = lambda device: torch.float32  # a CPU without instructions for bfloat16 would take minutes
    data = shapes_path(folder/'shapes', n_train=30, n_test=10)
    for name in names:
        try:
            with Device(): found = CHECKS[name](data)
        except Exception as e:
            where = [f'{Path(f.filename).name}:{f.lineno} {f.name}' for f in traceback.extract_tb(e.__traceback__) if '/cifar_cam/' in f.filename]
            found = dict(error=f'{type(e).__name__}: {e}'[:500], where=where[-3:])
        print('CHECK', json.dumps({name: found}), flush=True)


if __name__ == '__main__': main()
