"""The scorecard: each measure against a reference or a case whose answer is known, and the whole on data with and without masks"""
import itertools, json, random
from collections import OrderedDict
from math import isnan, nan

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_grad_cam.metrics import road as library
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from scipy.stats import bootstrap, spearmanr
from torch import nn

from cifar_cam import measures, scorecard, shapes as S
from cifar_cam.core import InputError
from cifar_cam.loaders import cifar_dls
from cifar_cam.interpret import CamInterpretation
from cifar_cam.models import cifar_resnet18, davidnet
from cifar_cam.measures import (bootstrap_interval, cascade, cell_shares, deletion_insertion, energy_inside,
                                grid_maps, grid_pg, impute_pixels, montage, pick_montages, pointing_game,
                                positive_maps, randomised, rank_correlation, removal_order, road, target_probs)
from cifar_cam.scorecard import score_cams, score_run, Scorecard
from cifar_cam.learner import cifar_learner


def block(i, o, stride): return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU())

def tiny(n=4):
    "Stages of 32, 16, 8 and 4 pixels at 32×32 input"
    torch.manual_seed(1)
    return nn.Sequential(OrderedDict(stem=block(3, 8, 1), s1=block(8, 8, 2), s2=block(8, 16, 2), s3=block(16, 16, 2),
                                     gap=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(16, n))).eval()


class Cells(nn.Module):
    "The logit of class c is one cell of the map"
    def __init__(self, cells): super().__init__(); self.cells = cells
    def forward(self, x): return torch.stack([x[:, :, r, k].sum(1) for r,k in self.cells], 1)

def seeing(cells):
    "A network of 8×8-pixel cells whose head sees one cell for each class, and nothing else"
    net = nn.Sequential(OrderedDict(stage=nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU()), head=Cells(cells)))
    net.stage[0].weight.data.abs_()
    net.stage[0].bias.data.fill_(1) # no cell is dark
    return net


@pytest.fixture
def xb():
    torch.manual_seed(2)
    return torch.randn(5, 3, 32, 32)


# Energy and pointing game

def test_the_energy_of_a_network_that_sees_one_cell_is_exactly_one():
    net,x = seeing([(2, 3), (6, 1)]),torch.rand(3, 3, 64, 64)
    maps = positive_maps(net, x, torch.tensor([0, 0, 1]), 'hirescam', 'stage')
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    masks[:2, 16:24, 24:32] = masks[2, 48:56, 8:16] = True
    assert energy_inside(maps, masks).tolist() == [1, 1, 1]
    assert pointing_game(maps, masks).tolist() == [1, 1, 1]
    assert energy_inside(maps, ~masks).tolist() == [0, 0, 0]
    everywhere = positive_maps(net, x, torch.tensor([0, 0, 1]), 'gradcam', 'stage') # mean gradient: every cell lights up
    assert (energy_inside(everywhere, masks) < 0.1).all()

def test_energy_counts_pixels_when_cells_are_whole_pixels():
    rng = np.random.default_rng(0)
    maps,masks = rng.normal(size=(6, 8, 4)),rng.random((6, 32, 32)) < 0.3
    big = np.kron(maps.clip(0), np.ones((1, 4, 8)))
    expected = (big*masks).sum((1, 2))/big.sum((1, 2))
    np.testing.assert_allclose(energy_inside(torch.tensor(maps), torch.tensor(masks)), expected, rtol=1e-12)

@pytest.mark.parametrize('h,w', [(5, 5), (7, 3), (8, 8), (32, 32), (1, 1), (40, 33)])
def test_cells_of_any_size_share_a_mask_without_loss(h, w):
    mask = torch.rand(1, 32, 32) < 0.4
    shares = cell_shares(mask, (h, w))
    assert shares.mean().item() == pytest.approx(mask.double().mean().item(), abs=1e-12)
    assert 0 <= shares.min() and shares.max() <= 1
    assert (cell_shares(torch.ones(1, 32, 32), (h, w)) == 1).all()

def test_a_cell_across_a_border_is_split_by_area():
    m = torch.zeros(1, 3, 3); m[0, 1, 1] = 4
    left,corner = torch.zeros(1, 2, 2),torch.zeros(1, 2, 2)
    left[:, :, 0] = corner[:, 0, 0] = 1
    assert energy_inside(m, left).item() == 0.5 and energy_inside(m, corner).item() == 0.25

def test_zero_maps_score_zero_and_nan_maps_nan():
    masks = torch.ones(3, 32, 32, dtype=torch.bool)
    maps = torch.stack([torch.zeros(8, 8), -torch.ones(8, 8), torch.ones(8, 8)])
    maps[2, 3, 3] = nan
    for f in energy_inside, pointing_game:
        assert f(maps, masks)[:2].tolist() == [0, 0] and isnan(f(maps, masks)[2])

def test_the_pointing_game_asks_for_the_highest_pixel_only():
    masks = torch.zeros(3, 32, 32, dtype=torch.bool)
    masks[:, 12:16, 20:24] = True # cell (3, 5)
    maps = torch.rand(3, 8, 8)/2
    maps[0, 3, 5] = maps[1, 3, 4] = 1 # a hit, and one cell beside it
    maps[2] = 0; maps[2, 3, 5] = maps[2, 6, 1] = 1 # a tie of one that hits and one that does not
    first,second,tie = pointing_game(maps, masks).tolist()
    assert (first, second, tie) == (1, 0, 0.5)

