import random

import numpy as np
import pytest
import torch
from fastai.vision.all import Callback, PILImage, Pipeline, TensorImage, nn

from cifar_cam.augment import (Albumentations, albumentations_augment, AlternatingFlip, cifar_augment, Cutout,
                               HorizontalFlip, PadCrop, TTA)
from cifar_cam.core import InputError
from cifar_cam.loaders import cifar_dls
from cifar_cam.learner import cifar_learner


@pytest.fixture
def img():
    return PILImage.create(np.random.default_rng(0).integers(1, 255, (32, 32, 3), dtype=np.uint8))


def batch_of(img, n): return TensorImage(np.array(img)).permute(2, 0, 1)[None].repeat(n, 1, 1, 1)
def as_tensor(img): return torch.from_numpy(np.array(img)).permute(2, 0, 1)


def draws(tfm, img, n):
    "n transformed copies, item by item and as a batch, each n×3×H×W"
    random.seed(0); torch.manual_seed(0)
    return torch.stack([as_tensor(tfm(img, split_idx=0)) for _ in range(n)]), tfm(batch_of(img, n), split_idx=0)


@pytest.mark.parametrize('mode', ['reflect', 'constant'])
def test_pad_crop_gives_each_shift_of_the_padded_image_as_often(img, mode):
    padded = np.pad(np.array(img), ((4,4),(4,4),(0,0)), mode=mode)
    windows = {padded[i:i+32, j:j+32].transpose(2, 0, 1).tobytes(): (i, j) for i in range(9) for j in range(9)}
    for out in draws(PadCrop(4, mode), img, 1600):
        shifts = [windows[np.ascontiguousarray(o.numpy()).tobytes()] for o in out]   # KeyError: not a window of the padded image
        for axis in zip(*shifts):
            counts = np.bincount(axis, minlength=9)
            assert counts.min() > 120 and counts.max() < 240   # 178 on average, standard deviation 12.6


def test_flip_mirrors_one_in_two(img):
    for out in draws(HorizontalFlip(), img, 800):
        mirrored = (out == as_tensor(img).flip(-1)).flatten(1).all(1)
        assert ((out == as_tensor(img)).flatten(1).all(1) ^ mirrored).all()
        assert 330 < mirrored.sum() < 470


