"What is exported gives the network's own answers, for any batch, without our code; what does not is not written"
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cifar_cam import export
from cifar_cam.core import InputError
from cifar_cam.export import check_images, compare_logits, export_command, export_metadata, export_onnx, export_torch, exported_logits
from cifar_cam.predict import PixelNetwork
from cifar_cam.recipe import change_recipe, find_recipe
from cifar_cam.models import MODELS, build_model
from cifar_cam.run import load_run


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)


@pytest.fixture
def onnx():
    for package in 'onnx', 'onnxscript', 'onnxruntime': pytest.importorskip(package)
    if torch.__version__ < '2.7': pytest.skip('the onnxscript of today converts no batch norm for the exporter of PyTorch 2.6')
    return pytest.importorskip('onnxruntime')


def test_the_images_are_those_of_the_metrics(run, few):
    o = load_run(run)
    images,targets = check_images(o)
    assert images.dtype==torch.uint8 and images.shape==(20, 3, 32, 32)
    with torch.no_grad(): hits = PixelNetwork(o)(images).argmax(1)==targets
    assert hits.double().mean().item() == o.metrics['accuracy']
    again,labels = check_images(o, few)
    assert torch.equal(again, images) and torch.equal(labels, targets)


@pytest.mark.parametrize('input', ['uint8', 'float'])
def test_onnx_takes_batches_of_any_size_and_says_what_it_is(run, onnx, input):
    o = load_run(run)
    path,found = export_onnx(o, 'net.onnx', input)
    assert found['agree'] and found['difference'] <= 1e-4 and found['accuracy']==o.metrics['accuracy'] and found['images']==20
    session = onnx.InferenceSession(str(path))
    given, = session.get_inputs()
    assert given.name=='images' and given.shape[1:]==[3, 32, 32] and given.type==f"tensor({'uint8' if input=='uint8' else 'float'})"
    x = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad(): ours = PixelNetwork(o)(x).numpy()
    for n in 1, 2, 7:
        batch = x[:n].numpy() if input=='uint8' else x[:n].numpy().astype(np.float32)/255
        assert np.abs(session.run(None, {'images': batch})[0] - ours[:n]).max() < 1e-4
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about['classes'])==list(o.metrics['class_accuracy']) and float(about['accuracy'])==o.metrics['accuracy'] and '32×32' in about['input']
    assert not [f for f in Path('.').rglob('*') if f.name!='net.onnx' and 'run' not in f.parts]   # one file, no data beside it, nothing left over


@pytest.mark.parametrize('input', ['uint8', 'float'])
def test_torch_export(run, input):
    o = load_run(run)
    path,found = export_torch(o, 'net.pt2', input)
    assert found['agree'] and found['accuracy']==o.metrics['accuracy']
    extra = {'metadata.json': ''}
    program = torch.export.load(path, extra_files=extra).module()
    x = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    for n in 1, 5:
        with torch.no_grad(): assert torch.allclose(program(x[:n] if input=='uint8' else x[:n]/255), PixelNetwork(o)(x[:n]), atol=1e-4)
    assert json.loads(extra['metadata.json'])==export_metadata(o, input)


@pytest.mark.parametrize('loader', ['files', 'main memory', 'own parts'])
def test_images_of_any_loader_are_checked(run, few, loader, request):
    "albumentations opens files one at a time; what stays in the main memory, and held-out images, are as good"
    o = load_run(run)
    expected = check_images(load_run(run))
    if loader == 'main memory': o.dls[-1].memory.stays = True
    else: o.recipe = change_recipe(o.recipe, **dict(augment='albumentations') if loader == 'files' else dict(keep_best=True))
    assert all(map(torch.equal, check_images(o), expected)) and len(o.dls.loaders) == (3 if loader == 'own parts' else 2)
    assert export_torch(o, 'net.pt2')[1]['accuracy'] == o.metrics['accuracy']
    if loader == 'files':
        request.getfixturevalue('onnx')
        assert export_onnx(o, 'net.onnx')[1]['images'] == 20


