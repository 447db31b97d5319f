"""Several fits of one learner: how they continue one another, what they leave behind, and what is refused before it
goes wrong"""
import random, shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.vision.all import (BCEWithLogitsLossFlat, Callback, CrossEntropyLossFlat, DataBlock, EarlyStoppingCallback, get_image_files, GradientAccumulation, ImageBlock,
                               L, Learner, MCDropoutCallback, MultiCategoryBlock, nn, OptimWrapper, params, partial, ReduceLROnPlateau)
from torch.nn import functional as F

from cifar_cam.augment import AlternatingFlip, cifar_augment
from cifar_cam.callbacks import L1Penalty, mix_callbacks, StopOnNaN, WeightAverage
from cifar_cam.core import InputError
from cifar_cam.learner import Checkpoint, cifar_learner, TorchOptimizer
from cifar_cam.loaders import cifar_dls
from cifar_cam.optimizers import OPTIMIZERS
from cifar_cam.recorder import Accuracy, LightProgress
from cifar_cam.schedule import find_lrs


def net(n=10, dropout=0.):
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(8*64, n))


@pytest.fixture
def make(few, tmp_path):
    "A function that makes a learner of 100 images, 20 a batch"
    def make(model=None, item_tfms=cifar_augment(8), dls=None, **kwargs):
        dls = dls or cifar_dls(few, item_tfms, bs=20, device='cpu')
        return cifar_learner(dls, model or net(), path=tmp_path, **{'bf16': False, **kwargs})
    return make


def quietly(learn, fit):
    with learn.no_bar(), learn.no_logging(): fit(learn)
    return learn


class Images(Callback):
    "A number for each training batch"
    order = 80
    def __init__(self): self.seen = []
    def before_batch(self):
        if self.training and not hasattr(self.learn, 'lr_finder'): self.seen.append(round(float(self.x.double().mul(torch.arange(32)).sum()), 3))


class StopAt(Callback):
    class Dead(BaseException): pass
    order = 90
    def __init__(self, epoch, step): self.at = epoch,step
    def after_batch(self):
        if self.training and (self.epoch, self.iter)==self.at: raise self.Dead


def weights(learn): return [p.detach().clone() for p in learn.model.state_dict().values()]
def same(a, b): return all(torch.equal(p, q) for p,q in zip(a, b))


# ---- the count of epochs

SERIES = {'one by one': [1, 1, 1, 1], 'two and two': [2, 2], 'finder between': [1, 'find', 3], 'predictions between': [1, 'predict', 3], 'skipped': [2, (4, 2)], 'one and the rest': [1, (4, 1)]}

@pytest.mark.parametrize('kind', ['memory', 'files', 'alternating'])
@pytest.mark.parametrize('series', SERIES)
def test_fits_show_the_images_of_one_long_fit(make, few, series, kind):
    "Several fits in a row see the same augmented images as one long fit, even with `lr_find` in between"
    tfms = [AlternatingFlip(), *cifar_augment(8, flip=False)] if kind=='alternating' else cifar_augment(8)
    seen,ends = [],[]
    for fits in [4], SERIES[series]:
        learn = make(dls=cifar_dls(few, tfms, bs=20, device='cpu', in_memory=kind!='files', num_workers=0), cbs=Images(), seed=7, opt='sgd')
        for n in fits:
            if n=='find': quietly(learn, lambda l: l.lr_find(num_it=7, show_plot=False))
            elif n=='predict': quietly(learn, lambda l: (l.validate(), l.get_preds()))
            elif isinstance(n, tuple): quietly(learn, lambda l: l.fit(n[0], .01, start_epoch=n[1]))
            else: quietly(learn, lambda l: l.fit(n, .01))
        seen.append(learn.images.seen)
        ends.append(weights(learn))
        assert learn.epochs_done == 4
    assert len(set(seen[0])) == len(seen[0]) == 20 and seen[0] == seen[1]
    if 'find' not in SERIES[series]: assert same(*ends)   # the finder's file keeps float32 and no more of the optimizer's state


