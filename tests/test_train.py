import json, platform, subprocess, sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.vision.all import Callback, CrossEntropyLossFlat, GradientAccumulation, Recorder, accuracy, nn

from cifar_cam.augment import cifar_augment
from cifar_cam.core import InputError
from cifar_cam.loaders import cifar_dls
from cifar_cam.schedule import find_lrs, Plateau
from cifar_cam.core import save_atomically
from cifar_cam.optimizers import Muon, newton_schulz, OPTIMIZERS
from cifar_cam.optimizers import has_bf16
from cifar_cam.precision import HalfPrecision, keep_memory
from cifar_cam.callbacks import FreezeWhitening, L1Penalty, plot_update_ratios, ProgressiveResize, StopOnNaN, UpdateRatio
from cifar_cam.learner import Checkpoint, cifar_learner, SeedEpochs
from cifar_cam.recorder import _DeviceSmoothLoss as DeviceSmoothLoss
from conftest import megabytes

pytestmark = pytest.mark.usefixtures('on_cpu')


def tiny_net(n_out=10):
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.2), nn.Flatten(), nn.Linear(8*64, n_out))


def tiny_learner(data, tmp_path, in_memory=True, num_workers=0, **kwargs):
    dls = cifar_dls(data, cifar_augment(8), bs=32, in_memory=in_memory, num_workers=num_workers)
    return cifar_learner(dls, tiny_net(), path=tmp_path, **{'bf16': False, **kwargs})


def quietly(learn, fit):
    with learn.no_bar(), learn.no_logging(): fit(learn)
    return [p.detach().clone() for p in learn.model.state_dict().values()], learn.recorder.values


def same(a, b): return all(torch.equal(p, q) for p,q in zip(a, b))


class StopAt(Callback):
    "As if the process died in this epoch, at this step"
    class Dead(BaseException): pass
    def __init__(self, epoch, step): self.at = epoch, step
    def after_batch(self):
        if self.training and (self.epoch, self.iter) == self.at: raise self.Dead


@pytest.mark.parametrize('in_memory, workers', [(True, 0), (False, 0), (False, 2)])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(shapes, tmp_path, in_memory, workers):
    def train(seed):
        torch.rand(seed + 1); np.random.rand(3)   # what happened before must not matter
        learn = tiny_learner(shapes, tmp_path, in_memory, workers, seed=seed)
        return quietly(learn, lambda l: l.fit_one_cycle(2, .02))
    (a,va),(b,vb),(c,vc) = train(0),train(0),train(1)
    assert same(a, b) and va == vb
    assert not same(a, c) and va != vc


FITS = dict(
    onecycle=lambda l, cbs: l.fit_one_cycle(4, .02, cbs=cbs), triangle=lambda l, cbs: l.fit_triangle(4, .002, .02, peak=1, cbs=cbs),
    plateau=lambda l, cbs: l.fit(4, .5, cbs=[Plateau(.5, patience=1), *cbs]))


@pytest.mark.parametrize('at', [(0, 3), (1, 0), (3, 8)])
@pytest.mark.parametrize('opt, fit', [pytest.param(opt, fit, marks=() if (opt, fit) in (('nesterov', 'onecycle'), ('adam', 'plateau'), ('muon', 'triangle')) else pytest.mark.slow)
                                      for opt in ('nesterov', 'adam', 'muon') for fit in FITS])
def test_a_killed_training_goes_on_to_the_same_numbers(shapes, tmp_path, fit, opt, at):
    whole,values = quietly(tiny_learner(shapes, tmp_path, opt=opt), lambda l: FITS[fit](l, [Checkpoint(tmp_path/'whole.pt')]))
    with pytest.raises(StopAt.Dead):
        quietly(tiny_learner(shapes, tmp_path, opt=opt), lambda l: FITS[fit](l, [Checkpoint(tmp_path/'c.pt'), StopAt(*at)]))
    resumed,later = quietly(tiny_learner(shapes, tmp_path, opt=opt), lambda l: FITS[fit](l, [Checkpoint(tmp_path/'c.pt')]))
    assert same(whole, resumed)
    assert len(later) == 4 - at[0] and later == values[at[0]:]


