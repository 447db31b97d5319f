"A user's own folder: seven classes of different sizes, images of 48×64, names that are not plain"
import numpy as np
import pytest
from PIL import Image

from cifar_cam.core import InputError
from cifar_cam.photo import explain_image
from cifar_cam.models import MODELS
from cifar_cam.run import load_run
from cifar_cam.experiment import run_recipe
from cifar_cam.share import push_to_hub

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


@pytest.mark.parametrize('name', ['davidnet', pytest.param('resnet18-albumentations', marks=pytest.mark.slow)])
def test_a_recipe_its_galleries_and_its_cams_take_the_folder(folder, narrow, tmp_path, monkeypatch, name):
    for arch in 'davidnet', 'resnet18': monkeypatch.setitem(MODELS, arch, narrow)
    run = run_recipe(name, folder, tmp_path, epochs=2, bs=32, lr=.05, lr_min=.005, size=40, schedule='one-cycle')
    m = run.metrics
    assert sorted(m['class_accuracy'])==CLASSES and m['images']==sum(5 + c for c in range(7)) and m['size']==[40, 40]
    assert run.published is None   # those curves are of CIFAR-10
    assert {f.stem for f in (run.path/'figures').iterdir()} >= {'curves', 'confusion_matrix', 'class_accuracy', 'top_losses', 'misclassified', 'cams'}
    page = (run.path/'report.html').read_text()
    assert 'white <b>' not in page and 'blå' in page   # names are text, not HTML
    o = load_run(run.path)
    _,probs = explain_image(o.model, next((folder/'valid'/'red').iterdir()), vocab=list(m['class_accuracy']), stats=(m['mean'], m['std']), size=m['size'])
    assert sorted(probs)==CLASSES and sum(probs.values())==pytest.approx(1, abs=1e-4)


def test_a_run_is_uploaded_without_what_would_be_unpickled(folder, narrow, tmp_path, monkeypatch):
    hub = pytest.importorskip('huggingface_hub')
    monkeypatch.setitem(MODELS, 'davidnet', narrow)
    run = run_recipe('davidnet', folder, tmp_path, epochs=1, bs=32, lr=.05, lr_min=.005)
    calls,sent = [],[]
    monkeypatch.setattr(hub.HfApi, 'create_repo', lambda self, repo, **kw: calls.append((repo, kw)) or f'hub:{repo}')
    monkeypatch.setattr(hub.HfApi, 'upload_folder', lambda self, repo_id, folder_path, allow_patterns, delete_patterns: sent.extend(
        hub.utils.filter_repo_objects([str(p.relative_to(folder_path)) for p in sorted(folder_path.rglob('*')) if p.is_file()], allow_patterns=allow_patterns)))
    (run.path/'validation'/'private').mkdir(parents=True)
    (run.path/'validation'/'private'/'metrics.json').write_text('{}')
    assert push_to_hub(run.path, 'me/net', private=True)=='hub:me/net'
    assert calls==[('me/net', dict(private=True, exist_ok=True))]
    assert {'README.md', 'recipe.json', 'metrics.json', 'history.csv', 'weights.safetensors', 'figures/cams.png'} <= set(sent)
    assert not [f for f in sent if f.endswith(('.pt', '.pkl')) or 'private' in f]
    card = (run.path/'README.md').read_text()
    assert f'{100*run.metrics["accuracy"]:.2f} %' in card and str(folder.parent) not in card and "d'or" in card
    (run.path/'metrics.json').unlink()
    with pytest.raises(InputError, match='not finished'): push_to_hub(run.path, 'me/net')
