"Two features together: what one of them does is not undone, doubled or hidden by the other."
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.training import GradientAccumulation, ShortEpochCallback
from fastai.vision.all import accuracy, Callback, nn, partial, top_k_accuracy
from PIL import Image

from cifar_cam.callbacks import UpdateRatio
from cifar_cam.cam import cam_maps
from cifar_cam.core import InputError
from cifar_cam.formats import find_form
from cifar_cam.heads import logit_column
from cifar_cam.history import History, KeepBest, read_history
from cifar_cam.images import data_path, image_table
from cifar_cam.inputs import find_images
from cifar_cam.learner import Checkpoint, cifar_learner
from cifar_cam.loaders import cifar_dls
from cifar_cam.measures import target_probs
from cifar_cam.photo import explain_image
from cifar_cam.predict import GrowingTable, predict_images
from cifar_cam.recipe import BUILT_IN, change_recipe, find_recipe, Recipe, RECIPES
from cifar_cam.run import load_run
from cifar_cam.search import begin_sweep
from cifar_cam.summary import differing_settings, run_command
from cifar_cam.sweep import recipe_toml
from cifar_cam.validate import labelled_images


# --- training, again and again

@pytest.fixture
def learn(few, tmp_path):
    def make(cbs=(), **kwargs):
        torch.manual_seed(0)
        dls = cifar_dls(few, bs=20, device='cpu')
        net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, len(dls.vocab)))
        made = cifar_learner(dls, net, cbs=cbs, path=tmp_path, precision='float32', **kwargs)
        made.remove_cb(made.progress)
        return made
    return make


def test_looking_at_a_network_writes_nothing_into_its_history(learn, few, tmp_path):
    rows = tmp_path/'history.csv'
    l = learn([History(rows), ratio := UpdateRatio(2)])
    l.fit(2, .1)
    before,seen = rows.read_text(),list(ratio.accuracies)
    l.validate()
    l.get_preds()
    l.predict(next(few.rglob('*.png')))
    assert rows.read_text()==before and ratio.accuracies==seen
    l.fit(1, .1)
    assert list(read_history(rows).epoch)==[1, 2, 3]


@pytest.mark.parametrize('more', [dict(), dict(metrics=[accuracy, partial(top_k_accuracy, k=5)])], ids=['own', 'two'])
def test_validate_is_no_better_epoch(learn, tmp_path, more):
    l = learn([KeepBest(tmp_path/'best.safetensors')], **more)
    l.fit(1, .1)
    best,written = l.keep_best.best,(tmp_path/'best.safetensors').stat().st_mtime_ns
    l.validate()
    assert l.keep_best.best==best and (tmp_path/'best.safetensors').stat().st_mtime_ns==written


class Stop(Callback):
    order = 80
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.training and self.learn.epochs_done >= self.at and self.iter==2: raise KeyboardInterrupt

def test_a_fit_that_is_stopped_twice_ends_as_if_never_stopped(learn, tmp_path):
    whole = learn([History(tmp_path/'whole.csv')])
    whole.fit_one_cycle(5, .1)
    cut = learn([History(tmp_path/'cut.csv'), Checkpoint(tmp_path/'checkpoint.pt')])
    for at in 1, 3:
        with pytest.raises(KeyboardInterrupt): cut.fit_one_cycle(5, .1, cbs=Stop(at))
    cut.fit_one_cycle(5, .1)
    a,b = (read_history(tmp_path/f'{name}.csv') for name in ('whole', 'cut'))
    assert list(b.epoch)==[1, 2, 3, 4, 5] and list(a.lr)==list(b.lr)
    assert all(torch.equal(p, q) for p,q in zip(whole.model.state_dict().values(), cut.model.state_dict().values()))


def test_a_short_epoch_has_its_numbers_in_their_own_columns(learn, tmp_path):
    l = learn()
    l.fit(1, .1, cbs=[History(tmp_path/'h.csv'), ShortEpochCallback(.5, short_valid=False)])
    row = pd.read_csv(tmp_path/'h.csv').iloc[0]
    loss,share = l.validate()
    assert row.valid_loss==pytest.approx(loss, rel=1e-5) and row.valid_accuracy==pytest.approx(share) and 'train_loss' not in row


