import pytest
import torch

from cifar_cam.core import InputError
from cifar_cam.learner import cifar_learner
from cifar_cam.loaders import cifar_dls
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


def small(n=8, size=32, seed=0):
    "Images of noise and three classes, told apart by brightness, as fastai's loaders"
    from fastai.vision.all import DataLoader, DataLoaders
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    items = list(zip(torch.randn(n, 3, size, size, generator=g) + y.view(-1, 1, 1, 1).float(), y))
    dls = DataLoaders(*(DataLoader(items, bs=4, num_workers=0) for _ in range(2)))
    dls.c = 3
    return dls


LIBRARY = ['timm/convnext_atto', 'timm/vit_tiny_patch16_224', 'timm/test_resnet', 'torchvision/shufflenet_v2_x0_5']

def libraries_name(arch):
    if arch.startswith('timm/'): pytest.importorskip('timm')
    return arch


@pytest.mark.parametrize('arch', LIBRARY)
@pytest.mark.parametrize('size', [(32, 32), (40, 48), (160, 200)])
def test_a_librarys_network_takes_images_of_every_size(arch, size):
    model = build_model(libraries_name(arch), 3).eval()
    assert model(torch.randn(2, 3, *size)).shape == (2, 3)


@pytest.mark.parametrize('arch', LIBRARY)
def test_the_map_of_a_librarys_network_says_where(arch):
    from cifar_cam.cam import cam_maps
    model = build_model(libraries_name(arch), 3).eval()
    raw = cam_maps(model, torch.randn(2, 3, 32, 32), raw=True).maps
    assert raw.shape[1] == raw.shape[2] >= 5


def test_small_images_are_enlarged_and_large_ones_left():
    from cifar_cam.library import AtSize
    model = build_model('torchvision/shufflenet_v2_x0_5', 3).eval()
    assert isinstance(model, AtSize) and not model.fixed
    x = torch.randn(2, 3, 192, 130)
    torch.testing.assert_close(model(x), model.net(x))
    bright = torch.nn.functional.interpolate(x[..., :32, :32], 128, mode='bilinear')
    torch.testing.assert_close(model(x[..., :32, :32]), model.net(bright))


def test_a_network_of_one_size_is_built_for_large_images():
    libraries_name('timm/')
    model = build_model('timm/vit_tiny_patch16_224', 3, size=160)
    assert model.fixed and model.side == 160
    assert model(torch.randn(1, 3, 160, 160)).shape == (1, 3)


def test_a_network_that_cannot_be_built_for_another_size_keeps_its_own():
    model = build_model('torchvision/vit_b_16', 3)
    assert model.fixed and model.side == 224


@pytest.mark.parametrize('arch', LIBRARY + ['resnet18', 'davidnet'])
def test_groups_hold_every_parameter_once_with_the_head_last(arch):
    from cifar_cam.library import split_layers
    model = build_model(libraries_name(arch), 13)
    groups = split_layers(model)
    ids = [id(p) for g in groups for p in g]
    assert sorted(ids) == sorted(id(p) for p in model.parameters()) and len(set(ids)) == len(ids)
    assert all(groups) and {len(p) for p in groups[2]} == {13}
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    assert any(p is first.weight for p in groups[0])


def test_a_distilled_networks_two_heads_are_the_head():
    from cifar_cam.library import split_layers
    libraries_name('timm/')
    model = build_model('timm/deit_tiny_distilled_patch16_224', 13)
    assert [tuple(p.shape) for p in split_layers(model)[2]] == [(13, 192), (13,)]*2


@pytest.mark.parametrize('arch', ['timm/test_resnet', 'torchvision/shufflenet_v2_x0_5', 'timm/test_vit'])
def test_freezing_rates_and_fine_tuning_go_by_the_groups(arch):
    from cifar_cam.learner import cifar_learner
    from cifar_cam.library import split_layers
    model = build_model(libraries_name(arch), 3)
    learn = cifar_learner(small(), model, splitter=split_layers, bf16=False)
    groups = split_layers(model)
    learn.freeze()
    before = [[p.detach().clone() for p in g] for g in groups]
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .1)
    moved = [[not torch.equal(a, b) for a,b in zip(g, old)] for g,old in zip(groups, before)]
    assert any(moved[2])
    for g,m in zip(groups[:2], moved[:2]): assert not any(c for p,c in zip(g, m) if p.ndim > 1)  # norms go on, as in fastai
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, slice(1e-4, 1e-2))
    assert [h['lr'] for h in learn.opt.hypers] == pytest.approx([1e-4, 1e-3, 1e-2])
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, 1e-3)
    assert len(learn.recorder.values) == 1 and learn.epochs_done == 4