@pytest.mark.parametrize('size', [1, 7, 8, 16])
def test_cutout_is_centred_anywhere_and_clipped_at_the_border(img, size):
    tfm = Cutout(size, fill=(0, 0, 0))
    for out in draws(tfm, img, 1500):
        hole = (out == 0).all(1)
        rows,cols = hole.any(2),hole.any(1)
        assert (hole == (rows[:, :, None] & cols[:, None, :])).all()     # a rectangle
        for span in rows.sum(1),cols.sum(1):
            assert span.max() == size and span.min() >= max(1, size//2)  # at most half of it lies outside
        # each pixel of an axis is a centre as often, so a pixel far from the border is hit with probability size/32
        assert abs(rows[:, 16].float().mean() - size/32) < 0.05
        corner = (size//2 + 1)/32
        assert abs(rows[:, 0].float().mean() - corner) < 0.05
        untouched = torch.where(hole[:, None], as_tensor(img), out)
        assert (untouched == as_tensor(img)).all()


def test_the_order_is_crop_flip_cutout_whatever_the_list(img):
    names = [type(t).__name__ for t in Pipeline(list(reversed(cifar_augment()))).fs]
    assert names == ['PadCrop', 'HorizontalFlip', 'Cutout']


def told(out):
    "Of images whose red is the column and whose green is the row each pixel came from: hole's rows and columns, both ends of the windows, mirrored or not"
    red,green,blue = out.long().unbind(1)
    hole = blue != 255
    place = torch.arange(32.)
    rows,cols = hole.any(2).double(),hole.any(1).double()
    whole = ~hole
    ends = [torch.where(whole, c, o).flatten(1).aminmax(dim=1)[i] for c in (red, green) for i,o in ((0, 99), (1, -1))]
    turned = torch.where(whole, red, -1)
    mirrored = [(r[w] @ (place[w.nonzero()[:, 1]].long() - 16) < 0).double() for r,w in zip(turned, whole)]
    return dict(height=rows.sum(1), width=cols.sum(1), top=(rows*place).sum(1)/rows.sum(1), left=(cols*place).sum(1)/cols.sum(1),
                ends=torch.stack(ends, 1).double() @ torch.tensor([1., 7., 60., 500.]).double(), mirrored=torch.stack(mirrored))


def test_items_and_batches_have_the_same_distribution():
    from scipy.stats import ks_2samp
    i,j = np.mgrid[:32, :32]
    img = PILImage.create(np.stack([j, i, np.full_like(i, 255)], -1).astype('uint8'))
    def tell(tfms, way):
        tfm = Pipeline(tfms)
        tfm.split_idx = 0
        random.seed(0); torch.manual_seed(0)
        return told(torch.stack([as_tensor(tfm(img)) for _ in range(3000)]) if way == 'items' else tfm(batch_of(img, 3000)).as_subclass(torch.Tensor))
    def same(a, b): return min(ks_2samp(a[k], b[k]).pvalue for k in a)
    items = tell(cifar_augment(cutout=12), 'items')
    assert same(items, tell(cifar_augment(cutout=12), 'batch')) > 1e-3
    # what it would notice: a hole of another size, a narrower or a black border, too few mirror images
    for other in cifar_augment(cutout=11), cifar_augment(cutout=12, pad=3), [PadCrop(4, 'constant'), HorizontalFlip(), Cutout(12)], cifar_augment(cutout=12, flip=False):
        assert same(items, tell(other, 'batch')) < 1e-6


def test_validation_images_are_left_alone(img):
    for tfm in cifar_augment() + albumentations_augment():
        for idx in 1, 2: assert np.array_equal(np.array(tfm(img, split_idx=idx)), np.array(img))


def test_batches_stay_bytes_and_do_not_change_their_source(img):
    x = batch_of(img, 4)
    y = Pipeline(cifar_augment(), split_idx=0)(x)
    assert y.dtype == torch.uint8 and y.shape == x.shape and type(y) is TensorImage
    assert (x == as_tensor(img)).all()


def test_images_in_a_batch_are_changed_independently(img):
    out = Pipeline(cifar_augment(), split_idx=0)(batch_of(img, 64))
    assert len({o.numpy().tobytes() for o in out}) > 60


def test_bad_settings_are_named():
    with pytest.raises(InputError, match='Cutout size 0'): Cutout(0)
    with pytest.raises(InputError, match='wrap'): PadCrop(mode='wrap')


def test_albumentations_gets_and_gives_numpy_and_repeats_with_the_seed(img):
    import albumentations as A
    seen = []
    def note(image, **kw):
        seen.append((type(image), image.dtype, image.shape))
        return 255 - image
    out = Albumentations(A.Compose([A.Lambda(image=note, p=1)]))(img, split_idx=0)
    assert seen == [(np.ndarray, np.uint8, (32, 32, 3))]
    assert type(out) is PILImage and np.array_equal(np.array(out), 255 - np.array(img))
    tfm = albumentations_augment()[0]
    def ten(seed):
        random.seed(seed)
        return [np.array(tfm(img, split_idx=0)).tobytes() for _ in range(10)]
    assert ten(1) == ten(1) != ten(2) and len(set(ten(1))) > 5


@pytest.mark.parametrize('side', [0, 5, 16, 40])
def test_the_hole_of_albumentations_is_as_asked(side):
    red = PILImage.create(np.full((32, 32, 3), (255, 0, 0), dtype=np.uint8))
    tfm = albumentations_augment(32, mean=(0, 0, 1), cutout=side)[0]
    random.seed(0)
    blue = [(np.array(tfm(red, split_idx=0)) == (0, 0, 255)).all(-1) for _ in range(100)]
    assert max(b.sum() for b in blue) == min(side, 32)**2 and (not side or 30 < sum(b.any() for b in blue) < 70)


def test_albumentations_mirrors_half_and_turns_by_up_to_15_degrees():
    i,j = np.mgrid[:32, :32]
    img = PILImage.create(np.stack([7*j, 7*i, 0*i], -1).astype('uint8'))   # red grows to the right, green downwards
    random.seed(0)
    tfm = albumentations_augment(cutout=0)[0]
    out = [np.array(tfm(img, split_idx=0)).astype(float) for _ in range(1000)]
    along = np.array([o[16, 19, :2] - o[16, 13, :2] for o in out])
    assert .43 < (along[:, 0] < 0).mean() < .57
    turn = np.degrees(np.arctan2(along[:, 1], np.abs(along[:, 0])))
    assert turn.min() < -10 and turn.max() > 10 and 12 < np.abs(turn).max() < 18


def test_albumentations_moves_images_to_all_sides_alike():
    i,j = np.mgrid[:32, :32]
    img = PILImage.create(np.stack([j, i, np.full_like(i, 255)], -1).astype('uint8'))   # red is the column, green the row that a pixel came from
    random.seed(0)
    tfm = albumentations_augment()[0]
    out = [np.array(tfm(img, split_idx=0))[16, 16].astype(int) for _ in range(3000)]
    rows = np.array([green - 16 for red,green,blue in out if blue == 255])
    assert abs(rows.mean()) < .2 and rows.min() <= -4 and rows.max() >= 4   # 0.05 is the standard error


# --- flips in turn, views

def test_alternating_flips_show_each_image_both_ways_in_any_two_epochs():
    x,flipped = TensorImage(torch.rand(4000, 3, 4, 4)),[]
    for epoch in 0, 1, 2:
        x.rows,x.epoch = torch.arange(4000),epoch
        out = AlternatingFlip()(x, split_idx=0)
        mirrored = (out == x.flip(-1)).flatten(1).all(1)
        assert ((out == x).flatten(1).all(1) ^ mirrored).all()
        flipped.append(mirrored)
    assert (flipped[0] ^ flipped[1]).all() and torch.equal(flipped[0], flipped[2])
    share = flipped[0].float().view(40, 100).mean(1)   # half of the images, wherever one looks
    assert .45 < share.mean() < .55 and share.min() > .2 and share.max() < .8


def in_order(dl):
    "All images of an epoch, in the order of the files"
    dl.shuffle = False
    return dl.one_batch()[0]


def test_alternating_flips_reach_the_loaders(shapes):
    dls = cifar_dls(shapes, [AlternatingFlip()], bs=300)
    epochs = []
    for epoch in 0, 1:
        dls.train.epoch = epoch
        epochs.append(in_order(dls.train))
    plain = in_order(cifar_dls(shapes, bs=300).train)
    straight = [(e == plain).flatten(1).all(1) for e in epochs]
    assert (straight[0] ^ straight[1]).all()


def test_a_training_shows_each_image_the_other_way_round_in_the_next_epoch(shapes, tmp_path, on_cpu):
    plain = in_order(cifar_dls(shapes, bs=300).train).as_subclass(torch.Tensor)
    way,seen = {o.numpy().tobytes(): (i, m) for m,xs in enumerate((plain, plain.flip(-1))) for i,o in enumerate(xs)},[]
    class Note(Callback):
        def before_batch(self):
            if self.training: seen.append(dict(way[o.numpy().tobytes()] for o in self.x.as_subclass(torch.Tensor)))
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.Flatten(), nn.Linear(64, 10))
    learn = cifar_learner(cifar_dls(shapes, [AlternatingFlip()], bs=300), net, path=tmp_path, bf16=False, cbs=[Note()])
    with learn.no_bar(), learn.no_logging(): learn.fit(3, .01)
    first,second,third = seen
    assert len(first) == 300 and all(first[i] != second[i] for i in first) and first == third


def test_views_are_the_image_its_mirror_image_and_both_moved(img):
    x = batch_of(img, 1).float()
    views = [(v(x) if v else x, w) for v,w in TTA['flip-translate']]
    assert [w for _,w in views] == [2, 2, 1, 1, 1, 1] and len({v.numpy().tobytes() for v,_ in views}) == 6
    padded = np.pad(np.array(img), ((1,1),(1,1),(0,0)), mode='reflect').transpose(2, 0, 1)
    for i,d in (2, 0), (3, 2):
        np.testing.assert_array_equal(views[i][0][0].numpy(), padded[:, d:d+32, d:d+32])
        mirror = padded[:, :, ::-1]
        np.testing.assert_array_equal(views[i+2][0][0].numpy(), mirror[:, d:d+32, d:d+32])


@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
@pytest.mark.parametrize('pad, mode', [(4, 'reflect'), (2, 'constant'), (0, 'reflect')])
def test_a_batch_is_cropped_as_image_by_image_would_be_with_the_same_draws(dtype, pad, mode):
    x = TensorImage((torch.rand(50, 3, 12, 16)*255).to(dtype))
    torch.manual_seed(0)
    out = PadCrop(pad, mode)(x, split_idx=0)
    torch.manual_seed(0)
    n = 2*pad + 1
    for image,new,offset in zip(x, out, torch.randint(0, n*n, (50,)).sort().values.tolist()):
        i,j = divmod(offset, n)
        padded = np.pad(np.array(image), ((0,0),(pad,pad),(pad,pad)), mode=mode)
        assert np.array_equal(np.array(new), padded[:, i:i+12, j:j+16])
    assert out.dtype == dtype and out.is_contiguous()


def test_the_hole_follows_the_mean_of_the_loaders_and_the_type_of_the_batch(img):
    tfm = Cutout(40)
    for dtype,grey in (torch.uint8, 128), (torch.float32, 128/255): assert (tfm(batch_of(img, 3).to(dtype), split_idx=0) == grey).any()
    tfm.fill = (1, 0, 0)   # changed by hand
    out = tfm(batch_of(img, 3), split_idx=0)
    hole = (out != batch_of(img, 3)).any(1)
    assert hole.any() and (out.permute(0, 2, 3, 1)[hole] == torch.tensor([255, 0, 0])).all()