def test_an_epoch_that_is_cut_short_is_compared_by_its_own_accuracy(learn, tmp_path, capsys):
    l = learn()
    keep = KeepBest(tmp_path/'best.safetensors')
    l.fit(1, .1, cbs=[keep, ShortEpochCallback(.5, short_valid=False)])
    assert keep.best==pytest.approx(l.validate()[1])
    before = keep.best
    l.fit(1, .1, cbs=[keep, ShortEpochCallback(0.)])  # neither trained nor validated: there is no accuracy
    assert keep.best==before and len(l.recorder.values[-1])==len(l.recorder.metric_names) - 2


def test_a_history_of_own_metrics_goes_on_in_the_second_fit(learn, tmp_path):
    l = learn(metrics=accuracy)
    for _ in range(2): l.fit(1, .1, cbs=History(tmp_path/'h.csv'))
    assert list(pd.read_csv(tmp_path/'h.csv').epoch)==[1, 2]


def test_skipped_epochs_leave_the_rows_alone(learn, tmp_path):
    learn().fit(1, .1, cbs=History(tmp_path/'h.csv'))
    learn().fit(3, .1, start_epoch=1, cbs=History(tmp_path/'h.csv'))
    assert list(read_history(tmp_path/'h.csv').epoch)==[1, 2, 3]


def test_steps_are_counted_where_a_step_is_of_two_batches(learn):
    ratio = UpdateRatio(2)
    learn().fit(2, .1, cbs=[ratio, GradientAccumulation(40)])
    assert len(ratio.steps)==len(next(iter(ratio.ratios.values())))==3


# --- recipes

def test_a_sweep_refuses_a_size_that_growing_images_do_not_reach(few, tmp_path):
    for settings in ['size=64', 'lr=.01,.02'], ['size=32,64']:
        with pytest.raises(InputError, match='set resize='): begin_sweep('speedrun', settings, data=few, trials=1, out=tmp_path)
    assert not [*tmp_path.glob('*sweep*')]
    text = recipe_toml(change_recipe(RECIPES['speedrun'], name='large', size=64), 'speedrun')
    (tmp_path/'large.toml').write_text(text)
    assert find_recipe(tmp_path/'large.toml').size==64


def test_a_recipe_of_ones_own_is_no_built_in_one(run, monkeypatch, tmp_path):
    mine = Recipe('quick', 'davidnet', epochs=1, bs=50, lr=.1, schedule='constant')
    monkeypatch.setitem(RECIPES, 'quick', mine)
    assert 'quick' not in BUILT_IN
    found = load_run(run)
    monkeypatch.setattr(found, 'recipe', mine, raising=False)
    command,toml = run_command(found)
    assert 'train quick.toml' in command and 'bs = 50' in toml
    (tmp_path/'quick-best.toml').write_text(recipe_toml(change_recipe(mine, name='quick-best', lr=.05), 'quick'))
    monkeypatch.undo()
    assert find_recipe(tmp_path/'quick-best.toml').bs==50


def test_runs_of_two_precisions_differ(run, tmp_path):
    a,b = load_run(run),load_run(shutil.copytree(run, tmp_path/'other'))
    b.env['precision'] = 'of another kind'
    assert 'precision' in differing_settings([a, b])


# --- images

def copied(files, to, name='{i}.png'):
    for i,f in enumerate(files):
        at = to/name.format(i=i, c=f.parent.name)
        at.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, at)
    return to

def parts(few): return [sorted((few/p).rglob('*.png')) for p in ('train', 'test')]

def table(path, rows): pd.DataFrame(rows, columns=['file', 'label']).to_csv(path, index=False)