def test_energy_and_pointing_game_agree_with_quantus():
    quantus = pytest.importorskip('quantus')
    rng = np.random.default_rng(1)
    maps,masks = rng.random((8, 32, 32)),rng.random((8, 32, 32)) < 0.2
    args = dict(model=None, x_batch=np.zeros((8, 3, 32, 32)), y_batch=np.zeros(8, int), a_batch=maps[:, None], s_batch=masks[:, None])
    kwargs = dict(abs=False, normalise=False, disable_warnings=True)
    mass,hits = quantus.RelevanceMassAccuracy(**kwargs)(**args),quantus.PointingGame(**kwargs)(**args)
    np.testing.assert_allclose(energy_inside(torch.tensor(maps), torch.tensor(masks)), np.ravel(mass))
    np.testing.assert_allclose(pointing_game(torch.tensor(maps), torch.tensor(masks)), np.ravel(hits).astype(float))


# GridPG

def test_montages_have_distinct_classes_and_use_an_image_once():
    rng = np.random.default_rng(0)
    targs,eligible = torch.tensor(rng.integers(0, 7, 300)),torch.tensor(rng.random(300) < 0.6)
    fours = pick_montages(targs, eligible, seed=3)
    assert len(fours) == eligible.sum()//4
    assert len(fours.unique()) == fours.numel() and eligible[fours].all()
    assert all(len(set(r)) == 4 for r in targs[fours].tolist())
    assert torch.equal(fours, pick_montages(targs, eligible, seed=3)) and not torch.equal(fours, pick_montages(targs, eligible, seed=4))
    assert len(targs[fours][:, 0].unique()) == 7 # any class anywhere
    assert pick_montages(targs, eligible, n=9).shape == (9, 4)

@pytest.mark.parametrize('counts', [(10, 1, 1, 1), (3, 3, 3, 3), (5, 5, 5), (4, 4, 4, 2, 2), (7, 1, 1, 1, 1, 1), (2, 2, 2, 1, 1), (0, 4, 3, 2, 1), (6, 6, 1, 1, 5)])
def test_there_are_as_many_montages_as_there_can_be(counts):
    targs = torch.tensor([c for c,n in enumerate(counts) for _ in range(n)], dtype=torch.long)
    def most(left): # by trying all
        fours = [f for f in itertools.combinations(range(len(left)), 4) if all(left[c] for c in f)]
        seen = {tuple(sorted(left[c] - (c in f) for c in range(len(left)))) for f in fours}
        return max((1 + most(s) for s in seen), default=0)
    for seed in range(5): assert len(pick_montages(targs, torch.ones(len(targs), dtype=torch.bool), seed=seed)) == most(counts)

def test_no_eligible_image_gives_no_montage():
    assert pick_montages(torch.arange(8), torch.zeros(8, dtype=torch.bool)).shape == (0, 4)

def test_a_montage_is_in_reading_order():
    x = torch.arange(5.)[:, None, None, None].expand(5, 3, 2, 3)
    m = montage(x, torch.tensor([[4, 1, 0, 2]]))
    assert m.shape == (1, 3, 4, 6)
    assert m[0, 0, ::2, ::3].tolist() == [[4, 1], [0, 2]]

def test_gridpg_of_a_network_that_sees_one_cell_for_each_class_is_exactly_one():
    net = seeing([(1, 1), (0, 6), (6, 2), (5, 5)]) # a class in each quadrant
    tiles,right = torch.rand(3, 3, 64, 64),torch.tensor([[0, 1, 2, 3]]).expand(3, 4)
    assert (grid_pg(grid_maps(net, tiles, right, method='hirescam', layer='stage')) == 1).all()
    assert (grid_pg(grid_maps(net, tiles, right.flip(1), method='hirescam', layer='stage')) == 0).all()

def test_gridpg_is_a_quarter_for_a_map_that_does_not_know_the_question(xb):
    tiles = montage(xb, torch.tensor([[0, 1, 2, 3], [3, 1, 4, 0]]))
    scores = grid_pg(grid_maps(tiny(), tiles, torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]]), method='eigencam'))
    torch.testing.assert_close(scores.mean(1), torch.full((2,), 0.25, dtype=torch.float64))

def test_gridpg_counts_an_empty_map_as_zero():
    net = seeing([(1, 1), (0, 6), (6, 2), (5, 5)])
    net.stage[0].weight.data.zero_(); net.stage[0].bias.data.fill_(-1) # every cell is dark
    assert (grid_pg(grid_maps(net, torch.rand(2, 3, 64, 64), torch.tensor([[0, 1, 2, 3]]).expand(2, 4), method='hirescam', layer='stage')) == 0).all()


# ROAD

