"Half precision by device, float16's scaler, full float32, determinism, compilation, and what is left of a batch that was too large."
import gc
from contextlib import ExitStack, nullcontext
from weakref import ref

import pytest
import torch
from fastai.vision.all import Callback, CancelFitException, CrossEntropyLossFlat, DataLoaders, GradientAccumulation, GradientClip, Learner, nn

from cifar_cam import precision
from cifar_cam.core import InputError
from cifar_cam.optimizers import opt_func, OPTIMIZERS
from cifar_cam.precision import (Compiled, deterministic_algorithms, fast_convolutions, forget_batch, full_float32, HalfPrecision, has_fp16, pick_precision,
                                 ProductGradients)


def small_learner(cbs=(), opt='sgd', sizes=(8,), net=None):
    "Four batches an epoch of 16 random images; the network has a convolution, a normalisation and a linear layer"
    torch.manual_seed(0)
    images = [(torch.randn(3, 8, 8), i%2) for i in range(64)]
    dls = DataLoaders.from_dsets(images, images, bs=16, device=torch.device('cpu'), shuffle=False)
    net = net or nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), opt_func=opt_func(opt), cbs=cbs)
    learn.first_epoch = None   # as of `CifarLearner`, outside of a training
    return learn


def train(learn, epochs=2, lr=.01, cbs=()):
    torch.manual_seed(1)
    learn.first_epoch = 0
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr, cbs=cbs)
    finally: learn.first_epoch = None
    return [p.detach().clone() for p in learn.model.state_dict().values()]


def same(a, b): return all(torch.equal(p, q) for p,q in zip(a, b))


# --- the choice

@pytest.mark.parametrize('capability, emulated, expected', [((6, 0), True, 'float32'), ((7, 0), True, 'float16'), ((7, 5), True, 'float16'),
                                                            ((8, 0), False, 'bfloat16'), ((9, 0), False, 'bfloat16')])
def test_a_gpu_gets_what_it_multiplies_fast(monkeypatch, capability, emulated, expected):
    monkeypatch.setattr(torch.cuda, 'device', lambda d: nullcontext())
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation or not emulated)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda d=None: capability)
    assert pick_precision('auto', 'cuda') == expected
    assert pick_precision('float32', 'cuda') == 'float32' and pick_precision('auto', 'cuda', bf16=True) == 'bfloat16'


@pytest.mark.parametrize('avx, amx, intel, fast', [(False, False, False, False), (True, False, False, True), (True, False, True, False), (True, True, True, True),
                                                   (False, True, True, True), (False, False, True, False)])
def test_a_cpu_gets_bfloat16_where_it_is_made_for_it_and_never_float16(monkeypatch, avx, amx, intel, fast):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
    monkeypatch.setattr('cifar_cam.optimizers._is_intel', lambda: intel)   # whose avx512_bf16 alone runs at half the speed of float32
    assert pick_precision() == ('bfloat16' if fast else 'float32')
    assert pick_precision(bf16=False) == 'float32' and pick_precision(bf16=True) == 'bfloat16' and not has_fp16('cpu')


def test_other_devices_get_float32(): assert pick_precision('auto', 'mps') == pick_precision('auto', torch.device('meta')) == 'float32'


def test_a_wrong_or_contradictory_wish_is_named():
    with pytest.raises(InputError, match="'half': choose one of auto, bfloat16, float16, float32"): pick_precision('half')
    with pytest.raises(InputError, match="bf16=True and precision='float16'"): pick_precision('float16', bf16=True)
    assert pick_precision('bfloat16', bf16=True) == 'bfloat16'


# --- the arithmetic

IN_TURN = ('muon', 'float16'), ('adam', 'bfloat16'), ('sgd', 'float16'), ('rmsprop', 'bfloat16')

@pytest.mark.parametrize('opt, half', [pytest.param(opt, half, marks=() if (opt, half) in IN_TURN else pytest.mark.slow)
                                       for opt in OPTIMIZERS for half in ('bfloat16', 'float16')])
