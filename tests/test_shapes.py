"Shapes10: the same pixels each time, exact masks, nothing but the outline tells the class, and whole or not there at all."
import hashlib
import multiprocessing
import os
import shutil

import numpy as np
import pytest
from fastai.data.transforms import get_image_files
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import cifar_cam.shapes as module
from cifar_cam.shapes import BACKGROUNDS, draw_shape, load_mask, mask_path, OUTLINES, SHAPES, shapes_path

SEEDS = range(25)


def draw(name, seed, **kwargs): return [np.asarray(o) for o in draw_shape(name, np.random.default_rng(seed), **kwargs)]


def pngs(folder): return sorted(folder.rglob('*.png'))


def digests(root): return {f.relative_to(root).as_posix(): hashlib.sha1(np.asarray(Image.open(f)).tobytes()).digest() for f in pngs(root)}


@pytest.fixture(scope='module')
def root(tmp_path_factory): return shapes_path(tmp_path_factory.mktemp('shapes10'), n_train=1000, n_test=1000)


@pytest.fixture(scope='module')
def read(root):
    "Images, masks and classes of both splits, as arrays"
    def of(split):
        files = pngs(root/split)
        return (np.stack([np.asarray(Image.open(f)) for f in files]), np.stack([load_mask(f) for f in files]),
                np.array([SHAPES.index(f.parent.name) for f in files]))
    return dict(train=of('train'), test=of('test'))


# The drawing

def test_ten_classes_in_the_order_of_the_vocab():
    assert len(SHAPES) == 10 and SHAPES == sorted(OUTLINES)


@pytest.mark.parametrize('name', SHAPES)
def test_outlines_have_area_1_and_centroid_0(name):
    big = Image.new('L', (2000, 2000))
    module.ImageDraw.Draw(big).polygon([tuple(p) for p in 1000 + 500*OUTLINES[name]], fill=255)
    y,x = np.nonzero(np.asarray(big))
    assert len(x)/500**2 == pytest.approx(1, abs=.02)
    assert np.array([x.mean(), y.mean()])/500 - 2 == pytest.approx([0, 0], abs=.01)


@pytest.mark.parametrize('size', [32, 48])
@pytest.mark.parametrize('name', SHAPES)
def test_image_and_mask_are_of_the_size_and_kind_promised(name, size):
    image,mask = draw_shape(name, np.random.default_rng(0), size=size)
    assert (image.mode, mask.mode, image.size, mask.size) == ('RGB', 'L', (size, size), (size, size))
    assert set(np.unique(mask)) == {0, 255}


def test_the_same_state_gives_the_same_pixels_and_another_state_others():
    for name in SHAPES:
        for a,b in zip(draw(name, 3), draw(name, 3)): assert (a == b).all()
        assert (draw(name, 3)[0] != draw(name, 4)[0]).any()


def test_the_same_state_gives_the_same_scene_for_every_class():
    for seed in SEEDS:
        drawn = [draw(name, seed) for name in SHAPES]
        near = binary_dilation([m>0 for _,m in drawn], np.ones((1, 3, 3)), iterations=2).any(0)
        assert near.mean() < .6
        for image,_ in drawn: assert (image[~near] == drawn[0][0][~near]).all()
        cores = [binary_erosion(m>0, np.ones((3, 3))) for _,m in drawn]
        for (image,_),core in zip(drawn[1:], cores[1:]): # the object's colour and shade too
            both = core & cores[0]
            same = (image[both] == drawn[0][0][both]).all(1)
            assert not both.any() or same.mean() > .85 # all but the thin end of the heart's notch


def test_the_mask_is_where_the_object_is(monkeypatch):
    "On black, an object of one colour: its colour or a shade of it inside, black outside, blended at the edge only"
    monkeypatch.setattr(module, '_palette', lambda rng: (np.zeros(3), np.zeros(3), np.array([200., 100., 0.])))
    monkeypatch.setattr(module, '_background', lambda rng, x, y, back, back2: np.zeros((*x.shape, 3)))
    square = np.ones((3, 3))
    for name in SHAPES:
        for seed in SEEDS:
            image,mask = draw(name, seed)
            mask = mask > 0
            red,green,blue = image.astype(float).transpose(2, 0, 1)
            assert red[mask].min() >= 60 and (blue == 0).all() and np.abs(red - 2*green).max() <= 1.5 # one hue
            assert (red[~binary_dilation(mask, square, iterations=2)] == 0).all() # a tip may end 2 pixels outside
            assert red[~mask].mean() < 5
            core = binary_erosion(mask, square)
            for row in np.flatnonzero(core.any(1)): # a row has one shade: half of it or more inside, less outside
                half = red[row].max() / 2
                assert red[row][mask[row]].min() >= half-1 and red[row][~mask[row]].max() <= half+1


def test_objects_are_whole_and_inside():
    for name in SHAPES:
        for seed in SEEDS:
            mask = draw(name, seed)[1] > 0
            assert not (mask[[0,-1]].any() or mask[:,[0,-1]].any()), (name, seed)


