"Trainings that are stopped, resumed, repeated or begun wrongly, in one notebook."
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.callback.training import GradientAccumulation
from fastai.vision.all import Callback, CancelStepException, nn, noop, TensorImage
from PIL import Image

from cifar_cam.augment import PadCrop
from cifar_cam.callbacks import FreezeWhitening, plot_update_ratios, UpdateRatio
from cifar_cam.core import InputError
from cifar_cam.crossfit import fold_splitter
from cifar_cam.evidence import Evidence
from cifar_cam.experiment import run_or_resume
from cifar_cam.history import History, read_history
from cifar_cam.learner import Checkpoint, cifar_learner
from cifar_cam.loaders import cifar_dls
from cifar_cam.models import build_model
from cifar_cam.schedule import Plateau
from cifar_cam.shapes import shapes_path
from cifar_cam.triage import ambiguity_scores, label_scores, torn_score, verdicts
from cifar_cam.truth import doubtful_set


def few(**kwargs): return cifar_dls(shapes_path(n_train=40, n_test=20), **dict(bs=10) | kwargs)

def learn(cbs=(), dls=None, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return cifar_learner(dls or few(), model, cbs=cbs, **dict(precision='float32') | kwargs)

class Interrupt(Callback):
    "Ctrl-C in the middle of a step"
    def __init__(self, epoch, event='after_backward', step=1):
        self.at,self.step = epoch,step
        setattr(self, event, self.stop)
    def stop(self):
        if self.learn.training and self.learn.epoch==self.at and self.learn.iter==self.step: raise KeyboardInterrupt

def same(a, b): return all(torch.equal(p, q) for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values()))


@pytest.mark.parametrize('precision', ['float32', 'float16'])
def test_an_interrupted_step_leaves_no_gradients(precision, tmp_path):
    whole = learn([Checkpoint(tmp_path/'a.pt')], precision=precision)
    whole.fit(3, .1)
    cut = learn([Checkpoint(tmp_path/'b.pt')], precision=precision)
    with pytest.raises(KeyboardInterrupt): cut.fit(3, .1, cbs=Interrupt(1))
    cut.fit(3, .1)
    assert same(whole, cut)


def test_gathered_gradients_end_with_their_fit():
    a,b = learn(),learn()
    for l in (a, b): l.fit(1, .1, cbs=GradientAccumulation(30))
    b.model.zero_grad()
    for l in (a, b): l.fit(1, .1)
    assert same(a, b)


def test_float16_keeps_its_scale_from_fit_to_fit():
    once,thrice = learn(precision='float16'),learn(precision='float16')
    for l in (once, thrice):
        with torch.no_grad(): l.model[5].weight.mul_(60)  # the gradients overflow at the first scales
    start = thrice.model[0].weight.clone()
    once.fit(3, 1e-4)
    with pytest.warns(UserWarning, match='no step was taken'):
        for _ in range(3): thrice.fit(1, 1e-4)
    assert same(once, thrice) and not start.equal(thrice.model[0].weight)


def test_float16_and_a_step_that_a_callback_leaves_out():
    class Skip(Callback):
        order = 20
        def before_step(self):
            if self.iter==1: raise CancelStepException
    l = learn(precision='float16')
    l.fit(2, .01, cbs=Skip())
    assert l.epochs_done == 2


@pytest.mark.parametrize('first, second, said', [(dict(lr=.1), dict(lr=.001), 'learning rate is 0.1, not 0.001'),
                                                  (dict(lr=.1, wd=.1), dict(lr=.1, wd=.2), 'weight decay is 0.1, not 0.2')])
def test_a_resumed_fit_has_the_settings_that_are_asked_for(first, second, said, tmp_path):
    l = learn([Checkpoint(tmp_path/'c.pt')])
    with pytest.raises(KeyboardInterrupt): l.fit(4, cbs=Interrupt(2), **first)
    with pytest.raises(InputError, match=said): l.fit(4, **second)
    l.fit(4, **first)
    assert l.epochs_done == 4


