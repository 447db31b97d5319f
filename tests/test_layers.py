"""The layer of any network, found without a line of glue, and its map: the same as pytorch-grad-cam's with a reshape written by hand"""
from collections import OrderedDict, namedtuple
from copy import deepcopy
from dataclasses import make_dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from fastai.vision.all import create_body, create_head, xresnet18
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import BinaryClassifierOutputTarget, ClassifierOutputTarget
from torch import nn
from torch.utils.checkpoint import checkpoint

from cifar_cam.cam import all_cams, cam_maps
from cifar_cam.core import InputError
from cifar_cam.forward import LayerTrace, MapGrid, find_logits, trace_layers, untouched
from cifar_cam.layers import layer_candidates
from cifar_cam.layers import cam_layer

tv = torchvision.models
slow = pytest.mark.slow


def timm_net(name, **kwargs):
    timm = pytest.importorskip('timm', reason='timm is not installed')
    return lambda: timm.create_model(name, num_classes=5, **kwargs)


def tokens(h, w, front, t): return t[:, front:front + h*w].reshape(len(t), h, w, -1).permute(0, 3, 1, 2)

def last(t): return t.permute(0, 3, 1, 2)


def library(model, layer, x, targets, reshape=None):
    with GradCAM(model, [model.get_submodule(layer)], reshape_transform=reshape) as cam:
        return torch.from_numpy(cam(x, [ClassifierOutputTarget(int(t)) for t in targets]))


def awake(m):
    "Weights that do something: some networks begin with zeros in their heads, scales and class tokens"
    torch.manual_seed(0)
    for n,p in m.named_parameters():
        if p.data.abs().max() < 1e-3 and not n.endswith('bias'): p.data.normal_(0.2, 0.1)
    return m.eval()


def state(m):
    return ([c.training for c in m.modules()], [p.requires_grad for p in m.parameters()], [id(c) for c in m.modules()],
            [(len(c._forward_hooks), len(c._forward_pre_hooks)) for c in m.modules()], {k: v.clone() for k,v in m.state_dict().items()})


def nest():
    timm = pytest.importorskip('timm', reason='timm is not installed')
    return timm.models.nest.Nest(80, num_levels=3, embed_dims=(16, 32, 64), num_heads=(1, 2, 4), depths=(1, 1, 2), num_classes=5)

VIT = dict(img_size=64, patch_size=8, embed_dim=48, depth=3, num_heads=3)
FAMILIES = { # how to make it, height and width, the layer, the reshape written by hand
    'ViT': (timm_net('vit_tiny_patch16_224', **VIT), (64, 64), 'blocks.2.norm1', partial(tokens, 8, 8, 1)),
    'ViT of torchvision': (lambda: tv.VisionTransformer(64, 8, 2, 2, 32, 64, num_classes=5), (64, 64),
                           'encoder.layers.encoder_layer_1.ln_1', partial(tokens, 8, 8, 1)),
    'Swin': (timm_net('swin_tiny_patch4_window7_224', img_size=64, window_size=4, embed_dim=24, depths=(1, 2), num_heads=(2, 4)),
             (64, 64), 'layers.1.blocks.1.norm1', last),
    'ResNet': (lambda: tv.resnet18(num_classes=5), (96, 96), 'layer3', None),
    'ConvNeXt': (timm_net('test_convnext'), (160, 160), 'stages', None),
    'ViT, pooled by attention': (timm_net('vit_base_patch16_siglip_224', **VIT), (64, 64), 'blocks.2.norm1', partial(tokens, 8, 8, 0)),
    'TNT': (timm_net('tnt_s_patch16_224', img_size=64, patch_size=8, embed_dim=48, inner_dim=12, num_heads_outer=3, num_heads_inner=2, depth=3), (64, 64),
            'blocks.2.norm_out', partial(tokens, 8, 8, 1)),
}
MORE = {
    'ViT, an oblong image': (timm_net('vit_tiny_patch16_224', **{**VIT, 'img_size': (48, 80)}), (48, 80), 'blocks.2.norm1', partial(tokens, 6, 10, 1)),
    'ViT, averaged': (timm_net('vit_tiny_patch16_224', **VIT, class_token=False, global_pool='avg'), (64, 64), 'blocks.2.norm1',
                      partial(tokens, 8, 8, 0)),
    'DeiT, distilled': (timm_net('deit_tiny_distilled_patch16_224', **VIT), (64, 64), 'blocks.2.norm1', partial(tokens, 8, 8, 2)),
    'DINOv2 with registers': (timm_net('vit_small_patch14_reg4_dinov2', **{**VIT, 'img_size': 56, 'patch_size': 14//2}), (56, 56),
                              'blocks.2.norm1', partial(tokens, 8, 8, 5)),
    'BEiT': (timm_net('beit_base_patch16_224', **VIT), (64, 64), 'blocks.2.norm1', partial(tokens, 8, 8, 1)),
    'EVA-02': (timm_net('eva02_tiny_patch14_224', **VIT), (64, 64), 'blocks.2.norm1', partial(tokens, 8, 8, 1)),
    'CaiT': (timm_net('cait_xxs24_224', **VIT), (64, 64), 'blocks_token_only.1.norm1', partial(tokens, 8, 8, 1)),
    'PiT': (timm_net('pit_ti_224', img_size=64, patch_size=8, stride=4, base_dims=(16, 16), depth=(2, 2), heads=(2, 4)), (64, 64),
            'transformers.1.blocks.1.norm1', partial(tokens, 8, 8, 1)),
    'SwinV2': (timm_net('swinv2_tiny_window8_256', img_size=64, window_size=4, embed_dim=24, depths=(1, 2), num_heads=(2, 4)),
               (64, 64), 'layers.1.blocks.1.norm1', last),
    'Swin of torchvision': (lambda: torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5), (64, 96),
                            'features.3.1.norm1', last),
    'MambaOut': (timm_net('test_mambaout'), (160, 160), None, last),
    'DaViT': (timm_net('davit_tiny', depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64), num_heads=(2, 2, 2, 2), window_size=7), (224, 224),
              'stages', None),
    'MaxViT': (timm_net('maxvit_pico_rw_256', img_size=160), (160, 160), None, None),
    'CoAtNet': (timm_net('coatnet_pico_rw_224', img_size=160), (160, 160), None, None),
    'NesT': (nest, (80, 80), 'norm', last),
    'RegNet': (lambda: tv.regnet_y_400mf(num_classes=5), (160, 160), 'trunk_output', None),
    'DenseNet': (timm_net('densenet121', growth_rate=8, block_config=(2, 2, 2, 2)), (160, 160), 'features', None),
    'VGG': (lambda: nn.Sequential(OrderedDict(features=tv.vgg.make_layers([8, 'M', 16, 'M', 16, 'M'], True), avgpool=nn.AdaptiveAvgPool2d(7),
                                              flatten=nn.Flatten(), classifier=nn.Linear(784, 5))), (64, 64), 'features', None),
    'MobileNetV3': (timm_net('mobilenetv3_small_050'), (160, 160), 'blocks', None),
    'EfficientNet': (timm_net('test_efficientnet'), (160, 160), None, None),
    'NFNet': (timm_net('test_nfnet'), (160, 160), None, None),
    'TResNet': (timm_net('tresnet_m'), (160, 160), 'body', None),
    'xresnet': (lambda: xresnet18(n_out=5), (160, 160), '7', None),
    'vision_learner': (lambda: nn.Sequential(create_body(tv.resnet18(), pretrained=False), create_head(512, 5)), (160, 160), '0', None),
}


