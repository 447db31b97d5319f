import numpy as np
import pytest
import torch
from fastai.vision.all import SGD, Learner, nn, partial

from cifar_cam.core import InputError
from cifar_cam.loaders import cifar_dls
from cifar_cam.schedule import find_lrs, Plateau, plot_triangle, suggest_lr_max, suggest_lr_min, triangle
from cifar_cam.optimizers import opt_func, OPTIMIZERS
from cifar_cam.learner import cifar_learner


def tiny_learner(data, opt_func=partial(SGD, mom=.9), **kwargs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8*64, 10))
    return Learner(cifar_dls(data, bs=32), net, opt_func=opt_func, **kwargs)


def fit_quietly(learn, fit):
    with learn.no_bar(), learn.no_logging(): fit()
    return np.array(learn.recorder.lrs)


@pytest.mark.parametrize('n_epoch, peak', [(24, 5), (3, 1), (2, .5), (4, 3.5)])
def test_the_recorder_saw_the_triangle_step_by_step(shapes, tmp_path, n_epoch, peak):
    learn = tiny_learner(shapes, path=tmp_path)
    lrs = fit_quietly(learn, lambda: learn.fit_triangle(n_epoch, .002, .02, peak=peak))
    epoch = np.arange(len(lrs))/len(learn.dls.train)
    up,down = .002 + .018*epoch/peak, .02 - .018*(epoch - peak)/(n_epoch - peak)
    np.testing.assert_allclose(lrs, np.where(epoch <= peak, up, down), rtol=1e-5)
    assert lrs.min() >= .002*(1 - 1e-6)   # no annihilation


def test_one_cycle_peaks_where_the_assignment_asks(shapes, tmp_path):
    learn = tiny_learner(shapes, path=tmp_path)
    lrs = fit_quietly(learn, lambda: learn.fit_one_cycle(24, .01, pct_start=5/24))
    assert lrs.argmax() == 5*len(learn.dls.train)


@pytest.mark.parametrize('args', [(24, .1, .01), (24, -1, .1), (5, .01, .1), (24, .01, float('nan'))])
def test_an_impossible_triangle_is_refused_before_training(shapes, tmp_path, args):
    learn = tiny_learner(shapes, path=tmp_path)
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(InputError): learn.fit_triangle(*args)
    assert all(torch.equal(p, q) for p,q in zip(before, learn.model.parameters()))
    with pytest.raises(InputError): plot_triangle(*args)


def test_the_drawn_triangle_is_the_trained_one():
    line = next(l for l in plot_triangle(24, .01, .4, peak=5).lines if l.get_label()=='triangle')
    x,y = line.get_data()
    np.testing.assert_allclose(y, [triangle(.01, .4, 5/24)(o/24) for o in x], rtol=1e-6)
    assert y[0] == pytest.approx(.01) and y[-1] == pytest.approx(.01) and x[y.argmax()] == pytest.approx(5, abs=.03)


def test_the_picks_bracket_the_fall_of_the_loss():
    lrs = torch.logspace(-6, 1, 100)
    losses = 2.3 - 1.0*((lrs.log10() + 3).clamp(0, 2)/2) + 5*(lrs.log10() - .3).clamp(0)   # falls from 1e-3 to 1e-1, rises beyond 2
    lo,hi = suggest_lr_min(lrs, losses, 100)[0],suggest_lr_max(lrs, losses, 100)[0]
    assert lo == pytest.approx(10**-2.8, rel=.2) and hi == pytest.approx(10**-1.2, rel=.2)


def test_find_lrs_marks_both_picks_and_leaves_the_learner_as_it_was(colours, tmp_path, on_cpu):
    import matplotlib.pyplot as plt
    plt.close('all')
    learn = tiny_learner(colours, path=tmp_path)
    before = [p.clone() for p in learn.model.parameters()]
    lo,hi = find_lrs(learn)
    assert 0 < lo < hi
    marked = sorted(float(l.get_xdata()[0]) for l in plt.gca().lines if l.get_marker()=='o')
    assert marked == pytest.approx([lo, hi])
    assert all(torch.equal(p, q) for p,q in zip(before, learn.model.parameters()))
    assert not [f for f in (tmp_path/'models').rglob('*') if f.is_file()]


