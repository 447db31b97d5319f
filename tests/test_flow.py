"The way from images to CAMs of mistakes, in the words of README and the notebooks."
import matplotlib.pyplot as plt
import numpy as np
import pytest
from fastai.learner import load_learner
from torch import nn

from cifar_cam.all import (SHAPES, CamInterpretation, Cutout, HorizontalFlip, InputError, PadCrop, cam_layer, cifar_block, cifar_dls, cifar_learner, davidnet,
                           image_files, image_stats, cifar_resnet18, shapes_path)


@pytest.fixture(scope='module')
def dls(tmp_path_factory):
    path = shapes_path(tmp_path_factory.mktemp('flow'), n_train=50, n_test=20)
    block = cifar_block(item_tfms=[PadCrop(4), HorizontalFlip(), Cutout(16)], stats=image_stats(path))
    return block.dataloaders(path, path=path, bs=25, num_workers=0)


def quietly(learn, fit):
    with learn.no_bar(), learn.no_logging(): fit()
    return np.array(learn.recorder.lrs)


def test_show_batch_shows_holes_in_training_images_only(dls):
    grey = np.array([float(m) for m in image_stats(dls.path)[0]])
    def holes(dl):
        plt.close('all')
        dl.show_batch(max_n=9)
        shown = [np.asarray(ax.images[0].get_array())/255 for ax in plt.gcf().axes if ax.images]   # fastai shows bytes
        return [(np.abs(im - grey) < .02).all(2).mean() > .06 for im in shown]
    assert len(holes(dls.train)) == 9 and all(holes(dls.train)) and not any(holes(dls.valid))


@pytest.mark.slow
def test_from_images_to_cams_of_mistakes(dls, tmp_path):
    small = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8*15*15, 10))
    learn = cifar_learner(dls, small, path=tmp_path)
    suggested = learn.lr_find(start_lr=1e-4)
    assert 0 < suggested.valley < 10
    lrs = quietly(learn, lambda: learn.fit_one_cycle(24, .05, pct_start=5/24))
    assert len(lrs) == 48 and lrs.argmax() == 10 and lrs.max() == pytest.approx(.05, rel=1e-3)

    learn = cifar_learner(dls, 'davidnet', path=tmp_path)
    lrs = quietly(learn, lambda: learn.fit_triangle(24, .005, .05, peak=5))
    epoch = np.arange(48)/2
    np.testing.assert_allclose(lrs, np.where(epoch <= 5, .005 + .045*epoch/5, .05 - .045*(epoch - 5)/19), rtol=1e-5)
    losses = [v[0] for v in learn.recorder.values]
    assert losses[-1] < losses[0]

    interp = CamInterpretation.from_learner(learn)
    assert len(interp.preds) == 20 and interp.confusion_matrix().sum() == 20
    wrong = (interp.preds != interp.targs).sum().item()
    assert wrong == sum(n for _,_,n in interp.most_confused()) and set(interp.per_class_accuracy()) == set(SHAPES)
    for which in 'misclassified', 'correct', 'top_losses':
        fig = interp.plot_cams(3, which)
        assert sum(bool(ax.images) for ax in fig.axes) >= 4
    assert interp.plot_top_losses(5, heatmap=True).axes
    with pytest.raises(InputError, match='4×4.*min_px'): interp.plot_cams(3, layer='layer3')


def test_the_cam_layer_is_the_deepest_that_can_say_where():
    assert cam_layer(cifar_resnet18())[0] == 'layer3' and cam_layer(davidnet())[0] == 'layer2'
    with pytest.raises(InputError, match='4×4'): cam_layer(cifar_resnet18(), 'layer4')
    assert cam_layer(cifar_resnet18(), 'layer4', min_px=4)[0] == 'layer4'
    assert cam_layer(cifar_resnet18(), size=(64, 64))[0] == 'layer4'


@pytest.mark.parametrize('in_memory', [True, False])
def test_fastais_export_and_load_learner_keep_working(tmp_path, shapes, in_memory):
    dls = cifar_dls(shapes, [HorizontalFlip(), Cutout(8)], bs=50, in_memory=in_memory, num_workers=0)
    small = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8*15*15, 10))
    learn = cifar_learner(dls, small, path=tmp_path)
    quietly(learn, lambda: learn.fit_one_cycle(1, .01))
    learn.export('learner.pkl')
    assert (tmp_path/'learner.pkl').stat().st_size < 1e6   # no images in it
    loaded,files = load_learner(tmp_path/'learner.pkl'),image_files(shapes)[:7]
    with learn.no_bar(), loaded.no_bar():
        assert loaded.predict(files[0])[0]==learn.predict(files[0])[0]
        expected = learn.get_preds(dl=learn.dls.test_dl(files))[0]
        assert np.allclose(loaded.get_preds(dl=loaded.dls.test_dl(files))[0], expected, atol=1e-6) and len(expected)==7