def test_the_progress_bar_goes_on_too(shapes, tmp_path, capsys):
    with pytest.raises(StopAt.Dead): tiny_learner(shapes, tmp_path).fit(3, cbs=[Checkpoint(tmp_path/'c.pt'), StopAt(1, 0)])
    capsys.readouterr()
    tiny_learner(shapes, tmp_path).fit(3, cbs=Checkpoint(tmp_path/'c.pt'))
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip() and line.count('.') > 4]
    assert [r for r in rows if r.isdigit()] == ['1', '2']


def test_a_training_that_went_on_and_was_interrupted_leaves_the_next_one_whole(shapes, tmp_path):
    with pytest.raises(StopAt.Dead):
        quietly(tiny_learner(shapes, tmp_path), lambda l: l.fit(4, .02, cbs=[Checkpoint(tmp_path/'c.pt'), StopAt(2, 0)]))
    learn = tiny_learner(shapes, tmp_path)
    with pytest.raises(StopAt.Dead): quietly(learn, lambda l: l.fit(4, .02, cbs=[Checkpoint(tmp_path/'c.pt'), StopAt(3, 0)]))
    assert len(learn.recorder.values) == 1
    quietly(learn, lambda l: l.fit(2, .02))
    assert len(learn.recorder.values) == 2


def test_a_checkpoint_of_the_learner_is_written_by_trainings_alone(shapes, tmp_path):
    file = tmp_path/'c.pt'
    learn = tiny_learner(shapes, tmp_path, cbs=[Checkpoint(file)])
    with learn.no_bar(), learn.no_logging():
        learn.validate(); learn.get_preds(); learn.lr_find(num_it=5, show_plot=False, suggest_funcs=None)
        assert not file.exists()
        learn.fit(2, .02)
        kept = file.read_bytes()
        with torch.no_grad(): learn.model[-1].bias.fill_(3.)
        learn.get_preds(); learn.validate(); learn.lr_find(num_it=5, show_plot=False, suggest_funcs=None)
    assert file.read_bytes() == kept and torch.load(file, weights_only=True)['epochs'] == 2
    assert (learn.model[-1].bias == 3).all()   # what validates does not load it either


def test_a_finished_training_is_not_trained_further(shapes, tmp_path):
    done,_ = quietly(tiny_learner(shapes, tmp_path), lambda l: l.fit_one_cycle(2, .02, cbs=Checkpoint(tmp_path/'c.pt')))
    again,values = quietly(tiny_learner(shapes, tmp_path), lambda l: l.fit_one_cycle(2, .02, cbs=Checkpoint(tmp_path/'c.pt')))
    assert same(done, again) and values == []


def test_a_checkpoint_holds_nothing_that_could_run(shapes, tmp_path):
    quietly(tiny_learner(shapes, tmp_path), lambda l: l.fit(1, cbs=[Plateau(), Checkpoint(tmp_path/'c.pt')]))
    state = torch.load(tmp_path/'c.pt', weights_only=True)
    assert state['epochs'] == 1 and set(state) == {'model', 'opt', 'training', 'before', 'epochs', 'of', 'watchers', 'callbacks', 'smooth_loss', 'begun', 'fits'}


def test_half_a_write_leaves_the_old_file(tmp_path):
    path = tmp_path/'file'
    path.write_text('old')
    def write(tmp):
        tmp.write_text('half')
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): save_atomically(write, path)
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
    save_atomically(lambda tmp: tmp.write_text('new'), path)
    assert path.read_text() == 'new' and list(tmp_path.iterdir()) == [path]


MEMORY = """
import json, resource, torch
from cifar_cam.precision import keep_memory

def fresh():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)   # 64 MB: 16,384 pages, or 32 huge ones
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident(): return int(open('/proc/self/statm').read().split()[1])

outside = min(fresh() for _ in range(5))
with keep_memory():
    with keep_memory(): fresh()
    # a heap in pieces may need some rounds until one piece is large enough
    inside,held = min(fresh() for _ in range(20)),resident()
print(json.dumps(dict(outside=outside, inside=inside, given_back=held - resident(), after=fresh())))
"""