@pytest.mark.parametrize('family', [*FAMILIES, *(pytest.param(f, marks=slow) for f in MORE)])
def test_a_family_without_glue(family):
    make,size,name,reshape = (FAMILIES | MORE)[family]
    m,x = awake(make()),torch.randn(2, 3, *size)
    m.train()
    before = state(m)
    found = cam_layer(m, size=size)[0]
    assert name is None or found == name
    ours = cam_maps(m, x, 'gradcam')
    for a,b in zip(before[:-1], state(m)): assert a == b
    for k,v in m.state_dict().items(): assert torch.equal(v, before[-1][k])
    m.eval()
    theirs = library(m, found, x, ours.preds.argmax(1), reshape)
    assert ours.maps.shape[1:] == size and not ours.blank.any() and theirs.std() > 0.01
    assert (ours.maps - theirs).abs().max() < 1e-4
    h,w = cam_maps(m, x, raw=True).maps.shape[1:]
    assert min(h, w) >= 5 and h*size[1] == w*size[0]


def hugging_face(kind, **config):
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    return getattr(transformers, f'{kind}ForImageClassification')(getattr(transformers, f'{kind}Config')(num_labels=5, **config))

OF_TOKENS = dict(image_size=64, patch_size=8, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=64)
FOUR = dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
HUGGING_FACE = { # settings, side, the reshape written by hand; the library cannot take a layer that gives an object: the last stage in it gives the same
    'ViT': (OF_TOKENS, 64, partial(tokens, 8, 8, 1)), 'Dinov2': (OF_TOKENS, 64, partial(tokens, 8, 8, 1)), 'Beit': (OF_TOKENS, 64, partial(tokens, 8, 8, 1)),
    'Swin': (dict(image_size=64, patch_size=4, window_size=4, embed_dim=24, depths=[1, 2], num_heads=[2, 4]), 64, partial(tokens, 8, 8, 0)),
    'ConvNext': (FOUR, 160, None), 'ResNet': (dict(FOUR, embedding_size=8, layer_type='basic'), 160, None)}
STAGES = {'ConvNext': 'convnext.encoder.stages.3', 'ResNet': 'resnet.encoder.stages.3'}

class Logits(nn.Module):
    "What pytorch-grad-cam needs, and we do not"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x).logits

@pytest.mark.parametrize('kind', [k if k=='ViT' else pytest.param(k, marks=slow) for k in HUGGING_FACE])
def test_a_network_of_hugging_face_without_glue(kind):
    config,side,reshape = HUGGING_FACE[kind]
    m,x = awake(hugging_face(kind, **config)),torch.randn(2, 3, side, side)
    found,ours = cam_layer(m, size=(side, side))[0],cam_maps(m, x, 'gradcam')
    def by_hand(out):
        t = out if torch.is_tensor(out) else out[0]
        return reshape(t) if reshape else t
    theirs = library(Logits(m), f'net.{STAGES.get(kind, found)}', x, ours.preds.argmax(1), by_hand)
    assert not ours.blank.any() and theirs.std() > 0.01
    assert (ours.maps - theirs).abs().max() < 1e-4