def test_half_precision_trains_like_float32(opt, half):
    plain,learn = small_learner(opt=opt),small_learner([HalfPrecision(half)], opt=opt)
    seen = set()
    learn.model[0].register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    train(plain, lr=.003); train(learn, lr=.003)
    assert seen == {getattr(torch, half)} and {p.dtype for p in learn.model.parameters()} == {torch.float32}
    assert float(learn.recorder.values[-1][0]) == pytest.approx(float(plain.recorder.values[-1][0]), rel=.05)
    assert 'forward' not in vars(learn.model) and '_step' not in vars(learn)
    seen.clear(); learn.get_preds()
    assert seen == {torch.float32}


class NoteSteps(Callback):
    "Gradients as the optimizer gets them, and the length that a clip saw"
    order = 20
    def before_fit(self): self.grads = []
    def before_step(self): self.grads.append([p.grad.clone() for p in self.model.parameters()])


@pytest.mark.parametrize('more', [lambda: [], lambda: [GradientClip(.05)], lambda: [GradientAccumulation(32)], lambda: [GradientAccumulation(32), GradientClip(.05)]])
def test_clipping_and_accumulation_see_unscaled_gradients(more):
    plain,half = NoteSteps(),NoteSteps()
    train(small_learner([*more(), plain]), lr=1e-4)
    train(small_learner([*more(), half, HalfPrecision('float16')]), lr=1e-4)
    assert len(plain.grads) == len(half.grads) > 0
    for a,b in zip(plain.grads, half.grads):
        norm = torch.cat([g.flatten() for g in a]).norm()
        difference = torch.cat([(g - h).flatten() for g,h in zip(a, b)]).norm()
        assert difference < .03*norm


class Spoil(Callback):
    "An infinite gradient at some steps"
    order = 9   # before the scaler looks
    def __init__(self, steps): self.steps,self.n = steps,0
    def before_fit(self): self.n = 0
    def before_step(self):
        if self.n in self.steps: next(self.model.parameters()).grad.fill_(float('inf'))
        self.n += 1


@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_a_step_with_an_infinite_gradient_is_skipped_and_counted(opt):
    learn,weights = small_learner([HalfPrecision('float16'), Spoil({1, 3})], opt=opt),[]
    class Note(Callback):
        order = 30
        def after_step(self): weights.append([p.detach().clone() for p in self.model.parameters()])
    train(learn, epochs=1, cbs=Note())
    assert learn.half_precision.skipped == 2 and learn.half_precision.scaler.get_scale() == 2.**14
    assert same(weights[0], weights[1]) and not same(weights[1], weights[2]) and same(weights[2], weights[3])


def test_neither_validation_nor_predictions_begin_a_new_count():
    learn = small_learner([HalfPrecision('float16'), Spoil({0})])
    train(learn, epochs=1)
    with learn.no_bar(): learn.validate(); learn.get_preds()
    assert learn.half_precision.skipped == 1
    learn.remove_cb(Spoil)
    train(learn, epochs=1)
    assert learn.half_precision.skipped == 0 and learn.half_precision.scaler.get_scale() == 2.**15   # the scale goes on


class StopAfter(Callback):
    order = 90
    def __init__(self, epoch): self.at = epoch
    def after_epoch(self):
        if self.epoch == self.at: raise CancelFitException


@pytest.mark.parametrize('opt', ['sgd', 'adam', 'muon'])
def test_the_scaler_goes_on_from_a_checkpoint_to_the_same_bits(opt, tmp_path):
    spoil = lambda: Spoil({1})
    whole = small_learner([HalfPrecision('float16'), spoil()], opt=opt)
    expected = train(whole, epochs=2)
    first = small_learner([HalfPrecision('float16'), spoil()], opt=opt)
    train(first, epochs=1)
    torch.save(dict(model=first.model.state_dict(), opt=first.opt.state_dict(), scaler=first.half_precision.state_dict()), tmp_path/'c.pt')
    state = torch.load(tmp_path/'c.pt', weights_only=True)   # nothing but numbers
    second = small_learner([HalfPrecision('float16')], opt=opt)
    class Restore(Callback):
        order = 70
        def before_fit(self):
            self.model.load_state_dict(state['model']); self.opt.load_state_dict(state['opt'])
            self.half_precision.load_state_dict(state['scaler'])
    assert same(train(second, epochs=1, cbs=Restore()), expected)
    assert second.half_precision.state_dict() == whole.half_precision.state_dict() and second.half_precision.skipped == 1