def test_the_eye_can_tell_object_from_background(read):
    "In luma, the object and the ring of background around it are far apart in nearly every image"
    images,masks,_ = read['test']
    luma = images @ [.299, .587, .114]
    gap = []
    for l,m in zip(luma, masks):
        around = binary_dilation(m, iterations=4) & ~binary_dilation(m, iterations=1)
        gap.append(abs(np.median(l[m]) - np.median(l[around])))
    assert np.mean(np.array(gap) > 40) > .97


@pytest.mark.parametrize('name', BACKGROUNDS)
def test_backgrounds_blend_at_any_size(name):
    for size in 32, 45:
        y,x = (np.mgrid[:size,:size] + .5) / size
        blend = BACKGROUNDS[name](np.random.default_rng(1), x, y)
        assert blend.shape == (size, size) and np.isfinite(blend).all() and -.05 <= blend.min() < blend.max() <= 1.05


def test_an_unknown_shape_is_named():
    with pytest.raises(ValueError, match="'hexagon'.*arrow, circle"): draw_shape('hexagon', np.random.default_rng(0))


# Nothing but the outline tells the class

def test_areas_are_alike(read):
    masks,labels = (np.concatenate([read[s][i] for s in read]) for i in (1, 2))
    area = masks.sum((1, 2))
    assert area.min() >= 35 and area.max() <= 165 # of 1,024 pixels
    means = np.array([area[labels==c].mean() for c in range(10)])
    assert np.abs(means/means.mean() - 1).max() < .06 # the standard error of one is .02


def colour_statistics(px):
    "Mean, standard deviation and histogram of the three colours"
    return [*px.mean(0), *px.std(0), *np.concatenate([np.histogram(c, 8, (0, 256))[0]/len(px) for c in px.T])]


def background(image, mask): return colour_statistics(image[~binary_dilation(mask, iterations=2)])
def frame(image, mask): return np.concatenate([image[[0,1,-2,-1]].ravel(), image[:,[0,1,-2,-1]].ravel()]) / 255
def place(image, mask): return [c.mean() for c in mask.nonzero()]
def area(image, mask): return [mask.sum()]
def place_and_area(image, mask): return [*place(image, mask), *area(image, mask)]
def colour(image, mask): return image[binary_erosion(mask) if binary_erosion(mask).any() else mask].mean(0)
def whole(image, mask): return colour_statistics(image.reshape(-1, 3))


def linear(): return make_pipeline(StandardScaler(), LogisticRegression(C=.1, max_iter=200))
def forest(): return RandomForestClassifier(40, min_samples_leaf=5, random_state=0)


@pytest.mark.parametrize('feature,model', [(background, linear), (frame, linear), (place, linear), (area, linear), (colour, linear),
                                           (background, forest), (place_and_area, forest), (colour, forest)])
def test_what_is_not_outline_says_nothing(read, feature, model):
    x = {s: np.array([feature(i, m) for i,m in zip(*read[s][:2])]) for s in read}
    accuracy = model().fit(x['train'], read['train'][2]).score(x['test'], read['test'][2])
    assert accuracy < .14, feature.__name__ # chance is .1 ± .0095 on 1,000 images


def test_the_colours_of_the_whole_image_say_next_to_nothing(read):
    x = {s: np.array([whole(i, m) for i,m in zip(*read[s][:2])]) for s in read}
    assert linear().fit(x['train'], read['train'][2]).score(x['test'], read['test'][2]) < .16


def test_the_outline_does_tell(read):
    "The control: the same model on the mask, moved to the middle, is far above chance"
    def centred(m): return np.roll(m, [round(15.5-c.mean()) for c in m.nonzero()], (0, 1))[4:-4,4:-4].ravel()
    x = {s: np.array([centred(m) for m in read[s][1]], dtype=float) for s in read}
    assert forest().fit(x['train'], read['train'][2]).score(x['test'], read['test'][2]) > .6


# On disk

def test_layout_and_counts(root):
    assert (root/'labels.txt').read_text().split() == SHAPES
    for split,n in ('train', 100), ('test', 100):
        assert sorted(o.name for o in (root/split).iterdir()) == SHAPES
        for name in SHAPES: assert len(list((root/split/name).glob('*.png'))) == n


def test_get_image_files_finds_the_images_and_no_masks(root):
    assert len(get_image_files(root)) == 2000
    assert {f.relative_to(root).parts[0] for f in get_image_files(root)} == {'train', 'test'}


def test_files_are_readable_by_others_as_the_users_own_are(root, tmp_path):
    (tmp_path/'own').mkdir()
    assert root.stat().st_mode == (tmp_path/'own').stat().st_mode