def some_masks():
    "Scattered holes, one large hole, all but two rows, all but a corner, nothing to fill"
    keep = torch.rand(5, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.3
    keep[1] = True; keep[1, 4:29, 3:30] = False
    keep[2] = False; keep[2, 10:12] = True
    keep[3] = False; keep[3, 31, 0] = True
    keep[4] = True
    return keep

def test_imputation_is_the_librarys_on_the_same_noise(xb, monkeypatch):
    keep,eps = some_masks(),torch.randn(5, 3, 32, 32)
    ours = impute_pixels(xb, keep, 0.01*eps)
    for i in range(4): # the library's solver cannot fill nothing
        monkeypatch.setattr(torch, 'randn_like', lambda t, i=i: eps[i][:, ~keep[i]])
        theirs = library.NoisyLinearImputer(noise=0.01)(xb[i], keep[i].float())
        torch.testing.assert_close(ours[i], theirs, atol=2e-6, rtol=0)
    assert torch.equal(ours[4], xb[4])
    assert torch.equal(torch.where(keep[:, None], ours, 0), torch.where(keep[:, None], xb, 0)) # what stays is untouched

def test_a_batch_is_filled_as_its_images_are(xb):
    keep = some_masks()
    torch.testing.assert_close(impute_pixels(xb, keep), torch.cat([impute_pixels(xb[i:i+1], keep[i:i+1]) for i in range(5)]), atol=1e-6, rtol=0)

def test_many_images_are_filled_in_parts(xb):
    x,keep = xb[:1].expand(300, -1, -1, -1),some_masks()[:1].expand(300, -1, -1)
    out = impute_pixels(x, keep, x)
    assert out.shape == x.shape and torch.allclose(out, out[:1].expand_as(x), atol=1e-6)

def test_an_image_without_any_pixel_left_is_an_error(xb):
    keep = some_masks(); keep[2] = False
    with pytest.raises(InputError, match='at least one'): impute_pixels(xb, keep)

def test_images_need_not_be_square_nor_coloured():
    x,keep = torch.randn(2, 1, 12, 20),torch.rand(2, 12, 20) < 0.5
    theirs = torch.stack([library.NoisyLinearImputer(noise=0)(a, k.float()) for a,k in zip(x, keep)])
    torch.testing.assert_close(impute_pixels(x, keep), theirs, atol=2e-6, rtol=0)

def test_road_is_the_librarys_on_maps_without_ties(xb, monkeypatch):
    model = tiny()
    model.fc.weight.data *= 100 # else nothing depends on the image
    y = model(xb).argmax(1)
    maps = torch.stack([torch.randperm(1024, generator=torch.Generator().manual_seed(i)).view(32, 32)/1024. for i in range(5)])
    eps = 0.01*torch.randn(xb.shape, generator=torch.Generator().manual_seed(7))
    plain = library.NoisyLinearImputer(noise=0)
    def same_noise(self, img, mask):
        i = next(i for i in range(5) if torch.equal(img, xb[i]))
        return type(plain).solve(plain, img, mask) + torch.where(mask == 0, eps[i], 0)
    monkeypatch.setattr(library.NoisyLinearImputer, 'solve', library.NoisyLinearImputer.__call__, raising=False)
    monkeypatch.setattr(library.NoisyLinearImputer, '__call__', same_noise)
    theirs = library.ROADCombined()(xb, maps.numpy(), [ClassifierOutputSoftmaxTarget(int(t)) for t in y], model)
    ours = road(model, xb, y, maps, seed=7)
    assert np.abs(theirs).max() > 0.005
    np.testing.assert_allclose(ours, theirs, atol=1e-5)

def test_equal_pixels_are_removed_in_an_order_that_the_seed_decides():
    maps = torch.zeros(2, 8, 8); maps[0, :, :4] = 1; maps[1] = -1
    order = removal_order(maps, (8, 8))
    assert torch.equal(order, removal_order(maps, (8, 8))) and not torch.equal(order, removal_order(maps, (8, 8), seed=1))
    assert (order.sort(1)[0] == torch.arange(64)).all()
    assert (order[0, :32]%8 < 4).all() and (order[0, 32:]%8 >= 4).all()
    top = (order[1, :32] < 32).sum().item()
    assert 8 <= top <= 24, 'equal pixels go from the whole image, not from its top'

def test_ties_do_not_change_how_much_is_removed(xb, monkeypatch):
    removed = []
    monkeypatch.setattr(measures, 'impute_pixels', lambda x, keep, eps: removed.append((~keep).flatten(1).sum(1).tolist()) or x)
    road(tiny(), xb[:2], torch.tensor([0, 1]), torch.stack([torch.zeros(8, 8), torch.rand(8, 8)]))
    assert removed == [[n, n] for n in [921, 819, 717, 614, 512, 410, 307, 205, 103] for _ in range(2)]

def test_a_nan_map_has_no_score_and_does_not_touch_its_neighbour(xb):
    maps,y = torch.rand(2, 8, 8),torch.tensor([0, 1])
    lost = maps.clone(); lost[0, 0, 0] = nan
    for a,b in zip([road(tiny(), xb[:2], y, lost), *deletion_insertion(tiny(), xb[:2], y, lost)],
                   [road(tiny(), xb[:2], y, maps), *deletion_insertion(tiny(), xb[:2], y, maps)]):
        assert isnan(a[0]) and a[1] == b[1]

def test_imputation_agrees_with_quantus():
    quantus = pytest.importorskip('quantus')
    from quantus.functions.perturb_func import noisy_linear_imputation
    x,keep = np.random.default_rng(0).normal(size=(3, 16, 16)),np.random.default_rng(1).random((16, 16)) < 0.5
    theirs = noisy_linear_imputation(arr=x, indices=np.flatnonzero(~keep), noise=0.)
    np.testing.assert_allclose(impute_pixels(torch.tensor(x)[None], torch.tensor(keep)[None])[0], theirs, atol=1e-9)


# Deletion and insertion

class ShareOfOnes(nn.Module):
    "The probability of class 0 is the share of pixels that are 1"
    def __init__(self): super().__init__(); self.none = nn.Parameter(torch.zeros(1))
    def forward(self, x):
        p = (x > 0.9999).float().mean((1, 2, 3))
        return torch.stack([p, 1 - p], 1).log()

def left_half(columns):
    "An image whose left half is 1, and a map that is high at the earlier `columns`"
    x = torch.zeros(1, 3, 32, 32); x[..., :16] = 1
    m = torch.zeros(1, 32, 32)
    for i,c in enumerate(columns): m[:, :, c] = 32 - i
    return x,m

def test_areas_by_hand():
    y = torch.tensor([0])
    x,m = left_half([*range(15, -1, -1), *range(16, 32)]) # the left half first, from the middle outwards
    deletion,insertion = deletion_insertion(ShareOfOnes(), x, y, m, steps=32)
    assert deletion.item() == pytest.approx(0.5*0.5/2) # falls from 1/2 to 0 in the first half
    # Blurred, the columns 0 to 10 are 1 still: 5 pixels from the edge on. The columns 15 to 11 come first.
    assert insertion.item() == pytest.approx((11.5 + 12.5 + 13.5 + 14.5 + 15.5 + 27*16)/32/32)
    x,m = left_half([*range(16, 32), *range(16)]) # the right half first
    deletion,_ = deletion_insertion(ShareOfOnes(), x, y, m, steps=32)
    assert deletion.item() == pytest.approx(0.5*0.5 + 0.5*0.5/2)

def test_steps_that_do_not_divide_the_pixels():
    x,m = left_half([*range(15, -1, -1), *range(16, 32)])
    assert deletion_insertion(ShareOfOnes(), x, torch.tensor([0]), m, steps=7)[0].item() == pytest.approx(0.125, abs=0.01)

def test_deletion_begins_with_the_image_and_insertion_ends_with_it(xb, monkeypatch):
    seen = []
    monkeypatch.setattr(measures, 'target_probs', lambda model, x, t, **how: seen.append(x) or torch.zeros(len(x)))
    deletion_insertion(None, xb, torch.zeros(5, dtype=torch.long), torch.rand(5, 8, 8), steps=4)
    assert torch.equal(seen[0], xb) and not seen[4].any() and torch.equal(seen[9], xb)
    changed = [(a != b).any(1).flatten(1).sum(1).tolist() for a,b in zip(seen[:4], seen[1:5])]
    assert changed == [[256]*5]*4


# Randomisation

def test_the_network_is_destroyed_from_the_top_and_the_model_stays(xb):
    model = davidnet(4).train()
    before = {k: v.clone() for k,v in model.state_dict().items()}
    trained = dict(model.named_parameters())
    state,steps = torch.get_rng_state(),[]
    for name,net in randomised(model, xb):
        steps.append((name, {k for k,p in net.named_parameters() if torch.equal(p, trained[k])}))
        assert net is not model and not net.training
    assert [n for n,_ in steps] == ['fc', 'layer3.1.block.1.0', 'layer3.1.block.0.0', 'layer3.0.0', 'layer2.0', 'layer1.1.block.1.0', 'layer1.1.block.0.0', 'layer1.0.0', 'prep.0']
    assert 'fc.weight' not in steps[0][1] and 'layer3.1.block.1.0.weight' in steps[0][1]
    assert 'prep.0.weight' in steps[-2][1] and 'prep.0.weight' not in steps[-1][1]
    assert not [k for k in steps[-1][1] if k.endswith(('0.weight', 'fc.bias'))] # fresh normalisations are as these never were trained
    assert model.training and all(torch.equal(before[k], v) for k,v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())

def test_normalisations_are_reset_with_the_layer_before_them(xb):
    model = tiny()
    for b in model.modules():
        if isinstance(b, nn.BatchNorm2d): nn.init.normal_(b.weight); nn.init.normal_(b.running_mean)
    nets = iter(randomised(model, xb))
    next(nets); name,net = next(nets)
    assert name == 's3.0' and (net.s3[1].weight == 1).all() and (net.s3[1].running_mean == 0).all() and not (net.s2[1].weight == 1).all()

def test_every_layer_of_a_resnet_is_reached(xb):
    assert len(list(randomised(cifar_resnet18(), xb))) == 21

def test_parameters_without_an_initialiser_are_shuffled():
    class Gain(nn.Module):
        def __init__(self): super().__init__(); self.g = nn.Parameter(torch.arange(12.).view(1, 3, 2, 2))
        def forward(self, x): return F.adaptive_avg_pool2d(x, 2)*self.g
    model = nn.Sequential(Gain(), nn.Flatten(), nn.Linear(12, 3))
    *_,(name,net) = randomised(model, torch.randn(1, 3, 32, 32))
    assert name == '0' and not torch.equal(net[0].g, model[0].g) and torch.equal(net[0].g.flatten().sort()[0], torch.arange(12.))

def test_rank_correlation_is_scipys():
    rng = np.random.default_rng(0)
    a,b = torch.tensor(rng.normal(size=(6, 8, 8))).clamp(min=0),torch.tensor(rng.integers(0, 5, (6, 8, 8))) # many ties
    b[3] = 2; a[4, 1, 1] = nan
    ours = rank_correlation(a, b.double())
    for i in 0, 1, 2, 5: assert ours[i] == pytest.approx(spearmanr(a[i].flatten(), b[i].flatten()).statistic)
    assert ours[3] == 0 and isnan(ours[4])

def test_a_method_that_ignores_the_head_does_not_notice_it(xb):
    y = torch.tensor([0, 1, 2, 3, 1])
    remains = cascade(tiny(), xb, y, 'eigencam', 's2')
    assert list(remains) == ['fc', 's3.0', 's2.0', 's1.0', 'stem.0']
    assert (remains['fc'] == pytest.approx(1)) and (remains['s3.0'] == pytest.approx(1)) and abs(remains['s2.0'].mean()) < 0.95
    grad = cascade(tiny(), xb, y, 'gradcam', 's2')
    assert grad['fc'].mean() < 0.9

class Uncalled(nn.Module):
    "Weights that are used without a call of their module"
    def __init__(self):
        super().__init__()
        self.conv,self.fc,self.gain = nn.Conv2d(3, 8, 3),nn.Linear(8, 4),nn.Parameter(torch.arange(1., 5))
    def forward(self, x): return F.linear(self.conv(x).mean((2, 3)), self.fc.weight)*self.gain

def test_no_weight_stays_trained_whoever_uses_it(xb):
    net = Uncalled()
    for _,last in randomised(net, xb): pass
    before,after = net.state_dict(),last.state_dict()
    assert not any(torch.equal(before[k], after[k]) for k in before)


def test_a_layer_may_be_a_module(xb):
    model,y = tiny(),torch.tensor([0, 1, 2, 3, 1])
    a,b = cascade(model, xb, y, layer=model.s2),cascade(model, xb, y, layer='s2')
    assert all(np.array_equal(a[k], b[k]) for k in b)


# Maps and intervals

def test_maps_are_positive_at_the_layers_resolution_and_nan_where_the_network_gives_no_number(xb):
    xb[1, :, 0, 0] = nan
    maps = positive_maps(tiny(), xb, torch.tensor([0, 1, 2, 3, 1]))
    assert maps.shape == (5, 8, 8) and maps.dtype == torch.float64
    assert maps.isnan().flatten(1).all(1).tolist() == [False, True, False, False, False]
    assert (maps[[0, 2, 3, 4]] >= 0).all()

def test_randomcam_is_seeded_and_numpys_state_given_back(xb):
    np.random.seed(5); before = np.random.get_state()[1].copy()
    a,b,c = (positive_maps(tiny(), xb, torch.zeros(5, dtype=torch.long), 'randomcam', seed=s) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert np.array_equal(before, np.random.get_state()[1])

def test_intervals_are_scipys():
    a = np.random.default_rng(0).exponential(size=80)
    theirs = bootstrap((a,), np.mean, n_resamples=20_000, method='percentile').confidence_interval
    np.testing.assert_allclose(bootstrap_interval(a, n=20_000), theirs, atol=0.02)
    wide,narrow = bootstrap_interval(a, 0.99),bootstrap_interval(a, 0.5)
    assert wide[0] < narrow[0] < a.mean() < narrow[1] < wide[1]
    assert bootstrap_interval(np.append(a, nan)) == bootstrap_interval(a)
    assert np.isnan(bootstrap_interval(a[:1])).all() and np.isnan(bootstrap_interval(np.array([nan, nan]))).all()


# The scorecard

def test_empty_and_lost_maps_are_counted(coloured, monkeypatch):
    def some_lost(model, x, targets, *args, **kwargs):
        maps = torch.rand(len(x), 8, 8, generator=torch.Generator().manual_seed(0)).double()
        if len(x) > 1: maps[0],maps[1, 0, 0] = 0,nan
        return maps
    for module in measures,scorecard: monkeypatch.setattr(module, 'positive_maps', some_lost)
    card = score_cams(coloured, 'gradcam', n=5, montages=3, progress=False)
    assert card.maps['gradcam'] == dict(zero=1, nan=1, montage_zero=4, montage_nan=4)
    assert card.text().loc['gradcam', ['zero maps', 'NaN maps']].tolist() == ['1 + 4', '1 + 4']
    s = card.scores['gradcam']
    assert s['gridpg'][0] == 0 and isnan(s['gridpg'][1]) and s['gridpg'][2] > 0
    for m in 'road', 'deletion', 'insertion', 'randomisation': assert np.isnan(s[m]).tolist() == [False, True, False, False, False]
    assert s['randomisation'][0] == 0 and card.stat('gradcam', 'road')['n'] == 4

def trained(data, classes):
    learn = cifar_learner(cifar_dls(data, bs=16), tiny(classes), bf16=False)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, 0.1)
    return CamInterpretation.from_learner(learn)

@pytest.fixture(scope='module')
def coloured(colours):
    "A network for four classes of colours, images without masks"
    return trained(colours, 4)

@pytest.fixture(scope='module')
def shaped(shapes):
    "A network that knows little of ten shapes, images with masks"
    return trained(shapes, 10)

def test_four_classes_and_no_masks(coloured):
    before = {k: v.clone() for k,v in coloured.learn.model.state_dict().items()}
    training = coloured.learn.model.training
    numpy_state = np.random.get_state()[1].copy()
    card = score_cams(coloured, ('GradCAM', 'eigencam'), n=8, montages=3, progress=False)
    assert list(card.scores) == ['gradcam', 'eigencam', 'randomcam', 'gradcam, random weights', 'chance']
    assert card.metrics == ['gridpg', 'road', 'deletion', 'insertion', 'randomisation']
    assert card.about['classes'] == ['blue', 'green', 'grey', 'red'] and card.about['images'] == 8 and card.about['montages'] == 3
    assert card.about['layer'] == 's2' and card.about['montage_layer'] == 's3'
    assert all(len(s['road']) == 8 and len(s['gridpg']) == 3 for r,s in card.scores.items() if r != 'chance')
    assert card.table.loc['eigencam', 'gridpg'] == pytest.approx(0.25) and card.table.loc['chance', 'gridpg'] == 0.25
    assert all(torch.equal(before[k], v) for k,v in coloured.learn.model.state_dict().items()) and coloured.learn.model.training == training
    assert np.array_equal(numpy_state, np.random.get_state()[1])

def test_the_seed_decides_everything(coloured):
    same = [score_cams(coloured, 'gradcam', n=6, montages=2, seed=s, progress=False).to_json() for s in (3, 3, 4)]
    assert same[0] == same[1] != same[2]

def test_masks_of_shapes_are_found_and_those_of_other_images_are_the_control(shaped):
    card = score_cams(shaped, 'gradcam', n=20, montages=0, progress=False)
    assert card.metrics == ['energy', 'energy_other', 'pointing', 'pointing_other', 'gridpg', 'road', 'deletion', 'insertion', 'randomisation']
    right = np.flatnonzero((shaped.preds == shaped.targs).numpy())
    idxs = np.random.default_rng(0).permutation(right)[:20].tolist()
    masks = torch.from_numpy(np.stack([S.load_mask(f) for f in shaped.dl.items]))
    maps = positive_maps(shaped.learn.model, shaped[idxs][0], shaped.targs[idxs])
    s = card.scores['gradcam']
    np.testing.assert_allclose(s['energy'], energy_inside(maps, masks[idxs]))
    np.testing.assert_allclose(s['energy_other'], energy_inside(maps, masks[idxs[-1:] + idxs[:-1]]))
    np.testing.assert_allclose(s['pointing_other'], pointing_game(maps, masks[idxs[-1:] + idxs[:-1]]))
    area = masks[idxs].double().mean().item()
    assert card.table.loc['chance', 'energy'] == pytest.approx(area) and card.table.loc['chance', 'pointing'] == pytest.approx(area)
    given = score_cams(shaped, 'gradcam', n=20, montages=0, masks=masks, progress=False)
    assert given.to_json() == card.to_json()
    with pytest.raises(InputError, match='7 masks for 100 images'): score_cams(shaped, masks=masks[:7], progress=False)

def test_the_controls_are_what_they_say(coloured):
    card = score_cams(coloured, 'gradcam', n=6, montages=2, progress=False)
    model,idxs = coloured.learn.model,np.random.default_rng(0).permutation(np.flatnonzero((coloured.preds == coloured.targs).numpy()))[:6].tolist()
    x,y = coloured[idxs][0].as_subclass(torch.Tensor),coloured.targs[idxs]
    for _,untrained in randomised(model, x): pass
    sure = (coloured.preds == coloured.targs) & (coloured.probs.amax(1) >= .9)
    fours = pick_montages(coloured.targs, sure, 2, 0)
    tiles = montage(coloured[list(range(len(coloured.targs)))][0].as_subclass(torch.Tensor), fours)
    for row,net,method in ('gradcam', model, 'gradcam'), ('randomcam', model, 'randomcam'), ('gradcam, random weights', untrained, 'gradcam'):
        maps = positive_maps(net, x, y, method)
        np.testing.assert_allclose(card.scores[row]['road'], road(model, x, y, maps), atol=1e-6)
        for name,curve in zip(('deletion', 'insertion'), deletion_insertion(model, x, y, maps)): np.testing.assert_allclose(card.scores[row][name], curve, atol=1e-6)
        np.testing.assert_allclose(card.scores[row]['gridpg'], grid_pg(grid_maps(net, tiles, coloured.targs[fours], method=method)).mean(1), atol=1e-6)
    noise = torch.rand((6, 8, 8), generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(card.scores['chance']['road'], road(model, x, y, noise), atol=1e-6)
    np.testing.assert_allclose(card.scores['chance']['deletion'], deletion_insertion(model, x, y, noise)[0], atol=1e-6)
    np.testing.assert_allclose(card.scores['chance']['randomisation'], np.abs(rank_correlation(noise, positive_maps(model, x, y))))
    remains = cascade(model, x, y)
    np.testing.assert_allclose(card.scores['gradcam']['randomisation'], np.abs(remains['stem.0']))
    assert card.cascades['gradcam'] == pytest.approx({l: np.abs(r).mean() for l,r in remains.items()})

def test_only_sure_and_right_images_are_part_of_montages(coloured):
    sure = (coloured.preds == coloured.targs) & (coloured.probs.amax(1) >= 0.6)
    card = score_cams(coloured, 'gradcam', n=1, montages=2, min_prob=0.6, progress=False)
    assert card.about['eligible'] == sure.sum() and card.about['correct'] == (coloured.preds == coloured.targs).sum()
    assert score_cams(coloured, 'gradcam', n=1, min_prob=1.1, progress=False).about['montages'] == 0

def one_size(coloured):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8*15*15, 4))
    learn = cifar_learner(coloured.learn.dls, net, bf16=False)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, .02)
    return learn

