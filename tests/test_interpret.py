import warnings

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.text import Annotation
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.vision.all import ImageDataLoaders, Learner, load_learner
from PIL import Image
from torch import nn

from cifar_cam import interpret, panels, photo
from cifar_cam.augment import cifar_augment
from cifar_cam.cam import CamMaps
from cifar_cam.core import InputError
from cifar_cam.loaders import cifar_dls
from cifar_cam.photos import open_photo
from cifar_cam.panels import fit_text, overlay, Panels
from cifar_cam.interpret import CamInterpretation
from cifar_cam.photo import explain_image
from cifar_cam.shapes import SHAPES, shapes_path
from cifar_cam.learner import cifar_learner


def tiny_net():
    torch.manual_seed(0)
    conv = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(conv(3, 8), conv(8, 16), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(16, 10))


@pytest.fixture(scope='module')
def shapes(tmp_path_factory): return shapes_path(tmp_path_factory.mktemp('shapes'), n_train=70, n_test=50)

def learner(shapes, in_memory=True, hold_out=0, **kwargs):
    dls = cifar_dls(shapes, cifar_augment(cutout=16), bs=16, in_memory=in_memory, hold_out=hold_out, num_workers=0, device='cpu')
    learn = cifar_learner(dls, tiny_net(), bf16=False, **kwargs)
    learn.remove_cb(learn.progress)
    return learn

@pytest.fixture(scope='module')
def learn(shapes): return learner(shapes)

@pytest.fixture(scope='module')
def interp(learn): return CamInterpretation.from_learner(learn)

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')


def as_if(interp, preds, losses=None, sure=0.9):
    "`interp` with predictions of our choice"
    probs = torch.full((len(preds), 10), (1 - sure)/9)
    probs[range(len(preds)), torch.as_tensor(preds)] = sure
    losses = -probs[range(len(preds)), interp.targs].log() if losses is None else torch.as_tensor(losses)
    return CamInterpretation(interp.learn, interp.dl, losses, None, probs, interp.targs)

def mistaken(interp, wrong):
    "`interp`, right except at `wrong` (index → predicted class); there, earlier keys have higher losses"
    preds,losses = interp.targs.clone(),torch.linspace(0.1, 0.2, len(interp.targs))
    for rank,(i,c) in enumerate(wrong.items()): preds[i],losses[i] = c,9. - rank
    return as_if(interp, preds, losses)

def count_images(model, f):
    "How many images go through each pass of the network while `f` runs"
    seen = []
    hook = model.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    try: f()
    finally: hook.remove()
    return seen

def file_pixels(files): return np.stack([np.asarray(Image.open(f).convert('RGB')) for f in files])
def over(ax): return '\n'.join(t.get_text() for t in ax.texts if isinstance(t, Annotation)).strip() # a panel's title, line by line
def titles(fig): return [t for ax in fig.axes if (t := over(ax) or ax.get_title())]
def heads(fig): return [t.get_text() for t in fig.texts if t.get_weight() == 'bold']
def texts(fig): return [t.get_text() for t in fig.texts] + [t.get_text() for ax in fig.axes for t in ax.texts]
def pictures(fig): return [ax.images[0].get_array() for ax in fig.axes if ax.images]

def by_hand(learn, files):
    "Logits of the files, computed without any loader"
    x = torch.from_numpy(file_pixels(files)).permute(0, 3, 1, 2)/255
    norm = next(t for t in learn.dls.valid.after_batch.fs if hasattr(t, 'mean'))
    with torch.no_grad(): return learn.model.eval()((x - norm.mean.cpu())/norm.std.cpu())


def test_a_loss_without_an_activation_has_probabilities_too(shapes):
    learn = learner(shapes)
    plain = Learner(learn.dls, learn.model, loss_func=nn.CrossEntropyLoss())
    with plain.no_bar(): a,b = CamInterpretation.from_learner(plain),CamInterpretation.from_learner(learn)
    torch.testing.assert_close(a.probs, b.probs); torch.testing.assert_close(a.losses, b.losses)
    logits = CamInterpretation(learn, a.dl, a.losses, None, torch.tensor([[9., -2, -3], [-3, -9, -2]]), torch.tensor([0, 2]))
    logits.vocab = 'abc'
    assert logits.asked([0, 1], 'rival').tolist() == [1, 0]

def test_files_of_a_data_frame(shapes, tmp_path):
    files = [f for f in sorted(shapes.rglob('*.png')) if 'mask' not in f.name][:40]
    frame = pd.DataFrame(dict(name=[str(f.relative_to(shapes)) for f in files], label=[f.parent.name for f in files], valid=[i % 2 == 0 for i in range(40)]))
    dls = ImageDataLoaders.from_df(frame, shapes, valid_col='valid', bs=10, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, dls.c)), loss_func=nn.CrossEntropyLoss())
    with learn.no_bar(): interp = CamInterpretation.from_learner(learn)
    assert interp.top_losses(3, items=True)[2][0]['name'] in set(frame.name)
    assert np.load(interp.save_maps(tmp_path/'maps', 2, 'top_losses'))['maps'].shape == (2, 32, 32)


# --- one run over the images ---------------------------------------------------------------------------------------------