def test_folders_that_are_no_classes_do_not_hide_a_table_beside_them(few, tmp_path):
    train,_ = parts(few)
    copied(train[::2], tmp_path/'a'/'train'/'shard0')
    copied(train[1::2], tmp_path/'a'/'train'/'shard1')
    table(tmp_path/'a'/'train.csv', [(f'train/shard{k}/{i}.png', f.parent.name) for k in (0, 1) for i,f in enumerate(train[k::2])])
    with pytest.raises(InputError, match='train.csv both tell labels'): find_form(tmp_path/'a')
    same = Path(shutil.copytree(few, tmp_path/'same'))
    table(same/'names.csv', [(f.relative_to(few), f.parent.name.upper()) for f in train])
    assert find_form(same)[0]=='folders'


def test_the_column_of_a_parquet_file_says_which_images_test(few, tmp_path):
    pytest.importorskip('pyarrow')
    rows = pd.DataFrame([dict(image=f.read_bytes(), label=f.parent.name, split=f.parent.parent.name) for part in parts(few) for f in part])
    def counts(made, name):
        made.to_parquet(tmp_path/name)
        return image_table(data_path(tmp_path/name)).split.value_counts().to_dict()
    own = few/'test'
    wanted = rows.split.value_counts().to_dict()
    assert counts(rows, 'all.parquet')==wanted
    test = image_table(data_path(tmp_path/'all.parquet')).query("split=='test'")
    assert sorted(f.read_bytes() for f in test.file)==sorted(f.read_bytes() for f in own.rglob('*.png'))
    assert counts(rows.drop(columns='split').assign(is_valid=rows.split=='test', file='a'), 'valid.parquet')==wanted
    assert counts(rows.assign(split='red'), 'other.parquet').keys()=={'train', 'test'}
    with pytest.raises(InputError, match='row 3: the split .red. is none of'): counts(rows.assign(split=['test', 'train', 'train', 'red'] + ['train']*(len(rows) - 4)), 'odd.parquet')


def test_a_table_called_test_names_the_files_of_test(few, tmp_path):
    for name,part in zip(('train', 'test'), parts(few)):
        copied(part, tmp_path/name)
        table(tmp_path/f'{name}.csv', [(f'{i}.png', f.parent.name) for i,f in enumerate(part)])
    assert {f.parent.name for f,_ in labelled_images(tmp_path/'test.csv')}=={'test'}
    assert {f.parent.name for f in image_table(tmp_path/'train.csv').file}=={'train'}
    with pytest.raises(InputError, match='test.csv and train.csv are both tables'): data_path(tmp_path)


def test_labels_by_a_function_leave_a_flat_test_folder_to_test(few, tmp_path):
    for name,part in zip(('train', 'test'), parts(few)): copied(part, tmp_path/name, '{c}_{i}.png')
    dls = cifar_dls(tmp_path, get_y=lambda f: f.name.split('_')[0], bs=8, device='cpu')
    assert {f.parent.name for f in dls.train.items}=={'train'} and not dls.test_note


def test_overlays_within_the_folder_are_not_predicted(few, run, tmp_path, monkeypatch):
    monkeypatch.chdir(copied(parts(few)[1][:6], tmp_path/'photos'))
    append,left = GrowingTable.append,[2]
    def stop(self, rows):
        if not left[0]: raise KeyboardInterrupt
        left[0] -= 1
        append(self, rows)
    monkeypatch.setattr(GrowingTable, 'append', stop)
    with pytest.raises(KeyboardInterrupt): predict_images('.', run, cams='cams', bs=2, device='cpu')
    monkeypatch.setattr(GrowingTable, 'append', append)
    found = pd.read_csv(predict_images('.', run, cams='cams', bs=2, device='cpu'))
    assert len(found)==6 and len([*Path('cams').rglob('*.png')])==6 and not found.file.str.contains('cams').any()
    shutil.copy('0.png', 'cams/7.png')  # a photo of the user's own is none of them
    again = pd.read_csv(predict_images('.', run, cams='cams', bs=2, device='cpu', force=True))
    assert list(again.file[again.file.str.contains('cams')])==['./cams/7.png']


