import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import cifar_cam.shapes as shapes_module
from cifar_cam.data import image_files
from cifar_cam.shapes import SHAPES, draw_shape, load_mask, mask_path, shapes_path


@pytest.fixture(scope='module')
def drawn():
    "200 drawings of each class: images, masks, classes"
    pairs = [draw_shape(name, np.random.default_rng([7, c, i])) for c,name in enumerate(SHAPES) for i in range(200)]
    images,masks = (np.stack([np.asarray(p[k]) for p in pairs]) for k in (0, 1))
    return images, masks > 127, np.repeat(np.arange(10), 200)


def linear_accuracy(x, y):
    "Accuracy of a linear model on images it was not fitted to; chance is 0.1"
    return cross_val_score(make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)), x, y, cv=5).mean()


def test_the_layout_is_cifar10s_and_masks_are_not_taken_for_images(shapes):
    files = image_files(shapes)
    assert len(files) == 400 and {f.parent.parent.name for f in files} == {'train', 'test'}
    assert (shapes/'labels.txt').read_text().split() == SHAPES == sorted(SHAPES) and len(SHAPES) == 10
    for split,n in ('train', 30), ('test', 10):
        for name in SHAPES: assert len(list((shapes/split/name).iterdir())) == n
    assert {Image.open(f).size for f in files} == {(32, 32)} and {Image.open(f).mode for f in files} == {'RGB'}


def test_every_image_has_a_mask_of_a_sound_size_and_others_have_none(shapes, tmp_path):
    areas = {name: [load_mask(f).mean() for f in image_files(shapes) if f.parent.name==name] for name in SHAPES}
    for name,a in areas.items(): assert .02 < min(a) and max(a) < .2, name
    Image.new('RGB', (32, 32)).save(tmp_path/'other.png')
    with pytest.raises(ValueError, match='no mask'): load_mask(tmp_path/'other.png')


def test_the_mask_is_the_object(drawn):
    images,masks,y = drawn
    for c,name in enumerate(SHAPES):
        # the same random state draws the same scene for every class: two classes differ only on the one or the other object
        for i in range(20):
            a,ma = (np.asarray(o).astype(int) for o in draw_shape(name, np.random.default_rng([7, i])))
            b,mb = (np.asarray(o).astype(int) for o in draw_shape(SHAPES[(c + 3) % 10], np.random.default_rng([7, i])))
            near = np.zeros((34, 34), bool)
            for dy in range(3):
                for dx in range(3): near[dy:dy+32, dx:dx+32] |= (ma > 0) | (mb > 0)
            assert (np.abs(a - b).sum(2) > 0)[~near[1:-1, 1:-1]].sum() < 8   # thin tips: less than half of their pixels is object
            assert (np.abs(a - b).sum(2) > 0)[(ma > 0) != (mb > 0)].mean() > .95


def test_the_same_seed_draws_the_same_pixels_and_another_others():
    draw = lambda seed: np.asarray(draw_shape('star', np.random.default_rng(seed))[0])
    assert np.array_equal(draw(3), draw(3)) and not np.array_equal(draw(3), draw(4))


def test_an_image_does_not_depend_on_how_many_are_drawn(shapes, tmp_path):
    small = shapes_path(tmp_path, n_train=20, n_test=10)
    for f in image_files(small): assert f.read_bytes() == (shapes/f.relative_to(small)).read_bytes()
    other = shapes_path(tmp_path, n_train=20, n_test=10, seed=1)
    assert all(f.read_bytes() != (other/f.relative_to(small)).read_bytes() for f in image_files(small))


def test_train_and_test_share_no_image(shapes):
    seen = {split: {np.asarray(Image.open(f)).tobytes() for f in image_files(shapes) if f.parent.parent.name==split} for split in ('train', 'test')}
    assert len(seen['train']) == 300 and len(seen['test']) == 100 and not seen['train'] & seen['test']


def test_the_background_does_not_give_the_class_away(drawn):
    images,masks,y = drawn
    outside = [im[~m].astype(float) for im,m in zip(images, masks)]
    statistics = np.stack([np.concatenate([o.mean(0), o.std(0), np.percentile(o, (5, 25, 50, 75, 95), axis=0).ravel(), np.corrcoef(o.T)[np.triu_indices(3, 1)]])
                           for o in outside])
    assert linear_accuracy(np.nan_to_num(statistics), y) < .15


def test_place_size_and_colour_do_not_give_the_class_away(drawn):
    images,masks,y = drawn
    where = [np.argwhere(m) for m in masks]
    place = np.stack([np.concatenate([w.mean(0), [len(w)]]) for w in where])
    assert linear_accuracy(place[:, :2], y) < .15
    assert linear_accuracy(place, y) < .17
    assert linear_accuracy(np.stack([im[m].mean(0) for im,m in zip(images, masks)]), y) < .15


def test_a_linear_model_on_the_pixels_cannot_solve_it(drawn):
    images,_,y = drawn
    assert linear_accuracy(images.reshape(len(y), 16, 2, 16, 2, 3).mean((2, 4)).reshape(len(y), -1), y) < .3


def test_a_second_call_draws_nothing(tmp_path, monkeypatch):
    first = shapes_path(tmp_path, n_train=10, n_test=10)
    monkeypatch.setattr(shapes_module, '_draw_split', lambda *a: pytest.fail('drawn again'))
    assert shapes_path(tmp_path, n_train=10, n_test=10) == first


def test_a_kill_while_drawing_leaves_nothing_that_passes_for_the_set(tmp_path, monkeypatch):
    class Killed(BaseException): pass
    source = draw_shape
    def draw(name, rng):
        if name=='heart': raise Killed
        return source(name, rng)
    monkeypatch.setattr(shapes_module, 'draw_shape', draw)
    with pytest.raises(Killed): shapes_path(tmp_path, n_train=10, n_test=10)
    monkeypatch.undo()
    assert not [d for d in tmp_path.iterdir() if not d.name.startswith('.')]
    assert len(image_files(shapes_path(tmp_path, n_train=10, n_test=10))) == 20


def test_a_set_that_lost_files_is_noticed(tmp_path):
    path = shapes_path(tmp_path, n_train=10, n_test=10)
    image_files(path)[0].unlink()
    with pytest.raises(ValueError, match='lost files'): shapes_path(tmp_path, n_train=10, n_test=10)


@pytest.mark.parametrize('kwargs', [dict(n_train=15), dict(n_test=0), dict(n_train=-10), dict(seed=-1)])
def test_sizes_that_cannot_be_are_named(tmp_path, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))): shapes_path(tmp_path, **kwargs)
    assert not list(tmp_path.iterdir())