def test_bfloat16_has_no_scaler_and_ignores_one():
    learn = small_learner([HalfPrecision('bfloat16')])
    train(learn, epochs=1)
    assert learn.half_precision.state_dict() == {} and learn.half_precision.skipped == 0
    learn.half_precision.load_state_dict(dict(scale=4.))
    assert learn.half_precision.scaler is None


def test_an_interrupted_training_gets_its_own_step_and_forward_back():
    class Dead(BaseException): pass
    class Die(Callback):
        def after_step(self): raise Dead
    learn = small_learner([HalfPrecision('float16')])
    with pytest.raises(Dead): train(learn, cbs=Die())
    learn.half_precision.restore()   # what `CifarLearner.fit` does at its end
    assert 'forward' not in vars(learn.model) and '_step' not in vars(learn)


def test_the_finder_works_in_float16():
    learn = small_learner([HalfPrecision('float16')])
    before = [p.detach().clone() for p in learn.model.state_dict().values()]
    with learn.no_bar(): learn.lr_find(num_it=20, show_plot=False)
    assert len(learn.recorder.losses) == 20 and same(before, learn.model.state_dict().values())


# --- gradients of small maps

def gradients(conv, x, *contexts):
    "Of the weights and of the image, and the name of the operation, in bfloat16 inside `contexts`"
    x = x.clone().requires_grad_()
    conv.weight.grad = None
    with ExitStack() as stack:
        for context in torch.autocast('cpu', torch.bfloat16), *contexts: stack.enter_context(context)
        out = conv(x)
    out.float().square().mean().backward()
    return conv.weight.grad.clone(), x.grad, out.grad_fn.name()


def far(a, b): return float((a - b).norm()/b.norm())


@pytest.mark.parametrize('conv', [dict(kernel_size=3, padding=1), dict(kernel_size=3, padding=1, stride=2), dict(kernel_size=3), dict(kernel_size=1, stride=2), dict(kernel_size=2, stride=2),
                                  dict(kernel_size=(3, 1), padding=(1, 0), stride=(1, 2)), dict(kernel_size=(1, 5), padding=(0, 2)), dict(kernel_size=3, padding=1, padding_mode='reflect')])
@pytest.mark.parametrize('last', [True, False])
def test_a_product_gives_the_gradients_of_a_convolution(conv, last, monkeypatch):
    monkeypatch.setattr(ProductGradients, 'weights', 1)
    monkeypatch.setattr(ProductGradients, 'places', 99)
    torch.manual_seed(0)
    net = nn.Conv2d(32, 64, bias=False, **conv)
    x = torch.randn(4, 32, 4, 5)
    if last: net,x = net.to(memory_format=torch.channels_last),x.contiguous(memory_format=torch.channels_last)
    weight,image,name = gradients(net, x, ProductGradients())
    exact,exact_image,other = gradients(net, x, torch.autocast('cpu', enabled=False))
    assert 'ByProduct' in name and 'ByProduct' not in other and weight.dtype==image.dtype==torch.float32
    assert far(weight, exact) < .01 and far(image, exact_image) < .01