# situations

class Pooled(nn.Module):
    "Gives its map and the mean of it; the head takes the mean, as ConvNeXt's does at Hugging Face"
    def __init__(self): super().__init__(); self.conv1,self.conv2 = nn.Conv2d(3, 8, 3, 2, 1),nn.Conv2d(8, 8, 3, 1, 1)
    def forward(self, x):
        x = self.conv2(self.conv1(x).relu())
        return x, x.mean((2, 3))

class PooledNet(nn.Module):
    def __init__(self, of_map): super().__init__(); self.body,self.fc,self.of_map = Pooled(),nn.Linear(8, 5),of_map
    def forward(self, x):
        m,pooled = self.body(x)
        return self.fc(m.mean((2, 3)) if self.of_map else pooled)

@pytest.mark.parametrize('of_map, layer', [(True, 'body'), (False, 'body.conv2')])
def test_a_layer_whose_map_nobody_takes_is_none(of_map, layer):
    m,x = PooledNet(of_map).eval(),torch.randn(2, 3, 32, 32)
    assert cam_layer(m, size=(32, 32))[0] == layer
    assert not cam_maps(m, x, 'gradcam').blank.any()
    roles = dict(layer_candidates(m, size=(32, 32))[['layer', 'role']].values)
    assert roles['body'] == ('the layer' if of_map else 'the logits use its map inside it')


class Listed(nn.Module):
    "Stages in a list or a dictionary of modules, which is never called itself; what follows a stage is shared, or a function"
    def __init__(self, shared=False, pool=False, named=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        stages = [nn.Conv2d(8, 8, 3, 2, 1) for _ in range(3)]
        self.blocks = nn.ModuleDict({f's{i}': s for i,s in enumerate(stages)}) if named else nn.ModuleList(stages)
        self.act,self.pool,self.fc = nn.ReLU() if shared else torch.relu, nn.AdaptiveAvgPool2d(1) if pool else self.mean, nn.Linear(8, 5)
    def mean(self, x): return x.mean((2, 3))
    def forward(self, x):
        x = self.stem(x)
        for b in self.blocks.values() if isinstance(self.blocks, nn.ModuleDict) else self.blocks: x = self.act(b(x))
        return self.fc(self.pool(x).flatten(1))

class Scaled(nn.Module):
    def forward(self, x): return (x - .5)/.25

class Wrapper(nn.Module):
    "As Lightning's: the network and things that are not layers of it, an answer in an object"
    def __init__(self, net, read): super().__init__(); self.net,self.loss,self.read = net,nn.CrossEntropyLoss(),read
    def forward(self, x): return self.read(self.net(x))

class Checkpointed(nn.Module):
    def __init__(self, net, reentrant): super().__init__(); self.net,self.reentrant = net,reentrant
    def forward(self, x):
        n = self.net
        x = n.maxpool(n.relu(n.bn1(n.conv1(x))))
        for stage in n.layer1, n.layer2, n.layer3, n.layer4: x = checkpoint(stage, x, use_reentrant=self.reentrant)
        return n.fc(n.avgpool(x).flatten(1))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.fc = headless(),headless(),nn.Linear(1024, 5)
    def forward(self, x): return self.fc(torch.cat([self.a(x), self.b(x)], 1))

def resnet(): return tv.resnet18(num_classes=5)

def headless():
    net = resnet()
    net.fc = nn.Identity()
    return net


@pytest.mark.parametrize('make,want', [
    (Listed, 'blocks.2'), (partial(Listed, named=True), 'blocks.s2'), (partial(Listed, shared=True, pool=True), 'blocks.2'),
    (lambda: nn.Sequential(Scaled(), resnet()), '1.layer3'), (lambda: Wrapper(resnet(), lambda o: SimpleNamespace(logits=o)), 'net.layer3'),
    (lambda: nn.Sequential(headless(), nn.Linear(512, 5)), '0.layer3'), (lambda: Checkpointed(resnet(), True), 'net.layer3'),
    (lambda: Checkpointed(resnet(), False), 'net.layer3'), (lambda: nn.DataParallel(resnet()), 'layer3')])
def test_where_the_layer_stands(make, want):
    assert cam_layer(make(), size=(96, 96), min_px=6)[0] == want


@pytest.mark.parametrize('side,like,want', [(96, 'layer3', 'layer3.1.relu:2'), (160, 'layer4', 'layer4.1.relu:2'), (64, 'layer2', 'layer2.1.relu:2')])
def test_a_traced_network_has_the_map_of_the_network(side, like, want):
    m,x = resnet().eval(),torch.randn(2, 3, side, side)
    traced = torch.fx.symbolic_trace(m)
    assert cam_layer(traced, x=x[:1])[0] == want
    for method in 'gradcam', 'hirescam', 'eigencam':
        torch.testing.assert_close(cam_maps(traced, x, method, targets=1).maps, cam_maps(m, x, method, like, targets=1).maps, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match='runs once'): cam_maps(traced, x, 'ablationcam')


@pytest.mark.parametrize('reentrant', [True, False])
def test_a_checkpointed_network_has_the_map_of_the_network(reentrant):
    m,x = resnet().eval(),torch.randn(2, 3, 96, 96)
    for layer in 'layer3', 'layer3.0', 'layer2.1.conv1':
        for method in 'hirescam', 'shapleycam': # which differentiates twice
            want = cam_maps(m, x, method, layer=layer, targets=1).maps
            torch.testing.assert_close(cam_maps(Checkpointed(m, reentrant), x, method, layer='net.' + layer, targets=1).maps, want, atol=1e-5, rtol=0)


def test_two_branches_are_both_listed_and_their_maps_averaged():
    m,x = Two().eval(),torch.randn(2, 3, 96, 96)
    names,modules = cam_layer(m, x=x[:1])
    assert names == ['a.layer3', 'b.layer3'] and modules == [m.a.layer3, m.b.layer3]
    got = cam_maps(m, x, 'gradcam', targets=2)
    with GradCAM(m, modules) as cam: want = torch.from_numpy(cam(x, [ClassifierOutputTarget(2)]*2))
    assert (got.maps - want).abs().max() < 1e-4
    assert cam_maps(m, x, raw=True).maps.shape == (2, 6, 6)


def test_several_layers_are_averaged_as_the_library_does():
    m,x = resnet().eval(),torch.randn(2, 3, 96, 128)
    with GradCAM(m, [m.layer1, m.layer2, m.layer3]) as cam: want = torch.from_numpy(cam(x, [ClassifierOutputTarget(2)]*2))
    assert (cam_maps(m, x, 'gradcam', ['layer1', m.layer2, 'layer3'], targets=2).maps - want).abs().max() < 1e-4


def test_aug_smooth_is_the_librarys():
    m,x = resnet().eval(),torch.randn(2, 3, 96, 96)
    with GradCAM(m, [m.layer3]) as cam: want = torch.from_numpy(cam(x, [ClassifierOutputTarget(2)]*2, aug_smooth=True))
    assert (cam_maps(m, x, 'gradcam', 'layer3', targets=2, aug_smooth=True).maps - want).abs().max() < 1e-4


def test_a_module_that_always_runs_twice_is_no_layer():
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.body,self.fc = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()),nn.Linear(3, 5)
        def forward(self, x): return self.fc(self.body(self.body(x)).mean((2, 3)))
    with pytest.raises(InputError, match='more than once'): cam_layer(Twice())
    with pytest.raises(InputError, match='runs 2 times'): cam_maps(Twice(), torch.randn(1, 3, 32, 32), layer='body')


