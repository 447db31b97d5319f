import pytest
import torch

from cifar_cam.core import InputError
from cifar_cam.models import (build_model, cifar_resnet18, cifar_resnet34, count_parameters, davidnet, layer_table,
                              MODELS, speednet, Whiten)


@pytest.mark.parametrize('build, n', [(cifar_resnet18, 11_173_962), (cifar_resnet34, 21_282_122), (davidnet, 6_573_130), (speednet, 1_971_352)])
def test_parameters_are_the_published_ones(build, n): assert count_parameters(build()) == n


@pytest.mark.parametrize('arch', MODELS)
@pytest.mark.parametrize('norm', ['batch', 'layer', 'group'])
@pytest.mark.parametrize('size', [32, 48, 64])
def test_every_network_takes_every_size_and_trains(arch, norm, size):
    model = build_model(arch, 7, norm)
    out = model(torch.randn(2, 3, size, size))
    assert out.shape == (2, 7)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_layer_norm_does_not_mix_images_and_batch_norm_does():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32)
    for norm,alone in ('layer', True), ('group', True), ('batch', False):
        model = build_model('davidnet', norm=norm).train()
        with torch.no_grad(): same = torch.allclose(model(x)[:2], model(x[:2]), atol=1e-4)
        assert same == alone


def test_unknown_names_list_the_known():
    with pytest.raises(InputError, match='resnet18, resnet34, davidnet'): build_model('resnet50')
    with pytest.raises(InputError, match='batch, layer, group'): build_model('davidnet', norm='instance')


def test_the_layer_table_counts_every_parameter_and_leaves_the_network_alone():
    model = cifar_resnet18().train()
    before = {k: v.clone() for k,v in model.state_dict().items()}
    table = layer_table(model)
    assert table.parameters.sum() == count_parameters(model)
    assert table.output.iloc[0] == (64, 32, 32) and table.output.iloc[-1] == (10,)
    assert model.training and all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_the_layer_table_leaves_frozen_layers_frozen():
    model = davidnet().train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    layer_table(model)
    assert model.training and not frozen.training


def test_whitening_leaves_patches_uncorrelated_and_of_unit_variance():
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.randn(200, 3, 9, 9), 32, mode='bicubic')
    layer = Whiten()
    layer.fit(smooth, eps=0)
    with torch.no_grad(): out = layer(smooth) - layer.bias[:, None, None]
    flat = out[:, :12].transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat @ flat.T/flat.shape[1], torch.eye(12), atol=2e-3, rtol=0)
    torch.testing.assert_close(out[:, 12:], -out[:, :12])


def test_speednet_begins_as_an_identity_and_keeps_its_whitening():
    model = speednet()
    x = torch.randn(2, 24, 8, 8)
    torch.testing.assert_close(model.group1[0](x)[:, :24], x)
    kept = {n for n,p in model.named_parameters() if not p.requires_grad}
    assert kept == {'whiten.weight'} | {f'group{i}.{j}.weight' for i in (1, 2, 3) for j in (2, 5)}
