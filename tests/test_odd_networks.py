"Networks, targets and choices of images that once gave a wrong map or a wrong number without a word."
import numpy as np
import pytest
import torch
from torch import nn

from cifar_cam.attention import attention_rollout
from cifar_cam.cam import cam_maps
from cifar_cam.core import InputError
from cifar_cam.evidence import see_images
from cifar_cam.interpret import CamInterpretation
from cifar_cam.learner import cifar_learner
from cifar_cam.loaders import cifar_dls
from cifar_cam.measures import (cascade, energy_inside, pointing_game, positive_maps, randomised, road, target_probs)
from cifar_cam.panels import overlay
from cifar_cam.scorecard import score_cams
from cifar_cam.shapes import shapes_path
from cifar_cam.targets import class_indices


def net(outputs=3, conv=nn.Conv2d, wrap=lambda layer: layer):
    torch.manual_seed(0)
    return nn.Sequential(wrap(conv(3, 8, 3, padding=1)), nn.ReLU(), nn.MaxPool2d(2), wrap(conv(8, 8, 3, padding=1)), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs)).eval()

@pytest.fixture(scope='module')
def x(): return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('wrap', [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_random_weights_are_random_where_a_weight_is_computed_from_others(wrap, x):
    model = net(wrap=wrap)
    before = {k: v.clone() for k,v in model.named_parameters()}
    *_,(_,last) = randomised(model, x)
    assert all(not p.equal(before[k]) for k,p in last.named_parameters() if p.numel() > 1 and 'bias' not in k)
    assert all(p.equal(before[k]) for k,p in model.named_parameters())
    for _,shares in cascade(model, x, torch.tensor([0, 1]), layer='3').items(): assert abs(shares).max() < .99


def test_parameters_that_a_reset_does_not_know_are_shuffled(x):
    class LoRA(nn.Linear):
        def __init__(self, *args):
            super().__init__(*args)
            self.a = nn.Parameter(torch.randn(2, self.in_features))
        def forward(self, x): return super().forward(x) + x @ self.a.T @ self.a[:, :self.out_features]
    model = net()
    model[-1] = LoRA(8, 3)
    *_,(_,last) = randomised(model, x)
    assert not last[-1].a.equal(model[-1].a) and last[-1].a.sum().isclose(model[-1].a.sum(), atol=1e-5)


@pytest.mark.parametrize('bias', [-50., 50.])
def test_ablationcam_keeps_its_sign_where_the_logit_is_negative(bias, x):
    model = net()
    with torch.no_grad(): model[-1].bias += bias
    here,there = (cam_maps(model, x, 'ablationcam', layer='4', targets=0, raw=True).maps for _ in range(2))
    toward = cam_maps(model, x, 'gradcam', layer='4', targets=0, raw=True).maps
    assert here.equal(there) and ((here*toward).sum((1, 2)) > 0).all()


def test_ablationcam_of_a_pair_of_classes_turns_with_the_pair(x):
    maps = [cam_maps(net(), x, 'ablationcam', layer='4', targets=pair, raw=True).maps for pair in ((0, 1), (1, 0))]
    torch.testing.assert_close(maps[0], -maps[1])


def test_ablationcam_of_a_layer_in_two_places(x):
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = net()
            self.features = nn.Sequential(*self.model[:5])
        def forward(self, x): return self.model[5:](self.features(x))
    found = cam_maps(Alias(), x, 'ablationcam', layer='model.3', targets=1, raw=True).maps
    assert found.equal(cam_maps(net(), x, 'ablationcam', layer='3', targets=1, raw=True).maps) and found.abs().max() > 0


class Tokens(nn.Module):
    "A transformer of one block whose head reads the class token, before or behind the places"
    def __init__(self, front=True, more=False):
        super().__init__()
        torch.manual_seed(0)
        self.cut = nn.Conv2d(3, 16, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.place = nn.Parameter(torch.randn(1, 17, 16))
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.head = nn.Linear(16, 3)
        self.front,self.more = front,more
    def forward(self, x):
        t = self.cut(x).flatten(2).transpose(1, 2)
        cls = self.cls.expand(len(x), -1, -1)
        t = torch.cat([cls, t] if self.front else [t, cls], 1) + self.place
        q,k,v = self.qkv(self.norm(t)).chunk(3, 2)
        self.attention = (q @ k.transpose(1, 2)/4).softmax(-1)
        t = self.norm(t + self.attention @ v)
        logits = self.head(t[:, 0 if self.front else -1])
        return dict(logits=logits, tokens=t) if self.more else logits

@pytest.mark.parametrize('front', [True, False])
@pytest.mark.parametrize('more', [False, True])
def test_rollout_shows_the_row_of_the_class_token(front, more, x):
    model = Tokens(front, more).eval()
    maps,_ = attention_rollout(model, x)
    with torch.no_grad(): model(x)
    row = (model.attention + torch.eye(17))[:, 0 if front else -1]/2
    torch.testing.assert_close(maps.flatten(1), row[:, 1:] if front else row[:, :-1])


def test_lengths_that_do_not_fit_are_refused(x):
    model,maps,t = net(),torch.rand(2, 4, 4),torch.tensor([0, 1])
    for wrong in (lambda: road(model, x, t, maps[:1]), lambda: road(model, x, t[:1], maps), lambda: target_probs(model, x, t[:1]),
                  lambda: positive_maps(model, x, t[:1]), lambda: energy_inside(maps, torch.ones(1, 4, 4)),
                  lambda: pointing_game(maps, torch.ones(1, 4, 4, dtype=torch.bool))):
        with pytest.raises(InputError, match='pass one for each image'): wrong()
    with pytest.raises(InputError, match='up to 255: a mask'): energy_inside(maps, torch.full((2, 4, 4), 255))


def test_a_train_method_that_returns_nothing(x):
    class Frozen(nn.Sequential):
        def train(self, mode=True): super().train(mode)
    model = Frozen(*net())
    assert cam_maps(model, x, layer='4').maps.shape == (2, 32, 32)
    assert target_probs(model, x, torch.tensor([0, 1])).shape == (2,)
    assert len([*randomised(model, x)])


def test_the_runner_up_is_another_class():
    assert class_indices('runner-up', torch.tensor([[5., 5, 0], [1, 2, 3]])).tolist() == [1, 1]


def test_names_have_to_be_those_of_all_outputs(x):
    for vocab in ['cat', 'dog'], list('abcdefghij'):
        with pytest.raises(InputError, match='class names for 3 outputs'): cam_maps(net(), x, layer='4', targets=vocab[1], vocab=vocab)
    with pytest.raises(InputError, match='2 times'): cam_maps(net(), x, layer='4', targets='a', vocab=['a', 'a', 'b'])


@pytest.fixture(scope='module')
def dls(): return cifar_dls(shapes_path(n_train=40, n_test=20), bs=10)


def test_a_choice_by_yes_and_no_is_the_same_everywhere(dls):
    interp = CamInterpretation.from_learner(cifar_learner(dls, net(10)))
    mask = np.asarray(interp.targs) == int(interp.targs[3])
    places = np.flatnonzero(mask).tolist()
    assert (interp.images(mask) == interp.images(places)).all() and interp.files(mask) == interp.files(places)
    assert all(a.equal(b) for a,b in zip(interp[mask], interp[places]))
    assert (interp.cams(mask, layer='4')[0] == interp.cams(places, layer='4')[0]).all()
    with pytest.raises(InputError, match='no image is chosen'): interp.images([])
    with pytest.raises(InputError, match='out of range'): interp.cams([999])
    names = [str(interp.vocab[i]) for i in (1, 2)]
    assert all((interp.cams([0, 1], target=t, layer='4')[0] == interp.cams([0, 1], target=names, layer='4')[0]).all()
               for t in (np.array(names), tuple(names), [1, 2]))


def test_a_network_that_writes_into_its_images_sees_each_view_once(dls):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(10)
        def forward(self, x): return self.net(x.mul_(.5))
    model = Writes().eval()
    seen = see_images(model, dls.valid, 'flip')
    xb = next(iter(dls.valid))[0].as_subclass(torch.Tensor)
    with torch.no_grad(): by_hand = (model(xb.clone()) + model(xb.flip(-1)))/2
    torch.testing.assert_close(torch.from_numpy(seen.logits[:len(xb)]), by_hand)


def test_the_scorecard_takes_the_probabilities_of_the_loss(dls):
    class Probs(nn.Sequential): pass
    plain = net(10)
    inside = Probs(*plain, nn.Softmax(1))
    def negative_log(p, y, reduction='mean'): return nn.functional.nll_loss(p.log(), y, reduction=reduction)
    a,b = cifar_learner(dls, plain),cifar_learner(dls, inside, loss_func=negative_log)
    one = CamInterpretation.from_learner(a, -1)
    other = CamInterpretation.from_learner(b, -1, act=lambda p: p)
    x,y = one[[0, 1]][0].as_subclass(torch.Tensor),one.targs[[0, 1]]
    torch.testing.assert_close(target_probs(inside, x, y, to_probs=lambda p: p), target_probs(plain, x, y))
    torch.testing.assert_close(other.probs, one.probs)
    if (one.preds == one.targs).any():
        cards = [score_cams(o, ['gradcam'], n=2, montages=0, layer='4', progress=False, cascaded=1) for o in (one, other)]
        for k in 'deletion', 'insertion': np.testing.assert_allclose(*(c.scores['chance'][k] for c in cards), atol=1e-5)


@pytest.mark.parametrize('wrong, said', [(dict(layer='0:x'), 'number of a run'), (dict(method='scorecam', batch_size=0), 'batch_size=0'),
    (dict(method='refinecam', base_method='fullgrad'), 'looks at one layer'), (dict(method='finercam', comparison_categories=(9,)), 'ranks from 1 to 2')])
def test_options_that_cannot_be(wrong, said, x):
    with pytest.raises(InputError, match=said): cam_maps(net(), x, **{'layer': '4', **wrong})


def test_rollout_knows_no_zebra(x):
    with pytest.raises(InputError, match="unknown class 'zebra'"): cam_maps(Tokens().eval(), x, 'rollout', targets='zebra', vocab=['a', 'b', 'c'])


@pytest.mark.parametrize('cam', [np.full((4, 4), 7.), np.full((4, 4), np.nan), -np.eye(4), np.zeros((1, 4, 4)), np.zeros((0, 4))])
def test_overlay_takes_maps_alone(cam):
    with pytest.raises(InputError, match='scale_maps makes them'): overlay(np.zeros((8, 8, 3), np.uint8), cam)