@pytest.mark.parametrize('conv', [dict(bias=True), dict(groups=2), dict(dilation=2), dict(padding='same')])
def test_other_convolutions_are_left_to_pytorch(conv, monkeypatch):
    monkeypatch.setattr(ProductGradients, 'weights', 1)
    torch.manual_seed(0)
    net = nn.Conv2d(8, 8, 3, **{'padding': 1, 'bias': False, **conv})
    x = torch.randn(2, 8, 4, 4)
    *with_mode,name = gradients(net, x, ProductGradients())
    *without,_ = gradients(net, x)
    assert 'ByProduct' not in name and same(with_mode, without)


def test_a_product_is_for_many_weights_small_maps_and_gradients():
    wide = nn.Conv2d(256, 256, 3, padding=1, bias=False)
    x = torch.randn(2, 256, 4, 4)
    def name(conv, x):
        with torch.autocast('cpu', torch.bfloat16), ProductGradients(): return conv(x).grad_fn and conv(x).grad_fn.name()
    assert 'ByProduct' in name(wide, x) and 'ByProduct' in name(wide, x.requires_grad_())
    assert 'ByProduct' not in name(wide, torch.randn(2, 256, 4, 5)) and 'ByProduct' not in name(nn.Conv2d(256, 128, 3, padding=1, bias=False), x)
    with torch.no_grad(): assert name(wide, x) is None
    assert 'ByProduct' not in name(wide.requires_grad_(False), x)
    with torch.autocast('cpu', torch.bfloat16), ProductGradients():
        w = torch.randn(256, 256, 3, 3, requires_grad=True)
        for o in (2, 1), ((2, 2), (1, 1)), (): assert 'ByProduct' in torch.nn.functional.conv2d(x, w, None, *o).grad_fn.name()
        assert torch.nn.functional.conv2d(x, w, stride=2).shape == (2, 256, 1, 1)


@pytest.mark.parametrize('context', [nullcontext, lambda: torch.autocast('cpu', torch.float16)])
def test_a_product_is_for_bfloat16_only(context, monkeypatch):
    monkeypatch.setattr(ProductGradients, 'weights', 1)
    with context(), ProductGradients(): out = nn.Conv2d(8, 8, 3, padding=1, bias=False)(torch.randn(2, 8, 4, 4))
    assert 'ByProduct' not in out.grad_fn.name() and out.dtype!=torch.bfloat16


def test_float64_stays_float64(monkeypatch):
    monkeypatch.setattr(ProductGradients, 'weights', 1)
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False).double()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    with torch.autocast('cpu', torch.bfloat16), ProductGradients(): out = conv(x)
    assert out.dtype==torch.float64 and torch.equal(out, conv(x))


def test_a_penalty_of_gradients_has_its_second_derivatives(monkeypatch):
    monkeypatch.setattr(ProductGradients, 'weights', 1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.Tanh(), nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Tanh())
    x = torch.randn(4, 8, 4, 4, requires_grad=True)
    def penalty(*contexts):
        net.zero_grad()
        with ExitStack() as stack:
            for context in contexts: stack.enter_context(context)
            out = net(x)
        slope, = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
        slope.square().mean().backward()
        return [p.grad.clone() for p in net.parameters()]
    exact = penalty()
    by_products = penalty(torch.autocast('cpu', torch.bfloat16), ProductGradients())
    assert all(far(p, e) < .05 for p,e in zip(by_products, exact))


@pytest.mark.parametrize('amx, half, products', [(True, 'bfloat16', True), (False, 'bfloat16', False), (True, 'float16', False)])
def test_a_training_uses_products_where_onednn_adds_slowly(amx, half, products, monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
    monkeypatch.setattr(ProductGradients, 'weights', 1)
    seen = []
    product = precision._ConvByProduct.apply
    monkeypatch.setattr(precision._ConvByProduct, 'apply', lambda *args: seen.append(args[0].shape) or product(*args))
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))
    learn = small_learner([HalfPrecision(half)], net=net)
    train(learn, epochs=1)
    assert len(seen) == 4*products # a batch each, and none of the validation


# --- float32, determinism, tuning

def flags():
    cudnn = torch.backends.cudnn
    return (torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(), torch.utils.deterministic.fill_uninitialized_memory)