@pytest.mark.parametrize('make', [lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)),
                                  lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 4, (3, 1, 1)), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 5))])
def test_what_has_no_map_is_refused_in_one_line(make):
    with pytest.raises(InputError, match='reshape=') as e: cam_maps(make(), torch.randn(1, 3, 32, 32))
    assert '\n' not in str(e.value)


def test_the_table_says_what_became_of_each_layer():
    m = nn.Sequential(Scaled(), resnet())
    t = layer_candidates(m, size=(96, 96)).set_index('layer').role
    assert t['1.layer3'] == 'the layer' and t['1.layer4'] == 'too small' and t['1.fc'] == 'no map'
    assert {t['0'], t['1.conv1'], t['1.maxpool']} == {'before the first block'}
    vit = tv.VisionTransformer(32, 4, 2, 2, 16, 32)
    t = layer_candidates(vit).set_index('layer')
    assert t.lies['encoder.layers.encoder_layer_1.ln_1'] == 'tokens, 1 in front' and t['map']['encoder.layers.encoder_layer_1.ln_1'] == '8×8'


class Weighed(nn.Module):
    "Another module says how much each place counts: a map of one channel, or rows of one number"
    def __init__(self, rows):
        super().__init__()
        self.body,self.rows = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1)),rows
        self.weight,self.fc = nn.Linear(16, 1) if rows else nn.Conv2d(16, 1, 3, padding=1),nn.Linear(16, 5)
    def forward(self, x):
        x = self.body(x)
        if not self.rows: return self.fc((x*self.weight(x).sigmoid()).mean((2, 3)))
        x = x.flatten(2).transpose(1, 2)
        return self.fc((x*self.weight(x).softmax(1)).sum(1))

@pytest.mark.parametrize('rows', [False, True])
def test_weights_of_the_places_are_not_the_layer(rows):
    m,x = Weighed(rows).eval(),torch.randn(2, 3, 48, 32)
    assert cam_layer(m, x=x[:1])[0] == 'body'
    assert (cam_maps(m, x, 'gradcam', targets=2).maps - library(m, 'body', x, [2, 2])).abs().max() < 1e-4


class Stage(nn.Module):
    def __init__(self, i, o): super().__init__(); self.conv1,self.conv2,self.beside = nn.Conv2d(i, o, 3, 2, 1),nn.Conv2d(o, o, 3, 1, 1),nn.Conv2d(i, o, 1, 2)
    def forward(self, x): return self.conv2(self.conv1(x).relu()) + self.beside(x)