def test_the_cascade_of_fewer_images_is_that_of_the_first_ones(coloured):
    whole,few = (score_cams(coloured, 'gradcam', n=6, montages=0, cascaded=c, progress=False) for c in (None, 2))
    assert list(few.scores['gradcam']['randomisation']) == list(whole.scores['gradcam']['randomisation'])[:2]
    assert (few.scores['gradcam']['road'] == whole.scores['gradcam']['road']).all()
    assert 'Random weights: 2 of the images.' in few.caption() and 'Random weights' not in whole.caption()
    with pytest.raises(InputError, match='cascaded=0'): score_cams(coloured, 'gradcam', n=6, cascaded=0, progress=False)

def test_montages_for_a_network_of_one_size_are_shrunk_and_that_is_said(coloured):
    learn = one_size(coloured)
    interp = CamInterpretation.from_learner(learn, len(learn.dls.loaders) - 1)
    interp.preds = interp.targs.clone()  # as if it were right
    card = score_cams(interp, 'hirescam', n=3, montages=3, min_prob=0, progress=False)
    assert card.about['shrunk'] and 'shrunk to the size of one image' in card.caption()
    assert card.scores['hirescam']['gridpg'].shape == (card.about['montages'],) and card.about['montages'] > 0
    other = score_cams(coloured, 'hirescam', n=3, montages=3, min_prob=0, progress=False)
    assert not other.about['shrunk'] and 'shrunk' not in other.caption()
    assert 'gridpg' not in score_cams(learn, 'gradcam', n=3, montages=0, progress=False).scores['gradcam']