def test_inference_runs_once(learn, capsys):
    made = []
    seen = count_images(learn.model, lambda: made.append(CamInterpretation.from_learner(learn)))
    assert sum(seen) == 50
    interp, = made
    def views():
        interp.confusion_matrix(), interp.most_confused(), interp.print_classification_report(), interp.per_class_accuracy()
        interp.plot_confusion_matrix(), interp.plot_per_class_accuracy(), interp.plot_images(), interp.plot_class_images()
        interp.plot_top_losses(3, heatmap=False), interp.top_losses(3), interp[[0, 1]]
        interp.show_results([0, 1])
    assert count_images(learn.model, views) == []

def test_cams_of_a_gallery_are_batches(interp):
    interp = mistaken(interp, {i: (interp.targs[i].item() + 1) % 10 for i in range(9)})
    seen = [n for n in count_images(interp.learn.model, lambda: interp.plot_cams(9)) if n > 4] # up to four images: looking for the layer
    assert seen == [9, 9] # predicted class, rival
    assert [n for n in count_images(interp.learn.model, lambda: interp.plot_class_cams(groups=5)) if n > 4] == [9]

@pytest.mark.parametrize('in_memory', [True, False])
@pytest.mark.parametrize('ds_idx,folder,n', [(0, 'train', 50), (1, 'train', 20), (2, 'test', 50), (-1, 'test', 50)])
def test_any_loader_in_order_whole_and_not_augmented(shapes, in_memory, ds_idx, folder, n):
    learn = learner(shapes, in_memory, hold_out=20)
    interp = CamInterpretation.from_learner(learn, ds_idx)
    files = interp.files(range(n))
    assert len(interp.targs) == n and {f.parent.parent.name for f in files} == {folder} # 50 train images, drop_last, batches of 16
    assert [SHAPES[t] for t in interp.targs] == [f.parent.name for f in files]
    logits = by_hand(learn, files)
    assert torch.allclose(interp.probs, logits.softmax(1), atol=1e-5)
    assert torch.allclose(interp.losses, F.cross_entropy(logits, interp.targs, reduction='none'), atol=1e-4)
    some = [n-1, 3, 3, 0]
    assert (interp.images(some) == file_pixels([files[i] for i in some])).all()

def test_a_loader_of_ones_own(learn, shapes):
    files = sorted((shapes/'test').rglob('*.png'))[3:30:4]
    interp = CamInterpretation.from_learner(learn, dl=learn.dls.test_dl(files, with_labels=True, shuffle=True))
    assert interp.files(range(len(files))) == files and [SHAPES[t] for t in interp.targs] == [f.parent.name for f in files]
    assert torch.allclose(interp.probs, by_hand(learn, files).softmax(1), atol=1e-5)
    with pytest.raises(InputError, match='no labels'): CamInterpretation.from_learner(learn, dl=learn.dls.test_dl(files))

def test_losses_are_the_learners(shapes):
    learn = learner(shapes, label_smoothing=0.2)
    interp = CamInterpretation.from_learner(learn)
    logits = by_hand(learn, interp.files(range(50)))
    assert torch.allclose(interp.losses, F.cross_entropy(logits, interp.targs, reduction='none', label_smoothing=0.2), atol=1e-4)

def test_indexing_is_fastais(interp):
    x,probs,targs,preds,losses = interp[torch.tensor([4, 2])]
    assert x.shape == (2, 3, 32, 32)
    for got,kept in zip((probs, targs, preds, losses), (interp.probs, interp.targs, interp.preds, interp.losses)):
        assert torch.equal(got, kept[[4, 2]])


# --- confusions ----------------------------------------------------------------------------------------------------------

def test_confusions(interp):
    wrong = mistaken(interp, {0: 3, 1: 3, 2: 5, 20: 0}) # 0..4 are arrows, 20..24 houses
    cm = wrong.confusion_matrix()
    assert cm.sum() == 50 and cm[0].tolist() == [2, 0, 0, 2, 0, 1, 0, 0, 0, 0]
    assert [(a, p, int(n)) for a,p,n in wrong.most_confused()] == [('arrow', 'heart', 2), ('arrow', 'moon', 1), ('house', 'arrow', 1)]
    assert wrong.per_class_accuracy() == {c: {'arrow': .4, 'house': .8}.get(c, 1.) for c in SHAPES}
    report = {line.split()[0]: line.split()[1:] for line in wrong.classification_report().splitlines() if line.strip()}
    assert report['heart'] == ['0.71', '1.00', '0.83', '5'] and report['arrow'][:2] == ['0.67', '0.40'] # precision, recall

def test_a_class_without_images(interp):
    few = CamInterpretation(interp.learn, interp.dl, interp.losses[:5], None, interp.probs[:5], interp.targs[:5]) # arrows only
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert np.isnan(few.per_class_accuracy()['ring'])
        fig = few.plot_confusion_matrix(normalize=True)
        numbers = few.plot_per_class_accuracy().axes[0].child_axes[0].get_yticklabels()
        assert [t.get_text() for t in numbers].count('no images') == 9
        few.classification_report()
        fig.canvas.draw()
    assert not any('nan' in t for t in texts(fig))

