"Optimizers by name, and Muon: its step in few operations, and the step that is taken back."
import pytest
import torch
from torch import nn, optim

from cifar_cam import optimizers
from cifar_cam.core import InputError
from cifar_cam.optimizers import has_bf16, Muon, newton_schulz, opt_func, OPTIMIZERS


def parameters(seed=0):
    "Kernels of several shapes, one of them taller than wide, a matrix and a vector, with gradients"
    rng = torch.Generator().manual_seed(seed)
    shapes = (8, 3, 3, 3), (8, 8, 3, 3), (16, 8, 3, 3), (16, 8, 3, 3), (40, 2, 2, 2), (5, 16), (8,)
    params = [nn.Parameter(torch.randn(s, generator=rng)) for s in shapes]
    for p in params: p.grad = torch.randn(p.shape, generator=rng)
    params[-1].lr_scale = 3.
    return params


def one_by_one(params, buffers, lr, momentum, wd, other):
    "Muon's step of one parameter after the other, in float64"
    for i,p in enumerate(params):
        g,conv = p.grad.double(),p.ndim > 2
        m = momentum if conv else other
        buffers[i] = m*buffers.get(i, torch.zeros_like(g)) + g
        step,w = g + m*buffers[i],p.detach().double()
        if conv:
            x = step.flatten(1)
            x = x/x.norm()
            for _ in range(3):
                s = x @ x.T
                x = 3.4445*x - 4.7750*s @ x + 2.0315*s @ s @ x
            w = w*len(w)**.5/w.norm() - lr*x.view_as(w)
        else: w = w*(1 - lr*wd) - lr*getattr(p, 'lr_scale', 1)*step
        p.data = w.float()


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_muon_in_batches_is_muon_one_by_one(monkeypatch, layout):
    monkeypatch.setattr(optimizers, '_product_type', lambda device: torch.float32)
    ours,theirs,buffers = parameters(),parameters(),{}
    for p in ours:
        if p.ndim == 4: p.data = p.data.contiguous(memory_format=layout)
    opt = Muon(ours, lr=.1, momentum=.6, weight_decay=.2, other_momentum=.85)
    for seed in 1, 2, 3:
        for p,q,g in zip(ours, theirs, parameters(seed)): p.grad,q.grad = g.grad.clone(),g.grad.clone()
        opt.step()
        one_by_one(theirs, buffers, .1, .6, .2, .85)
        for p,q in zip(ours, theirs): torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-4)


def test_muon_without_gradients_does_nothing():
    frozen,kernel = parameters()[0],parameters()[1]
    frozen.grad = None
    before = frozen.detach().clone()
    opt = Muon([frozen, kernel])
    opt.step()
    assert torch.equal(frozen, before) and frozen not in opt.state
    kernel.grad = None
    opt.step()   # nothing at all to do


@pytest.mark.parametrize('first', [True, False])
def test_a_step_with_an_infinite_gradient_changes_not_a_bit(first):
    params = parameters()
    opt = Muon(params, weight_decay=.1)
    if not first: opt.step()
    before = [p.detach().clone() for p in params]
    buffers = [opt.state[p]['momentum_buffer'].clone() if p in opt.state else torch.zeros_like(p) for p in params]
    for p,bad in zip(params, [float('inf'), float('nan')]*4): p.grad = torch.full_like(p, bad)
    opt.found_inf,opt.grad_scale = torch.tensor(1.),None
    opt.step()
    assert all(torch.equal(p, b) for p,b in zip(params, before))
    assert all(torch.equal(opt.state[p]['momentum_buffer'], b) for p,b in zip(params, buffers))


def test_muon_divides_by_the_scale():
    ours,theirs = parameters(),parameters()
    a,b = Muon(ours),Muon(theirs)
    for p in ours: p.grad = p.grad*1024
    a.grad_scale,a.found_inf = torch.tensor(1024.),torch.tensor(0.)
    a.step(); b.step()
    for p,q in zip(ours, theirs): torch.testing.assert_close(p, q)