@pytest.mark.parametrize('context', [full_float32, deterministic_algorithms, fast_convolutions, lambda: deterministic_algorithms(False)])
def test_every_flag_comes_back_after_an_error_too(context, monkeypatch):
    torch.set_float32_matmul_precision('high')
    try:
        before = flags()
        with context(): pass
        assert flags() == before
        with pytest.raises(ValueError), context(): raise ValueError
        assert flags() == before
    finally: torch.set_float32_matmul_precision('highest')


def test_what_the_contexts_switch(monkeypatch):
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    with full_float32(): assert flags()[:2] == ('highest', False)
    with fast_convolutions(): assert torch.backends.cudnn.benchmark
    with deterministic_algorithms(), fast_convolutions():
        assert flags() == ('highest', False, False, True, True, True, False)
        assert precision.os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'
    with deterministic_algorithms(False), fast_convolutions(): assert torch.backends.cudnn.benchmark


# --- compiled

class Grow(Callback):
    "Images grow: three sizes, one after the other, and back in the next training"
    run_valid = False
    def before_batch(self): self.learn.xb = (nn.functional.interpolate(self.x, size=(6, 8, 10)[self.epoch]),)


class Backend:
    "aot_eager, and how many graphs it got"
    def __init__(self): self.shapes = []
    def __call__(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager
        self.shapes += [tuple(i.shape) for i in inputs if isinstance(i, torch.Tensor) and i.ndim == 4 and i.shape[1] == 3 and i.shape[0] == 16]
        return aot_eager(graph, inputs)


@pytest.mark.parametrize('half', [pytest.param(None, marks=pytest.mark.slow), 'bfloat16', pytest.param('float16', marks=pytest.mark.slow)])
def test_each_size_compiles_once_and_nothing_over_a_run(half):
    torch._dynamo.reset()
    backend = Backend()
    learn = small_learner([Grow(), Compiled(backend), *([HalfPrecision(half)] if half else [])])
    names = list(learn.model.state_dict())
    train(learn, epochs=3)
    assert backend.shapes == [(16, 3, 6, 6), (16, 3, 8, 8), (16, 3, 10, 10)]
    train(learn, epochs=3)
    assert len(backend.shapes) == 3, 'a second training compiled again'
    assert list(learn.model.state_dict()) == names and learn.model._compiled_call_impl is None
    with learn.no_bar(): learn.get_preds(); learn.validate()
    assert len(backend.shapes) == 3


def test_a_compiled_training_has_the_plain_ones_numbers():
    torch._dynamo.reset()
    plain,compiled = train(small_learner()),train(small_learner([Compiled('aot_eager')]))
    for a,b in zip(plain, compiled): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_what_the_user_compiled_is_still_compiled_afterwards():
    torch._dynamo.reset()
    learn = small_learner([Compiled('eager')])
    learn.model.compile(backend='eager')
    own = learn.model._compiled_call_impl
    train(learn, epochs=1)
    assert learn.model._compiled_call_impl is own


# --- out of memory

class Greedy(nn.Module):
    "Needs more memory than there is for more than eight images"
    def __init__(self):
        super().__init__()
        self.layer,self.held = nn.Linear(192, 2),[]
    def forward(self, x):
        activation = self.layer(x.flatten(1))
        self.held.append(ref(activation))
        if len(x) > 8: raise torch.OutOfMemoryError('CUDA out of memory')
        return activation


def test_nothing_of_a_batch_that_was_too_large_stays_and_half_works():
    learn,error = small_learner(net=Greedy()),None
    with pytest.raises(InputError) as caught:
        try: train(learn)
        except torch.OutOfMemoryError as e:
            forget_batch(learn, e)
            raise InputError('try half') from None
    gc.disable()
    try: assert learn.model.held and all(r() is None for r in learn.model.held)
    finally: gc.enable()
    assert caught.value is not None   # the error that says so may be kept
    learn.dls.train.bs = learn.dls.valid.bs = 8
    train(learn)
