"Looking at networks whose head is no softmax over many classes, and at sets that a gallery cannot show"
import warnings

import matplotlib
matplotlib.use('Agg')
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.vision.all import (BCEWithLogitsLossFlat, CategoryBlock, CrossEntropyLossFlat, DataBlock, ImageBlock, ImageDataLoaders, L1LossFlat,
                               Learner, load_learner, MultiCategoryBlock, RegressionBlock)
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from PIL import Image
from torch import nn

from cifar_cam import panels
from cifar_cam.cam import scale_maps
from cifar_cam.core import InputError
from cifar_cam.interpret import CamInterpretation
from cifar_cam.panels import drawable, new_figure
from cifar_cam.photo import explain_image
from cifar_cam.heads import class_index, class_probs
from cifar_cam.shapes import shapes_path


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    path = shapes_path(tmp_path_factory.mktemp('heads'), n_train=60, n_test=10)
    return sorted(f for f in (path/'train').rglob('*.png') if 'mask' not in f.name)

def is_early(f): return 'early' if f.parent.name < 'heart' else 'late'

def net(n, last=None):
    torch.manual_seed(1)
    parts = nn.Conv2d(3, 8, 3, padding=1),nn.ReLU(),nn.MaxPool2d(2),nn.Conv2d(8, 8, 3, padding=1),nn.ReLU()
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n), *([last] if last else []))

def loaders(files, label=is_early, block=CategoryBlock, bs=16):
    return ImageDataLoaders.from_path_func('.', files, label, valid_pct=.4, seed=1, bs=bs, y_block=block, num_workers=0, device='cpu')

def learner(dls, model, loss_func, **kwargs):
    learn = Learner(dls, model, loss_func=loss_func, **kwargs)
    learn.remove_cb(learn.progress)
    return learn


# --- one output for two classes

class FloatBCE(nn.BCEWithLogitsLoss):
    "PyTorch's own loss, which has no activation, on labels as fastai gives them"
    def forward(self, p, y): return super().forward(p.view(-1), y.float())

class FloatBCEOfProbs(nn.BCELoss):
    def forward(self, p, y): return super().forward(p.view(-1), y.float())

@pytest.mark.parametrize('loss,last', [(BCEWithLogitsLossFlat(), None), (BCEWithLogitsLossFlat(thresh=.9), None), (FloatBCE(), None),
                                       (FloatBCEOfProbs(), nn.Sigmoid())])
def test_one_output_is_read_by_its_own_loss(files, loss, last):
    learn = learner(loaders(files), net(1, last), loss)
    with torch.no_grad(): learn.model[7].bias += 1.5
    interp = CamInterpretation.from_learner(learn)
    z = torch.cat([learn.model(xb) for xb,_ in learn.dls.valid]).flatten().detach()
    p = z if last else z.sigmoid()
    assert torch.allclose(interp.probs, torch.stack([1 - p, p], 1), atol=1e-5)
    assert interp.preds.tolist() == (p > getattr(loss, 'thresh', .5)).long().tolist()
    assert torch.allclose(interp.losses, F.binary_cross_entropy(p, interp.targs.float(), reduction='none'), atol=1e-4)
    if isinstance(loss, BCEWithLogitsLossFlat): assert int(learn.predict(files[0])[1]) == int(learn.model.eval()(z.new_tensor(
        np.asarray(Image.open(files[0]).convert('RGB'))).permute(2, 0, 1)[None]/255).sigmoid() > loss.thresh)

def test_maps_of_one_output_speak_for_the_class_asked(files):
    learn = learner(loaders(files), net(1), BCEWithLogitsLossFlat())
    interp = CamInterpretation.from_learner(learn)
    yes,no = (interp.cams([0, 1], [c, c], layer='3')[0] for c in (1, 0))
    assert (yes != no).any()
    x,_ = next(iter(learn.dls.valid))
    acts = learn.model[:4](x[:2]).detach().requires_grad_()
    for sign,maps in (1, yes), (-1, no): # Grad-CAM's ancestor by hand: activation times gradient, summed over the channels
        grad, = torch.autograd.grad(sign*learn.model[4:](acts).sum(), acts)
        raw = (acts*grad).sum(1).clamp(min=0)
        assert np.allclose(maps, scale_maps(raw.detach().as_subclass(torch.Tensor), (32, 32))[0].numpy(), atol=1e-4)
    for fig in interp.plot_cams(2, 'top_losses'), interp.plot_class_cams('top_losses', 1), interp.plot_top_losses(3), interp.plot_confusion_matrix(): fig.canvas.draw()
    assert not any(k.startswith('net.') for k in learn.model.state_dict()) and not learn.model._forward_hooks