def test_a_fit_that_begins_later_sees_the_images_of_those_epochs(make):
    "With `start_epoch`, a fit sees the same images as those epochs of a whole fit"
    whole,late = make(cbs=Images()),make(cbs=Images())
    quietly(whole, lambda l: l.fit(3, .01))
    quietly(late, lambda l: l.fit(3, .01, start_epoch=1))
    assert late.images.seen == whole.images.seen[5:] and late.epochs_done == 3


def test_a_fit_that_a_callback_ends_counts_and_one_that_is_interrupted_begins_its_epoch_again(make):
    "Epochs before an early stop count; after an interruption, the next fit starts the broken epoch again"
    learn = make(cbs=Images())
    quietly(learn, lambda l: l.fit(5, .01, cbs=EarlyStoppingCallback(monitor='accuracy', min_delta=2)))
    assert learn.epochs_done == 2
    with suppress(StopAt.Dead): quietly(learn, lambda l: l.fit(5, .01, cbs=StopAt(1, 2)))
    assert learn.epochs_done == 3
    quietly(learn, lambda l: l.fit(1, .01))
    whole = quietly(make(cbs=Images()), lambda l: l.fit(4, .01))
    assert learn.images.seen == whole.images.seen[:15] + whole.images.seen[15:18] + whole.images.seen[15:]


# ---- checkpoints of several fits

def script(make, path, fits, stop=None):
    "What a user's script does; `stop` is the fit that dies, in which epoch"
    learn = make(cbs=[Checkpoint(path), Images()], opt='adam')
    for i,n in enumerate(fits):
        dies = [StopAt(stop[1], 1)] if stop and stop[0]==i else []
        quietly(learn, lambda l: l.fit(n, .01, cbs=dies))
    return learn


def test_a_second_fit_with_a_checkpoint_trains(make, tmp_path):
    "A second fit with a `Checkpoint` trains on, to the same weights as without one"
    with_file,without = script(make, tmp_path/'c.pt', [2, 2]),make(cbs=Images(), opt='adam')
    for _ in range(2): quietly(without, lambda l: l.fit(2, .01))
    assert with_file.images.seen == without.images.seen and same(weights(with_file), weights(without)) and with_file.epochs_done == 4
    assert torch.load(tmp_path/'c.pt', weights_only=True)['before'] == 2


@pytest.mark.parametrize('stop', [(0, 1), (1, 0), (1, 2), (2, 0)])
def test_a_script_of_several_fits_that_dies_is_run_again(make, tmp_path, stop):
    "If a script of several fits dies, running it again ends with the weights of an uninterrupted run"
    whole = script(make, tmp_path/'whole.pt', [2, 3, 1])
    with suppress(StopAt.Dead): script(make, tmp_path/'c.pt', [2, 3, 1], stop)
    again = script(make, tmp_path/'c.pt', [2, 3, 1])
    assert same(weights(whole), weights(again)) and again.epochs_done == 6 and len(again.images.seen) < len(whole.images.seen)


def test_a_fit_that_was_interrupted_goes_on_in_the_same_learner(make, tmp_path):
    "With a `Checkpoint`, calling an interrupted `fit` again in the same learner continues it to the same weights"
    whole,learn = script(make, tmp_path/'whole.pt', [4]),make(cbs=[Checkpoint(tmp_path/'c.pt'), Images()], opt='adam')
    with suppress(StopAt.Dead): quietly(learn, lambda l: l.fit(4, .01, cbs=StopAt(2, 1)))
    quietly(learn, lambda l: l.fit(4, .01))
    assert same(weights(whole), weights(learn)) and len(learn.recorder.values) == 2