def test_confusion_matrix_writes_counts(interp):
    fig = mistaken(interp, {0: 3, 1: 3}).plot_confusion_matrix()
    written = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in fig.axes[0].texts}
    assert written[0,3] == '2' and written[0,0] == '3' and (3,0) not in written # row actual, column predicted


# --- which images --------------------------------------------------------------------------------------------------------

def test_order(interp):
    wrong = mistaken(interp, {30: 1, 7: 2, 12: 3})
    assert wrong.indices('misclassified') == [30, 7, 12] == wrong.indices('top_losses', 3)
    right = wrong.indices('correct')
    assert sorted(right) == sorted(set(range(50)) - {30, 7, 12})
    assert right[:12] == [0, 5, 10, 15, 20, 25, 31, 35, 40, 45, 1, 6] # one of each class, the surest; then the next
    assert wrong.indices([5, 2, 5]) == [5, 2, 5] and wrong.indices(np.array([4])) == [4]

def test_equal_losses_keep_the_order(interp):
    even = as_if(interp, [0]*50, losses=[1.]*50)
    assert even.indices('top_losses') == list(range(50)) == even.top_losses()[1].tolist() == even.top_losses(largest=False)[1].tolist()
    assert even.indices('misclassified') == list(range(5, 50)) and even.indices('correct') == list(range(5))

def test_bad_choices(interp):
    for which,message in ('wrong', 'misclassified'), ([50], 'out of range'), ([-1], 'out of range'):
        with pytest.raises(InputError, match=message): interp.indices(which)
    for k in 0, -3:
        with pytest.raises(InputError, match='at least one'): interp.plot_images(k)
    with pytest.raises(InputError, match='at least one row'): interp.plot_class_cams(groups=0)
    with pytest.raises(InputError, match='unknown class .zebra.: choose one of arrow, circle'): interp.plot_mean_cams(['zebra'])
    with pytest.raises(InputError, match='runner|rival'): interp.cams([0], 'best')
    for target in 3, [1, 2], [[1]]:
        with pytest.raises(InputError, match='an index for each'): interp.cams([0], target)
    with pytest.raises(InputError, match='yes and no for 3 images: there are 50'): interp.indices([True, False, True])

def test_a_choice_of_yes_and_no(interp):
    chosen = interp.preds == 3
    for which in chosen, chosen.numpy(), chosen.tolist(): assert interp.indices(which) == chosen.nonzero().flatten().tolist()

def test_a_loader_with_an_order_of_its_own_is_refused(learn):
    with pytest.raises(InputError, match='order of its own'): CamInterpretation.from_learner(learn, dl=learn.dls.valid.new(get_idxs=lambda: [7, 5, 9], n=3))

def test_classes_that_are_numbers(interp):
    numbers = as_if(interp, interp.targs)
    numbers.vocab = [*range(10)]
    assert len(numbers.mean_cams([3, (3, 3), '4'])) == 3 and titles(numbers.plot_mean_cams([3, (3, 4)])) == ['3\n5 images', '3 taken\nfor 4\nno images']

def test_more_than_there_are(interp):
    wrong = mistaken(interp, {3: 1, 9: 4})
    for fig in wrong.plot_images(20), wrong.plot_cams(20):
        assert len({t for t in titles(fig)}) >= 2
    assert len(titles(wrong.plot_images(20))) == 2 and len(titles(wrong.plot_cams(20))) == 6
    assert len(titles(wrong.plot_top_losses(1000, heatmap=False))) == 50
    assert len(wrong.top_losses(1000)[0]) == 50

def test_nothing_to_show(interp, tmp_path):
    perfect,hopeless = as_if(interp, interp.targs), as_if(interp, (interp.targs + 1) % 10)
    for f in perfect.plot_images, perfect.plot_cams, perfect.plot_class_images, perfect.plot_class_cams:
        assert texts(f()) == ['No misclassified images: all 50 are right.']
    assert texts(hopeless.plot_images(5, 'correct')) == ['No correct images: all 50 are wrong.']
    assert texts(perfect.plot_images(5, [])) == ['No images to show.']
    assert texts(perfect.plot_mean_cams([])) == ['No images to show.']
    with pytest.raises(InputError, match='No misclassified'): perfect.save_maps(tmp_path/'m.npz')


# --- galleries -----------------------------------------------------------------------------------------------------------

def test_images_and_titles(interp):
    wrong = mistaken(interp, {12: 3, 47: 0})
    fig = wrong.plot_images()
    assert titles(fig) == ['heart 0.90\ncross', 'arrow 0.90\ntriangle']
    assert (np.stack(pictures(fig)) == file_pixels(interp.files([12, 47]))).all()