def test_methods_that_give_no_map_of_the_network_are_left_out_with_the_reason(coloured):
    card = score_cams(coloured, ('rollout', 'gradcam'), n=2, montages=0, progress=False)
    assert card.about['methods'] == ['gradcam'] and 'rollout' not in card.scores
    assert 'Left out: rollout (the network has no attention' in card.caption()
    assert 'rollout' in json.loads(card.to_json())['about']['left_out']
    with pytest.raises(InputError, match='no attention'): score_cams(coloured, 'rollout', n=2, montages=0, progress=False)

def small_transformer():
    from torchvision.models import VisionTransformer
    torch.manual_seed(0)
    net = VisionTransformer(32, 4, 2, 2, 16, 32, num_classes=4)
    nn.init.normal_(net.heads.head.weight)
    return net

def test_a_transformer_has_a_scorecard_with_rollout_and_without_fullgrad(coloured):
    learn = cifar_learner(coloured.learn.dls, small_transformer(), bf16=False)
    interp = CamInterpretation.from_learner(learn, len(learn.dls.loaders) - 1)
    interp.preds = interp.targs.clone()  # as if it were right
    card = score_cams(interp, ('hirescam', 'rollout', 'fullgrad'), n=2, montages=1, min_prob=0, progress=False)
    assert card.about['methods'] == ['hirescam', 'rollout'] and card.about['shrunk']
    assert 'fullgrad (' in card.caption() and 'LayerNorm' in card.caption()
    assert card.stat('rollout', 'gridpg')['mean'] == pytest.approx(.25)  # it hears no class