def test_fits_of_another_length_are_refused(make, tmp_path):
    "`Checkpoint` refuses to resume a script whose fits now have other lengths, and keeps its file"
    script(make, tmp_path/'c.pt', [2, 2])
    kept = (tmp_path/'c.pt').read_bytes()
    with pytest.raises(InputError, match='after 2 epochs'): script(make, tmp_path/'c.pt', [3, 2])
    assert (tmp_path/'c.pt').read_bytes() == kept


@pytest.mark.parametrize('change', [dict(seed=5), dict(fits=[6]), dict(part='images'), dict(part='classes')])
def test_a_checkpoint_of_another_training_is_refused_and_kept(make, few, tmp_path, change):
    "`Checkpoint` refuses to resume a training of another seed, length, number of images or other classes"
    script(make, tmp_path/'c.pt', [3])
    kept = (tmp_path/'c.pt').read_bytes()
    other,part = {k: v for k,v in change.items() if k=='seed'},change.get('part')
    if part:
        data = Path(shutil.copytree(few, tmp_path/'other'))
        if part=='images': next((data/'train'/'star').iterdir()).unlink()
        for p in ('train', 'test') if part=='classes' else (): (data/p/'star').rename(data/p/'sun')
        other['dls'] = cifar_dls(data, cifar_augment(8), bs=20, device='cpu')
    learn = make(cbs=Checkpoint(tmp_path/'c.pt'), opt='adam', **other)
    before = weights(learn)
    with pytest.raises(InputError, match='not a checkpoint of this training'): quietly(learn, lambda l: l.fit(change.get('fits', [3])[0], .01))
    assert (tmp_path/'c.pt').read_bytes() == kept and same(before, weights(learn))


def test_a_checkpoint_of_before_the_count_is_gone_on_with(make, tmp_path):
    "Checkpoints from older versions, which kept no count of epochs, still resume to the same weights"
    whole = script(make, tmp_path/'whole.pt', [3])
    with suppress(StopAt.Dead): script(make, tmp_path/'c.pt', [3], (0, 2))
    state = torch.load(tmp_path/'c.pt', weights_only=True)
    for k in 'before', 'of', 'callbacks': del state[k]
    torch.save(state, tmp_path/'c.pt')
    assert same(weights(script(make, tmp_path/'c.pt', [3])), weights(whole))


# ---- the caller's random numbers

def states(): return random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2], torch.get_rng_state().tolist()

CALLS = dict(
    fit=lambda l: l.fit(1, .01), one_cycle=lambda l: l.fit_one_cycle(1, .01), find=lambda l: find_lrs(l, num_it=30, show_plot=False), lr_find=lambda l: l.lr_find(num_it=10, show_plot=False),
    validate=lambda l: l.validate(), preds=lambda l: l.get_preds(), predict=lambda l: l.predict(l.dls.valid_ds.items[0]),
    dies=lambda l: l.fit(2, .01, cbs=StopAt(1, 1)), diverges=lambda l: l.fit(1, 1e20), bad=lambda l: l.get_preds(dl=3))

@pytest.mark.parametrize('call', CALLS)
@pytest.mark.parametrize('in_memory', [True, False])
def test_the_callers_random_numbers_go_on(make, few, call, in_memory):
    "Training, `lr_find` and predicting leave your random number generators as they were, even after an error"
    learn = make(dls=cifar_dls(few, cifar_augment(8), bs=20, device='cpu', in_memory=in_memory, num_workers=0), metrics=None)
    random.seed(5); np.random.seed(5); torch.manual_seed(5)
    before = states()
    with suppress(InputError, StopAt.Dead, TypeError, AssertionError), learn.no_bar(), learn.no_logging(): CALLS[call](learn)
    assert states() == before


def test_making_a_learner_draws_nothing_from_the_caller(few, make):
    "Creating a learner draws no random numbers from your generators"
    dls = cifar_dls(few, bs=20, device='cpu')
    before = states()
    for arch in 'davidnet', 'speednet': make(arch, dls=dls)
    with pytest.raises(InputError): make('nonesuch', dls=dls)
    assert states() == before


