"""The CAM engine: equal to pytorch-grad-cam, safe where the library has traps, and no trace left on the model"""
import copy, io
from collections import OrderedDict
from contextlib import redirect_stderr

import numpy as np
import pytest
import pytorch_grad_cam
import torch
import torch.nn.functional as F
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torchvision.models import resnet50, vgg11_bn

from cifar_cam import cam as C, forward
from cifar_cam.layers import cam_layer
from cifar_cam.cam import all_cams, cam_maps, cam_method, METHODS, scale_maps
from cifar_cam.models import cifar_resnet18, davidnet

NAMES = 'cat dog bird frog'.split()


def block(i, o, stride, inplace=False):
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU(inplace))


def tiny(n=4):
    "Stages of 32, 16, 8 and 4 pixels, few channels, BatchNorm statistics that are not the initial ones"
    torch.manual_seed(1)
    m = nn.Sequential(OrderedDict(stem=block(3, 6, 1), s1=block(6, 8, 2), s2=block(8, 12, 2), s3=block(12, 16, 2),
                                  gap=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(16, n)))
    for b in m.modules():
        if isinstance(b, nn.BatchNorm2d):
            b.running_mean.normal_(0, 0.1)
            b.running_var.uniform_(0.5, 1.5)
    m.fc.weight.data *= 20 # else a class changes ScoreCAM's weights by less than the tolerances below
    return m.eval()


def colour_net():
    "Channel c is how much colour c exceeds the others; class c is its mean"
    net = nn.Sequential(OrderedDict(colour=nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU()), pool=nn.AvgPool2d(4),
                                    gap=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(3, 3, bias=False)))
    net.colour[0].weight.data = (1.5*torch.eye(3) - 0.5)[..., None, None]
    net.fc.weight.data = torch.eye(3)
    return net


@pytest.fixture
def model(): return tiny()

@pytest.fixture
def xb():
    torch.manual_seed(2)
    return torch.randn(5, 3, 32, 32)


def library(model, x, key, targets=None, layers=('s2',), **kwargs):
    "The library's plain call; `targets` are class indices"
    layers = [] if key == 'fullgrad' else [model.get_submodule(n) for n in (('stem', 's1', 's2') if key == 'refinecam' else layers)]
    ts = targets if targets is None else [ClassifierOutputTarget(int(t)) for t in targets]
    with redirect_stderr(io.StringIO()): return torch.from_numpy(cam_method(key)[1](model, layers)(x, ts, **kwargs))