def test_two_tables_that_name_alike_are_not_mixed_up(few, tmp_path):
    for name,part in zip('ab', parts(few)):
        copied(part[:3], tmp_path/name)
        pd.DataFrame(dict(file=[f'{i}.png' for i in range(3)])).to_csv(tmp_path/name/'list.csv', index=False)
    lists = [tmp_path/name/'list.csv' for name in 'ab']
    with pytest.raises(InputError, match='0.png: two tables name different files so'): list(find_images(lists))
    assert len(list(find_images([lists[0], lists[0]])))==3


def test_ids_keep_their_dots_in_a_submission(few, run, tmp_path):
    copied(parts(few)[1][:2], tmp_path/'i', '1.2.{i}.png')
    pd.DataFrame(dict(id=['1.2.0', '1.2.1'])).to_csv(tmp_path/'i'/'ids.csv', index=False)
    out = predict_images(tmp_path/'i'/'ids.csv', run, tmp_path/'out.csv', kaggle=True, device='cpu')
    assert list(pd.read_csv(out, dtype=str).id)==['1.2.0', '1.2.1']


def test_coarse_labels_of_an_archive_of_a_table_are_refused(few, tmp_path):
    copied(parts(few)[0][:3], tmp_path/'c')
    pd.DataFrame([(f'{i}.png', 'a', 'b') for i in range(3)], columns=['file', 'fine_label', 'coarse_label']).to_csv(tmp_path/'c'/'list.csv', index=False)
    with pytest.raises(InputError, match="labels='coarse' is for"): data_path(shutil.make_archive(str(tmp_path/'z'), 'zip', tmp_path/'c'), labels='coarse')


# --- maps

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
ABOUT = dict(vocab=['cat', 'dog'], stats=([.5]*3, [.25]*3))

class Net(nn.Module):
    "A small network; `end` makes its answer of pooled features and logits"
    def __init__(self, n, end):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.fc,self.end = nn.Linear(32, n),end
        self.eval()
    def forward(self, x): return self.end(self, self.body(x))

def plain(net, h): return net.fc(h.mean((2, 3)))
def squeezed(net, h): return net.fc(F.adaptive_avg_pool2d(h, 1).squeeze())
def with_features(net, h): return net.fc(h.mean((2, 3))).squeeze(1),h.mean((2, 3))
def sigmoid(net, h): return (plain(net, h) - 3).sigmoid()


class Swapped(Net):
    "A norm over channels by `transpose(1, -1)`, which swaps height and width as well"
    def __init__(self):
        super().__init__(5, plain)
        self.norm = nn.LayerNorm(32)
    def forward(self, x): return plain(self, self.norm(self.body(x).transpose(1, -1)).transpose(1, -1))

