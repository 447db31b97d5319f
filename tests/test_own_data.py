"A user's own folder: seven classes of different sizes, images of 48×64, names that are not plain"
import numpy as np
import pytest
from PIL import Image

from cifar_cam.interpret import explain_image
from cifar_cam.models import MODELS
from cifar_cam.recipes import load_run, run_recipe

CLASSES = sorted(['blå', 'dark green', "d'or", 'gray', 'red', 'violet', 'white <b>'])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root,rng = tmp_path_factory.mktemp('own images'),np.random.default_rng(0)
    for c,name in enumerate(CLASSES):
        for split,n in ('train', 20 + 4*c), ('valid', 5 + c):
            (root/split/name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 60, (48, 64, 3)) + np.array([c%2, c//2%2, c//4])*180
                Image.fromarray(pixels.astype('uint8')).save(root/split/name/f'{i}.{"png" if i%2 else "jpg"}')
    return root


@pytest.mark.parametrize('name', ['davidnet', 'resnet18-albumentations'])
def test_a_recipe_its_galleries_and_its_cams_take_the_folder(folder, narrow, tmp_path, monkeypatch, name):
    for arch in 'davidnet', 'resnet18': monkeypatch.setitem(MODELS, arch, narrow)
    run = run_recipe(name, folder, tmp_path, epochs=2, bs=32, lr=.05, lr_min=.005, size=40, schedule='one-cycle')
    m = run.metrics
    assert sorted(m['class_accuracy'])==CLASSES and m['images']==sum(5 + c for c in range(7)) and m['size']==[40, 40]
    assert run.published is None   # those curves are of CIFAR-10
    assert {f.stem for f in (run.path/'figures').iterdir()} >= {'curves', 'confusion_matrix', 'class_accuracy', 'top_losses', 'misclassified', 'cams'}
    o = load_run(run.path)
    _,probs = explain_image(o.model, next((folder/'valid'/'red').iterdir()), vocab=list(m['class_accuracy']), stats=(m['mean'], m['std']), size=m['size'])
    assert sorted(probs)==CLASSES and sum(probs.values())==pytest.approx(1, abs=1e-4)
