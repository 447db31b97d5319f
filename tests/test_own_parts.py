"Networks, losses, loaders and images of one's own: what is asked of them is right or refused in one line, and nothing is lost when `fit` is called again."
import random
from collections import namedtuple
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, nn, PILImage, PILImageBW, TensorCategory, TensorImage, TfmdDL
from torch.utils.data import DataLoader as TorchLoader, TensorDataset

from cifar_cam.attention import attention_matrices, roll_out
from cifar_cam.augment import albumentations_augment, AlternatingFlip, cifar_augment, Cutout, HorizontalFlip, PadCrop
from cifar_cam.callbacks import ProgressiveResize, UpdateRatio
from cifar_cam.cam import cam_maps
from cifar_cam.core import InputError
from cifar_cam.evaluate import load_weights, loader_stats, save_weights
from cifar_cam.evidence import see_images
from cifar_cam.history import History, KeepBest, read_history
from cifar_cam.interpret import CamInterpretation
from cifar_cam.learner import cifar_learner
from cifar_cam.loaders import cifar_dls
from cifar_cam.models import cifar_resnet
from cifar_cam.optimizers import Muon
from cifar_cam.panels import overlay
from cifar_cam.photo import explain_image
from cifar_cam.precision import full_float32
from cifar_cam.recipe import find_recipe
from cifar_cam.schedule import find_lrs


def net(n=3, channels=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n))


class OwnSet(torch.utils.data.Dataset):
    def __init__(self, vocab=('cat', 'dog', 'cow'), shift=0., scale=1.):
        rng = torch.Generator().manual_seed(0)
        self.vocab,self.x,self.y = vocab,(torch.rand(12, 3, 8, 8, generator=rng) - shift)/scale,torch.arange(12)%3
        self.items = [*range(12)]
    def __len__(self): return 12
    def __getitem__(self, i): return TensorImage(self.x[i]),TensorCategory(self.y[i])

def own_loaders(**kwargs): return DataLoaders(*(TfmdDL(OwnSet(**kwargs), bs=6, n_inp=1) for _ in range(2)), device=torch.device('cpu'))

def labelled(y, n=12):
    data = TensorDataset(torch.randn(n, 3, 8, 8), y)
    return DataLoaders.from_dsets(data, data, bs=6, device=torch.device('cpu'))

def learner_of(dls=None, model=None, **kwargs): return cifar_learner(dls or labelled(torch.arange(12)%3), model or net(), **{'precision': 'float32', **kwargs})

def fit(learn, n=1, lr=.01, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, **kwargs)
    return learn


# --- images that grow

@pytest.mark.parametrize('shape, expected', [((16, 32), [(8, 16), (16, 32)]), ((32, 16), [(16, 8), (32, 16)]), ((16, 16), [(8, 8), (16, 16)])])
def test_images_that_grow_keep_their_shape(shape, expected):
    seen = []
    grow = ProgressiveResize([8, 16])
    for epoch in 0, 1:
        grow.learn = SimpleNamespace(epoch=epoch, n_epoch=2, x=torch.zeros(2, 3, *shape), xb=(torch.zeros(2, 3, *shape),))
        grow.before_batch()
        seen.append(tuple(grow.learn.xb[0].shape[2:]))
    assert seen == expected


@pytest.mark.parametrize('epochs', [1, 2, 3, 4, 5, 10, 12])
def test_the_last_epoch_has_the_last_size(epochs):
    grow = ProgressiveResize([20, 20, 24, 24, 28, 28, 28, 28, 32, 32])
    grow.learn = SimpleNamespace(epoch=epochs - 1, n_epoch=epochs, x=torch.zeros(1, 3, 64, 64), xb=())
    grow.before_batch()
    assert grow.learn.xb[0].shape[2:] == (32, 32)


def test_a_larger_size_does_not_leave_training_at_the_old_one():
    with pytest.raises(InputError, match="size=64: .*set resize='40,40,48"): find_recipe('speedrun', size=64)
    assert find_recipe('speedrun', size=64, resize='40,64').resize == '40,64' and find_recipe('davidnet', size=64).size == 64
    assert find_recipe('speedrun', size=64, resize='').resize == ''


# --- maps

@pytest.mark.parametrize('norm', ['group', 'layer'])
def test_fullgrad_refuses_biases_that_it_does_not_count(norm):
    with pytest.raises(InputError, match='those of GroupNorm: choose another method'): cam_maps(cifar_resnet([1,1,1,1], 3, norm).eval(), torch.randn(1, 3, 16, 16), 'fullgrad')
    assert cam_maps(cifar_resnet([1,1,1,1], 3).eval(), torch.randn(1, 3, 16, 16), 'fullgrad').maps.shape == (1, 16, 16)


