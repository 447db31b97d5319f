"""timm's ViT-Tiny with patches of 4 pixels for images of 32, by name: cifar-cam train vit_tiny.toml --module vit_tiny.py"""
from timm import create_model

from cifar_cam.models import MODELS


def vit_tiny(n_out=10, norm='batch'):
    "5.4 million parameters. It takes images of other sides too, its position embedding is resized for them; `norm` is not heeded: it has its own"
    return create_model('vit_tiny_patch16_224', img_size=32, patch_size=4, num_classes=n_out, dynamic_img_size=True)


MODELS['vit-tiny-4'] = vit_tiny