@pytest.mark.parametrize('target', [None, 'early', 'late'])
def test_a_photo_by_one_output(files, target):
    learn = learner(loaders(files), net(1), BCEWithLogitsLossFlat())
    want = float(learn.predict(files[0])[2])
    _,probs = explain_image(learn, files[0], target=target)
    assert probs['late'] == pytest.approx(want, abs=1e-4) and probs['early'] == pytest.approx(1 - want, abs=1e-4)
    _,alone = explain_image(learn.model, files[0], target=target, layer='3', vocab=['early', 'late'], stats=([0.]*3, [1.]*3))
    assert alone == pytest.approx(probs, abs=1e-4)

def test_outputs_that_cannot_be_classes():
    with pytest.raises(InputError, match='one output for 3 classes'): class_probs(torch.zeros(4, 1), 3, BCEWithLogitsLossFlat())
    with pytest.raises(InputError, match='softmax is always 1'): class_probs(torch.randn(4, 1), 2, CrossEntropyLossFlat())
    with pytest.raises(InputError, match='2 class names for a network of 1000'): class_probs(torch.zeros(4, 1000), 2)
    with pytest.raises(InputError, match='8×8'): class_probs(torch.zeros(4, 2, 8, 8), 2)


# --- a sigmoid for each class; several labels

def test_a_sigmoid_for_each_of_two_classes(files):
    class OneHot(nn.BCEWithLogitsLoss):
        def forward(self, p, y): return super().forward(p, F.one_hot(y.long(), 2).float())
    learn = learner(loaders(files), net(2), OneHot())
    interp = CamInterpretation.from_learner(learn)
    z = torch.cat([learn.model(xb) for xb,_ in learn.dls.valid]).detach()
    assert torch.allclose(interp.probs, z.sigmoid(), atol=1e-5) and interp.preds.tolist() == z.argmax(1).tolist()
    wanted = F.binary_cross_entropy_with_logits(z, F.one_hot(interp.targs, 2).float(), reduction='none').mean(1)
    assert torch.allclose(interp.losses, wanted, atol=1e-4)

def test_several_labels(files):
    dls = DataBlock((ImageBlock, MultiCategoryBlock), get_y=lambda f: [f.parent.name, is_early(f)]).dataloaders(files, bs=8, num_workers=0, device='cpu')
    learn = learner(dls, net(dls.c), BCEWithLogitsLossFlat())
    want = learn.predict(files[3])[2]
    _,probs = explain_image(learn, files[3])
    assert np.allclose([probs[c] for c in dls.vocab], want, atol=1e-4) and [*probs.values()] == sorted(probs.values(), reverse=True)
    with pytest.raises(InputError, match='several labels') as e: CamInterpretation.from_learner(learn)
    assert '\n' not in str(e.value)

def test_a_loss_that_is_always_reduced_is_asked_image_by_image(files):
    learn = learner(loaders(files), net(2), lambda p, y: F.cross_entropy(p, y))
    interp = CamInterpretation.from_learner(learn)
    assert torch.allclose(interp.losses, -interp.probs.log()[range(len(interp.targs)), interp.targs], atol=1e-4)

def test_an_activation_of_ones_own(files):
    learn = learner(loaders(files), net(2), CrossEntropyLossFlat())
    interp = CamInterpretation.from_learner(learn, act=torch.sigmoid)
    assert torch.allclose(interp.probs, torch.cat([learn.model(xb) for xb,_ in learn.dls.valid]).sigmoid(), atol=1e-5)


# --- one line in place of a traceback