def test_a_plain_learner_keeps_the_state_in_find_lrs_too(few, tmp_path):
    "`find_lrs` also leaves your random number generators as they were with a plain fastai `Learner`"
    learn = Learner(cifar_dls(few, cifar_augment(8), bs=20, device='cpu'), net(dropout=.2), loss_func=CrossEntropyLossFlat(), path=tmp_path)
    before = states()
    with suppress(InputError), learn.no_bar(): find_lrs(learn, num_it=20, show_plot=False)
    assert states() == before


def test_what_predicting_draws_stays_drawn(make):
    "Monte Carlo dropout, TTA and predictions on augmented images draw new random numbers each time"
    learn = make(net(dropout=.5))
    with learn.no_bar():
        a,b = (learn.get_preds(cbs=MCDropoutCallback())[0] for _ in range(2))
        assert not torch.equal(a, b)   # samples of Monte Carlo dropout
        a,b = (learn.get_preds(0)[0] for _ in range(2))
        assert not torch.equal(a, b)   # augmented training images
        views = []
        learn.model.register_forward_hook(lambda m, i, o: views.append(float(o.sum())))
        learn.tta(n=3)
        assert len(set(views)) == len(views)


# ---- optimizers whose settings are written

@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_fastais_plateau_lowers_the_rate_of_every_optimizer(make, opt):
    "`ReduceLROnPlateau` from fastai lowers the learning rate of every optimizer"
    learn = quietly(make(opt=opt, cbs=ReduceLROnPlateau(monitor='valid_loss', min_delta=100, factor=4)), lambda l: l.fit(4, .01))
    assert learn.recorder.lrs[::5] == pytest.approx([.01, .01, .0025, .000625])


def test_hypers_are_the_settings_themselves():
    "`opt.hypers` reads and writes the settings of the PyTorch optimizer itself"
    p = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    opt = TorchOptimizer(L([p[0]], [p[1]]), opt=torch.optim.Adam, lr=.1, betas=(.8, .9))
    for h,lr in zip(opt.hypers, (.2, .3)): h['lr'],h['mom'] = lr,.7
    opt.hypers[1].update(sqr_mom=.5)
    assert [g['lr'] for g in opt.opt.param_groups] == [.2, .3] and opt.opt.param_groups[1]['betas'] == (.7, .5)
    assert all(isinstance(v, (int, float)) and not isinstance(v, bool) for h in opt.hypers for v in h.values()) and dict(opt.hypers[0])['wd'] == 0
    opt.set_hypers(lr=slice(.01, .1))
    assert [h['lr'] for h in opt.hypers] == pytest.approx([.01, .1])
    with pytest.raises(KeyError): opt.hypers[0]['nonesuch']


def test_an_optimizer_of_ones_own_is_made_writable(make):
    "`ReduceLROnPlateau` also lowers the learning rate of your own `OptimWrapper`"
    model = net()
    mine = OptimWrapper(opt=torch.optim.SGD(model.parameters(), .1))
    learn = quietly(make(model, opt_func=mine, cbs=ReduceLROnPlateau(monitor='valid_loss', min_delta=100)), lambda l: l.fit(3, .01))
    assert learn.opt is mine and mine.opt.param_groups[0]['lr'] == pytest.approx(.0001)   # after the second and the third epoch