def test_every_mask_fits_its_image(root, read):
    for split,(_,masks,_) in read.items():
        assert masks.dtype == bool and masks.any((1, 2)).all() and masks.shape[1:] == (32, 32)
    drawn = draw_shape('star', np.random.default_rng([42, 1, SHAPES.index('star'), 7]))
    f = root/'test'/'star'/'star_0007.png'
    assert (np.asarray(Image.open(f)) == np.asarray(drawn[0])).all() and (load_mask(f) == (np.asarray(drawn[1]) > 0)).all()


def test_masks_are_found_from_a_relative_path_and_a_string(root, monkeypatch):
    monkeypatch.chdir(root/'test'/'star')
    assert load_mask('star_0000.png').sum() == load_mask(root/'test'/'star'/'star_0000.png').sum() > 0
    assert mask_path('star_0000.png') == root/'.masks'/'test'/'star'/'star_0000.png'


@pytest.mark.parametrize('path', ['photo.png', '/photo.png', '/nowhere/test/star/star_0000.png', 'deep/er/still/photo.png'])
def test_an_image_without_mask_is_named(path):
    with pytest.raises(ValueError, match=f'no mask for {path}'): load_mask(path)


def test_images_do_not_depend_on_how_many_there_are(root, tmp_path):
    few = shapes_path(tmp_path, n_train=30, n_test=10)
    assert len(digests(few)) == 80 # images and masks
    assert digests(few).items() <= digests(root).items()


def test_another_seed_is_another_set_beside_the_first(tmp_path):
    a,b = (shapes_path(tmp_path, 20, 10, seed=s) for s in (0, 1))
    assert a != b
    images = [{d for f,d in digests(o).items() if not f.startswith('.masks')} for o in (a, b)]
    assert not images[0] & images[1]


def test_train_and_test_share_no_image_and_none_comes_twice(root):
    train,test = (list(digests(root/s).values()) for s in ('train', 'test'))
    assert len(set(train + test)) == 2000


def test_a_finished_set_is_reused(tmp_path, monkeypatch):
    a = shapes_path(tmp_path, 20, 10)
    monkeypatch.setattr(module, 'draw_shape', lambda *args: pytest.fail('drawn again'))
    assert shapes_path(str(tmp_path), 20, 10) == a


def test_by_default_it_lies_in_fastais_data_folder(fastai_home):
    assert shapes_path(n_train=10, n_test=10).parent == fastai_home


def broken_after(n, stop):
    "`draw_shape` that calls `stop` instead of drawing image `n`"
    left = iter(range(n))
    def draw(*args): return draw_shape(*args) if next(left, None) is not None else stop(*args)
    return draw


@pytest.mark.parametrize('n', [0, 35])
def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch, n):
    def interrupt(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(module, 'draw_shape', broken_after(n, interrupt))
        with pytest.raises(KeyboardInterrupt): shapes_path(tmp_path, 30, 10)
    assert not list(tmp_path.iterdir())
    assert len(get_image_files(shapes_path(tmp_path, 30, 10))) == 40


def _killed(path):
    module.draw_shape = broken_after(35, lambda *args: os._exit(9)) # as a kill -9 does: nothing is cleaned up
    shapes_path(path, 30, 10)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_killed_drawing_does_not_pass_as_finished(tmp_path):
    child = multiprocessing.get_context('fork').Process(target=_killed, args=(tmp_path,))
    child.start(); child.join()
    assert child.exitcode == 9
    assert not [o for o in tmp_path.iterdir() if not o.name.startswith('.')] # only a hidden draft
    assert len(get_image_files(shapes_path(tmp_path, 30, 10))) == 40


def test_a_second_process_that_finishes_first_does_no_harm(tmp_path, monkeypatch):
    def other(*args):
        monkeypatch.setattr(module, 'draw_shape', draw_shape)
        faster.append(shapes_path(tmp_path, 30, 10))
        return draw_shape(*args)
    faster = []
    monkeypatch.setattr(module, 'draw_shape', broken_after(39, other))
    root = shapes_path(tmp_path, 30, 10)
    assert [root] == faster and [root] == list(tmp_path.iterdir())
    assert len(digests(root)) == 80


@pytest.mark.parametrize('lost', ['train/star/star_0001.png', '.masks/test/moon/moon_0000.png', 'test/ring'])
def test_a_set_that_lost_files_is_named(tmp_path, lost):
    root = shapes_path(tmp_path, 20, 10)
    shutil.rmtree(root/lost) if (root/lost).is_dir() else (root/lost).unlink()
    with pytest.raises(ValueError, match=f'{root.name} has lost files: delete'): shapes_path(tmp_path, 20, 10)


@pytest.mark.parametrize('kwargs,named', [(dict(n_train=55), 'n_train=55'), (dict(n_test=0), 'n_test=0'), (dict(n_train=-10), 'n_train=-10'),
                                          (dict(seed=-1), 'seed=-1')])
def test_bad_sizes_and_seeds_are_named(tmp_path, kwargs, named):
    with pytest.raises(ValueError, match=named): shapes_path(tmp_path, **kwargs)
    assert not list(tmp_path.iterdir())