@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='no glibc, whose memory this is about')
def test_memory_is_kept_inside_and_given_back_after():
    "In a process of its own: what other tests have left in the heap changes where the next block comes from"
    pages = json.loads(subprocess.check_output([sys.executable, '-c', MEMORY], text=True))
    assert pages['outside'] > 25 and pages['after'] > 25
    assert pages['inside'] < 10, 'the inner one has switched it off'
    assert pages['given_back'] > 16_000


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='no glibc, whose memory this is about')
def test_memory_is_given_back_after_an_error_and_kept_while_training_and_predicting(shapes, tmp_path):
    with pytest.raises(ValueError), keep_memory(): raise ValueError
    assert keep_memory.depth == 0
    learn,depths = tiny_learner(shapes, tmp_path),[]
    learn.model[0].register_forward_hook(lambda *_: depths.append(keep_memory.depth))
    quietly(learn, lambda l: l.fit(1, .01))
    learn.get_preds()
    assert set(depths) == {1} and keep_memory.depth == 0


class Crumble(Callback):
    "Leaves 200 holes of 1 MB in the heap at the end of an epoch, between blocks that stay"
    held,left = (),()
    def after_epoch(self):
        blocks = [torch.ones(2**18) for _ in range(400)]
        self.stays = blocks[::2]
        del blocks
        self.held = (*self.held, megabytes())
    def before_epoch(self): self.left = (*self.left, megabytes())


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='no glibc, whose memory this is about')
def test_what_is_kept_does_not_grow_from_epoch_to_epoch(shapes, tmp_path):
    learn = tiny_learner(shapes, tmp_path, cbs=[crumble := Crumble()])
    quietly(learn, lambda l: l.fit(3, .01))
    assert all(at_end - next_one > 150 for at_end,next_one in zip(crumble.held, crumble.left[1:]))


def test_without_glibc_nothing_changes(monkeypatch):
    monkeypatch.setattr(keep_memory, 'glibc', None)
    with keep_memory(): assert keep_memory.depth == 1
    assert keep_memory.depth == 0


def test_bf16_trains_in_bf16_keeps_float32_weights_and_leaves_nothing_behind(shapes, tmp_path):
    learn,seen = tiny_learner(shapes, tmp_path, bf16=True),set()
    learn.model[0].register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    quietly(learn, lambda l: l.fit(1, .01))
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in learn.model.parameters()} == {torch.float32}
    assert 'forward' not in vars(learn.model)
    seen.clear(); learn.model(torch.randn(2, 3, 32, 32))
    assert seen == {torch.float32}
    assert learn.get_preds()[0].dtype == torch.float32 and 'forward' not in vars(learn.model)


def test_an_interrupted_training_leaves_a_float32_network(shapes, tmp_path):
    learn,seen = tiny_learner(shapes, tmp_path, bf16=True),set()
    with pytest.raises(StopAt.Dead): quietly(learn, lambda l: l.fit(1, .01, cbs=StopAt(0, 2)))
    learn.model[0].register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    assert 'forward' not in vars(learn.model)
    learn.model(torch.randn(2, 3, 32, 32))
    assert seen == {torch.float32}


def test_a_forward_of_ones_own_is_trained_and_comes_back(shapes, tmp_path):
    learn,asked = tiny_learner(shapes, tmp_path, bf16=True),[]
    whole = learn.model.forward
    def own(x):
        asked.append(x.dtype)
        return whole(x)
    learn.model.forward = own   # as `torch.compile` has one
    quietly(learn, lambda l: l.fit(1, .01))
    assert asked and vars(learn.model)['forward'] is own


def test_predictions_are_float32_whatever_the_training_was(shapes, tmp_path):
    learn = tiny_learner(shapes, tmp_path, bf16=True)
    x = torch.cat([b[0] for b in learn.dls.valid]).as_subclass(torch.Tensor)
    with torch.no_grad(): expected = learn.model.eval()(x)
    assert torch.allclose(learn.get_preds(act=lambda o: o)[0], expected, atol=1e-6)


def test_bf16_is_near_float32(shapes, tmp_path):
    (_,a),(_,b) = (quietly(tiny_learner(shapes, tmp_path, bf16=on), lambda l: l.fit(2, .02)) for on in (True, False))
    assert abs(a[-1][0] - b[-1][0]) < .05*b[-1][0]


@pytest.mark.parametrize('avx, amx', [(False, False), (True, False), (False, True)])
def test_bf16_is_chosen_where_the_processor_is_made_for_it(shapes, tmp_path, monkeypatch, avx, amx):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
    monkeypatch.setattr('cifar_cam.optimizers._is_intel', lambda: False)
    assert bool(tiny_learner(shapes, tmp_path, bf16=None)._grab_cbs(HalfPrecision)) == (avx or amx)


def test_a_gpu_that_only_emulates_bf16_trains_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device', lambda d: nullcontext())
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation)
    assert not has_bf16('cuda')