def test_sets_that_a_gallery_cannot_show(files, tmp_path):
    learn = learner(loaders(files), net(2), CrossEntropyLossFlat(), path=tmp_path)
    empty = learn.dls.new_empty().valid
    with pytest.raises(InputError, match='no images'): CamInterpretation.from_learner(learn, dl=empty)
    numbers = DataBlock((ImageBlock, RegressionBlock), get_y=lambda f: float(f.stat().st_size)).dataloaders(files, bs=8, num_workers=0, device='cpu')
    regression = learner(numbers, net(1), L1LossFlat())
    with pytest.raises(InputError, match='as that of a regression'): CamInterpretation.from_learner(regression)
    with pytest.raises(InputError, match='as that of a regression'): explain_image(regression, files[0])
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(2)
        def forward(self, x): return self.net(x),self.net(x)
    two = learner(learn.dls, Two(), lambda p, y: F.cross_entropy(p[0], y))
    with pytest.raises(InputError, match='output=, one of 0, 1'): CamInterpretation.from_learner(two)
    assert CamInterpretation.from_learner(two, output=1).output == 1

@pytest.mark.parametrize('kind', [tuple, list, lambda p: dict(zip('ab', p))])
def test_the_loss_of_an_image_is_of_all_that_the_network_says(files, kind):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(2)
        def forward(self, x): return kind((self.net(x), 3*self.net(x)))
    def first(p): return [*p.values()][0] if isinstance(p, dict) else p[0]
    two = learner(loaders(files), Two(), lambda p, y: F.cross_entropy(first(p), y))  # takes no `reduction`
    interp = CamInterpretation.from_learner(two, output='b' if kind(()) == {} else 1)
    with torch.no_grad(): out = torch.cat([first(two.model.eval()(x)) for x,_ in two.dls.valid.new(shuffle=False, drop_last=False)])
    assert torch.allclose(interp.losses, F.cross_entropy(out.as_subclass(torch.Tensor), interp.targs, reduction='none'), atol=1e-5)

def test_a_loaded_learner_takes_files(files, tmp_path):
    learn = learner(loaders(files), net(2), CrossEntropyLossFlat(), path=tmp_path)
    learn.export('e.pkl')
    loaded = load_learner(tmp_path/'e.pkl')
    with pytest.raises(InputError, match='test_dl'): CamInterpretation.from_learner(loaded)
    interp = CamInterpretation.from_learner(loaded, dl=loaded.dls.test_dl(files[:7], with_labels=True))
    assert [interp.vocab[t] for t in interp.targs] == [is_early(f) for f in files[:7]]
    interp.plot_top_losses(3).canvas.draw()


# --- many classes, large images, names in any script