def test_plateau_multiplies_as_in_pytorch(shapes, tmp_path):
    learn = tiny_learner(shapes, path=tmp_path)
    plateau = Plateau(factor=.5, patience=2)
    with torch.no_grad():
        for p in learn.model.parameters(): p.zero_()
    lrs = fit_quietly(learn, lambda: learn.fit(7, lr=1e-12, cbs=plateau))
    by_epoch = lrs[::len(learn.dls.train)]/1e-12
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(opt := torch.optim.SGD(learn.model.parameters(), 1.), factor=.5, patience=1)
    expected = []
    for _ in range(7):
        expected.append(opt.param_groups[0]['lr'])
        reference.step(1.)   # never improves after the first epoch; PyTorch counts patience from 0
    np.testing.assert_allclose(by_epoch, expected)
    with pytest.raises(InputError, match='between 0 and 1'): Plateau(factor=10)


@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_a_plateau_lowers_the_rate_of_every_optimizer(shapes, tmp_path, opt):
    "fastai's own callback writes into a copy of the settings of PyTorch's optimizers"
    learn = cifar_learner(cifar_dls(shapes, bs=32), nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.Flatten(), nn.Linear(64, 10)), opt=opt, path=tmp_path)
    lrs = fit_quietly(learn, lambda: learn.fit(4, lr=1e-30, cbs=Plateau(factor=.2, patience=1)))
    np.testing.assert_allclose(lrs[::len(learn.dls.train)]/1e-30, [1, 1, .2, .04])
    assert [g['lr'] for g in learn.opt.param_groups] == pytest.approx([1e-30*.2**3])


def test_a_plateau_stops_at_its_lowest_rate(shapes, tmp_path):
    learn = tiny_learner(shapes, path=tmp_path, opt_func=opt_func('nesterov'))
    with torch.no_grad():
        for p in learn.model.parameters(): p.zero_()
    lrs = fit_quietly(learn, lambda: learn.fit(5, lr=1e-12, cbs=Plateau(factor=.1, patience=1, min_lr=5e-14)))
    np.testing.assert_allclose(lrs[::len(learn.dls.train)]/1e-12, [1, 1, .1, .05, .05])


def test_a_loss_that_never_falls_gives_no_pick():
    with pytest.raises(InputError, match='hardly falls'): suggest_lr_max(torch.logspace(-6, 1, 50), 2.3 + .005*torch.rand(50), 50)


@pytest.mark.parametrize('losses', [[], [1.], [1, 1.001, 1, .999, .998, .98, 1.1, 1.3, 1.6, 2], [1, *(2. + i for i in range(20))]])
def test_a_loss_that_only_rises_gives_no_pick(losses):
    with pytest.raises(InputError, match='hardly falls'): suggest_lr_max(torch.logspace(-6, 1, len(losses)), torch.tensor(losses, dtype=torch.float), len(losses))


def test_an_early_dip_is_not_the_fall():
    lrs = torch.logspace(-6, 1, 100)
    losses = 2.3 - 1.0*((lrs.log10() + 3).clamp(0, 2)/2)
    losses[12] = 2.0
    assert suggest_lr_min(lrs, losses, 100)[0] > 1e-3


def test_a_plateau_that_warms_up_may_be_a_callback_of_the_learner_and_validate_comes_first(shapes, tmp_path, on_cpu):
    learn = tiny_learner(shapes, path=tmp_path, cbs=[Plateau(warmup=1)])
    with learn.no_bar(), learn.no_logging():
        learn.validate()   # there is no optimizer yet
        learn.fit(2, .01)
    n = len(learn.dls.train)
    assert learn.recorder.lrs[:n] == pytest.approx([.01*(i + 1)/n for i in range(n)])
    assert learn.recorder.lrs[n:] == pytest.approx([.01]*n)