def test_fullgrad_refuses_a_layer_that_does_not_run():
    model = net().eval()
    model.add_module('spare', nn.Identity())
    model[-1].spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(InputError, match='runs 0 times'): cam_maps(model, torch.randn(1, 3, 8, 8), 'fullgrad')


@pytest.mark.parametrize('pool, class_token', [('avg', True), ('token', True), ('avg', False)])
def test_rollout_follows_the_tokens_that_the_head_reads(pool, class_token):
    timm = pytest.importorskip('timm.models.vision_transformer')
    torch.manual_seed(0)
    model = timm.VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=4, class_token=class_token, global_pool=pool).eval()
    for p in model.parameters():
        if p.ndim > 1: p.data.mul_(3)
    x = torch.randn(1, 3, 16, 16)
    rolled,first = roll_out(attention_matrices(model, x)[0]),int(class_token)
    read = rolled[:, 0, first:] if pool=='token' else rolled[:, first:, first:].mean(1)
    assert torch.allclose(cam_maps(model, x, 'rollout', raw=True).maps.flatten(1), read, atol=1e-6)


class InPlace(nn.Module):
    def __init__(self): super().__init__(); self.body = net()
    def forward(self, x): return self.body(x.sub_(.5))

def test_a_network_that_changes_its_input_leaves_the_batch_alone():
    x,model = torch.rand(2, 3, 8, 8),InPlace().eval()
    before,expected = x.clone(),model(x.clone())
    found = cam_maps(model, x, layer=model.body[3])
    assert torch.equal(x, before) and torch.allclose(found.preds, expected, atol=1e-6)


@pytest.mark.parametrize('kind', [list, tuple])
def test_names_of_classes_are_those_of_the_data_set(kind):
    dls = own_loaders(vocab=kind(['cat', 'dog', 'cow']))
    interp = CamInterpretation.from_learner(Learner(dls, net(), loss_func=CrossEntropyLossFlat()))
    assert list(interp.vocab) == ['cat', 'dog', 'cow']
    named,numbered = (interp.cams([0, 1], target)[0] for target in (['cow', 'cat'], [2, 0]))
    assert np.array_equal(named, numbered)
    with pytest.raises(InputError, match="unknown class 'bird'"): interp.cams([0, 1], ['cow', 'bird'])


def test_saved_maps_say_which_class_they_are_about(tmp_path):
    interp = CamInterpretation.from_learner(Learner(own_loaders(), net(), loss_func=CrossEntropyLossFlat()))
    saved = np.load(interp.save_maps(tmp_path/'maps.v2', 3, [0, 1, 2], target='cow'))
    assert saved['classes'].tolist() == [2, 2, 2] and (tmp_path/'maps.v2.npz').exists()


def test_images_normalised_by_the_data_set_itself_are_drawn_with_a_warning():
    interp = CamInterpretation.from_learner(Learner(own_loaders(shift=.5, scale=.25), net(), loss_func=CrossEntropyLossFlat()))
    with pytest.warns(UserWarning, match='no Normalize in the loaders'): interp.images([0])


def test_an_image_is_explained_by_a_learner_of_an_own_data_set(tmp_path):
    PILImage.create(np.full((8, 8, 3), 90, np.uint8)).save(tmp_path/'a.png')
    assert explain_image(Learner(own_loaders(), net(), loss_func=CrossEntropyLossFlat()), tmp_path/'a.png')


def test_overlay_takes_numbers_from_0_to_1_and_refuses_others():
    image = np.random.default_rng(0).random((8, 8, 3)).astype(np.float32)
    assert np.array_equal(overlay(image, np.eye(8)), overlay((255*image).round().astype(np.uint8), np.eye(8)))
    with pytest.raises(InputError, match='numbers from 0 to 1'): overlay(3*image, np.eye(8))


# --- networks and losses

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)
        self.b = self.a
    def forward(self, x): return self.b(self.a(x)).mean((2, 3))

def test_weights_that_layers_share_are_saved(tmp_path):
    save_weights(tied := Tied(), tmp_path/'w.safetensors')
    load_weights(other := Tied(), tmp_path/'w.safetensors')
    assert torch.equal(other.a.weight, tied.a.weight) and other.b is other.a


Two = namedtuple('Two', 'logits aux')

class Out(dict):
    def __getattr__(self, k): return self[k]

class Several(nn.Module):
    "Returns logits and more"
    def __init__(self, kind): super().__init__(); self.body,self.kind = net(),kind
    def forward(self, x): return Two(l := self.body(x), l) if self.kind=='tuple' else Out(logits=self.body(x))