class Encoder(nn.Module):
    def __init__(self): super().__init__(); self.stages = nn.ModuleList([Stage(8, 8), Stage(8, 16), Stage(16, 16)])
    def forward(self, x):
        for s in self.stages: x = s(x)
        return x

@pytest.mark.parametrize('size,want', [((64, 96), '1.stages.1'), ((32, 48), '1.stages.0'), ((96, 96), '1')])
def test_a_stage_within_an_encoder_and_not_the_stem(size, want):
    m = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()), Encoder(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval()
    x = torch.randn(2, 3, *size)
    assert cam_layer(m, size=size)[0] == want
    assert (cam_maps(m, x, 'gradcam', targets=2).maps - library(m, want, x, [2, 2])).abs().max() < 1e-4

@slow
@pytest.mark.parametrize('kind,config,want', [('ResNet', dict(FOUR, embedding_size=8), 'resnet.encoder.stages.2'), ('ConvNext', FOUR, 'convnext.encoder.stages.2'),
                                              ('RegNet', dict(FOUR, embedding_size=8, groups_width=8), 'regnet.encoder.stages.2')])
def test_an_encoder_of_hugging_face_whose_last_stage_is_too_small(kind, config, want):
    assert cam_layer(hugging_face(kind, **config), size=(96, 96))[0] == want


class Recurrent(nn.Module):
    def __init__(self, of_tokens):
        super().__init__()
        self.patches,self.fc,self.of_tokens = nn.Conv2d(3, 16, 8, 8),nn.Linear(16, 5),of_tokens
        self.block = nn.TransformerEncoderLayer(16, 2, 32, 0., batch_first=True, norm_first=True) if of_tokens else nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    def forward(self, x):
        x = self.patches(x)
        if self.of_tokens: x = torch.cat([torch.ones(len(x), 1, 16), x.flatten(2).transpose(1, 2)], 1)
        for _ in range(3): x = self.block(x)
        return self.fc(x[:, 0] if self.of_tokens else x.mean((2, 3)))

@pytest.mark.parametrize('of_tokens,run', [(False, 'block:3'), (True, 'block.norm1:3')])
def test_of_a_block_that_runs_again_and_again_the_run_to_name_is_said(of_tokens, run):
    m,x = Recurrent(of_tokens).eval(),torch.randn(2, 3, 48, 48)
    for f in lambda: cam_layer(m, x=x[:1]), lambda: cam_maps(m, x):
        with pytest.raises(InputError, match=f"more than once.*'{run}'"): f()
    assert not cam_maps(m, x, 'gradcam', run).blank.all()


class Given(nn.Module):
    "Gives its map within something"
    def __init__(self, kind): super().__init__(); self.conv,self.kind = nn.Conv2d(3, 8, 3, 2, 1),kind
    def forward(self, x): return self.kind(feats=self.conv(x), pooled=x.mean((2, 3)))

class GivenNet(nn.Module):
    def __init__(self, kind): super().__init__(); self.body,self.fc = Given(kind),nn.Conv2d(8, 5, 1)
    def forward(self, x): return self.fc(self.body(x).feats.mean((2, 3), keepdim=True))

@pytest.mark.parametrize('kind', [namedtuple('Out', 'feats pooled'), make_dataclass('Frozen', ['feats', 'pooled'], frozen=True), SimpleNamespace])
def test_a_map_within_something_and_logits_with_two_axes_too_many(kind):
    m,x = GivenNet(kind).eval(),torch.randn(2, 3, 32, 32)
    assert cam_layer(m)[0] == 'body' and cam_maps(m, x).preds.shape == (2, 5)
    torch.testing.assert_close(cam_maps(m, x, targets=1).maps, cam_maps(m, x, layer='body.conv', targets=1).maps)


# tokens

class Halves(nn.Module):
    "Attention and what follows it, each with a norm of its own"
    def __init__(self, d=16):
        super().__init__()
        self.patches,self.fc = nn.Conv2d(3, d, 8, 8),nn.Linear(d, 5)
        self.layers = nn.ModuleList([nn.ModuleList([nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d)) for _ in range(2)]) for _ in range(3)])
    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        for first,second in self.layers:
            x = x + first(x)
            x = x + second(x)
        return self.fc(x.mean(1))

def test_the_first_norm_of_a_block_that_is_a_list_of_two():
    assert cam_layer(Halves(), size=(48, 48))[0] == 'layers.2.0.0'


def unrolled(m): return m.unflatten(3, (3, 2)).unflatten(2, (3, 2)).permute(0, 1, 3, 5, 2, 4) # as in Hiera: the first place of every 2×2, then the second

def windows(m): return m.unflatten(3, (2, 3)).unflatten(2, (2, 3)).transpose(3, 4)

class Ordered(nn.Module):
    "Tokens in an order of its own"
    def __init__(self, order): super().__init__(); self.order,self.patches,self.blocks,self.fc = order,nn.Conv2d(3, 16, 8, 8),nn.Sequential(*[nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)) for _ in range(2)]),nn.Linear(16, 5)
    def forward(self, x): return self.fc(self.blocks(self.mixed(self.order(self.patches(x)).flatten(2).transpose(1, 2))).mean(1))
    def mixed(self, t): return t

class OrderedAndMixed(Ordered):
    "Each token has something of all others, as after attention to the whole image"
    def mixed(self, t): return t + t.mean(1, keepdim=True)