@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_groups_train_at_rates_of_their_own_and_freeze(make, opt):
    "Every optimizer supports discriminative learning rates, `freeze`, `unfreeze` and `fine_tune`"
    model = net()
    learn = make(model, opt=opt, splitter=lambda m: L(m[:3], m[3:]).map(params))
    quietly(learn, lambda l: l.fit(1, slice(1e-4, 1e-3)))
    assert [h['lr'] for h in learn.opt.hypers] == pytest.approx([1e-4, 1e-3])
    learn.freeze()
    before = weights(learn)
    quietly(learn, lambda l: l.fit_one_cycle(1, .01))
    assert torch.equal(model[0].weight, before[0]) and not torch.equal(model[5].weight, before[-2])
    learn.unfreeze()
    quietly(learn, lambda l: l.fine_tune(1, .01))
    assert not torch.equal(model[0].weight, before[0]) and learn.epochs_done == 4


# ---- outputs and labels

@pytest.mark.parametrize('loss', [None, F.cross_entropy, nn.CrossEntropyLoss(), CrossEntropyLossFlat(), partial(F.cross_entropy, label_smoothing=.1)])
@pytest.mark.parametrize('n', [1000, 9, 11])
def test_outputs_that_are_not_the_classes_are_refused(make, n, loss):
    "A network with more or fewer outputs than classes is refused before any weight changes"
    learn = make(net(n), **({} if loss is None else dict(loss_func=loss)))
    before = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(InputError, match=f'the network has {n:,} outputs for 10 classes'): quietly(learn, lambda l: l.fit(1, .01))
    assert same(before, learn.model.parameters())
    with pytest.raises(InputError, match='outputs'), learn.no_bar(): learn.validate()


def test_a_loss_of_ones_own_may_have_other_outputs(make):
    "With your own loss function, a network may have more outputs than classes"
    learn = make(net(12), loss_func=lambda p, y: F.cross_entropy(p[:, :10], y))
    quietly(learn, lambda l: l.fit(1, .01))