@pytest.mark.parametrize('other', [dict(opt='sgd'), dict(opt='adam'), dict(dls=True)])
def test_a_checkpoint_of_another_optimizer_or_batch_is_refused(other, tmp_path):
    with pytest.raises(KeyboardInterrupt): learn([Checkpoint(tmp_path/'c.pt')]).fit(4, .01, cbs=Interrupt(2))
    if 'dls' in other: other = dict(dls=few(bs=20))
    with pytest.raises(InputError, match='optimizer is|batch size is 10, not 20'): learn([Checkpoint(tmp_path/'c.pt')], **other).fit(4, .01)


def test_early_stopping_keeps_its_last_epoch_and_the_script_resumes(tmp_path):
    def script(stop=noop):
        ratios = UpdateRatio(1)
        l = learn([History(tmp_path/'h.csv'), Checkpoint(tmp_path/'c.pt'), ratios])
        l.fit(6, 1e-12, cbs=EarlyStoppingCallback('accuracy', patience=2, min_delta=.5))
        assert l.epochs_done == 3
        stop(l)
        l.fit(4, .01)
        return l,ratios
    def cut(l):
        with pytest.raises(KeyboardInterrupt): l.fit(4, .01, cbs=Interrupt(2))
        raise InterruptedError
    with pytest.raises(InterruptedError): script(cut)
    assert list(read_history(tmp_path/'h.csv').epoch) == [1, 2, 3, 4, 5]
    l,_ = script()
    assert list(read_history(tmp_path/'h.csv').epoch) == [*range(1, 8)] and l.epochs_done == 7
    for f in tmp_path.glob('*'): f.unlink()
    whole,ratios = script()
    assert same(whole, l) and len(ratios.accuracies) == 7
    assert script()[0].epochs_done == 7  # all is there


@pytest.mark.parametrize('error, seen, said', [(KeyboardInterrupt, KeyboardInterrupt, ''),
                                                (torch.OutOfMemoryError('CUDA out of memory'), InputError, 'try half, bs=5')])
def test_a_finder_that_is_cut_off_gives_the_weights_back(error, seen, said, tmp_path):
    l = learn(path=tmp_path)
    l.fit(1, .1)
    before = {k: v.clone() for k,v in l.model.state_dict().items()}
    class Stop(Callback):
        order = 99
        def after_batch(self):
            if hasattr(self.learn, 'lr_finder') and self.iter==2: raise error
    l.add_cb(Stop())
    with pytest.raises(seen, match=said): l.lr_find(start_lr=.5, end_lr=100, show_plot=False)
    assert all(v.equal(before[k]) for k,v in l.model.state_dict().items()) and not any((tmp_path/'models').iterdir())


def test_crossfit_of_few_images_holds_some_of_each_class_out(tmp_path):
    files = [tmp_path/part/c/f'{i}.png' for part in ('train', 'test') for c in 'abc' for i in range(5)]
    for k in range(3):
        train,held,fold,test = fold_splitter(3, k, hold_out=.1)(files)
        assert {files[i].parent.name for i in held} == {files[i].parent.name for i in train} == set('abc')
        assert sorted([*train, *held, *fold, *test]) == [*range(30)]
    with pytest.raises(InputError, match='too few for 2 folds and images to choose by'):
        fold_splitter(2, 0, hold_out=.1)([f for f in files if f.stem in '01'])


def test_run_or_resume_finishes_a_run_whose_pictures_are_missing(tmp_path, monkeypatch):
    import cifar_cam.experiment as experiment
    path = tmp_path/'run'
    def stop(*args, **kwargs): raise KeyboardInterrupt
    changes = dict(epochs=1, bs=20, lr=.01, lr_min=.001)
    with monkeypatch.context() as m:
        m.setattr(experiment, 'draw_run', stop)
        with pytest.raises(KeyboardInterrupt): run_or_resume('davidnet', shapes_path(n_train=40, n_test=20), path, **changes)
    run = run_or_resume('davidnet', shapes_path(n_train=40, n_test=20), path, **changes)
    assert run.finished and (path/'report.html').exists()