@pytest.mark.parametrize('network', [Ordered, OrderedAndMixed])
@pytest.mark.parametrize('order,known', [(lambda m: m, True), (lambda m: m.transpose(2, 3), False), (lambda m: m.roll(3, 2), False), (unrolled, False), (windows, False),
                                         (lambda m: m.unflatten(2, (3, 2)).transpose(2, 3), False)])
def test_tokens_that_do_not_lie_row_by_row_are_no_map(order, known, network):
    m,x = network(order).eval(),torch.randn(2, 3, 48, 48)
    assert (trace_layers(m, x[:1]).grid('blocks.1.0') is not None) == known
    assert cam_layer(m, x=x[:1])[0] == ('blocks.1.0' if known else 'patches')

def test_a_grid_that_only_the_number_of_tokens_speaks_for_is_refused():
    "Patches of 8×2: 8×32 tokens could be 16×16"
    class Patches(nn.Module):
        def __init__(self): super().__init__(); self.embed,self.block,self.fc = nn.Linear(48, 16),nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)),nn.Linear(16, 5)
        def forward(self, x): return self.fc(self.block(self.embed(x.unflatten(3, (32, 2)).unflatten(2, (8, 8)).permute(0, 2, 4, 3, 5, 1).reshape(len(x), 256, 48))).mean(1))
    with pytest.raises(InputError, match='reshape='): cam_maps(Patches(), torch.randn(1, 3, 64, 64))


@slow
def test_the_tokens_of_hiera_are_in_rows_in_its_last_stage_only():
    timm = pytest.importorskip('timm', reason='timm is not installed')
    m = timm.create_model('hiera_tiny_224', embed_dim=24, stages=(1, 1, 2, 2), num_classes=5)
    trace = trace_layers(m, torch.zeros(1, 3, 224, 224))
    assert [trace.grid(f'blocks.{i}') is not None for i in range(6)] == [False]*4 + [True]*2
    assert cam_layer(m, size=(224, 224))[0] == 'blocks.5.norm1'
    m = timm.create_model('hiera_tiny_224', embed_dim=24, stages=(1, 1, 2, 2), num_classes=5, img_size=(64, 64)) # attention reaches a quarter of the image
    trace = trace_layers(m, torch.zeros(1, 3, 64, 64))
    assert [trace.grid(f'blocks.{i}') is not None for i in range(6)] == [False]*4 + [True]*2


class Tokens(nn.Module):
    "A transformer written by hand: other tokens in front and behind, batch first or not, one read at the end or the mean"
    def __init__(self, front=1, behind=0, batch_first=True, read=None, depth=2):
        super().__init__()
        self.patches,self.front,self.behind = nn.Conv2d(3, 16, 8, 8),nn.Parameter(torch.randn(1, front, 16)),nn.Parameter(torch.randn(1, behind, 16))
        layer = partial(nn.TransformerEncoderLayer, 16, 2, 32, 0., batch_first=batch_first, norm_first=True)
        self.blocks,self.fc,self.batch_first,self.read = nn.ModuleList([layer() for _ in range(depth)]),nn.Linear(16, 5),batch_first,read
    def forward(self, x):
        t = self.patches(x).flatten(2).transpose(1, 2)
        t = torch.cat([self.front.expand(len(t), -1, -1), t, self.behind.expand(len(t), -1, -1)], 1)
        if not self.batch_first: t = t.transpose(0, 1)
        for b in self.blocks: t = b(t)
        if not self.batch_first: t = t.transpose(0, 1)
        return self.fc(t.mean(1) if self.read is None else t[:, self.read])


@pytest.mark.parametrize('front,behind', [(0, 0), (1, 0), (0, 1), (5, 0), (2, 3)])
@pytest.mark.parametrize('batch_first', [True, False])
def test_tokens_in_front_and_behind(front, behind, batch_first):
    m,x = Tokens(front, behind, batch_first, 0 if front else -1 if behind else None).eval(),torch.randn(2, 3, 48, 64)
    name,_ = cam_layer(m, x=x[:1])
    assert name == 'blocks.1.norm1'
    assert trace_layers(m, x[:1]).grid(name) == MapGrid('NLC' if batch_first else 'LNC', 6, 8, front, front + behind)
    def reshape(t): return (t if batch_first else t.transpose(0, 1))[:, front:front + 48].reshape(2, 6, 8, 16).permute(0, 3, 1, 2)
    for method in 'gradcam', 'hirescam', 'layercam', 'eigengradcam':
        ours = cam_maps(m, x, method, targets=3, raw=True).maps
        torch.testing.assert_close(ours, cam_maps(m, x, method, name, targets=3, raw=True, reshape=reshape).maps if batch_first else ours)
    if batch_first: assert (cam_maps(m, x, 'gradcam', targets=3).maps - library(m, name, x, [3, 3], reshape)).abs().max() < 1e-4


def test_a_layer_behind_the_last_attention_is_refused():
    m,x = Tokens(1, 0, True, 0).eval(),torch.randn(2, 3, 48, 48)
    for layer in 'blocks.1', 'blocks.1.norm2':
        with pytest.raises(InputError, match="no place of the image.*layer='blocks.1.norm1'"): cam_maps(m, x, layer=layer)
    assert not cam_maps(m, x, layer='blocks.1.norm1', targets=1, raw=True).maps.eq(0).all()