def test_l1_moves_every_weight_toward_zero_and_is_not_in_the_reported_loss(shapes, tmp_path):
    sizes = {}
    for strength in 0., .01:
        learn = tiny_learner(shapes, tmp_path, cbs=[L1Penalty(strength)])
        quietly(learn, lambda l: l.fit(2, .02))
        sizes[strength] = sum(p.abs().sum() for p in learn.model.parameters()).item()
    assert sizes[.01] < .8*sizes[0.]
    learn.model.zero_grad()
    learn.loss_grad = torch.zeros((), requires_grad=True)
    learn.training = True
    learn('after_loss')
    learn.loss_grad.backward()
    learn('after_backward')
    for p in learn.model.parameters(): torch.testing.assert_close(p.grad, .01*p.sign())


def test_a_loss_that_is_no_number_stops_at_once_and_says_where(shapes, tmp_path):
    learn = tiny_learner(shapes, tmp_path)
    with pytest.raises(InputError, match=r'loss is (nan|inf).*epoch \d+, step \d+, at learning rate 1e\+20'): quietly(learn, lambda l: l.fit(3, 1e20))


def test_the_lr_finder_may_diverge(shapes, tmp_path):
    learn = tiny_learner(shapes, tmp_path)
    with learn.no_bar(): learn.lr_find(start_lr=1e15, end_lr=1e30, num_it=20, show_plot=False, stop_div=False, suggest_funcs=None)


def test_the_lr_finder_draws_losses_that_were_on_a_gpu(shapes, tmp_path, monkeypatch):
    class OnGPU(torch.Tensor):
        def __array__(self, *args, **kwargs): raise TypeError('no array of a tensor on a GPU')
        def cpu(self): return self.as_subclass(torch.Tensor)
    value = DeviceSmoothLoss.value
    monkeypatch.setattr(DeviceSmoothLoss, 'value', property(lambda o: value.fget(o).as_subclass(OnGPU)))
    learn = tiny_learner(shapes, tmp_path)
    with learn.no_bar(): learn.lr_find(num_it=20)
    assert {type(o) for o in learn.recorder.losses} == {torch.Tensor}


def test_an_interrupted_finder_leaves_no_callback_asleep_and_no_weight_moved(shapes, tmp_path):
    learn = tiny_learner(shapes, tmp_path, cbs=Checkpoint(tmp_path/'c.pt'))
    before = [p.detach().clone() for p in learn.model.state_dict().values()]
    with learn.added_cbs(stop := StopAt(1, 3)), learn.no_bar(), learn.no_logging(), pytest.raises(StopAt.Dead): find_lrs(learn)
    assert same(before, learn.model.state_dict().values()) and not (tmp_path/'c.pt').exists()
    quietly(learn, lambda l: l.fit(1, .01))
    assert (tmp_path/'c.pt').exists()


def test_what_the_learner_is_given_is_what_it_has(shapes, tmp_path):
    learn = tiny_learner(shapes, tmp_path, metrics=[accuracy], loss_func=CrossEntropyLossFlat(), cbs=Checkpoint(tmp_path/'c.pt'))
    assert type(learn.loss_func) is CrossEntropyLossFlat and [m.name for m in learn.metrics] == ['accuracy']
    assert cifar_dls(shapes, bs=16, val_bs=20).valid.bs == 20


def test_update_ratios_are_the_steps_over_the_weights(shapes, tmp_path):
    cb = UpdateRatio(every=1)
    learn = tiny_learner(shapes, tmp_path, opt='sgd', wd=0., cbs=[cb])
    before = learn.model[0].weight.detach().clone()
    class Note(Callback):
        order = 100
        def after_batch(self):
            if self.training and self.iter == 0: self.now = self.model[0].weight.detach().clone()
    note = Note()
    quietly(learn, lambda l: l.fit(1, .1, cbs=note))
    assert cb.ratios['0.weight'][0] == pytest.approx(((note.now - before).norm()/before.norm()).item(), rel=1e-4)
    assert cb.steps == list(range(len(learn.dls.train))) and set(cb.ratios) == {'0.weight', '5.weight'}
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert cb.accuracies == [(len(learn.dls.train), row['accuracy'])]
    fig = plot_update_ratios({'a': cb, 'b': cb})
    assert len(fig.axes) == 2*2 + 1 and [ax.get_title() for ax in fig.axes[:2]] == ['a', 'b'] # ratios, accuracies, the scale of colours
    assert f"{100*row['accuracy']:.1f}" in [t.get_text() for t in fig.axes[2].texts]
    bare = UpdateRatio(every=1)
    quietly(tiny_learner(shapes, tmp_path, metrics=[], cbs=[bare]), lambda l: l.fit(1, .1))
    assert not bare.accuracies and len(plot_update_ratios({'a': bare}).axes) == 1 + 1
    for runs in {}, {'a': bare, 'untrained': UpdateRatio()}:
        with pytest.raises(InputError, match='no step was recorded'): plot_update_ratios(runs)