def test_class_grid(interp):
    wrong = mistaken(interp, {3: 7, 1: 2, 26: 0}) # two arrows, the later one with the higher loss; one moon
    assert wrong.by_class(groups=2) == [[3, *[None]*4, 26, *[None]*4], [1, *[None]*9]]
    for fig in wrong.plot_class_images(groups=2), wrong.plot_class_cams(groups=2):
        cells = fig.axes[:20]
        assert [(i, over(ax)) for i,ax in enumerate(cells) if over(ax)] == [(0, 'square 0.90'), (5, 'arrow 0.90'), (10, 'cross 0.90')]
        assert heads(fig) == SHAPES
    fig = wrong.plot_class_images(groups=2)
    assert [ax.images[0].get_array().std() > 0 for ax in fig.axes[:6]] == [True, False, False, False, False, True] # the empty ones are a grey square
    assert set(titles(wrong.plot_class_images('correct', 1))) == {'0.90'} # the class is the column's head
    right = wrong.by_class('correct', 3)
    assert all(wrong.targs[i] == c == wrong.preds[i] for row in right for c,i in enumerate(row) if i is not None)
    assert wrong.by_class('correct', 9)[4][0] is None # 3 arrows are right

def test_top_losses(interp):
    wrong = mistaken(interp, {12: 3, 47: 0})
    plain,maps = wrong.plot_top_losses(3, heatmap=False), wrong.plot_top_losses(3)
    assert titles(plain)[:2] == titles(maps)[:2] == ['heart 0.90\ncross, loss 9.00', 'arrow 0.90\ntriangle, loss 8.00']
    assert [np.shape(p)[0] for p in pictures(maps)[:4]] == [32, 256, 32, 256] # the plain image beside each map
    assert (pictures(maps)[0] == pictures(plain)[0]).all() and np.shape(pictures(plain)[0]) == (32, 32, 3)
    assert titles(wrong.plot_top_losses([1])) == ['arrow 0.90\ntriangle, loss 8.00'] # fastai: places in the ranking
    assert titles(wrong.plot_top_losses(1, False))[0].startswith('arrow 0.90\narrow, loss 0.10')

@pytest.mark.parametrize('k', [6, np.int64(6), range(6), [0, 1, 2, 3, 4, 5]])
def test_top_losses_take_fastais_arguments(interp, k):
    for kwargs,rows,cols in (dict(nrows=2), 2, 3), (dict(ncols=2), 3, 2), (dict(nrows=3, ncols=4, figsize=(6, 4)), 3, 4):
        fig = interp.plot_top_losses(k, **kwargs, heatmap=False, cmap='viridis', alpha=.9)
        spots = [ax.get_position(original=True) for ax in fig.axes]
        assert len({round(b.y0, 3) for b in spots}) == rows and len({round(b.x0, 3) for b in spots}) == cols
    assert fig.get_size_inches().tolist() == [6, 4]
    interp.plot_confusion_matrix(figsize=(4, 4), dpi=60, facecolor='white')
    interp.show_results([0, 1], nrows=1)

def test_options_reach_the_method_and_the_drawing(interp, monkeypatch):
    seen = []
    real = interpret.cam_maps
    monkeypatch.setattr(interpret, 'cam_maps', lambda m, xb, method, layer, t, **kw: seen.append((method, t.tolist(), kw)) or real(m, xb, method, layer, t, **kw))
    drawn = [pictures(interp.plot_top_losses([0], target='ring', eigen_smooth=True, **kw))[1] for kw in ({}, dict(cmap='Blues'), dict(alpha=0))]
    assert seen[0] == ('hirescam', [6], dict(min_px=5, output=None, eigen_smooth=True))
    assert (drawn[0] != drawn[1]).any() and (drawn[2][::8, ::8] == interp.images(interp.indices('top_losses', 1))[0]).all()
    for plot in interp.plot_cams, interp.plot_class_cams, interp.plot_mean_cams: plot(target='moon', method='gradcam', eigen_smooth=True)
    assert all(kw['eigen_smooth'] for *_,kw in seen) and seen[-1][:1] == ('gradcam',) and set(seen[-1][1]) == {SHAPES.index('moon')}
    with pytest.raises(TypeError, match='no option nonsense'): interp.plot_top_losses(1, nonsense=1)

