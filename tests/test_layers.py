"""The layer of any network, found without a line of glue, and its map: the same as pytorch-grad-cam's with a reshape written by hand"""
from collections import OrderedDict
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
from cifar_cam.models import layer_table
from cifar_cam.layers import cam_layer

tv = torchvision.models
slow = pytest.mark.slow


def timm_net(name, **kwargs):
    timm = pytest.importorskip('timm', reason='timm is not installed')
    return lambda: timm.create_model(name, num_classes=5, **kwargs)


def tokens(h, w, front, t): return t[:, front:front + h*w].reshape(len(t), h, w, -1).permute(0, 3, 1, 2)

def last(t): return t.permute(0, 3, 1, 2)


def library(model, layer, x, target, reshape=None):
    with GradCAM(model, [model.get_submodule(layer)], reshape_transform=reshape) as cam:
        return torch.from_numpy(cam(x, [ClassifierOutputTarget(target)]*len(x)))


def awake(m):
    "Weights that do something: some networks begin with zeros in their heads, scales and class tokens"
    torch.manual_seed(0)
    for p in m.parameters():
        if p.ndim < 2: p.data.add_(0.2*torch.randn_like(p))
        elif not p.data.std() > 0.01: p.data.normal_(0, 0.05)
    return m.eval()


def state(m):
    return ([c.training for c in m.modules()], [p.requires_grad for p in m.parameters()], [id(c) for c in m.modules()],
            [(len(c._forward_hooks), len(c._forward_pre_hooks)) for c in m.modules()], {k: v.clone() for k,v in m.state_dict().items()})


VIT = dict(img_size=64, patch_size=8, embed_dim=48, depth=3, num_heads=3)
FAMILIES = { # how to make it, height and width, the layer, the reshape written by hand
    'ViT': (timm_net('vit_tiny_patch16_224', **VIT), (64, 64), 'blocks.2.norm1', partial(tokens, 8, 8, 1)),
    'ViT of torchvision': (lambda: tv.VisionTransformer(64, 8, 2, 2, 32, 64, num_classes=5), (64, 64),
                           'encoder.layers.encoder_layer_1.ln_1', partial(tokens, 8, 8, 1)),
    'Swin': (timm_net('swin_tiny_patch4_window7_224', img_size=64, window_size=4, embed_dim=24, depths=(1, 2), num_heads=(2, 4)),
             (64, 64), 'layers.1.blocks.1.norm1', last),
    'ResNet': (lambda: tv.resnet18(num_classes=5), (96, 96), 'layer3', None),
    'ConvNeXt': (timm_net('test_convnext'), (160, 160), 'stages', None),
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
    'PiT': (timm_net('pit_ti_224', img_size=64, patch_size=8, stride=4, base_dims=(16, 16), depths=(2, 2), heads=(2, 4)), (64, 64),
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
    'NesT': (timm_net('nest_tiny', img_size=64, embed_dims=(16, 32, 64), num_heads=(1, 2, 4), depths=(1, 1, 2)), (64, 64), None, last),
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
    ours = cam_maps(m, x, 'gradcam', targets=3)
    for a,b in zip(before[:-1], state(m)): assert a == b
    for k,v in m.state_dict().items(): assert torch.equal(v, before[-1][k])
    m.eval()
    theirs = library(m, found, x, 3, reshape)
    assert ours.maps.shape[1:] == size and not ours.blank.any() and theirs.std() > 0.01
    assert (ours.maps - theirs).abs().max() < 1e-4
    h,w = cam_maps(m, x, raw=True).maps.shape[1:]
    assert min(h, w) >= 5 and h*size[1] == w*size[0]
