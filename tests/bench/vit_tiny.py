"""timm's ViT-Tiny with patches of 4 pixels for images of 32, by name: cifar-cam train vit_tiny.toml --module vit_tiny.py"""
from timm.models.vision_transformer import VisionTransformer

from cifar_cam.models import MODELS


def vit_tiny(n_out=10, norm='batch'):
    "5.4 million parameters; `norm` is not heeded, a transformer has its own"
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=192, depth=12, num_heads=3, num_classes=n_out)


MODELS['vit-tiny-4'] = vit_tiny