@pytest.fixture
def known_maps(monkeypatch):
    "`cam_maps` that marks one quadrant by the class asked: 0 upper left, 1 upper right, ...; class 9 is blank"
    asked = []
    def cam_maps(model, xb, method='hirescam', layer='auto', targets=None, min_px=5, **kwargs):
        maps = torch.zeros(len(xb), 32, 32)
        for m,t in zip(maps, targets.tolist()):
            if t != 9: m[16*(t//2 % 2):, 16*(t % 2):][:16, :16] = 1
        asked.append(targets.tolist())
        return CamMaps(maps, torch.zeros(len(xb), 10), targets == 9)
    monkeypatch.setattr(interpret, 'cam_maps', cam_maps)
    return asked

def test_rows_of_plot_cams(interp, known_maps):
    wrong = mistaken(interp, {5: 0}) # a circle (1) taken for an arrow (0)
    fig = wrong.plot_cams(1)
    assert known_maps == [[0], [1]]
    assert titles(fig) == ['5, loss 9.00', 'arrow 0.90', 'circle 0.01'] and heads(fig) == ['image', 'for the prediction', 'for the actual class', 'difference']
    image,predicted,actual,diff = (np.asarray(p).astype(float) for p in pictures(fig)[:4])
    crisp = image.repeat(8, 0).repeat(8, 1)
    changed = lambda p, col: np.abs(p - crisp)[32:96, 128*col + 32:128*col + 96].mean()
    assert changed(predicted, 0) > 20 > 1 > changed(predicted, 1) and changed(actual, 1) > 20 > 1 > changed(actual, 0)
    red = diff[..., 0] - diff[..., 2]
    assert red[32:96, 32:96].min() > 20 and red[32:96, 160:224].max() < -20 and abs(red[160:]).max() < 10
    assert {'difference', '-1', '1'} <= set(texts(fig)) # symmetric
    assert len(heads(wrong.plot_cams(4, 'top_losses'))) == 8 # two images a row

def test_the_rival_of_a_right_prediction_is_the_runner_up(interp):
    right = as_if(interp, interp.targs)
    right.probs[0, 6] = 0.05
    assert right.asked([0], 'rival').tolist() == [6] and right.asked([0], 'actual').tolist() == [0]
    fig = right.plot_cams(1, [0])
    assert titles(fig)[2] == 'ring 0.05' and heads(fig)[2] == 'for the runner-up' and heads(right.plot_cams(1, [0]))[1] == 'for the prediction'
    assert heads(mistaken(interp, {0: 3}).plot_cams(2, [0, 1]))[2] == 'for the rival'
    wrong = mistaken(interp, {0: 3})
    assert wrong.asked([0, 5], 'rival').tolist()[0] == 0

def test_a_blank_map_is_not_drawn(interp, known_maps):
    wrong = mistaken(interp, {5: 9}) # class 9 has no map
    fig = wrong.plot_cams(1)
    marks = [any(t.get_text() == 'no map' for t in ax.texts) for ax in fig.axes[:4]]
    assert marks == [False, True, False, True]
    for ax in (fig.axes[1], fig.axes[3]): assert (ax.images[0].get_array() == interp.images([5])[0]).all()
    assert 'no map' in texts(wrong.plot_cams(1, plain=True))

def test_mean_cams(interp, known_maps):
    wrong = mistaken(interp, {5: 0, 6: 0, 45: 9})
    (image,cam,n),(_,none,zero),(_,blank,m) = wrong.mean_cams([('circle', 'arrow', 2), ('ring', 'arrow'), 'triangle'])
    assert n == 2 and cam[:16, :16].min() == 1 and cam[16:].max() == 0
    assert np.allclose(image, file_pixels(interp.files([5, 6])).mean(0), atol=0.51)
    assert none is None and zero == 0 and blank is None and m == 0 # triangle is class 9, whose maps are blank
    fig = wrong.plot_mean_cams([('circle', 'arrow', 2), 'triangle'])
    assert titles(fig) == ['circle taken\nfor arrow\n2 images', 'triangle\nno images']
    assert wrong.mean_cams(['arrow'], n=3)[0][2] == 3

def test_blank_maps_are_not_in_the_mean(interp, monkeypatch):
    right = as_if(interp, interp.targs)
    maps,blank = np.zeros((5, 32, 32), np.float32),np.array([True, False, True, False, False])
    maps[1:] = 1
    monkeypatch.setattr(right, 'cams', lambda *args, **kwargs: (maps, blank))
    (image,cam,n), = right.mean_cams(['arrow'])
    assert n == 3 and np.allclose(image, file_pixels(interp.files([1, 3, 4])).mean(0), atol=0.51)

def test_methods_side_by_side(interp):
    fig = interp.plot_methods(7, ('gradcam', 'eigencam'), target='ring')
    assert heads(fig) == ['image', 'gradcam', 'eigencam'] and 'CAM of ring' in texts(fig)
    assert len(titles(interp.plot_methods([7, 8], ('gradcam',)))) == 2
    with pytest.raises(ValueError, match='no CAM method'): interp.plot_methods(7, ('magic',))

def test_plain_has_no_text(interp):
    wrong = mistaken(interp, {5: 0, 6: 3})
    for fig in (wrong.plot_cams(2, plain=True), wrong.plot_top_losses(2, plain=True), wrong.plot_class_cams(plain=True),
                wrong.plot_methods(5, ('gradcam',), plain=True), wrong.plot_mean_cams(['arrow'], plain=True)):
        assert not [t for t in texts(fig) + titles(fig) if t != 'no map']

@pytest.mark.parametrize('figsize', [None, pytest.param((8, 3), marks=pytest.mark.slow)])
def test_long_names_do_not_collide(interp, figsize):
    wrong = as_if(interp, (interp.targs + 1) % 10)
    wrong.vocab = ['airplane', 'automobile', *(f'a rather long name of class {i}' for i in range(6)), 'Wildebeest'*5, 'x']
    for fig in (wrong.plot_images(20, figsize=figsize), wrong.plot_class_images(groups=1, figsize=figsize), wrong.plot_mean_cams(n=1, figsize=figsize)):
        with matplotlib.rc_context({'text.hinting': 'none'}): # as the figure is drawn
            fig.canvas.draw()
            drawn = [t for ax in fig.axes for t in ax.texts if isinstance(t, Annotation) and t.get_text()] + [t for t in fig.texts if t.get_weight() == 'bold']
            boxes = [t.get_window_extent() for t in drawn]
        assert len(boxes) >= 20
        assert all(b.x0 >= 0 and b.x1 <= fig.bbox.width for b in boxes)
        assert not any(a.overlaps(b) for i,a in enumerate(boxes) for b in boxes[:i])

def test_fit_text():
    assert fit_text(['cat', 'dog\n0.98'], 1.) == (['cat', 'dog\n0.98'], 9)
    (short,cat),size = fit_text(['Wildebeest'*5, 'cat'], 0.5)
    assert short.startswith('Wil') and '…' in short and short.endswith('st') and cat == 'cat' and size == 6

def test_a_figure_is_shown_once(interp, monkeypatch):
    fig = interp.plot_images(1, 'top_losses', figsize=(3, 2), dpi=50)
    assert fig.get_size_inches().tolist() == [3, 2] and fig.dpi == 50
    monkeypatch.setattr(panels, 'get_backend', lambda: 'inline')
    with pytest.raises(NotImplementedError): fig._ipython_display_() # IPython goes on to its own picture
    assert not plt.fignum_exists(fig.number)


# --- overlay -------------------------------------------------------------------------------------------------------------

def test_overlay():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    cam = np.zeros((8, 8)); cam[1, 6] = 1
    crisp = overlay(image, cam, alpha=0)
    assert crisp.shape == (256, 256, 3) and (crisp == image.repeat(8, 0).repeat(8, 1)).all()
    changed = np.abs(overlay(image, cam, alpha=1).astype(int) - crisp).sum(-1)
    y,x = np.unravel_index(changed.argmax(), changed.shape)
    assert y//32 == 1 and x//32 == 6
    weight = np.abs(overlay(np.full_like(image, 200), cam, alpha=1).astype(int) - 200).sum(-1)
    assert len(np.unique(weight[48])) > 20 # interpolated, not eight steps
    assert changed[128:].max() == 0 # where the map is cold, the image is as it was
    red,blue = (overlay(np.full_like(image, 128), np.full((4, 4), v), cmap='RdBu_r', signed=True).mean((0, 1)) for v in (1., -1.))
    assert red[0] > red[2] + 40 and blue[2] > blue[0] + 40
    assert overlay(Image.new('L', (400, 300)), cam).shape == (300, 400, 3) # at a photo's own resolution
    assert overlay(image, np.full((4, 4), 1.001)).max() <= 255
    with pytest.raises(InputError, match='from 1.2 to 1.2'): overlay(image, np.full((4, 4), 1.2))


# --- the numbers ---------------------------------------------------------------------------------------------------------

def test_save_maps(interp, tmp_path, shapes):
    wrong = mistaken(interp, {5: 0, 40: 3})
    saved = np.load(wrong.save_maps(tmp_path/'worst', k=5), allow_pickle=False)
    assert [p.name for p in tmp_path.iterdir()] == ['worst.npz']
    maps,blank = wrong.cams([5, 40])
    assert np.allclose(saved['maps'], maps) and (saved['blank'] == blank).all()
    assert np.allclose(saved['rival_maps'], wrong.cams([5, 40], 'actual')[0])
    assert saved['indices'].tolist() == [5, 40] and saved['targets'].tolist() == [1, 8] and saved['predictions'].tolist() == [0, 3]
    assert saved['files'].tolist() == [f.relative_to(shapes).as_posix() for f in interp.files([5, 40])]
    assert saved['vocab'].tolist() == SHAPES and saved['maps'].dtype == np.float32

def test_the_map_is_of_the_class_asked(interp):
    every,_ = interp.cams([4]*10, list(range(10)))
    one,_ = interp.cams([4], SHAPES[3])
    assert np.allclose(one[0], every[3], atol=1e-5)
    assert np.allclose(interp.cams([4])[0][0], every[interp.preds[4]], atol=1e-5)


# --- photos --------------------------------------------------------------------------------------------------------------

def colour(im): return np.asarray(im).reshape(-1, 3).mean(0).round().astype(int).tolist()

@pytest.mark.parametrize('mode,fill,suffix,expected', [
    ('RGB', (200, 100, 50), 'png', [200, 100, 50]), ('L', 77, 'png', [77]*3), ('1', 1, 'png', [255]*3),
    ('RGBA', (255, 0, 0, 0), 'png', [255]*3), ('RGBA', (0, 0, 0, 51), 'png', [204]*3), ('LA', (0, 0), 'png', [255]*3),
    ('CMYK', (0, 255, 255, 0), 'jpg', [255, 0, 0]), ('I;16', 257*128, 'png', [128]*3), ('I;16', 257*128, 'tif', [128]*3),
    ('F', 0.5, 'tif', [0]*3)])
def test_photo_modes(tmp_path, mode, fill, suffix, expected):
    Image.new(mode, (7, 5), fill).save(tmp_path/f'p.{suffix}')
    im = open_photo(tmp_path/f'p.{suffix}')
    assert im.mode == 'RGB' and im.size == (7, 5)
    assert np.abs(np.subtract(colour(im), expected)).max() <= 2

def test_photo_16_bit_gradient_is_not_clipped(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)).save(tmp_path/'g.png')
    grey = np.asarray(open_photo(tmp_path/'g.png'))[..., 0].ravel()
    assert grey[0] == 0 and grey[-1] == 255 and (np.diff(grey.astype(int)) > 0).all()

def test_photo_palette_with_transparency(tmp_path):
    im = Image.new('P', (4, 4), 0)
    im.putpalette([10, 20, 30, 200, 0, 0])
    im.paste(1, (2, 0, 4, 4))
    im.save(tmp_path/'p.png', transparency=0)
    px = np.asarray(open_photo(tmp_path/'p.png'))
    assert px[0, 0].tolist() == [255]*3 and px[0, 3].tolist() == [200, 0, 0]

def test_photo_is_turned_upright(tmp_path):
    im = Image.new('RGB', (40, 20), 'blue')
    im.paste('red', (0, 0, 10, 20)) # the left end, which is the top after a quarter turn clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    im.save(tmp_path/'p.jpg', exif=exif, quality=95)
    up = open_photo(tmp_path/'p.jpg')
    assert up.size == (20, 40) and up.getpixel((10, 2))[0] > 200 and up.getpixel((10, 37))[2] > 200

def test_photo_that_cannot_be_read(tmp_path, learn):
    (tmp_path/'text.jpg').write_text('not a photo')
    Image.effect_noise((300, 300), 90).save(tmp_path/'whole.png')
    (tmp_path/'cut.png').write_bytes((tmp_path/'whole.png').read_bytes()[:9000])
    (tmp_path/'empty.png').touch()
    for name in 'text.jpg', 'cut.png', 'empty.png', 'missing.png', '.':
        with pytest.raises(InputError) as e: explain_image(learn, tmp_path/name)
        assert str(tmp_path/name) in str(e.value) and '\n' not in str(e.value)

def test_explain_agrees_with_the_learner(interp, learn):
    file = interp.files([17])[0]
    fig,probs = explain_image(learn, file)
    assert list(probs.values()) == sorted(probs.values(), reverse=True) and set(probs) == set(SHAPES)
    assert np.allclose([probs[c] for c in SHAPES], interp.probs[17], atol=1e-4)
    top = list(probs)[:3]
    assert fig.axes[1].get_title(loc='left') == f'CAM of {top[0]}'
    assert [t.get_text() for t in fig.axes[2].texts] == [t for c in top for t in (c, f'{100*probs[c]:.1f} %')]

@pytest.mark.parametrize('draw', ['plot_images', 'plot_top_losses', 'plot_cams', 'plot_class_images', 'plot_class_cams', 'plot_mean_cams',
                                  'plot_confusion_matrix', 'plot_per_class_accuracy'])
def test_the_user_chooses_the_size_of_a_figure(interp, draw):
    fig = getattr(interp, draw)(figsize=(7, 5), dpi=50)
    assert tuple(fig.get_size_inches()) == (7, 5) and fig.dpi == 50

def test_a_mean_map_lies_over_no_image(interp):
    with pytest.raises(TypeError, match='alpha'): interp.plot_mean_cams(alpha=.5)

def test_explain_says_what_it_needs(interp):
    with pytest.raises(InputError, match='pass vocab and stats'): explain_image('no network', interp.files([17])[0])

def test_explain_squeezes_the_whole_photo(learn, monkeypatch):
    seen = []
    real = photo.cam_maps
    monkeypatch.setattr(photo, 'cam_maps', lambda model, xb, *args, **kw: seen.append(xb) or real(model, xb, *args, **kw))
    im = Image.new('RGB', (300, 100), 'black')
    im.paste('white', (0, 0, 150, 100))
    im.paste('red', (270, 0, 300, 100)) # at the end, where a centre crop would lose it
    fig,_ = explain_image(learn, im)
    red = seen[0][0, 0]
    assert red.shape == (32, 32) and red[:, :14].std() < 1e-3 and red[:, 18:26].std() < 1e-3
    assert torch.isclose(red[:, 31].mean(), red[:, 0].mean(), atol=0.05) and red[:, 0].mean() > red[:, 22].mean() + 1
    assert pictures(fig)[0].shape == (100, 300, 3) == pictures(fig)[1].shape # at the photo's own resolution

def test_explain_with_a_network_alone(interp, learn):
    file = interp.files([17])[0]
    norm = next(t for t in learn.dls.valid.after_batch.fs if hasattr(t, 'mean'))
    stats = norm.mean.flatten().tolist(), norm.std.flatten().tolist()
    _,alone = explain_image(learn.model, file, vocab=SHAPES, stats=stats)
    _,known = explain_image(learn, file)
    assert alone == pytest.approx(known, abs=1e-5)
    explain_image(learn.model, file, vocab=SHAPES, stats=stats, size=(48, 64), target='moon')
    for kwargs in dict(vocab=SHAPES), dict(stats=stats), {}:
        with pytest.raises(InputError, match='vocab and stats'): explain_image(learn.model, file, **kwargs)
    with pytest.raises(InputError, match='zebra'): explain_image(learn, file, target='zebra')

@pytest.mark.parametrize('channels', [1, 4])
def test_explain_with_a_network_of_other_channels(channels):
    model = torch.nn.Sequential(torch.nn.Conv2d(channels, 10, 3, padding=1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    asked = dict(vocab=SHAPES, stats=([.5]*channels, [.2]*channels), layer='0')
    if channels == 4:
        with pytest.raises(InputError, match='4 channels'): explain_image(model, Image.new('RGB', (40, 30), 'red'), **asked)
        return
    im = Image.effect_noise((40, 30), 80)
    _,probs = explain_image(model, im.convert('RGB'), **asked)
    x = (torch.from_numpy(np.array(im.resize((32, 32), Image.Resampling.BICUBIC))).float()/255 - .5)/.2
    with torch.no_grad(): expected = model(x[None, None]).softmax(1)[0]
    assert [probs[c] for c in SHAPES] == pytest.approx(expected.tolist(), abs=1e-5)


def test_explain_by_an_exported_learner_uses_its_size(shapes, tmp_path):
    dls = cifar_dls(shapes, bs=10, size=(48, 64), num_workers=0, device='cpu')
    learn = cifar_learner(dls, tiny_net(), bf16=False, path=tmp_path)
    file = sorted(f for f in shapes.rglob('*.png') if 'mask' not in f.name)[0]
    _,probs = explain_image(learn, file)
    learn.export('l.pkl')
    _,loaded = explain_image(load_learner(tmp_path/'l.pkl'), file)
    assert loaded == pytest.approx(probs, abs=1e-5)

def test_explain_with_too_few_names(learn):
    with pytest.raises(InputError, match='2 class names for a network of 10'): explain_image(learn.model, Image.new('RGB', (40, 30)), vocab=['a', 'b'], stats=([.5]*3, [.2]*3))

def test_explain_tiny_and_plain(learn):
    fig,_ = explain_image(learn, Image.new('L', (1, 1), 128), plain=True)
    assert not [t for t in texts(fig) + titles(fig) if t != 'no map'] and len(fig.axes) == 1


def as_it_is(t): return t

OPTIONS = dict(aug_smooth=True, eigen_smooth=True, output=None, reshape=as_it_is, method='gradcam', layer='0')
GALLERIES = dict(
    plot_top_losses=lambda i, **o: i.plot_top_losses(2, **o), plot_cams=lambda i, **o: i.plot_cams(2, 'top_losses', **o),
    plot_class_cams=lambda i, **o: i.plot_class_cams('top_losses', 1, **o),
    plot_methods=lambda i, **o: i.plot_methods([0, 1], ('gradcam', 'hirescam'), **{k: v for k,v in o.items() if k!='method'}),
    plot_mean_cams=lambda i, **o: i.plot_mean_cams([(str(i.vocab[int(i.targs[0])]), str(i.vocab[int(i.preds[0])]))], **{k: v for k,v in o.items() if k!='alpha'}),
    explain_image=lambda i, **o: explain_image(i.learn, i.files([0])[0], **o)[0])

@pytest.mark.parametrize('gallery', GALLERIES)
def test_every_gallery_passes_its_options_on(interp, gallery, monkeypatch):
    asked,drawn = [],[]
    def note(model, xb, method, layer, targets, **kwargs):
        asked.append((method, layer, targets, kwargs))
        return CamMaps(torch.rand(len(xb), 32, 32), torch.rand(len(xb), 10), torch.zeros(len(xb), dtype=torch.bool))
    for module in interpret,photo: monkeypatch.setattr(module, 'cam_maps', note)
    real = panels.overlay
    def paint(*args, **kwargs):
        drawn.append(kwargs)
        return real(*args, **kwargs)
    monkeypatch.setattr(panels, 'overlay', paint)
    name = str(interp.vocab[3])
    GALLERIES[gallery](interp, target=name, cmap='viridis', alpha=.3, **OPTIONS)
    for method,layer,targets,kwargs in asked:
        assert layer=='0' and all(kwargs[k]==OPTIONS[k] for k in ('aug_smooth', 'eigen_smooth', 'output', 'reshape'))
        assert gallery=='plot_methods' or method=='gradcam'
    assert any(t==3 if isinstance(t, int) else (t==3).all() for _,_,t,_ in asked)
    painted = [d for d in drawn if not d.get('signed')]
    assert gallery=='plot_mean_cams' or painted and all(d['cmap']=='viridis' and d['alpha']==.3 for d in painted)


class Among(nn.Module):
    "The logits in a dictionary, or one of two tensors"
    def __init__(self, net, kind): super().__init__(); self.net,self.kind = net,kind
    def forward(self, x):
        out = self.net(x)
        return dict(loss=None, scores=out) if self.kind=='dict' else (out.flip(1), out)

@pytest.mark.parametrize('kind, output', [('dict', None), ('pair', 1)])
def test_a_network_with_several_outputs_has_galleries(interp, kind, output):
    def loss(p, y, **kwargs): return F.cross_entropy(p['scores'] if kind=='dict' else p[1], y, **kwargs)
    learn = Learner(interp.learn.dls, Among(interp.learn.model, kind), loss)
    among = CamInterpretation.from_learner(learn, output=output)
    torch.testing.assert_close(among.probs, interp.probs)
    maps,_ = among.cams([0, 1], method='gradcam', min_px=1)
    want,_ = interp.cams([0, 1], method='gradcam', min_px=1)
    np.testing.assert_allclose(maps, want, atol=1e-5)
    _,probs = explain_image(learn, interp.files([0])[0], output=output, min_px=1)
    assert probs[str(interp.vocab[0])]==pytest.approx(float(interp.probs[0, 0]), abs=.01)