def state(model):
    "All that a CAM must leave alone"
    return dict(mode=[m.training for m in model.modules()], req=[p.requires_grad for p in model.parameters()],
                grad=[None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
                hooks=[(list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in model.modules()],
                children=[[(n, id(c)) for n,c in m._modules.items()] for m in model.modules()],
                tensors={k: v.clone() for k,v in model.state_dict().items()})


def assert_same(a, b):
    for k in 'mode req hooks children'.split(): assert a[k] == b[k], k
    for g,h in zip(a['grad'], b['grad']):
        assert (g is None) == (h is None)
        if g is not None: assert g[0] == h[0] and torch.equal(g[1], h[1])
    for k in a['tensors']: assert torch.equal(a['tensors'][k], b['tensors'][k]), k


# a known answer

def test_lights_up_the_patch_of_the_class_and_only_that():
    net,x = colour_net(), torch.full((3, 3, 32, 32), 0.5)
    for i,(r,k) in enumerate([(0, 0), (8, 16), (20, 24)]):
        for c,(dr,dk) in enumerate([(0, 0), (4, 0), (0, 4)]): # red, green, blue beside each other
            x[i, :, r+dr:r+dr+4, k+dk:k+dk+4] = 0.1
            x[i, c, r+dr:r+dr+4, k+dk:k+dk+4] = 0.9
    for c,(dr,dk) in enumerate([(0, 0), (4, 0), (0, 4)]):
        raw = cam_maps(net, x, targets=c, raw=True).maps
        for i,(r,k) in enumerate([(0, 0), (8, 16), (20, 24)]):
            want = torch.zeros(8, 8)
            want[(r+dr)//4, (k+dk)//4] = 0.8/64
            torch.testing.assert_close(raw[i], want, atol=1e-6, rtol=0)


def test_gap_and_linear_head_gives_zhous_cam(model, xb):
    with torch.no_grad():
        acts = model[:4](xb)
        top = model(xb).argmax(1)
        want = torch.einsum('nc,nchw->nhw', model.fc.weight[top], acts)/acts[0, 0].numel()
    for m in 'gradcam', 'hirescam', 'shapleycam':
        res = cam_maps(model, xb, m, 's3', min_px=4, raw=True)
        torch.testing.assert_close(res.maps, want, atol=1e-6, rtol=1e-4)
    assert not want.eq(0).all()


# equal to the library and to others

@pytest.mark.parametrize('key', METHODS)
def test_equals_the_library(key, model, xb):
    np.random.seed(0); res = cam_maps(model, xb, key)
    np.random.seed(0); want = library(model, xb, key)
    assert res.maps.shape == (5, 32, 32) and res.maps.dtype == torch.float32
    assert (res.maps - want).abs().max() <= 1e-4
    assert (want.amax((1, 2)) > 0.99).tolist() == (~res.blank).tolist() and not res.blank.all()
    torch.testing.assert_close(res.preds, model(xb).detach())


@pytest.mark.parametrize('key', [k for k in METHODS if k != 'finercam'])
def test_equals_the_library_for_given_classes(key, model, xb):
    ts = [3, 0, 1, 2, 0]
    np.random.seed(0); got = cam_maps(model, xb, key, targets=ts).maps
    np.random.seed(0)
    if key=='ablationcam':  # the library turns the map of a negative score over
        model = copy.deepcopy(model)
        model.fc.bias.data += 10
    assert (got - library(model, xb, key, ts)).abs().max() <= 1e-4


def test_finercam_equals_the_library_for_given_classes(model, xb):
    ts = [3, 0, 1, 2, 0]
    want = torch.cat([library(model, xb[i:i+1], 'finercam', target_idx=t, alpha=0.7) for i,t in enumerate(ts)])
    assert (cam_maps(model, xb, 'finercam', targets=ts, alpha=0.7).maps - want).abs().max() <= 1e-4
    assert (cam_maps(model, xb, 'finercam', targets=ts).maps - cam_maps(model, xb, targets=ts).maps).abs().max() > 1e-2


@pytest.mark.parametrize('key', [k for k in METHODS if k != 'randomcam'])
def test_batch_equals_one_by_one(key, model, xb):
    whole = cam_maps(model, xb, key)
    ones = [cam_maps(model, x[None], key) for x in xb]
    torch.testing.assert_close(whole.maps, torch.cat([o.maps for o in ones]), atol=1e-4, rtol=0)
    assert whole.blank.tolist() == [o.blank.item() for o in ones]


def test_resnet18_equals_the_library_on_images_that_are_not_square():
    torch.manual_seed(0)
    m,x = cifar_resnet18().eval(), torch.randn(2, 3, 32, 48)
    for key in 'gradcam', 'layercam':
        assert (cam_maps(m, x, key).maps - library(m, x, key, layers=['layer3'])).abs().max() <= 1e-4


def test_eigen_smooth_is_the_librarys(model, xb):
    assert (cam_maps(model, xb, 'gradcam', eigen_smooth=True).maps - library(model, xb, 'gradcam', eigen_smooth=True)).abs().max() <= 1e-4


def test_captum_agrees_on_gradcam(model, xb):
    attr = pytest.importorskip('captum.attr', reason='captum, an independent Grad-CAM, is not installed')
    ts = torch.tensor([3, 0, 1, 2, 0])
    want = attr.LayerGradCam(model, model.s2).attribute(xb, target=ts, relu_attributions=True)[:, 0].detach()
    torch.testing.assert_close(cam_maps(model, xb, targets=ts, raw=True).maps.relu(), want, atol=1e-6, rtol=1e-4)
    assert want.max() > 0


@pytest.mark.parametrize('key,cls', [('layercam', 'LayerCAM'), ('gradcam', 'GradCAM')])
def test_torchcam_agrees(key, cls, model, xb):
    methods = pytest.importorskip('torchcam.methods', reason='torch-cam, an independent peer, is not installed')
    ts = [3, 0, 1, 2, 0]
    with getattr(methods, cls)(model, model.s2) as extract: want = extract(ts, model(xb), normalized=False)[0].relu().detach()
    got = cam_maps(model, xb, key, targets=ts, raw=True).maps.relu()
    unit = lambda m: m/m.amax((1, 2), keepdim=True).clamp(min=1e-9)
    torch.testing.assert_close(unit(got), unit(want), atol=1e-4, rtol=0)


@pytest.mark.parametrize('key', sorted(C._on_device))
def test_map_is_computed_where_the_tensors_are(key):
    "The meta device has no numbers: any trip through NumPy raises"
    acts,grads = torch.empty(2, 2, 4, 6, 6, device='meta')
    out = C._cam_image(cam_method(key)[1](tiny(), []), key, None, None, None, acts, grads)
    assert out.device.type == 'meta' and out.shape == (2, 6, 6) and type(out) is torch.Tensor


# targets

def test_targets_in_all_their_forms(model, xb):
    logits = model(xb).detach()
    two = logits.topk(2).indices
    maps = lambda t: cam_maps(model, xb, targets=t, vocab=NAMES, raw=True).maps
    for t in [None, 'predicted', two[:, 0], two[:, 0].numpy(), two[:, 0].tolist(), [NAMES[i] for i in two[:, 0]]]:
        assert torch.equal(maps(t), maps(None)), t
    assert torch.equal(maps('runner-up'), maps(two[:, 1]))
    for t in 'bird', 2, torch.tensor(2), np.int64(2): assert torch.equal(maps(t), maps([2]*5)), t
    # Grad-CAM is linear in the gradient: the map of a difference is the difference of the maps
    torch.testing.assert_close(maps(('cat', 'dog')), maps(0) - maps(1), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(maps(([0, 1, 2, 3, 0], ['dog']*5)), maps([0, 1, 2, 3, 0]) - maps(1), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(maps(('predicted', 'runner-up')), maps(None) - maps('runner-up'), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize('targets,vocab,says', [
    ([1, 2], None, '2 targets for 5 images'), (list(range(6)), None, 'out of range'), ([0]*6, None, '6 targets for 5 images'),
    (torch.zeros(0, dtype=torch.long), None, '0 targets for 5'), ('cow', NAMES, "unknown class 'cow': choose one of cat, dog"), ('cat', None, 'pass vocab'),
    (4, None, '0 to 3'), (-1, None, 'out of range'), (1.5, None, 'neither'), ((1, 2, 3), None, 'a tuple is a pair'),
    (('cat', [0, 1]), NAMES, '2 targets for 5'), (torch.zeros(5, 4), None, 'neither'), ([True]*5, None, 'neither')])
def test_wrong_targets_are_one_clear_line(targets, vocab, says, model, xb):
    with pytest.raises(ValueError, match=says) as e: cam_maps(model, xb, targets=targets, vocab=vocab)
    assert '\n' not in str(e.value)


def test_one_logit_has_two_classes(xb):
    "The library's own target for one logit asks with a sign; here the classes are 0 and 1, by name too"
    from pytorch_grad_cam.utils.model_targets import BinaryClassifierOutputTarget
    m = tiny(1)
    maps = lambda t, **kw: cam_maps(m, xb, 'gradcam', 's2', targets=t, raw=True, **kw)
    for c in 0, 1:
        with pytorch_grad_cam.GradCAM(m, [m.s2]) as cam: want = torch.from_numpy(cam(xb, [BinaryClassifierOutputTarget(c)]*5))
        assert (scale_maps(maps(c).maps, (32, 32))[0] - want).abs().max() <= 1e-4
    assert torch.equal(maps(0).maps, -maps(1).maps) and maps(1).preds.shape == (5, 1)
    assert torch.equal(maps('cat', vocab=['dog', 'cat']).maps, maps(1).maps)
    assert torch.equal(maps('cat', vocab=['cat']).maps, maps(1).maps)
    sign = maps(1).preds[:, 0] > 0
    assert torch.equal(maps(None).maps, maps(sign.long()).maps)
    assert torch.equal(maps('runner-up').maps, maps((~sign).long()).maps)


@pytest.mark.parametrize('key', ['scorecam', 'ablationcam', 'fullgrad', 'refinecam', 'shapleycam', 'finercam'])
def test_a_pair_goes_through_the_other_methods_too(key, model, xb):
    pair = cam_maps(model, xb, key, targets=(0, 1)).maps
    assert (pair - cam_maps(model, xb, key, targets=0).maps).abs().max() > 1e-3
    one = torch.cat([cam_maps(model, x[None], key, targets=([0], [1])).maps for x in xb])
    torch.testing.assert_close(pair, one, atol=1e-4, rtol=0)


# traps of the library

def test_library_gives_zeros_for_missing_targets_and_the_engine_does_not(model, xb):
    assert (library(model, xb, 'gradcam', [1, 2])[2:] == 0).all() # the trap
    with pytest.raises(ValueError): cam_maps(model, xb, targets=[1, 2])


def test_library_swallows_index_errors_and_the_engine_does_not(model, xb, capsys):
    with pytorch_grad_cam.GradCAM(model, [model.s2]) as cam: cam(xb, [ClassifierOutputTarget(9)]*5) # the trap: no exception
    assert 'An exception occurred' in capsys.readouterr().out
    with pytest.raises(ValueError, match='out of range'): cam_maps(model, xb, targets=9)

    class Broken(nn.Module):
        def __init__(self): super().__init__(); self.net,self.last = tiny(),nn.Identity()
        def forward(self, x): return [self.net(x)][1]
    with pytest.raises(IndexError): cam_maps(Broken(), xb, layer='net.s2')


def test_bf16_raises_in_the_library_and_works_here(xb):
    half = tiny().bfloat16()
    with pytest.raises(TypeError): library(half, xb.bfloat16(), 'gradcam') # the trap
    want = tiny()
    for key in METHODS:
        if key == 'randomcam': continue
        res = cam_maps(half, xb, key, targets=1)
        assert res.maps.dtype == res.preds.dtype == torch.float32 and res.maps.isfinite().all(), key
        if key in ('gradcam', 'hirescam', 'layercam', 'eigencam', 'fullgrad'):
            assert (res.maps - cam_maps(want, xb, key, targets=1).maps).abs().mean() < 0.05, key
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_map_of_one_pixel_is_zero_in_the_library_and_refused_here(model, xb):
    assert (library(model, xb, 'gradcam', layers=['gap']) == 0).all() # the trap
    with pytest.raises(ValueError, match='1×1 map'): cam_maps(model, xb, layer='gap')
    res = cam_maps(model, xb, layer='gap', min_px=1)
    assert res.blank.all() and (res.maps == 0).all()


@pytest.mark.parametrize('key', [k for k in METHODS if k != 'randomcam'])
def test_nan_stays_in_its_image_and_is_flagged(key, model, xb):
    bad = xb.clone()
    bad[1] = torch.nan
    res = cam_maps(model, bad, key, targets=0)
    assert res.maps.isfinite().all() and res.blank[1] and (res.maps[1] == 0).all()
    keep = [0, 2, 3, 4]
    torch.testing.assert_close(res.maps[keep], cam_maps(model, xb, key, targets=0).maps[keep], atol=1e-4, rtol=0)
    assert cam_maps(model, bad, key, targets=0, raw=True).maps.isfinite().all()


@pytest.mark.parametrize('key', ['gradcam', 'eigencam', 'eigengradcam', 'kpca'])
def test_infinity_does_not_end_the_batch(key):
    "An infinite activation would end a singular value decomposition, and the batch with it"
    x = torch.rand(2, 3, 32, 32)
    x[1, 0, :4, :4] = torch.inf
    assert cam_maps(colour_net(), x, key, targets=0).blank.tolist() == [False, True]


class FrozenBody(nn.Module):
    def __init__(self, body, head):
        super().__init__()
        self.body,self.head = body,head
    def forward(self, x):
        with torch.no_grad(): f = self.body(x)
        return self.head(f)

def test_a_body_that_runs_without_gradients(xb):
    torch.manual_seed(0)
    body,head = nn.Sequential(block(3, 8, 1), block(8, 8, 2)),nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    a,b = (cam_maps(m.eval(), xb, layer=l) for m,l in ((FrozenBody(body, head), 'body.1'), (nn.Sequential(body, head), '0.1')))
    torch.testing.assert_close(a.maps, b.maps)


class WritesOver(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.conv,self.bn,self.fc,self.in_place = nn.Conv2d(3, 8, 3, padding=1),nn.BatchNorm2d(8),nn.Linear(8, 4),in_place
    def forward(self, x):
        y = self.conv(x)
        out = self.bn(y)
        if self.in_place: out += y
        else: out = out + y
        return self.fc(F.relu(out, inplace=self.in_place).mean((2, 3)))

def test_ablation_when_the_next_layer_writes_into_the_map(xb):
    maps = []
    for in_place in True, False:
        torch.manual_seed(0)
        maps.append(cam_maps(WritesOver(in_place).eval(), xb, 'ablationcam', layer='bn').maps)
    torch.testing.assert_close(*maps)


def test_in_place_relu_after_the_target_layer(xb):
    "In place, the library sees activations that the ReLU has already changed, on the CPU"
    plain,inplace = tiny(),tiny()
    for m in inplace.modules():
        if isinstance(m, nn.ReLU): m.inplace = True
    for key in 'gradcam', 'layercam', 'eigencam', 'ablationcam':
        want = library(plain, xb, key, layers=['s2.1'])
        assert (cam_maps(inplace, xb, key, 's2.1').maps - want).abs().max() <= 1e-4, key
    assert (library(inplace, xb, 'gradcam', layers=['s2.1']) - library(plain, xb, 'gradcam', layers=['s2.1'])).abs().max() > 0.1 # the trap


def test_blank():
    eye,flat = torch.eye(3),torch.full((3, 3), 2.)
    noise = flat.clone(); noise[0, 0] += 2.4e-7
    faint = eye*1e-6
    raw = torch.stack([eye, flat, noise, -eye-1, eye*0, eye*torch.nan, eye/0, faint])
    maps,blank = scale_maps(raw, (6, 6))
    assert blank.tolist() == [False, True, True, True, True, True, True, False]
    assert (maps[blank] == 0).all() and maps[0].max() > 0.99 and maps[7].max() > 0.9


# the layer

def body_head():
    return nn.Sequential(nn.Sequential(*list(cifar_resnet18().children())[:-2]), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)))

class Wrapper(nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x)

@pytest.mark.parametrize('make,at32,at64', [
    (cifar_resnet18, 'layer3', 'layer4'), (davidnet, 'layer2', 'layer3'), (tiny, 's2', 's3'), (body_head, '0.6', '0'),
    (lambda: Wrapper(cifar_resnet18()), 'net.layer3', 'net.layer4'), (lambda: nn.DataParallel(cifar_resnet18()), 'layer3', 'layer4'),
    (lambda: torch.compile(cifar_resnet18(), backend='eager'), 'layer3', 'layer4'), (lambda: resnet50(weights=None), 'layer1', 'layer2')])
def test_auto_layer(make, at32, at64):
    m = make()
    inner = C.unwrap(m)
    for size,want in (32, at32), (64, at64):
        name,module = cam_layer(m, size=(size, size))
        assert name == want and module is inner.get_submodule(want)


def test_auto_layer_looks_into_the_features_of_vgg_and_not_at_its_pool():
    "torchvision's VGG blows a 1×1 map up to 7×7 in its adaptive pool: the places are gone by then"
    name,_ = cam_layer(vgg11_bn(weights=None))
    assert name.startswith('features.') and cam_maps(vgg11_bn(weights=None), torch.randn(1, 3, 32, 32), raw=True).maps.shape[1:] == (8, 8)


def test_layer_by_name_or_module(model, xb):
    want = cam_maps(model, xb, layer='s1').maps
    assert torch.equal(cam_maps(model, xb, layer=model.s1).maps, want)
    assert not torch.equal(cam_maps(model, xb).maps, want)


def test_a_layer_too_small_says_what_to_pass_instead(xb):
    m = cifar_resnet18()
    for f in lambda: cam_layer(m, 'layer4'), lambda: cam_maps(m, xb, layer='layer4'), lambda: cam_maps(m, xb, 'scorecam', m.layer4):
        with pytest.raises(ValueError) as e: f()
        for part in "4×4", "32×32", "min_px=5", "layer='layer3' (8×8)", "min_px=4": assert part in str(e.value)
    assert cam_maps(m, xb, layer='layer4', min_px=4, raw=True).maps.shape == (5, 4, 4)
    with pytest.raises(ValueError, match='smaller min_px or larger images'): cam_layer(m, min_px=33)


def test_layers_that_cannot_be(model, xb):
    with pytest.raises(ValueError, match='stem, stem.0'): cam_maps(model, xb, layer='layer3')
    with pytest.raises(ValueError, match='not a part'): cam_maps(model, xb, layer=nn.ReLU())
    with pytest.raises(ValueError, match='N×C×H×W'): cam_maps(model, xb, layer='fc')
    with pytest.raises(ValueError, match='no N×C×H×W map'): cam_layer(model, 'fc')
    with pytest.raises(ValueError, match='runs 2 times'): cam_maps(cifar_resnet18(), xb, layer='layer3.0.relu')
    with pytest.raises(ValueError, match='no layer'): cam_maps(model, xb, layer=['s1', 's9'])
    assert cam_maps(model, xb, 'refinecam', layer=['s1', 's2']).maps.shape == (5, 32, 32)

    class Side(nn.Module): # a layer the logits do not depend on
        def __init__(self): super().__init__(); self.net,self.side = tiny(),nn.Conv2d(3, 4, 3)
        def forward(self, x): self.side(x); return self.net(x)
    with pytest.raises(ValueError, match='do not depend'): cam_maps(Side(), xb, layer='side')


@pytest.mark.parametrize('x,says', [(torch.zeros(3, 32, 32), 'x\\[None\\]'), (torch.zeros(0, 3, 32, 32), 'shape'),
                                    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 'normalised'), ([1], 'tensor')])
def test_images_that_cannot_be(x, says, model):
    with pytest.raises(ValueError, match=says): cam_maps(model, x)


# methods

def test_methods_by_any_name(monkeypatch):
    for names in ['gradcam GradCAM GRADCAM', 'gradcam++ GradCAM++ GradCAMPlusPlus', 'kpca KPCA KPCA_CAM', 'ElementWise GradCAMElementWise', 'XGradCAM xgradcam']:
        assert len({cam_method(n) for n in names.split()}) == 1
    with pytest.raises(ValueError, match='choose one of gradcam, hirescam'): cam_method('smooth')
    monkeypatch.delattr(pytorch_grad_cam, 'RefineCAM')
    with pytest.raises(ValueError, match='no CAM method') as e: cam_method('refinecam')
    assert 'shapleycam' in str(e.value) and ', refinecam' not in str(e.value)


def test_options_go_to_the_library_and_unknown_ones_are_named(model, xb):
    assert (cam_maps(model, xb, 'fem', k=0).maps - cam_maps(model, xb, 'fem', k=2).maps).abs().max() > 1e-3
    assert (cam_maps(model, xb, 'refinecam', base_method='gradcam').maps - cam_maps(model, xb, 'refinecam').maps).abs().max() > 1e-3
    with pytest.raises(TypeError, match="hirescam has no option target: its options are eigen_smooth"): cam_maps(model, xb, target=1)


@pytest.mark.parametrize('key', ['scorecam', 'ablationcam', 'fullgrad'])
def test_several_passes_are_small_ones(key, model, xb, monkeypatch):
    seen = []
    model.stem.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    want = cam_maps(model, xb, key).maps
    seen.clear()
    got = cam_maps(model, xb, key, batch_size=2).maps
    assert max(n for n in seen if n != 5) <= 2 and len(seen) > 3
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_several_passes_print_nothing(model, xb, capfd):
    for key in 'scorecam', 'ablationcam', 'fullgrad': cam_maps(model, xb[:1], key)
    assert capfd.readouterr() == ('', '')


# the model as it was

@pytest.mark.parametrize('key', METHODS)
def test_leaves_no_trace(key, model, xb):
    model.train()
    model.s1.eval()
    model.fc.weight.requires_grad_(False)
    F.cross_entropy(model(xb), torch.tensor([0, 1, 2, 3, 0])).backward()
    model.s2.register_forward_hook(lambda m, i, o: None)
    before = state(model)
    cam_maps(model, xb, key)
    assert_same(before, state(model))
    assert torch.is_grad_enabled()


class Writes(nn.Module):
    "Writes to a buffer in every pass, and puts another in the place of one"
    def __init__(self):
        super().__init__()
        self.register_buffer('passes', torch.zeros(1))
        self.register_buffer('table', torch.zeros(1), persistent=False)
    def forward(self, x):
        self.passes += 1
        self.table = torch.arange(len(x))
        return x

def test_buffers_that_a_pass_writes_to_come_back(model, xb):
    model.s3.append(Writes())
    passes,table = model.s3[-1].passes,model.s3[-1].table
    for key in 'gradcam', 'fullgrad', 'ablationcam': cam_maps(model, xb, key)
    assert model.s3[-1].passes is passes and passes.item() == 0
    assert model.s3[-1].table is table and table.tolist() == [0]


class Trap(nn.Module):
    "Raises at pass number `n`"
    def __init__(self): super().__init__(); self.n,self.seen = None,0
    def forward(self, x):
        self.seen += 1
        if self.seen == self.n: raise RuntimeError('trap')
        return x

@pytest.mark.parametrize('key', METHODS)
def test_leaves_no_trace_after_an_exception(key, model, xb):
    model.s3.append(Trap())
    model.train()
    F.cross_entropy(model(xb), torch.tensor([0, 1, 2, 3, 0])).backward()
    trap,fired = model.s3[-1],0
    for n in range(1, 6): # in the search for the layer, the first pass, and those of the method
        before = state(model)
        trap.n,trap.seen = n,0
        try: cam_maps(model, xb, key)
        except RuntimeError as e:
            assert str(e) == 'trap'
            fired += 1
        assert_same(before, state(model))
        assert torch.is_grad_enabled()
    assert fired >= (3 if key in ('scorecam', 'ablationcam', 'refinecam') else 2)


def test_images_are_not_written_to(model, xb):
    for key in METHODS:
        x = xb.clone()
        cam_maps(model, x, key)
        assert torch.equal(x, xb) and not x.requires_grad and x.grad is None, key


# kinds of model and ways of calling

@pytest.mark.parametrize('key', ['gradcam', 'shapleycam', 'fullgrad', 'scorecam', 'ablationcam', 'refinecam'])
def test_frozen_no_grad_and_inference_mode(key, model, xb):
    want = cam_maps(model, xb, key).maps
    model.requires_grad_(False)
    same = lambda got: torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    same(cam_maps(model, xb, key).maps)
    with torch.no_grad():
        same(cam_maps(model, xb, key).maps)
        assert not torch.is_grad_enabled()
    with torch.inference_mode(): same(cam_maps(model, xb+0, key).maps)


def compiled(m): return torch.compile(m, backend='eager')
def compiled_in_place(m): m.compile(backend='eager'); return m
def compiled_part(m): m.s2 = torch.compile(m.s2, backend='eager'); return m
def compiled_and_run(m):
    c = torch.compile(m, backend='eager')
    with torch.no_grad(): c(torch.zeros(5, 3, 32, 32))
    return c
def compiled_in_place_and_run(m):
    m.compile(backend='eager')
    with torch.no_grad(): m(torch.zeros(5, 3, 32, 32)), m(torch.zeros(1, 3, 32, 32))
    return m
def parallel(m): return nn.DataParallel(m)
def parallel_compiled(m): return nn.DataParallel(torch.compile(m, backend='eager'))

@pytest.mark.parametrize('wrap', [compiled, compiled_in_place, compiled_part, compiled_and_run, compiled_in_place_and_run, parallel, parallel_compiled])
@pytest.mark.parametrize('key', ['gradcam', 'fullgrad', 'ablationcam'])
def test_wrapped_models(wrap, key, xb):
    want,m = cam_maps(tiny(), xb, key).maps, wrap(tiny())
    torch.testing.assert_close(cam_maps(m, xb, key).maps.cpu(), want, atol=1e-5, rtol=0)  # `DataParallel` goes to a GPU
    assert torch.equal(m(xb).detach(), wrap(tiny())(xb).detach())


def test_compiled_parts_are_not_compiled_again(xb):
    "Nor is their code traced with the hooks in it: the compiled model goes on as it was"
    graphs = []
    m = tiny()
    m.compile(backend=lambda g, _: graphs.append(g) or g.forward)
    with torch.no_grad(): m(xb)
    n = len(graphs)
    if not n: pytest.skip('this version of torch does not trace a module compiled in place')   # 2.6
    for key in 'gradcam', 'fullgrad', 'scorecam': cam_maps(m, xb, key)
    with torch.no_grad(): m(xb)
    assert len(graphs) == n


def test_distributed_data_parallel(tmp_path, xb):
    if not torch.distributed.is_available(): pytest.skip('this torch has no torch.distributed')
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        m = nn.parallel.DistributedDataParallel(tiny().train())
        torch.testing.assert_close(cam_maps(m, xb).maps, cam_maps(tiny(), xb).maps)
        m(xb).sum().backward() # and it still trains
        assert m.training and m.module.fc.weight.grad is not None
    finally: torch.distributed.destroy_process_group()


def test_channels_last(model, xb):
    want = {k: cam_maps(model, xb, k).maps for k in METHODS if k != 'randomcam'}
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for k,w in want.items():
        torch.testing.assert_close(cam_maps(last, xb.to(memory_format=torch.channels_last), k).maps, w, atol=1e-4, rtol=0, msg=k)


def test_under_autocast(model, xb):
    want = cam_maps(model, xb, targets=1)
    with torch.autocast('cpu', dtype=torch.bfloat16): res = cam_maps(model, xb, targets=1)
    assert res.maps.dtype == res.preds.dtype == torch.float32
    assert (res.maps - want.maps).abs().mean() < 0.05


def test_raw_is_signed_and_at_the_layers_resolution(model, xb):
    res = cam_maps(model, xb, targets=0, raw=True)
    assert res.maps.shape == (5, 8, 8) and res.maps.min() < 0 < res.maps.max()
    maps,blank = scale_maps(res.maps, (32, 32))
    want = cam_maps(model, xb, targets=0)
    assert torch.equal(maps, want.maps) and torch.equal(blank, want.blank)


def test_a_model_without_logits(xb):
    with pytest.raises(ValueError, match='needs logits'): cam_maps(tiny()[:4], xb)


# a loader

def test_all_cams(model, xb):
    dl = [(xb[:2], torch.tensor([1, 2])), (xb[2:], torch.tensor([3, 0, 1]))]
    y = torch.tensor([1, 2, 3, 0, 1])
    for asked,want in ('true', y), (('true', 'predicted'), (y, 'predicted')), (None, None):
        got = [c.maps for c in all_cams(model, dl, targets=asked, progress=False)]
        assert [len(m) for m in got] == [2, 3]
        torch.testing.assert_close(torch.cat(got), cam_maps(model, xb, targets=want).maps, atol=1e-5, rtol=0)
    assert len(list(all_cams(model, torch.utils.data.DataLoader(xb, batch_size=2), 'refinecam'))) == 3 # images only, with a bar


def test_all_cams_looks_for_the_layer_once_and_waits_for_its_turn(model, xb, monkeypatch):
    calls = []
    monkeypatch.setattr(forward, 'LayerTrace', lambda *a, f=forward.LayerTrace: calls.append(1) or f(*a))
    gen = all_cams(model, [xb, xb, xb], progress=False)
    assert not calls
    assert len(list(gen)) == 3 and len(calls) == 1


def test_an_upright_map_lies_where_the_layer_is_active():
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.ReLU(), nn.AvgPool2d(4)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
    torch.manual_seed(3)
    net[0][0].weight.data = torch.rand(6, 3, 1, 1)
    x = torch.rand(12, 3, 32, 32)*.1
    for i in range(12): x[i, :, 4*(i % 6):4*(i % 6) + 8, 8:20] += torch.rand(3)[:, None, None] + .5
    for method in 'eigencam', 'eigengradcam', 'kpca':
        plain = cam_maps(net, x, method, '0', targets=1, raw=True).maps
        turned = cam_maps(net, x, method, '0', targets=1, raw=True, upright=True).maps
        torch.testing.assert_close(plain.abs(), turned.abs())
        if method == 'eigencam':
            bright = torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4)[:, 0]
            assert ((turned*(bright - bright.mean((1, 2), keepdim=True))).sum((1, 2)) > 0).all()
    with pytest.raises(TypeError, match='upright'): cam_maps(net, x, 'gradcam', '0', upright=True)
