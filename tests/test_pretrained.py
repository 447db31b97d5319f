"The network that comes with the package: nothing trained, no network connection"
import hashlib, json, re, shutil
from importlib.resources import files

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cifar_cam.cli import main
from cifar_cam.core import InputError
from cifar_cam.evaluate import image_format
from cifar_cam.images import CIFAR10
from cifar_cam.loaders import cifar_dls
from cifar_cam.interpret import CamInterpretation
from cifar_cam.run import load_run
from cifar_cam.share import model_card, pretrained_run, ship_run

FOLDER = files('cifar_cam')/'pretrained'


@pytest.fixture(scope='module')
def like_cifar(tmp_path_factory):
    "Two images of noise for each of CIFAR-10's classes, in train and in test"
    root = tmp_path_factory.mktemp('like')
    for i,name in enumerate(n for n in CIFAR10 for _ in range(4)):
        (folder := root/('train', 'test')[i % 2]/name).mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 90).convert('RGB').save(folder/f'{i}.png')
    return root


def test_the_file_is_small_half_precision_and_the_one_that_was_measured():
    file,metrics = FOLDER/'weights.safetensors',json.loads((FOLDER/'metrics.json').read_text())
    assert file.stat().st_size < 5_000_000
    assert hashlib.sha256(file.read_bytes()).hexdigest() == metrics['weights_sha256']
    assert {v.dtype for v in load_file(file).values() if v.is_floating_point()} == {torch.float16}


def test_the_card_says_what_was_measured_and_what_to_expect():
    m,card = pretrained_run().metrics,(FOLDER/'README.md').read_text()
    assert f"{100*m['accuracy']:.2f} %" in card and 'Krizhevsky' in card and 'Limits' in card and 'Licence' in card
    assert not re.search(r'/(home|root|tmp|work|opt)/', card + (FOLDER/'env.json').read_text())


def test_a_photo_is_explained_without_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((200, 120), 80).convert('RGB').save('photo.jpg')
    assert main(['explain', 'photo.jpg']) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith('photo.jpg: ') and sum(c in said[0] for c in CIFAR10) == 3
    assert said[-1].endswith('-hirescam.png') and Image.open(said[-1]).width > 300


def test_galleries_of_the_users_images(like_cifar):
    interp = CamInterpretation.from_pretrained(cifar_dls(like_cifar, bs=10))
    assert interp.at_chance == ()  # Grad-CAM's maps, which most papers show, are to be believed too
    assert interp.probs.shape == (20, 10)
    direct = pretrained_run().model(interp.dl.one_batch()[0].as_subclass(torch.Tensor)).softmax(1)
    assert torch.allclose(interp.probs[:len(direct)], direct, atol=1e-5)
    interp.plot_cams(4, 'top_losses')
    plt.close('all')


def test_the_users_images_are_normalised_as_the_network_was_trained(like_cifar):
    dls = cifar_dls(like_cifar, bs=10)
    own = image_format(dls)
    interp = CamInterpretation.from_pretrained(dls)
    m = pretrained_run().metrics
    assert own==image_format(dls) and (own['mean'], own['std'])!=(m['mean'], m['std'])
    assert [image_format(interp.learn.dls)[k] for k in ('mean', 'std')]==[m['mean'], m['std']]


def test_a_finished_run_sees_images_as_it_was_trained_whatever_is_measured_today(run):
    "Versions differ in what they take for CIFAR-10, and so in the mean that they measure of its parts"
    about = json.loads((run/'metrics.json').read_text()) | dict(mean=[.4, .5, .6], std=[.2, .25, .3])
    (run/'metrics.json').write_text(json.dumps(about))
    found = image_format(load_run(run).dls)
    assert found['mean']==[.4, .5, .6] and found['std']==[.2, .25, .3]


def test_a_method_that_the_scorecard_finds_at_chance_warns(like_cifar, monkeypatch):
    monkeypatch.setattr('cifar_cam.share.methods_at_chance', lambda path: ('gradcam',))
    interp = CamInterpretation.from_pretrained(cifar_dls(like_cifar, bs=10))
    with pytest.warns(UserWarning, match='finds the maps of gradcam at chance'): interp.cams([0], method='gradcam')


def test_the_card_says_of_the_maps_what_was_measured(tmp_path):
    shutil.copytree(FOLDER, tmp_path/'run')
    file = tmp_path/'run'/'score.json'
    told = lambda: model_card(load_run(tmp_path/'run'))
    score = json.loads(file.read_text())
    assert 'hirescam: ROAD 0.27 (0.25 to 0.29), GridPG 0.95 (0.95 to 0.95)' in told()
    for row in score['rows'].values(): row.pop('gridpg')  # as where no montage could be made
    score['rows']['gradcam']['road'] = dict(mean=.5, low=None, high=None)
    file.write_text(json.dumps(score))
    assert 'hirescam: ROAD 0.27 (0.25 to 0.29)\n' in told() and 'gradcam: ROAD 0.50\n' in told() and 'GridPG' not in told()
    for bad in '', '[]', '{"rows": {}}':
        file.write_text(bad)
        assert 'believed' not in told() and 'Limits' in told()


def test_other_classes_and_sizes_are_refused_by_name(shapes, like_cifar):
    with pytest.raises(InputError, match='airplane.*arrow'): CamInterpretation.from_pretrained(cifar_dls(shapes, bs=10))
    with pytest.raises(InputError, match='48'): CamInterpretation.from_pretrained(cifar_dls(like_cifar, bs=10, size=48))


def test_a_shipped_run_is_a_run_whose_metrics_are_those_of_its_rounded_weights(run, tmp_path):
    run = load_run(run)
    shipped = ship_run(run, tmp_path/'shipped')
    full,half = (o.model.state_dict() for o in (run, shipped))
    assert all(torch.equal(half[k], full[k].half().to(full[k].dtype)) for k in full)
    again = load_run(tmp_path/'shipped')
    hits = again.interp.preds == again.interp.targs
    assert hits.double().mean().item() == pytest.approx(again.metrics['accuracy'])
    assert (run.path/'weights.safetensors').stat().st_size > 1.5*(shipped.path/'weights.safetensors').stat().st_size


@pytest.mark.real
def test_accuracy_on_the_real_test_images(cifar10):
    interp,metrics = CamInterpretation.from_pretrained(cifar_dls(cifar10, bs=512)),pretrained_run().metrics
    assert (interp.preds == interp.targs).double().mean().item() == pytest.approx(metrics['accuracy'], abs=3e-4)  # last bits of other processors