def many(files, n, images=400, seed=0):
    "An interpretation of `n` classes, without a run"
    learn = learner(loaders(files), net(2), CrossEntropyLossFlat())
    base = CamInterpretation.from_learner(learn)
    rng = np.random.default_rng(seed)
    targs = torch.from_numpy(rng.integers(0, n, images))
    probs = torch.full((images, n), .5/n)
    preds = torch.where(torch.rand(images, generator=torch.Generator().manual_seed(0)) < .5, targs, (targs//10*10 + 3) % n)
    probs[range(images), preds] = .5
    res = CamInterpretation(learn, base.dl, torch.rand(images), None, probs, targs, preds)
    res.images = lambda idxs: np.zeros((len(idxs), 8, 8, 3), np.uint8)
    res.cams = lambda idxs, *args, **kwargs: (np.random.rand(len(idxs), 8, 8).astype(np.float32), np.zeros(len(idxs), bool))
    res.vocab = [f'class {i}' for i in range(n)]
    return res

@pytest.mark.parametrize('n', [100, 1000])
def test_figures_of_many_classes_are_of_the_most_confused(files, n):
    interp = many(files, n)
    figs = dict(matrix=interp.plot_confusion_matrix(), accuracy=interp.plot_per_class_accuracy(), images=interp.plot_class_images(),
                cams=interp.plot_class_cams(), means=interp.plot_mean_cams())
    for name,fig in figs.items():
        assert max(fig.get_size_inches()) < 30, name
        said = [t.get_text() for t in fig.texts] + [ax.get_title(loc) for ax in fig.axes for loc in ('left', 'center')]
        assert any(f'of {n:,} classes, those confused most often' in t for t in said), name
    actual,predicted,_ = interp.most_confused()[0]
    shown = [t.get_text() for t in figs['matrix'].axes[0].get_yticklabels()]
    assert {actual, predicted} <= set(shown) and len(shown) == 30
    few = interp.plot_confusion_matrix(classes=['class 7', 'class 3'])
    assert [t.get_text() for t in few.axes[0].get_yticklabels()] == ['class 7', 'class 3']

def test_no_confusions_at_all(files):
    right = many(files, 100)
    right.preds = right.targs
    assert right.hardest(5) == [0, 1, 2, 3, 4]
    right.plot_confusion_matrix().canvas.draw()

def test_an_unknown_class_among_many_lists_the_nearest(files):
    interp = many(files, 1000)
    for f in (lambda: interp.asked([0], 'clas 77'), lambda: interp.plot_mean_cams(['clas 77']), lambda: interp.plot_class_images(classes=['clas 77'])):
        with pytest.raises(InputError, match='class 77') as e: f()
        assert len(str(e.value)) < 250 and 'nearest of 1,000' in str(e.value)
    with pytest.raises(InputError, match='choose one of a, b$'): class_index('c', ['a', 'b'])

def test_large_images_go_through_in_the_loaders_batches(tmp_path):
    files = []
    for i in range(10):
        files.append(tmp_path/f'{"ab"[i % 2]}{i}.png')
        Image.effect_noise((512, 384), 60).convert('RGB').save(files[-1])
    interp = CamInterpretation.from_learner(learner(loaders(files, lambda f: f.name[0], bs=3), net(2), CrossEntropyLossFlat()))
    dl = interp.learn.dls.test_dl(files, with_labels=True, bs=3)
    interp = CamInterpretation.from_learner(interp.learn, dl=dl)
    assert [len(b) for b in interp.batches(range(10))] == [5, 5] # a million pixels, not 256 images
    fig = interp.plot_top_losses(4)
    box = fig.axes[0].get_position()
    w,h = fig.get_size_inches()
    assert box.height*h/(box.width*w) == pytest.approx(384/512, abs=.02) # no empty bands above and below

@pytest.fixture
def font(tmp_path):
    "A font that has one Chinese letter only"
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0)); pen.lineTo((100, 800)); pen.lineTo((900, 800)); pen.lineTo((900, 0)); pen.closePath()
    build = FontBuilder(1000, isTTF=True)
    build.setupGlyphOrder(['.notdef', 'cat'])
    build.setupCharacterMap({ord('猫'): 'cat'})
    build.setupGlyf({'.notdef': TTGlyphPen(None).glyph(), 'cat': pen.glyph()})
    build.setupHorizontalMetrics({'.notdef': (1000, 0), 'cat': (1000, 100)})
    build.setupHorizontalHeader(ascent=900, descent=-100)
    build.setupNameTable(dict(familyName='One Cat', styleName='Regular'))
    build.setupOS2(sTypoAscender=900)
    build.setupPost()
    build.save(tmp_path/'cat.ttf')
    return tmp_path/'cat.ttf'

def test_names_in_any_script(files, font, monkeypatch):
    monkeypatch.setattr(panels, '_family_of', {})
    monkeypatch.setattr(panels, 'findSystemFonts', lambda: [str(font)])
    monkeypatch.setattr(fontManager, 'ttflist', [f for f in fontManager.ttflist if 'DejaVu' in f.name or 'Last' in f.name])
    panels._text_width.cache_clear()
    interp = many(files, 3, 20)
    interp.vocab = ['猫', '犬', 'собака']
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        for fig in interp.plot_images(5), interp.plot_confusion_matrix(), interp.plot_per_class_accuracy(), interp.plot_class_images(): fig.canvas.draw()
    ours = [str(w.message) for w in said if 'font' in str(w.message) or 'lyph' in str(w.message)]
    assert len(ours) == 1 and '犬' in ours[0] and '猫' not in ours[0] and 'собака' not in ours[0]
    assert drawable('猫') == '猫' and drawable('犬') == r'\u72ac' and drawable('собака') == 'собака'
    fig = new_figure((1, .4), dpi=100)
    fig.text(.1, .2, '猫', fontsize=16)
    fig.canvas.draw()
    dark = np.asarray(fig.canvas.buffer_rgba())[..., 0] < 128
    rows,cols = np.nonzero(dark)
    assert dark[rows.min():rows.max() + 1, cols.min():cols.max() + 1].mean() > .9 # the font's own letter is a full square