@pytest.mark.slow
@pytest.mark.parametrize('arch,norm', [('resnet18', 'batch'), ('resnet18', 'group'), ('davidnet', 'layer'), ('speednet', 'batch')])
def test_every_network_of_the_package_is_exported(run, onnx, arch, norm, monkeypatch):
    o = load_run(run)
    o.model = build_model(arch, norm=norm).eval()
    assert export_onnx(o, 'net.onnx')[1]['agree'] and export_torch(o, 'net.pt2')[1]['agree']


def test_what_does_not_agree_is_not_written_and_what_was_there_stays(run, monkeypatch):
    o = load_run(run)
    path,_ = export_torch(o, 'net.pt2')
    before,example = path.read_bytes(),export._example
    def other(run, input):
        wrong = load_run(run.path)
        nn.init.normal_(wrong.model.fc.weight)
        return example(wrong, input)
    monkeypatch.setattr(export, '_example', other)
    with pytest.raises(InputError, match='differs'): export_torch(o, 'net.pt2', force=True)
    with pytest.raises(InputError, match='differs'): export_torch(o, 'other.pt2')
    assert path.read_bytes()==before and [p.name for p in Path('.').glob('*') if p.name!='run']==['net.pt2']


def test_a_network_that_knows_one_batch_size_only_is_found_out(run, monkeypatch):
    o = load_run(run)
    class Fixed(nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, images): return self.net(images)[:2]
    example = export._example
    def fixed(run, input):
        net,x = example(run, input)
        return Fixed(net),x
    monkeypatch.setattr(export, '_example', fixed)
    with pytest.raises(InputError, match='cannot export|differs'): export_torch(o, 'net.pt2')


def test_agreement():
    a = torch.tensor([[3., 1.], [1., 1.0001]])
    assert compare_logits(a, a)['agree'] and compare_logits(a, a.flip(0))['other_classes']==1
    near = torch.tensor([[3., 1.], [1.00009, 1.00004]])
    assert compare_logits(a, near)['agree'] and compare_logits(a, near)['difference'] > 5e-5   # the first two are the same as far as anyone can say
    assert not compare_logits(a, a + 2e-4)['agree'] and not compare_logits(a, a[:1])['agree'] and not compare_logits(a, a*float('nan'))['agree']
    assert not compare_logits(torch.tensor([[1., 1.001]]), torch.tensor([[1.001, 1.]]), atol=1e-4)['agree']


def test_wrong_input_is_one_line(run, few):
    o = load_run(run)
    Path('there.pt2').write_text('x')
    for call,told in ((lambda: export_torch(o, 'there.pt2'), '--force'), (lambda: export_torch(o, 'net.onnx'), '.pt2'),
                      (lambda: export_torch(o, 'net.pt2', input='half'), 'half'), (lambda: export_command(str(run)), '--onnx'),
                      (lambda: export_torch(o, 'net.pt2', data='nowhere'), 'nowhere'), (lambda: exported_logits('there.pt2', torch.zeros(1, 3, 32, 32)), 'there.pt2'),
                      (lambda: export_torch('nowhere'), 'nowhere')):
        with pytest.raises(InputError, match=told) as e: call()
        assert '\n' not in str(e.value)
    assert Path('there.pt2').read_text()=='x' and not Path('net.pt2').exists()
    (run/'metrics.json').unlink()
    with pytest.raises(InputError, match='not finished'): export_torch(run)


def test_a_missing_package_is_named(run, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'onnx', None)
    with pytest.raises(InputError, match=r'cifar_cam\[onnx\]'): export_onnx(load_run(run))


def test_the_shell_prints_the_file_last(run, capsys):
    export_command(str(run), torch=True)
    lines = capsys.readouterr().out.strip().splitlines()
    assert Path(lines[-1]).exists() and Path(lines[-1]).parent==run and 'agrees on 20 images' in lines[-2]
    assert load_run(run).finished