class Pair(nn.Module):
    def __init__(self): super().__init__(); self.body = net()
    def forward(self, x, z): return self.body(x) + z

@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_half_precision_takes_every_network_that_float32_takes(precision):
    seen = []
    def loss(out, y):
        seen.append(out.logits.dtype)
        return F.cross_entropy(out.logits, y)
    for kind in 'tuple', 'dict': fit(learner_of(model=Several(kind), loss_func=loss, precision=precision))
    assert set(seen) == {torch.float32}
    data = TensorDataset(torch.randn(12, 3, 8, 8), torch.randn(12, 3), torch.arange(12)%3)
    fit(learner_of(DataLoaders.from_dsets(data, data, bs=6, n_inp=2, device=torch.device('cpu')), Pair(), precision=precision))


class Auxiliary(CrossEntropyLossFlat):
    def __call__(self, out, y, **kwargs): return super().__call__(out.logits, y, **kwargs) + super().__call__(out.aux, y, **kwargs)

def test_a_loss_of_ones_own_may_take_a_tuple_and_others_are_told():
    dls = own_loaders()
    fit(learner_of(dls, Several('tuple'), loss_func=Auxiliary()))
    with pytest.raises(InputError, match='pass a loss_func that takes it'): fit(learner_of(dls, Several('tuple'), loss_func=CrossEntropyLossFlat()))


@pytest.mark.parametrize('labels', [torch.int8, torch.int32, torch.uint8, 'column'])
def test_labels_of_any_whole_numbers_train_alike(labels):
    y = torch.arange(12)%3
    def losses(y):
        torch.manual_seed(0)
        return fit(learner_of(labelled(y)), 2).recorder.values[-1]
    assert losses(y[:, None] if labels=='column' else y.to(labels)) == losses(y)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()
        self.register_buffer('mask', torch.full((2, 2), -torch.inf).triu(1))
    def forward(self, x): return self.body(x)

def test_an_infinite_mask_stops_no_training_and_a_spoilt_weight_does():
    fit(learner_of(model=Masked()))
    learn = learner_of(model=Masked())
    with pytest.raises(InputError, match='try a lower one'): fit(learn, 1, 1e30)


def test_muon_begins_with_a_kernel_of_zeros():
    layer = nn.Conv2d(3, 4, 3)
    nn.init.zeros_(layer.weight)
    opt = Muon(layer.parameters(), lr=.1)
    for _ in range(2):
        layer(torch.randn(2, 3, 5, 5)).square().sum().backward()
        opt.step()
    assert layer.weight.isfinite().all() and layer.weight.abs().sum() > 0