@pytest.mark.parametrize('shape,order', [((2, 8, 8, 8), None), ((2, 8, 8, 768), 'NHWC'), ((2, 14, 14, 16), 'NHWC')])
def test_channels_last_is_told_by_the_image_never_guessed(shape, order):
    class Odd(nn.Module):
        "Gives N×H×W×C of a side that could be N×C×H×W as well"
        def __init__(self, c, side): super().__init__(); self.conv,self.pool,self.norm,self.fc = nn.Conv2d(3, c, 3, padding=1),nn.AdaptiveAvgPool2d(side),nn.LayerNorm(c),nn.Linear(c, 5)
        def forward(self, x): return self.fc(self.norm(self.pool(self.conv(x)).permute(0, 2, 3, 1)).mean((1, 2)))
    m = Odd(shape[3], shape[1])
    assert trace_layers(m, torch.zeros(1, 3, shape[1]*2, shape[1]*2)).grid('norm') == MapGrid('NHWC', *shape[1:3])


def test_reshape_of_ones_own():
    m,x = Tokens(1, 0, True, 0).eval(),torch.randn(2, 3, 48, 48)
    wrong = dict(reshape=lambda t: t.mean(1))
    with pytest.raises(InputError, match='must give N×C×H×W'): cam_maps(m, x, layer='blocks.1.norm1', **wrong)


@pytest.mark.parametrize('method', ['scorecam', 'ablationcam', 'shapleycam', 'eigencam', 'gradcam++', 'xgradcam', 'finercam', 'refinecam', 'kpca', 'fem'])
def test_other_methods_take_tokens_too(method):
    m,x = awake(tv.VisionTransformer(48, 8, 2, 2, 16, 32, num_classes=5)),torch.randn(2, 3, 48, 48)
    maps = cam_maps(m, x, method, targets=1).maps
    assert maps.shape == (2, 48, 48) and maps.isfinite().all()
    if method == 'ablationcam':
        from pytorch_grad_cam import AblationCAM, AblationLayerVit
        m.heads.head.bias.data += 10  # the library turns the map of a negative score over
        with AblationCAM(m, [m.encoder.layers[-1].ln_1], partial(tokens, 6, 6, 1), AblationLayerVit()) as cam:
            assert (torch.from_numpy(cam(x, [ClassifierOutputTarget(1)]*2)) - maps).abs().max() < 1e-4


# a network whose logit depends on one patch only

class OnePatch(nn.Module):
    "Logit 1 is the mean of `net`'s map at the cell (1, 2) of 4×4"
    def __init__(self, net): super().__init__(); self.net,self.fc = net,nn.Linear(8, 5)
    def forward(self, x): return self.fc(self.net(x)[:, :, 1, 2])

class Windows(nn.Module):
    "Channels last, and a norm first, as Swin has it; places are not mixed"
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2)])
    def forward(self, x):
        x = self.patches(x).permute(0, 2, 3, 1)
        for b in self.blocks: x = x + b(x)
        return x.permute(0, 3, 1, 2)

class Rows(Windows):
    "The same as tokens behind a class token"
    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([torch.zeros_like(x[:, :1]), x], 1)
        for b in self.blocks: x = x + b(x)
        return x[:, 1:].transpose(1, 2).unflatten(2, (4, 4))

@pytest.mark.parametrize('make', [lambda: nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.Conv2d(8, 8, 1)), Windows, Rows])
def test_the_energy_lies_in_the_one_patch_that_is_read(make):
    torch.manual_seed(0)
    m,x = OnePatch(make()).eval(),torch.randn(4, 3, 32, 32)
    for method in 'hirescam', 'layercam':
        for target in range(5):
            energy = cam_maps(m, x, method, targets=target, raw=True, min_px=4).maps.abs()
            if method == 'hirescam': assert energy[:, 1, 2].min() > 0
            energy[:, 1, 2] = 0
            assert energy.max() == 0


# outputs and questions

def test_logits_where_they_stand():
    m,x = resnet().eval(),torch.randn(2, 3, 96, 96)
    want = cam_maps(m, x, targets=1).maps
    for read,output in [(lambda o: (o, None), None), (lambda o: dict(out=o, size=(3, 3)), None), (lambda o: [o, o + 1], 0), (lambda o: dict(a=o*2, b=o), 'b'),
                        (lambda o: SimpleNamespace(logits=o, features=o), None), (lambda o: SimpleNamespace(x=o, y=o), 'x'),
                        (lambda o: (o, o[:, :2]), lambda out: out[0])]:
        for layer in 'auto', 'net.layer3':
            torch.testing.assert_close(cam_maps(Wrapper(m, read), x, layer=layer, targets=1, output=output).maps, want, atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="pass output=, one of 'a', 'b'"): cam_maps(Wrapper(m, lambda o: dict(a=o, b=o)), x)
    with pytest.raises(InputError, match="no 'c': choose one of 'a'"): cam_maps(Wrapper(m, lambda o: dict(a=o)), x, output='c')