class Answers(nn.Module):
    "The logits among other things"
    def __init__(self, net, kind):
        super().__init__()
        self.net,self.kind = net,kind
    def forward(self, x):
        out = self.net(x)
        if self.kind == 'dict': return dict(loss=None, scores=out)
        return out,out*2 if self.kind == 'pair' else None

@pytest.mark.parametrize('kind, output', [('dict', None), ('dict', 'scores'), ('pair', 0), ('tuple', None)])
def test_logits_among_other_outputs_are_scored_as_if_alone(coloured, kind, output):
    def loss(p, y, **kwargs): return torch.nn.functional.cross_entropy(p['scores'] if isinstance(p, dict) else p[0], y, **kwargs)
    plain = score_cams(coloured, 'gradcam', n=4, montages=2, min_prob=0, progress=False)
    from fastai.vision.all import Learner
    learn = Learner(coloured.learn.dls, Answers(coloured.learn.model, kind), loss)
    interp = CamInterpretation.from_learner(learn, len(learn.dls.loaders) - 1, output=output)
    torch.testing.assert_close(interp.probs, coloured.probs)
    card = score_cams(interp, 'gradcam', n=4, montages=2, min_prob=0, progress=False)
    assert card.about['layer'] == f"net.{plain.about['layer']}"
    for metric in 'road', 'deletion', 'insertion', 'gridpg':
        np.testing.assert_allclose(card.scores['gradcam'][metric], plain.scores['gradcam'][metric], atol=1e-4)