def test_a_few_more_raw_errors(tmp_path):
    learn([Plateau()]).validate()
    l,ratios = learn(),UpdateRatio(1)
    with pytest.raises(KeyboardInterrupt): l.fit(1, .1, cbs=[ratios, Interrupt(0, 'after_step', 2)])
    l.fit(1, .1, cbs=ratios)
    assert len(ratios.steps) == len(next(iter(ratios.ratios.values())))
    plot_update_ratios({'a': ratios})
    with pytest.raises(InputError, match='at most 31 to reflect'): PadCrop(40).encodes(TensorImage(torch.zeros(2, 3, 32, 32)))
    with pytest.raises(InputError, match='choose 0 pixels or more'): PadCrop(-2)


def test_a_frozen_whitening_stays_frozen():
    net = build_model('speednet', 10)
    l = cifar_learner(few(), net, cbs=[FreezeWhitening()])
    for p in net.whiten.parameters(): p.requires_grad_(False)
    l.validate()
    assert not any(p.requires_grad for p in net.whiten.parameters())


def test_names_that_are_the_same_in_all_classes(tmp_path):
    for split in ('train', 'test'):
        for k,c in enumerate(('cat', 'dog', 'owl')):
            (tmp_path/'clean'/split/c).mkdir(parents=True)
            for i in range(10): Image.new('RGB', (32, 32), (80*k, 20*i, 0)).save(tmp_path/'clean'/split/c/f'{i:04}.png')
    out = doubtful_set(tmp_path/'spoiled', tmp_path/'clean', flipped=.5, blends=0, copies=0)
    here = [f for f in (out/'test').rglob('*.png')]
    assert len(here) == 30
    truth = pd.read_csv(out/'truth.csv')
    assert truth.file.is_unique and len(truth) == 15
    for row in truth.itertuples(): assert Image.open(out/row.file).getpixel((0, 0))[0] == 80*('cat', 'dog', 'owl').index(row.label)
    with pytest.raises(InputError, match="'dgo' is no class"): doubtful_set(tmp_path/'x', tmp_path/'clean', blends=0, copies=0, similar={'cat': 'dgo'})


def evidence(n, mistakes, classes, rng):
    "A calibrated network with so many mistakes, of which it is sure"
    targs = np.arange(n)%classes
    said = targs.copy()
    said[:mistakes] = (said[:mistakes] + 1)%classes
    p = np.full((n, classes), .01/(classes - 1))
    p[np.arange(n), said] = .99
    return Evidence([f'{i}.png' for i in range(n)], [f'c{i}' for i in range(classes)], targs, np.log(p*np.exp(rng.normal(0, .01, p.shape))))

@pytest.mark.parametrize('classes', [2, 3, 4, 10])
def test_a_sure_mistake_is_not_ambiguous_for_want_of_classes(classes):
    e = evidence(400, 20, classes, np.random.default_rng(0))
    p = np.exp(e.logits)/np.exp(e.logits).sum(1, keepdims=True)
    said = verdicts([e], np.zeros(400), ambiguity_scores(p, e.targs))
    assert set(said[:20]) == {'network'} and set(said[20:]) == {''}
    assert torn_score(10) == pytest.approx(.4) and torn_score(2) < 1


@pytest.mark.parametrize('mistakes', [49, 50])
def test_a_small_set_has_no_fifty_wrong_labels(mistakes):
    e = evidence(100, mistakes, 10, np.random.default_rng(0))
    p = np.exp(e.logits)/np.exp(e.logits).sum(1, keepdims=True)
    said = verdicts([e], label_scores(p, e.targs)*.97, np.zeros(100))
    assert (said=='label').sum() == (5 if mistakes >= 50 else 0) and (said!='').sum() == mistakes