class Many(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.net,self.kind = net(),kind
    def forward(self, x):
        out = self.net(x)
        return dict(a=out, b=out.sum()) if self.kind is dict else self.kind([out, out.sum(1)])


@pytest.mark.parametrize('kind', [tuple, list, dict])
@pytest.mark.parametrize('bf16', [False, True])
def test_networks_that_return_several_things_train_with_the_default_metric(make, kind, bf16):
    "A network that returns a tuple, list or dict trains with your own loss; its accuracy is left empty"
    seen = []
    def loss(p, y):
        seen.append(p['a' if kind is dict else 0].dtype)
        return F.cross_entropy(p['a' if kind is dict else 0], y)
    learn = quietly(make(Many(kind), loss_func=loss, bf16=bf16), lambda l: l.fit(1, .01))
    assert set(seen) == {torch.float32} and learn.recorder.row['valid_accuracy'] is None


def test_several_labels_an_image_train_with_fastais_loss(few, make):
    "Multi-label data trains with fastai's `BCEWithLogitsLossFlat` and reports `accuracy_multi`"
    block = DataBlock((ImageBlock, MultiCategoryBlock), get_y=lambda f: [f.parent.name, 'even' if len(f.name) % 2 else 'odd'])
    dls = block.dataloaders(get_image_files(few/'train'), bs=20, num_workers=0, device='cpu')
    learn = quietly(make(net(dls.c), dls=dls), lambda l: l.fit(2, .01))
    assert isinstance(learn.loss_func, BCEWithLogitsLossFlat) and .5 < learn.recorder.row['valid_accuracy_multi'] <= 1
    with pytest.raises(InputError, match='label_smoothing'): make(net(dls.c), dls=dls, label_smoothing=.1)


def test_accuracy_is_silent_where_it_cannot_judge():
    "Accuracy is `None`, not an error, if outputs and labels are not those of a single-label classifier"
    class Batch: pass
    for pred,y in ((torch.ones(4, 1), torch.zeros(4, dtype=torch.long)), (torch.ones(4), torch.zeros(4)), (torch.ones(4, 3), torch.ones(4, 3)), ((torch.ones(4, 3),), torch.zeros(4))):
        batch,measure = Batch(),Accuracy()
        batch.pred,batch.yb = pred,(y,)
        measure.reset()
        measure.accumulate(batch)
        assert measure.value is None


def test_numbers_of_numpy_are_numbers(make):
    "NumPy numbers work as epochs, learning rate and seed, and give the same weights as Python's"
    a,b = (quietly(make(seed=seed), lambda l: l.fit(np.int64(1), np.float64(.01))) for seed in (np.int64(3), 3))
    assert same(weights(a), weights(b))


# ---- what an error leaves

def test_too_large_a_batch_leaves_nothing_of_the_step(make):
    "An out-of-memory error suggests half the batch size and frees the step's tensors, so that you can fit again"
    learn,small = make(opt='adam'),[]
    forward = learn.model.forward
    def full(x):
        if len(small)==3: raise torch.OutOfMemoryError
        small.append(len(x))
        return forward(x)
    learn.model.forward = full
    with pytest.raises(InputError, match='batch of 20 images: try half, bs=10') as e: quietly(learn, lambda l: l.fit(1, .01))
    assert e.value.__context__ is None and e.value.__cause__ is None
    assert learn.loss is None and learn.loss_grad is None and learn.pred is None and all(p.grad is None for p in learn.model.parameters())
    del learn.model.forward
    quietly(learn, lambda l: l.fit(1, .01))
    assert len(learn.recorder.values) == 1


def test_a_loss_that_mixup_replaced_comes_back(make):
    "After an interrupted fit with Mixup, the learner has its own loss function back"
    learn = make(cbs=mix_callbacks(mixup=.4))
    own = learn.loss_func
    with pytest.raises(StopAt.Dead): quietly(learn, lambda l: l.fit(1, .01, cbs=StopAt(0, 2)))
    assert learn.loss_func is own
    quietly(learn, lambda l: l.fit(1, .01))


def test_on_a_gpu_the_first_bad_step_is_named_after_the_epoch(make):
    "On a GPU, the end of the epoch reports the first step with a non-finite loss, and its learning rate"
    learn = make()
    quietly(learn, lambda l: l.fit(1, .01))
    cb = learn._grab_cbs(StopOnNaN)[0]
    nan = torch.tensor(float('nan'))
    cb.losses,cb.rates = [torch.tensor(2.), torch.tensor(float('inf')), nan],[.1, .2, .3]
    with pytest.raises(InputError, match=r'the loss is inf in epoch 0, step 1, at learning rate 0.2'): cb.after_train()
    cb.losses,cb.rates = [torch.tensor(2.)]*3,[.1, .2, .3]
    cb.after_train()
    with torch.no_grad(): learn.model[5].bias[0] = nan
    with pytest.raises(InputError, match='a weight is not a finite number in epoch 0'): cb.after_train()


# ---- penalties, mixed images, averaged weights

@pytest.mark.parametrize('gather', [False, True])
def test_an_l1_penalty_is_the_gradient_of_the_sum(make, gather):
    "`L1Penalty` trains the same weights as an L1 term in the loss, also with `GradientAccumulation`"
    # Also where another callback divides the loss
    class Slow(Callback):
        run_valid = False
        def after_loss(self): self.learn.loss_grad = self.loss_grad + .01*sum(p.abs().sum() for p in self.model.parameters())
    ends = [quietly(make(opt='sgd', cbs=[cb, *[GradientAccumulation(40)]*gather]), lambda l: l.fit(2, .05)) for cb in (L1Penalty(.01), Slow())]
    for a,b in zip(*map(weights, ends)): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('cbs', [mix_callbacks(mixup=.4), mix_callbacks(cutmix=1.)])
def test_mixed_images_train_and_validation_sees_whole_ones(make, cbs):
    "With Mixup or CutMix, validation uses unmixed images and gives the same loss as `validate`"
    learn = quietly(make(cbs=cbs), lambda l: l.fit(1, .01))
    assert learn.recorder.row['valid_loss'] == pytest.approx(learn.validate()[0], rel=1e-5)


def test_one_kind_of_mixing_at_a_time():
    "`mix_callbacks` refuses Mixup together with CutMix, and a negative strength"
    assert mix_callbacks() == []
    for bad in dict(mixup=.4, cutmix=1.), dict(mixup=-1): pytest.raises(InputError, mix_callbacks, **bad)


class Follow(Callback):
    "The same average, by hand"
    order = 61
    def __init__(self, decay): self.decay,self.n,self.mean = decay,0,None
    def after_step(self):
        now,self.n = self.model[5].weight.detach().double(),self.n + 1
        d = min(self.decay, (1 + self.n)/(10 + self.n))
        self.mean = now.clone() if self.mean is None else d*self.mean + (1 - d)*now


def test_a_training_ends_with_the_average_and_its_steps_know_nothing_of_it(make):
    "`WeightAverage` ends training with the moving average of the weights and changes no training step"
    plain = quietly(make(cbs=Follow(.9)), lambda l: l.fit(2, .05))
    learn = quietly(make(cbs=[WeightAverage(.9), Follow(.9)]), lambda l: l.fit(2, .05))
    torch.testing.assert_close(learn.model[5].weight.double(), plain.follow.mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(learn.follow.mean, plain.follow.mean)
    assert learn.recorder.losses[-1] == plain.recorder.losses[-1]
    assert learn.recorder.row['valid_loss'] == pytest.approx(learn.validate()[0], rel=1e-5)
    with pytest.raises(InputError, match='between 0 and 1'): WeightAverage(1)


@pytest.mark.parametrize('at', [(0, 2), (1, 0), (2, 3)])
def test_averaged_weights_are_in_the_checkpoint(make, tmp_path, at):
    "`Checkpoint` saves the state of `WeightAverage`: an interrupted run ends with the same averaged weights"
    def train(path, *cbs): return quietly(make(cbs=[WeightAverage(.9), Checkpoint(tmp_path/path), *cbs]), lambda l: l.fit(3, .05))
    whole = train('whole.pt')
    with suppress(StopAt.Dead): train('c.pt', StopAt(*at))
    assert same(weights(whole), weights(train('c.pt')))


def test_tied_weights_are_averaged_once(make):
    "`WeightAverage` works with tied weights: the logged validation loss is that of the final weights"
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3*1024, 10)
            self.b = self.a
        def forward(self, x): return self.a(x.flatten(1)) + self.b(x.flatten(1))
    learn = quietly(make(Tied(), cbs=WeightAverage(.9)), lambda l: l.fit(1, .01))
    assert learn.recorder.row['valid_loss'] == pytest.approx(learn.validate()[0], rel=1e-5)


# ---- what is shown

def test_without_a_terminal_progress_is_plain_lines(make, capsys):
    "Without a terminal, progress is plain lines without a bar"
    learn = make()
    learn.fit(2, .01)
    learn.get_preds(); learn.validate(); learn.tta(n=2)
    out = capsys.readouterr().out
    assert '\r' not in out and [line.split()[0] for line in out.splitlines()] == ['epoch', '0', '1'] and '█' not in out


def test_the_bar_shows_loss_accuracy_and_rate(make, monkeypatch, capsys):
    "The progress bar shows loss, accuracy and learning rate"
    monkeypatch.setattr('cifar_cam.recorder.shows_bars', lambda: True)
    said = []
    class Listen(Callback):
        order = 99
        def after_batch(self):
            if self.training: said.append(self.progress.pbar.comment)
    make(cbs=Listen()).fit(1, .01)
    assert said[0].startswith('loss ') and 'accuracy ' in said[0] and said[0].endswith('lr 0.01')


def test_no_bar_puts_the_light_one_back(make):
    "After `learn.no_bar()`, the learner has its `LightProgress` bar back"
    learn = make()
    with learn.no_bar(): pass
    assert type(learn.progress) is LightProgress