def test_several_layers_are_scored_together(coloured):
    model = coloured.learn.model
    card = score_cams(coloured, 'gradcam', n=3, montages=0, layer=['stem', model.s2], progress=False)
    assert card.about['layer'] == ['stem', 's2'] and 'layer stem and s2' in card.caption()
    json.loads(card.to_json())

def test_a_single_logit_is_the_probability_of_the_second_class():
    class One(nn.Module):
        def __init__(self): super().__init__(); self.fc = nn.Linear(3, 1)
        def forward(self, x): return self.fc(x.mean((2, 3)))
    net,xb = One(),torch.randn(5, 3, 8, 8)
    p = net(xb).sigmoid().flatten().detach()
    torch.testing.assert_close(target_probs(net, xb, torch.ones(5, dtype=torch.long)), p)
    torch.testing.assert_close(target_probs(net, xb, torch.zeros(5, dtype=torch.long)), 1 - p)

def test_a_librarys_network_sees_the_parts_of_a_montage_as_it_sees_single_images(coloured):
    from cifar_cam.models import build_model
    learn = cifar_learner(coloured.learn.dls, build_model('torchvision/shufflenet_v2_x0_5', 4), bf16=False)
    interp = CamInterpretation.from_learner(learn, len(learn.dls.loaders) - 1)
    interp.preds = interp.targs.clone()  # as if it were right
    card = score_cams(interp, 'gradcam', n=1, montages=1, min_prob=0, progress=False)
    assert card.about['montages'] == 1 and not card.about['shrunk'] and card.about['layer'] == 'net.stage3'