def test_update_ratios_of_a_training_that_gathers_gradients(shapes, tmp_path):
    cb = UpdateRatio(every=1)
    learn = tiny_learner(shapes, tmp_path, cbs=[cb, GradientAccumulation(64)])   # two batches of 32
    quietly(learn, lambda l: l.fit(1, .01))
    assert len(cb.ratios['0.weight']) == len(cb.steps) == len(learn.dls.train)//2


@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_every_optimizer_learns_and_takes_a_schedule(colours, tmp_path, opt):
    dls = cifar_dls(colours, bs=32)
    learn = cifar_learner(dls, tiny_net(4), opt=opt, path=tmp_path, bf16=False)
    _,values = quietly(learn, lambda l: l.fit_one_cycle(4, .05 if opt in ('sgd', 'nesterov', 'muon') else .005))
    accuracy = learn.recorder.metric_names.index('accuracy') - 1
    assert values[-1][accuracy] > .9 and values[-1][0] < values[0][0]


def test_an_unknown_optimizer_lists_the_known(shapes, tmp_path):
    with pytest.raises(InputError, match='sgd, nesterov, adam, adamw, rmsprop, muon'): tiny_learner(shapes, tmp_path, opt='lion')


def test_the_learning_rate_is_in_the_log_of_a_training_and_nowhere_else(shapes, tmp_path):
    learn,lines = tiny_learner(shapes, tmp_path),[]
    learn.logger = lines.append
    with learn.no_bar(): learn.fit_triangle(2, .001, .01, peak=1)
    names = list(learn.recorder.metric_names)
    assert names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'train_accuracy', 'lr', 'time']
    assert [row[names.index('lr')] for row in lines] == [learn.recorder.lrs[8], learn.recorder.lrs[-1]]
    assert len(learn.validate()) == 2


# --- Muon

@pytest.mark.parametrize('shape', [(16, 40), (40, 16), (20, 20)])
def test_orthogonalize_is_torchs_newton_schulz(shape):
    reference = pytest.importorskip('torch.optim._muon', reason='PyTorch has Muon from 2.9 on')._zeropower_via_newtonschulz
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for steps in 3, 5:
        torch.testing.assert_close(newton_schulz(g, steps).float(), reference(g, (3.4445, -4.7750, 2.0315), steps, 1e-7).float(), atol=.05, rtol=0)   # bfloat16
    u,s,v = torch.linalg.svd(newton_schulz(g, 5).float())
    assert s.min() > .6 and s.max() < 1.3


def test_muon_keeps_the_length_of_kernels_and_steps_alike_in_all_directions():
    torch.manual_seed(0)
    kernel,bias = torch.nn.Parameter(torch.randn(8, 4, 3, 3)),torch.nn.Parameter(torch.ones(8))
    bias.lr_scale = 3.
    kernel.grad,bias.grad = torch.randn_like(kernel),torch.ones(8)
    start = kernel.detach()*8**.5/kernel.detach().norm()
    Muon([kernel, bias], lr=.1, momentum=.5, weight_decay=.2, other_momentum=.8).step()
    s = torch.linalg.svdvals((kernel.detach() - start).flatten(1))/.1
    assert s.min() > .3 and s.max() < 1.4   # three applications of the polynomial
    torch.testing.assert_close(bias.detach(), torch.full((8,), 1 - .1*.2 - .1*3*(1 + .8)))


def test_muon_on_a_matrix_is_nesterov_sgd():
    torch.manual_seed(0)
    a = torch.nn.Parameter(torch.randn(5, 4)); b = torch.nn.Parameter(a.detach().clone())
    ours,torchs = Muon([a], lr=.1, other_momentum=.9),torch.optim.SGD([b], lr=.1, momentum=.9, nesterov=True)
    for _ in range(4):
        a.grad = torch.randn_like(a); b.grad = a.grad.clone()
        ours.step(); torchs.step()
    torch.testing.assert_close(a, b)