def test_pytorchs_scaler_steps_muon():
    p = nn.Parameter(torch.randn(4, 3, 3, 3))
    opt,scaler = Muon([p]),torch.amp.GradScaler('cpu', init_scale=8.)
    def train(factor):
        opt.zero_grad()
        scaler.scale((p*factor).sum()).backward()
        scaler.step(opt); scaler.update()
    train(float('inf'))
    assert scaler.get_scale() == 4. and torch.isfinite(p).all()
    before = p.detach().clone()
    train(1.)
    assert scaler.get_scale() == 4. and not torch.equal(p, before)


def test_a_checkpoint_of_muon_goes_on_to_the_same_bits():
    whole,stopped = parameters(),parameters()
    a,b = Muon(whole),Muon(stopped)
    a.step(); b.step()
    c = Muon(stopped)
    c.load_state_dict(b.state_dict())
    a.step(); c.step()
    assert all(torch.equal(p, q) for p,q in zip(whole, stopped))


@pytest.mark.parametrize('shape', [(16, 40), (40, 16), (20, 20)])
def test_newton_schulz_is_torchs_for_one_matrix_and_for_many(shape):
    reference = pytest.importorskip('torch.optim._muon', reason='PyTorch has Muon from 2.9 on')._zeropower_via_newtonschulz
    g = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    many = newton_schulz(g, 5).float()
    for one,m in zip(g, many):
        torch.testing.assert_close(newton_schulz(one, 5).float(), m, atol=.02, rtol=0)
        torch.testing.assert_close(m, reference(one, (3.4445, -4.7750, 2.0315), 5, 1e-7).float(), atol=.05, rtol=0)   # bfloat16


def test_on_a_cpu_the_optimizers_are_pytorchs_own_to_the_bit():
    for name,make in dict(sgd=lambda p: optim.SGD(p, lr=.1, momentum=.9), adam=lambda p: optim.Adam(p, lr=.1), adamw=lambda p: optim.AdamW(p, lr=.1)).items():
        ours,theirs = parameters(),parameters()
        a,b = OPTIMIZERS[name](ours, lr=.1),make(theirs)
        for _ in range(3): a.step(); b.step()
        assert all(torch.equal(p, q) for p,q in zip(ours, theirs)), name


class Elsewhere:
    "A parameter that says it is on a GPU"
    device = torch.device('cuda')


@pytest.mark.parametrize('groups', [False, True])
@pytest.mark.parametrize('name', ['sgd', 'nesterov', 'adam', 'adamw'])
def test_on_a_gpu_they_are_fused(monkeypatch, name, groups):
    monkeypatch.setattr(optimizers, '_first_device', lambda params: torch.device('cuda'))   # PyTorch has fused kernels for a CPU too
    params = parameters()
    opt = OPTIMIZERS[name]([dict(params=params[:3]), dict(params=params[3:])] if groups else params, lr=.1)
    assert all(g['fused'] for g in opt.param_groups) and opt._step_supports_amp_scaling
    opt.step()
    # a checkpoint of a CPU, whose optimizer is not fused, is loaded into one that is
    plain = parameters()
    cpu = (optim.SGD if name in ('sgd', 'nesterov') else optim.Adam)(plain, lr=.1)
    cpu.step()
    if not groups:
        opt.load_state_dict(cpu.state_dict())
        assert all(g['fused'] for g in opt.param_groups)
        opt.step()


def test_the_first_parameter_says_where():
    where = optimizers._first_device
    assert where([Elsewhere()]).type == 'cuda' and where([dict(params=[Elsewhere()])]).type == 'cuda' and where(parameters()).type == 'cpu'


def test_unknown_names_are_answered_with_the_known():
    with pytest.raises(InputError, match='sgd, nesterov, adam, adamw, rmsprop, muon'): opt_func('lion')


def test_bf16_is_asked_of_the_gpu_without_emulation(monkeypatch):
    from contextlib import nullcontext
    monkeypatch.setattr(torch.cuda, 'device', lambda d: nullcontext())
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation)
    assert not has_bf16('cuda') and not has_bf16('mps')