def test_a_single_image(shaped):
    card = score_cams(shaped, 'gradcam', n=1, montages=1, progress=False)
    assert card.about['images'] == 1 and 'energy_other' not in card.metrics
    s = card.stat('gradcam', 'energy')
    assert s['n'] == 1 and isnan(s['low']) and 0 <= s['mean'] <= 1
    assert '[' not in card.text().loc['gradcam', 'ROAD ↑']
    json.loads(card.to_json())

def test_a_network_that_gives_no_number_is_counted_and_not_scored(colours):
    model = tiny(4)
    model.fc.weight.data.fill_(nan)
    interp = CamInterpretation.from_learner(cifar_learner(cifar_dls(colours, bs=16), model, bf16=False))
    card = score_cams(interp, 'gradcam', n=4, montages=1, progress=False)
    assert card.maps['gradcam'] == dict(zero=0, nan=4) and card.text().loc['gradcam', 'NaN maps'] == '4'
    assert card.stat('gradcam', 'road')['n'] == 0 and card.stat('gradcam', 'road')['nan'] == 4
    assert json.loads(card.to_json())['rows']['gradcam']['road']['mean'] is None

def test_lost_maps_are_left_out_of_the_mean_and_reported():
    card = Scorecard(dict(gradcam=dict(road=np.array([0.2, nan, 0.4]))), dict(gradcam=dict(zero=0, nan=1)), {}, about())
    assert card.stat('gradcam', 'road') | dict(low=0, high=0) == dict(mean=pytest.approx(0.3), low=0, high=0, n=2, nan=1)
    assert card.text().loc['gradcam', 'NaN maps'] == '1'

def about(): return dict(images=3, correct=3, total=4, layer='s2', montages=0, eligible=0, min_prob=0.9, montage_layer=None, seed=0, methods=['gradcam', 'edges'])

def test_a_method_that_survives_random_weights_is_marked():
    scores = {m: dict(randomisation=np.array([r, r])) for m,r in (('gradcam', 0.1), ('edges', 0.8))}
    cascades = {m: {'fc': 0.9, 'stem': float(s['randomisation'].mean())} for m,s in scores.items()}
    card = Scorecard(scores, {}, cascades, about())
    assert card.survivors == ['edges']
    marks = card.text()['random weights |ρ| ↓']
    assert '†' in marks['edges'] and '†' not in marks['gradcam'] and '†' in card.caption()
    assert json.loads(card.to_json())['survivors'] == ['edges']
    assert [t.get_text() for t in card.plot().axes[0].get_yticklabels()] == ['gradcam', 'edges †']

@pytest.mark.parametrize('kwargs,message', [
    (dict(n=0), 'n=0'), (dict(methods=()), '0 methods'), (dict(methods='smoothgrad'), "no CAM method 'smoothgrad'"),
    (dict(layer='s3'), 'smaller than min_px=5'), (dict(layer='layer9'), "no layer 'layer9'")])
def test_wrong_input_is_one_line(coloured, kwargs, message):
    with pytest.raises(InputError, match=message) as e: score_cams(coloured, progress=False, **kwargs)
    assert '\n' not in str(e.value)

def test_a_network_that_is_always_wrong(coloured):
    class Wrong(CamInterpretation):
        def __init__(self, o): self.__dict__.update(o.__dict__, preds=(o.targs + 1)%4)
    with pytest.raises(InputError, match='none of the 40 images right'): score_cams(Wrong(coloured))

def test_a_run_gets_its_files_whole_or_not_at_all(coloured, tmp_path, monkeypatch):
    card = score_run(coloured, tmp_path, methods='gradcam', n=4, montages=1, progress=False)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob('*') if p.is_file()) == ['figures/scorecard.png', 'score.json']
    assert (tmp_path/'figures'/'scorecard.png').read_bytes()[:4] == b'\x89PNG'
    first = json.loads((tmp_path/'score.json').read_text())
    assert first['rows']['gradcam']['road']['mean'] == card.stat('gradcam', 'road')['mean']
    monkeypatch.setattr(Scorecard, 'to_json', lambda self: 1/0)
    with pytest.raises(ZeroDivisionError): score_run(coloured, tmp_path, methods='gradcam', n=4, montages=1, progress=False)
    assert json.loads((tmp_path/'score.json').read_text()) == first and not [p for p in tmp_path.iterdir() if p.name.startswith('.')]

def test_it_reads_as_text_html_and_charts(coloured):
    card = score_cams(coloured, ('gradcam', 'layercam'), n=4, montages=1, progress=False)
    assert 'GridPG' in repr(card) and '<table' in card._repr_html_()
    assert len(card.plot().axes) == 5 and '1 montages' in card.caption()
    assert 'no montage' in score_cams(coloured, 'gradcam', n=2, montages=0, progress=False).caption()
    lines = card.plot_cascade().axes[0].get_lines()
    assert [l.get_label() for l in lines[:3]] == ['gradcam', 'layercam', 'randomcam'] and len(lines[0].get_xdata()) == 6