def test_evidence_keeps_modes_takes_dicts_and_finds_the_layer_that_runs_last():
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
        def forward(self, x): return dict(logits=self.head(self.body(x)), other=x)
    model = HeadFirst().train()
    model.body[1].eval()   # frozen
    dls = own_loaders()
    seen = see_images(model, dls.valid)
    assert model.training and model.body[0].training and not model.body[1].training
    with torch.no_grad(): expected = model.eval().body(dls.valid.dataset.x)
    assert seen.logits.shape == (12, 3) and np.allclose(seen.embeddings, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize('ask', ["cuda.matmul.fp32_precision = 'tf32'", "fp32_precision = 'tf32'", "cudnn.fp32_precision = 'tf32'", "fp32_precision = 'ieee'"])
def test_pytorchs_newer_switches_are_heeded_and_come_back(ask):
    b = torch.backends
    if not hasattr(b, 'fp32_precision'): pytest.skip('this PyTorch has the older switches only')
    kinds = b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv
    places = (b, b.cudnn, *kinds)
    held = [o.fp32_precision for o in places]
    try:
        exec(f'b.{ask}')
        asked = [o.fp32_precision for o in kinds]
        with full_float32(), full_float32(): assert {o.fp32_precision for o in kinds} == {'ieee'}
        assert [o.fp32_precision for o in kinds] == asked
        learn = learner_of()
        assert len(learn.get_preds()[0]) == 12
    finally:
        for o,v in zip(places, held): o.fp32_precision = v


# --- fit again and again

def test_a_history_goes_on_with_the_next_fit_and_the_finder_writes_nothing(tmp_path, few):
    learn = cifar_learner(cifar_dls(few, bs=20, device='cpu'), net(10), cbs=[h := History(tmp_path/'h.csv')], path=tmp_path, precision='float32')
    fit(learn, 2)
    with learn.no_bar(), suppress(InputError): find_lrs(learn, num_it=8, show_plot=False)   # so few steps give no pick
    fit(learn, 1)
    assert list(read_history(tmp_path/'h.csv').epoch) == [1, 2, 3] and len(h.rows) == 3


def test_a_second_fit_does_not_replace_better_weights(tmp_path):
    learn = learner_of(own_loaders(), cbs=[keep := KeepBest(tmp_path/'best.safetensors')])
    fit(learn, 1)
    keep.best,before = 1.,(tmp_path/'best.safetensors').read_bytes()   # as if all had been right
    fit(learn, 1)
    assert keep.best == 1 and (tmp_path/'best.safetensors').read_bytes() == before


def test_update_ratios_of_two_fits_follow_each_other():
    learn = learner_of(own_loaders(), cbs=[ratio := UpdateRatio(every=1)])
    fit(learn, 1); fit(learn, 2)
    assert ratio.steps == [*range(6)] and [s for s,_ in ratio.accuracies] == [2, 4, 6]


def test_a_finder_that_is_stopped_leaves_weights_and_optimizer_as_they_were(few, tmp_path):
    learn = fit(cifar_learner(cifar_dls(few, bs=20, device='cpu'), net(10), path=tmp_path, precision='float32'))
    weights,momentum = ([o.clone() for o in found] for found in (learn.model.parameters(), [s['momentum_buffer'] for s in learn.opt.opt.state.values()]))
    class Stop(KeyboardInterrupt): pass
    def stop(*_): raise Stop
    hook = learn.model[0].register_forward_hook(lambda *_: stop() if next(left, None) is None else None)
    left = iter(range(4))
    with learn.no_bar(), pytest.raises(Stop): find_lrs(learn, num_it=20, show_plot=False)
    hook.remove()
    assert all(map(torch.equal, weights, learn.model.parameters()))
    assert all(map(torch.equal, momentum, [s['momentum_buffer'] for s in learn.opt.opt.state.values()]))


# --- loaders and images

def test_loaders_of_pytorch_are_refused_in_one_line():
    loaders = DataLoaders(*(TorchLoader(OwnSet(), batch_size=6) for _ in range(2)))
    with pytest.raises(InputError, match='from_dsets'): cifar_learner(loaders, net())
    with pytest.raises(InputError, match='from_dsets'): CamInterpretation.from_learner(Learner(loaders, net(), loss_func=CrossEntropyLossFlat()))


def test_loaders_without_normalisation_say_so():
    with pytest.raises(InputError, match='do not normalise'): loader_stats(own_loaders())


def test_a_plain_learner_alternates_flips_too(few):
    dls = cifar_dls(few, [AlternatingFlip()], bs=20, device='cpu', shuffle=False)
    first,second,third = (torch.cat([x for x,_ in dls.train]).as_subclass(torch.Tensor) for _ in range(3))
    assert torch.equal(second, first.flip(-1)) and torch.equal(third, first)


def test_alternating_flip_refuses_what_has_no_count():
    with pytest.raises(InputError, match='HorizontalFlip'): AlternatingFlip()(PILImage.create(np.zeros((4, 4, 3), np.uint8)), split_idx=0)
    with pytest.raises(InputError, match='HorizontalFlip'): AlternatingFlip()(TensorImage(torch.zeros(2, 3, 4, 4)), split_idx=0)


def test_a_single_tensor_is_one_image_and_not_a_batch():
    random.seed(0); torch.manual_seed(0)
    x = TensorImage(torch.arange(3*8*8.).view(3, 8, 8))
    seen = {tuple((HorizontalFlip()(x, split_idx=0) == x).all((1, 2)).tolist()) for _ in range(20)}
    assert seen == {(True,)*3, (False,)*3}
    for t in PadCrop(2), Cutout(4): assert t(x, split_idx=0).shape == x.shape
    hole = (Cutout(4, fill=(0., 0., 0.))(x + 1, split_idx=0) == 0).as_subclass(torch.Tensor)
    assert torch.equal(hole[0], hole[1]) and torch.equal(hole[0], hole[2]) and 0 < hole[0].sum() <= 16


def test_grey_images_stay_grey():
    grey = PILImageBW.create(np.arange(64, dtype=np.uint8).reshape(8, 8))
    for t in cifar_augment(4, pad=2): assert t(grey, split_idx=0).mode == 'L' and t(grey, split_idx=0).size == (8, 8)
    assert Cutout(4)(TensorImage(torch.zeros(2, 1, 8, 8)), split_idx=0).shape == (2, 1, 8, 8)


def test_albumentations_for_another_size_is_refused():
    [aug] = albumentations_augment()
    with pytest.raises(InputError, match='of 32 pixels a side got one of 48×48'): aug(PILImage.create(np.zeros((48, 48, 3), np.uint8)), split_idx=0)
    assert albumentations_augment(48)[0](PILImage.create(np.zeros((48, 48, 3), np.uint8)), split_idx=0).size == (48, 48)