def test_a_function_as_the_question():
    m,x = resnet().eval(),torch.randn(2, 3, 96, 96)
    def ask(t): return cam_maps(m, x, 'gradcam', targets=t, raw=True).maps
    torch.testing.assert_close(ask(lambda out: out[2] - out[1]), ask((2, 1)))
    torch.testing.assert_close(ask([ClassifierOutputTarget(2), ClassifierOutputTarget(0)]), ask([2, 0]))
    with pytest.raises(InputError, match='1 targets for 2'): ask([ClassifierOutputTarget(2)])
    dense = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)) # a segmentation: N×4×48×48
    maps = cam_maps(dense, x, layer='1', targets=lambda out: out[1, :24].sum(), raw=True).maps
    assert maps[:, 24:].abs().max() == 0 < maps[:, :24].abs().max()


def test_a_question_for_each_image_over_batches():
    m,x = resnet().eval(),torch.randn(5, 3, 96, 96)
    dl,ts = [x[:2], x[2:4], x[4:]],[0, 1, 2, 3, 4]
    for asked in ts, torch.tensor(ts), np.array(ts), (ts, 1):
        got = torch.cat([c.maps for c in all_cams(m, dl, targets=asked, progress=False)])
        torch.testing.assert_close(got, cam_maps(m, x, targets=asked).maps, atol=1e-5, rtol=0)
    for wrong in ts[:3], ts*2:
        with pytest.raises(InputError, match=f'{len(wrong)} targets for'): list(all_cams(m, dl, targets=wrong, progress=False))


def test_the_nearest_of_a_thousand_classes():
    from cifar_cam.targets import class_indices
    vocab = [f'n{i:04} thing' for i in range(999)] + ['tabby cat']
    with pytest.raises(InputError, match='nearest of 1,000 are tabby cat') as e: class_indices('Tabby kat', torch.zeros(1, 1000), vocab)
    assert len(str(e.value)) < 200


# the process as it was

def test_switches_come_back_and_products_are_exact_inside():
    m,seen = resnet().eval(),[]
    m.layer1.register_forward_hook(lambda *_: seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.mha.get_fastpath_enabled()))
                                   if not hasattr(torch.backends.cuda.matmul, 'fp32_precision') else
                                   seen.append((torch.backends.cuda.matmul.fp32_precision != 'ieee', torch.backends.mha.get_fastpath_enabled())))
    held = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        cam_maps(m, torch.randn(1, 3, 96, 96))
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.mha.get_fastpath_enabled() and set(seen) == {(False, False)}
    finally: torch.backends.cuda.matmul.allow_tf32 = held
    from torch.utils import checkpoint as c
    assert c.CheckpointFunction.__name__ == 'CheckpointFunction'


@pytest.mark.parametrize('compile', [torch.jit.script, lambda m: torch.jit.trace(m.eval(), torch.zeros(1, 3, 64, 64)).train()])
def test_torchscript_is_refused_and_left_alone(compile):
    m = compile(resnet().train())
    for f in cam_layer, lambda m: cam_maps(m, torch.randn(1, 3, 64, 64)), lambda m: cam_maps(m, torch.randn(1, 3, 64, 64), layer='layer3'):
        with pytest.raises(InputError, match='TorchScript') as e: f(m)
        assert '\n' not in str(e.value)
    assert {c.training for c in m.children()} == {True}


def test_the_caller_keeps_its_random_state():
    m,x = Tokens(1, 0, True, 0).eval(),torch.randn(2, 3, 48, 48)
    torch.manual_seed(3)
    cam_maps(m, x)
    got = torch.randn(2)
    torch.manual_seed(3)
    assert torch.equal(got, torch.randn(2))


def test_rollout_is_that_of_matrices_caught_by_hand():
    m,x = Tokens(1, 0, True, 0, depth=3).eval(),torch.randn(2, 3, 48, 48)
    t = torch.cat([m.front.expand(2, -1, -1), m.patches(x).flatten(2).transpose(1, 2)], 1)
    total = torch.eye(37)
    for b in m.blocks:
        q = b.norm1(t)
        _,a = b.self_attn(q, q, q, need_weights=True)
        mixed = a + torch.eye(37)
        total = mixed/mixed.sum(-1, keepdim=True) @ total
        t = b(t)
    want = total[:, 0, 1:].reshape(2, 6, 6)
    torch.testing.assert_close(cam_maps(m, x, 'rollout', raw=True).maps, want.detach(), atol=1e-6, rtol=1e-4)
    assert torch.equal(cam_maps(m, x, 'rollout', targets=1).maps, cam_maps(m, x, 'rollout', targets=2).maps) # it does not listen
    with pytest.raises(InputError, match='no attention'): cam_maps(resnet(), torch.randn(1, 3, 96, 96), 'rollout')


def test_a_layer_that_was_changed_in_place_is_traced_anew():
    def block(i, o, stride): return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU())
    m = nn.Sequential(block(3, 8, 1), block(8, 16, 2), block(16, 16, 2), block(16, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    before = cam_layer(m)[0]
    m[3][0].stride = (1, 1)
    assert (before, cam_layer(m)[0])==('2', cam_layer(deepcopy(m))[0]) and cam_layer(m, '3')[0]=='3'  # 4×4 before, which is refused