def test_pretrained_weights_are_given_images_as_they_know_them(monkeypatch):
    import timm.models
    libraries_name('timm/')
    monkeypatch.setattr('timm.models._builder.load_pretrained', lambda *args, **kwargs: None)  # at hand, so to say
    stats = [.5, .4, .3],[.2, .2, .1]
    model = build_model('timm/convnext_atto', 3, pretrained=True, stats=stats).eval()
    pixels = torch.rand(2, 3, 128, 128)
    given = (pixels - torch.tensor(stats[0]).view(3, 1, 1))/torch.tensor(stats[1]).view(3, 1, 1)
    own = model.net.pretrained_cfg
    wanted = (pixels - torch.tensor(own['mean']).view(3, 1, 1))/torch.tensor(own['std']).view(3, 1, 1)
    torch.testing.assert_close(model(given), model.net(wanted), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('arch', ['timm/convnext_atto', 'torchvision/shufflenet_v2_x0_5'])
def test_weights_that_cannot_be_had_are_one_line(arch, monkeypatch):
    def no_connection(*args, **kwargs): raise OSError('no route to host\nand more')
    libraries_name(arch)
    monkeypatch.setattr('timm.models._builder.load_pretrained', no_connection)
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', no_connection)
    with pytest.raises(InputError, match=r'no route to host\).*pretrained=False') as e: build_model(arch, 3, pretrained=True)
    assert '\n' not in str(e.value)


def test_torchvisions_weights_come_without_their_head(monkeypatch):
    state = build_model('torchvision/shufflenet_v2_x0_5', 1000).net.state_dict()
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', lambda *args, **kwargs: state)
    model = build_model('torchvision/shufflenet_v2_x0_5', 3, pretrained=True)
    assert torch.equal(model.net.conv1[0].weight, state['conv1.0.weight']) and model.net.fc.weight.shape == (3, 1024)


def test_the_state_of_a_librarys_network_fits_one_built_without_pretrained_weights():
    state = build_model('torchvision/shufflenet_v2_x0_5', 3).state_dict()
    assert build_model('torchvision/shufflenet_v2_x0_5', 3).load_state_dict(state)
    assert state.keys() >= {'scale', 'shift'}


def test_wrong_names_of_libraries_are_one_line_with_the_nearest(monkeypatch):
    with pytest.raises(InputError, match='torchvision/resnet50'): build_model('torchvision/resnet-50')
    with pytest.raises(InputError, match='norm'): build_model('torchvision/resnet18', norm='group')
    with pytest.raises(InputError, match='pretrained=False'): build_model('davidnet', pretrained=True)
    libraries_name('timm/')
    with pytest.raises(InputError, match='timm/convnext_femto'): build_model('timm/convnext_fento')
    with pytest.raises(InputError, match='unknown network'): build_model('timm/hf-hub:some/where')
    monkeypatch.setitem(__import__('sys').modules, 'timm', None)
    with pytest.raises(InputError, match='pip install timm'): build_model('timm/convnext_femto')


def test_weights_for_a_network_of_ones_own_are_refused(shapes):
    with pytest.raises(InputError, match='pretrained=True is for a network given by name'):
        cifar_learner(cifar_dls(shapes, bs=50), torch.nn.Linear(2, 10), pretrained=True)


def test_first_weights_that_cannot_be_are_refused_and_not_passed_over(shapes):
    with pytest.raises(InputError, match='choose one of own, pytorch'): build_model('resnet18', init='PyTorch')
    with pytest.raises(InputError, match='first weights of its own'): build_model('torchvision/resnet18', init='pytorch')
    with pytest.raises(InputError, match='set its first weights'): cifar_learner(cifar_dls(shapes), torch.nn.Flatten(), init='pytorch')