# --- the speed run's callbacks

def test_training_images_grow_and_validation_images_are_whole(shapes, tmp_path):
    seen = {True: [], False: []}
    class Sizes(Callback):
        order = 100
        def before_batch(self): seen[self.training].append((self.epoch, self.x.shape[-1]))
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    learn = cifar_learner(cifar_dls(shapes, bs=100), net, path=tmp_path, bf16=False, cbs=[ProgressiveResize([16, 24, 32]), Sizes()])
    quietly(learn, lambda l: l.fit(4, .01))
    assert dict(seen[True]) == {0: 16, 1: 16, 2: 24, 3: 32} and {s for _,s in seen[False]} == {32}


def test_speednet_whitens_by_its_own_data_and_stops_training_that_layer(shapes, tmp_path):
    dls = cifar_dls(shapes, bs=60)
    learn = cifar_learner(dls, 'speednet', opt='muon', wd=.1, path=tmp_path, bf16=False, cbs=[FreezeWhitening(1/2)])
    white = learn.model.whiten
    x = torch.cat([b[0] for b in dls.train.new(shuffle=False, drop_last=False)])
    with torch.no_grad(): out = (white(x) - white.bias[:, None, None])[:, :12].transpose(0, 1).flatten(1)
    cov = out @ out.T/out.shape[1]
    assert (cov - torch.diag(cov.diag())).abs().max() < .05 and .9 < cov.diag()[-6:].min() <= cov.diag().max() < 1.1
    before = white.weight.clone(); biases = []
    class Note(Callback):
        def after_epoch(self): biases.append(white.bias.detach().clone())
    quietly(learn, lambda l: l.fit(4, .05, cbs=Note()))
    assert torch.equal(white.weight, before)
    assert not torch.equal(biases[0], biases[1]) and torch.equal(biases[1], biases[3])


# --- the light loop

def test_the_light_loop_gives_fastais_numbers(shapes, tmp_path):
    "The same training with fastai's own recorder, metric, loss and event loop"
    light = tiny_learner(shapes, tmp_path, label_smoothing=.1)
    weights,values = quietly(light, lambda l: l.fit_one_cycle(2, .02))
    own = tiny_learner(shapes, tmp_path, label_smoothing=.1)
    own.remove_cb(own.recorder); own.add_cb(Recorder())
    own.metrics,own.loss_func = accuracy,CrossEntropyLossFlat(label_smoothing=.1)
    own._call_one = lambda event: [cb(event) for cb in own.cbs.sorted('order')]
    theirs,expected = quietly(own, lambda l: l.fit_one_cycle(2, .02))
    assert same(weights, theirs)
    np.testing.assert_allclose(np.array(values, float)[:, :3], np.array(expected, float), rtol=1e-6)   # then ours
    np.testing.assert_allclose(light.recorder.losses, own.recorder.losses, rtol=1e-5)
    assert light.recorder.lrs == own.recorder.lrs and light.recorder.iters == own.recorder.iters
    assert [n for n in light.recorder.metric_names if n not in ('train_accuracy', 'lr')] == own.recorder.metric_names


def test_callbacks_may_come_and_go(shapes, tmp_path):
    calls = []
    class Once(Callback):
        def after_step(self): calls.append('once'); self.learn.remove_cb(self)
    class Off(Callback):
        run = False
        def after_step(self): calls.append('off')
    off = Off()
    learn = tiny_learner(shapes, tmp_path, cbs=[off])
    quietly(learn, lambda l: l.fit(1, .01, cbs=[Once()]))
    assert calls == ['once'] and off.run
    learn.remove_cb(off)
    quietly(learn, lambda l: l.fit(1, .01))
    assert calls == ['once']


def test_get_preds_and_interpretation_know_the_loss(shapes, tmp_path):
    learn = tiny_learner(shapes, tmp_path)
    with learn.no_bar(): probs,targets,decoded,losses = learn.get_preds(with_decoded=True, with_loss=True)
    torch.testing.assert_close(probs.sum(1), torch.ones(len(probs)))
    torch.testing.assert_close(losses, -probs[range(len(probs)), targets].log(), atol=1e-5, rtol=1e-4)
    assert torch.equal(decoded, probs.argmax(1))