def test_a_map_is_not_turned_over_its_diagonal():
    net,x = Swapped(),torch.zeros(1, 3, 32, 32)
    x[:, :, 2:10, 20:30] = 5*torch.randn(1, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    there = cam_maps(net, x, 'gradcam', targets=0, raw=True).maps
    changed = (there - cam_maps(net, torch.zeros_like(x), 'gradcam', targets=0, raw=True).maps).abs()[0]
    half = len(changed)//2
    assert changed[:half, half:].sum() > .9*changed.sum()
    with pytest.raises(InputError, match="layer 'norm' gives no"): cam_maps(net, x, 'gradcam', layer='norm')


def test_a_single_image_that_loses_its_axis_is_refused():
    net,x = Net(10, squeezed),torch.randn(4, 3, 32, 32)
    assert cam_maps(net, x, 'gradcam').preds.shape==(4, 10)
    for ask in lambda: cam_maps(net, x[:1], 'gradcam'), lambda: target_probs(net, x[:1], torch.tensor([0])):
        with pytest.raises(InputError, match='10 rows of logits for 1 images'): ask()


def test_a_logit_beside_features_has_to_be_named():
    net,x = Net(1, with_features),torch.randn(2, 3, 32, 32)
    with pytest.raises(InputError, match='2 parts of the output could be the logits'): cam_maps(net, x)
    assert cam_maps(net, x, output=0).preds.shape==(2, 1)


def drawn_maps(monkeypatch):
    import cifar_cam.photo as photo
    seen,draw = [],photo.draw_cam
    monkeypatch.setattr(photo, 'draw_cam', lambda ax, im, cam, *args, **kwargs: (seen.append(torch.as_tensor(cam)), draw(ax, im, cam, *args, **kwargs))[1])
    return seen

def test_the_map_is_of_the_class_in_its_title(monkeypatch):
    seen = drawn_maps(monkeypatch)
    _,probs = explain_image(Net(1, sigmoid), PHOTO, 'gradcam', act=lambda o: o, **ABOUT)
    explain_image(Net(1, sigmoid), PHOTO, 'gradcam', act=lambda o: o, target='cat', **ABOUT)
    assert next(iter(probs))=='cat' and torch.equal(*seen)


def test_scorecam_of_one_logit_is_that_of_the_network_itself(monkeypatch):
    import cifar_cam.photo as photo
    seen,net = drawn_maps(monkeypatch),Net(1, plain)
    net.fc.weight.data *= 200
    explain_image(net, PHOTO, 'scorecam', target='dog', **ABOUT)
    x = photo._squeezed(PHOTO, (32, 32), ABOUT['stats'], net)
    assert torch.equal(seen[0], cam_maps(net, x, 'scorecam', targets=1).maps[0])
    explain_image(net, PHOTO, 'gradcam', layer=['body.1', 'body.4'], **ABOUT)


@pytest.mark.parametrize('shape', [(3, 1), (3,), ()])
def test_a_column_of_logits(shape): assert logit_column(torch.zeros(shape)).shape==(torch.zeros(shape).numel(), 1)


class InPlace(nn.Module):
    "A transformer that normalises its images in place"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.p,self.fc = nn.Conv2d(3, 32, 4, 4),nn.Linear(32, 2)
        self.b = nn.TransformerEncoderLayer(32, 4, 64, dropout=0, norm_first=True, batch_first=True)
        self.eval()
    def forward(self, x):
        x.sub_(.5).div_(.25)
        return self.fc(self.b(self.p(x).flatten(2).transpose(1, 2)).mean(1))

def test_images_are_not_normalised_twice():
    net,x = InPlace(),torch.rand(2, 3, 32, 32)
    before = x.clone()
    a,p = cam_maps(net, x, 'rollout').maps,target_probs(net, x, torch.tensor([0, 1]))
    assert torch.equal(x, before) and torch.equal(a, cam_maps(net, x, 'rollout').maps) and torch.equal(p, target_probs(net, x, torch.tensor([0, 1])))
    import cifar_cam.photo as photo
    _,probs = explain_image(net, PHOTO, 'gradcam', **ABOUT)
    asked = target_probs(net, photo._squeezed(PHOTO, (32, 32), ABOUT['stats'], net), torch.tensor([0]))
    assert probs['cat']==pytest.approx(asked.item(), abs=1e-6)


class ChannelsLast(nn.Module):
    "As many channels as rows, and the same map once with the channels last and once with them first"
    def __init__(self, c=8):
        super().__init__()
        torch.manual_seed(0)
        self.stem,self.block = nn.Conv2d(3, c, 4, 4),nn.Sequential(nn.LayerNorm(c), nn.Linear(c, c), nn.GELU())
        self.first,self.fc = nn.Conv2d(c, c, 1, bias=False),nn.Linear(c, 5)
        self.first.weight.data = torch.eye(c)[:, :, None, None]
        self.eval()
    def forward(self, x): return self.fc(self.first(self.block(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).mean((2, 3)))

def test_ablationcam_ablates_channels_where_rows_are_as_many():
    net,x = ChannelsLast(),torch.randn(2, 3, 32, 32)
    last,first = (cam_maps(net, x, 'ablationcam', layer=name, targets=1, raw=True).maps for name in ('block', 'first'))
    assert torch.allclose(last, first, atol=1e-6)
