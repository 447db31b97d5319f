import json, shutil
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import Callback, nn

from cifar_cam import recipe as recipes, run as run_module
from cifar_cam.cli import main
from cifar_cam.core import InputError
from cifar_cam.images import CIFAR10, image_files
from cifar_cam.models import MODELS
from cifar_cam.report import write_report
from cifar_cam.shapes import shapes_path
from cifar_cam.recipe import (change_recipe, chooses, find_recipe, load_published, read_recipe, Recipe, recipe_dls,
                              recipe_learner, recipe_table, PUBLISHED_RECIPES, RECIPES, without_effect)
from cifar_cam.evaluate import accuracy_interval, calibration_error, evaluate_learner, load_weights
from cifar_cam.run import load_run, new_run_folder, Run
from cifar_cam.experiment import plot_curves, run_recipe, run_seeds, seed_summary, train_run, train_seeds
from cifar_cam.optimizers import OPTIMIZERS
from cifar_cam.callbacks import FreezeWhitening, L1Penalty, ProgressiveResize
from cifar_cam.learner import Checkpoint, SeedEpochs

FILES = 'recipe.json env.json history.csv metrics.json weights.safetensors checkpoint.pt lrs.json'.split()


def tiny(n_out=10, norm='batch'):
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
                         nn.Dropout(.1), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, n_out))


@pytest.fixture(autouse=True, scope='module')
def tiny_arch():
    with pytest.MonkeyPatch.context() as mp:
        mp.setitem(MODELS, 'tiny', tiny)
        yield


@pytest.fixture
def drawn(): "A test that asks for this looks at figures or at the report"


@pytest.fixture(autouse=True)
def quick(request):
    "Figures and report take most of the time of a small training"
    if 'drawn' not in request.fixturenames: request.getfixturevalue('undrawn')


def tiny_recipe(**changes):
    return Recipe('tiny', **{**dict(arch='tiny', epochs=2, bs=32, lr=.05, lr_min=.005, hold_out=.1), **changes})


def no_seconds(history): return history.drop(columns=['train_seconds', 'seconds'])


# --- what a recipe may say

@pytest.mark.parametrize('field, value', [('arch', 'vgg'), ('norm', 'instance'), ('opt', 'lion'), ('schedule', 'step'), ('augment', 'mixup'),
    ('epochs', 0), ('epochs', -3), ('bs', 1), ('bs', 10**9), ('lr', float('nan')), ('lr', 0), ('lr', -1), ('lr', float('inf')), ('lr', 'fast'),
    ('wd', float('nan')), ('factor', 1.5), ('hold_out', 0), ('pct_start', 0), ('cutout', -1), ('name', '../up'), ('name', ''), ('published', float('nan')), ('published', 101)])
def test_an_impossible_value_is_one_line_that_names_it(field, value):
    with pytest.raises(InputError, match=field) as e: change_recipe(RECIPES['davidnet'], **{field: value})
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('text, fields', [('norm=group', dict(norm='group')), ('lr=0.2', dict(lr=.2)), ('lr=find', dict(lr='find')), ('bs=64', dict(bs=64)),
    ('keep_best=true', dict(keep_best=True)), ('keep_best=no', dict(keep_best=False)), ('wd=1e-3', dict(wd=1e-3))])
def test_settings_from_the_shell_have_the_type_of_their_field(text, fields):
    k,v = text.split('=')
    assert change_recipe(RECIPES['davidnet'], **{k: v}) == change_recipe(RECIPES['davidnet'], **fields)


@pytest.mark.parametrize('k, v', [('epochs', '2.5'), ('keep_best', 'perhaps'), ('lr', 'abc'), ('batch_size', '3')])
def test_settings_that_cannot_be_are_refused(k, v):
    with pytest.raises(InputError, match=k): change_recipe(RECIPES['davidnet'], **{k: v})


def test_numbers_of_numpy_and_torch_are_numbers():
    r = Recipe('tiny', label_smoothing=np.float32(.1), bs=np.int64(16), flip=np.bool_(False), epochs=torch.tensor(3), wd=np.array(.25), published=np.float64(90))
    assert (r.bs, r.flip, r.epochs, r.wd, r.published) == (16, False, 3, .25, 90) and r.label_smoothing == pytest.approx(.1)
    assert change_recipe(r, bs=np.int32(7)).bs == 7 and json.loads(json.dumps(vars(r)))['epochs'] == 3
    with pytest.raises(InputError, match='label_smoothing'): Recipe('tiny', label_smoothing=np.array([.1, .2]))


@pytest.mark.parametrize('changes, told', [
    (dict(patience=5), "patience=5: acts only with schedule='plateau'"), (dict(schedule='plateau', steps='3:0.1'), "acts only with schedule='steps'"),
    (dict(schedule='steps'), 'needs steps'), (dict(schedule='constant', pct_start='0.5'), 'pct_start=0.5: acts only'), (dict(div=10.), "schedule='one-cycle'"),
    (dict(augment='none', cutout=16), 'cutout=16: acts only'), (dict(augment='albumentations', padding='zeros'), "padding='zeros': acts only"),
    (dict(pipeline='mine.json'), "augment='albumentations'"), (dict(augment='albumentations', pipeline='nowhere.json'), "pipeline='nowhere.json': no such file"),
    (dict(augment='albumentations', pipeline='mine.json', flip=False), "flip=False: pipeline='mine.json' decides")])
def test_a_change_that_would_do_nothing_is_refused(tmp_path, monkeypatch, changes, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'mine.json').write_text('{}')
    (tmp_path/'mine.toml').write_text('base = "davidnet"\n' + ''.join(f'{k} = {json.dumps(v)}\n' for k,v in changes.items()))
    for read in lambda: find_recipe('davidnet', **changes), lambda: find_recipe(RECIPES['davidnet'], **changes), lambda: find_recipe('mine.toml'):
        with pytest.raises(InputError) as e: read()
        assert told in str(e.value) and '\n' not in str(e.value)


def test_settings_that_another_schedule_leaves_idle_stay(tmp_path):
    for r in [*RECIPES.values(), *PUBLISHED_RECIPES.values()]: assert not without_effect(r)
    r = find_recipe('resnet18-plateau', schedule='one-cycle')   # its factor and patience are named by nobody
    assert without_effect(r).keys() == {'factor', 'patience'} and Recipe(**vars(r)) == r == change_recipe(r)
    assert find_recipe('resnet18-steps', as_published=True, epochs=2).steps == '46:0.1'
    with pytest.raises(InputError, match='for a recipe by name'): find_recipe(RECIPES['davidnet'], as_published=True)   # its own changes would be lost
    assert not without_effect(find_recipe('davidnet', augment='none', cutout=0, flip=False)) and find_recipe('davidnet', lr_min='find', schedule='linear')


@pytest.mark.parametrize('augment', ['crop-flip-cutout', 'alternating', 'albumentations', 'none'])
def test_without_flips_there_are_none_whatever_augments(shapes, augment):
    def flips(flip):
        dls = recipe_dls(tiny_recipe(augment=augment, flip=flip), shapes, device='cpu', num_workers=0)
        tfms = [t for f in (*dls.train.after_item.fs, *dls.train.after_batch.fs) for t in getattr(getattr(f, 'aug', None), 'transforms', [f])]
        return sum('Flip' in type(t).__name__ for t in tfms)
    assert flips(False) == 0 and flips(True) == (augment != 'none')


def test_a_recipe_from_toml_is_like_a_built_in_one(tmp_path):
    path = tmp_path/'mine.toml'
    path.write_text('base = "davidnet"\nepochs = 3\nnorm = "group"\n')
    r = find_recipe(str(path), bs='64')
    assert (r.name, r.arch, r.epochs, r.norm, r.bs, r.published) == ('mine', 'davidnet', 3, 'group', 64, None)
    for text,word in ('epoch = 3', 'epoch'), ('epochs = 0', 'epochs'), ('epochs =', 'TOML'), ('base = "nope"', 'nope'), ('base = ["davidnet"]', 'base='), ('base = "mine.toml"', 'base='), ('name = 5', 'name=5'), ('resize = "²"', 'resize'), ('epochs = [1]', 'mine.toml'):
        path.write_text(text)
        with pytest.raises(InputError, match=word) as e: read_recipe(path)
        assert 'mine.toml' in str(e.value)
    spaced = tmp_path/'my own.toml'
    spaced.write_text('name = "own"')
    assert read_recipe(spaced).name == 'own'
    with pytest.raises(InputError, match='gone.toml'): find_recipe(tmp_path/'gone.toml')


def test_the_table_has_a_row_for_each_published_experiment():
    table = recipe_table()
    assert list(table.recipe) == list(RECIPES) and '11,173,962' in table.parameters.values and '6,573,130' in table.parameters.values
    for r in RECIPES.values():
        if r.published is None: continue
        curve = load_published(r.name).test_accuracy
        assert r.published == (curve.max() if 'best' in r.published_as else curve.iloc[-1])


# --- what is chosen, and by which images

def test_only_recipes_that_choose_hold_images_out_and_never_test_images(shapes):
    for r,n in (tiny_recipe(), 0), (tiny_recipe(lr='find'), 30), (tiny_recipe(schedule='plateau'), 30), (tiny_recipe(keep_best=True), 30):
        dls = recipe_dls(r, shapes)
        assert bool(chooses(r)) == (n > 0) and len(dls.loaders) == 2 + (n > 0)
        assert [len(dl.dataset) for dl in dls.loaders] == ([270, 30, 100] if n else [300, 100])
        assert all(f.parent.parent.name == 'test' for f in dls[-1].items)
        if n: assert all(f.parent.parent.name == 'train' for f in [*dls[0].items, *dls[1].items])
    assert len(recipe_dls(tiny_recipe(lr='find'), shapes, hold_out=False).loaders) == 2


def test_the_published_protocol_is_said_wherever_its_accuracy_is(shapes, tmp_path):
    run = run_recipe(tiny_recipe(epochs=1, keep_best=True), shapes, tmp_path, published_protocol=True)
    assert 'TEST' in run.metrics['chosen_on'] and 'TEST' in run.chosen_on
    assert 'held-out' in run_recipe(tiny_recipe(epochs=1, keep_best=True), shapes, tmp_path).metrics['chosen_on']


def test_the_published_protocol_chooses_by_the_test_images_everywhere(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr('cifar_cam.precision.has_bf16', lambda device: False)   # while training, bfloat16 may see an image otherwise than float32 afterwards
    r = tiny_recipe(epochs=1, keep_best=True)
    run = run_recipe(r, shapes, tmp_path/'one', published_protocol=True)
    assert [len(dl.dataset) for dl in run.dls.loaders] == [300, 100] and 'test_accuracy' not in run.history
    assert run.history.valid_accuracy.max() == pytest.approx(run.metrics['accuracy'], abs=1e-6)
    several = run_seeds(r, shapes, tmp_path/'several', runs=1, published_protocol=True)
    assert [load_run(f.parent).env['published_protocol'] for f in several.glob('*/env.json')] == [True]
    (tmp_path/'mine.toml').write_text('arch = "tiny"\nepochs = 1\nbs = 32\nlr = 0.05\nkeep_best = true\n')
    assert main(['train', str(tmp_path/'mine.toml'), '--data', str(shapes), '--out', str(tmp_path/'shell'), '--published-protocol']) == 0
    assert [load_run(f.parent).env['published_protocol'] for f in (tmp_path/'shell').glob('*/env.json')] == [True]


def test_the_learner_and_the_loaders_are_what_the_recipe_says(shapes):
    r = tiny_recipe(opt='adamw', wd=.3, l1=.01, label_smoothing=.1, resize='16,32', cutout=11)
    dls = recipe_dls(r, shapes)
    learn = recipe_learner(r, dls, seed=3)
    assert [learn._grab_cbs(L1Penalty)[0].strength, learn._grab_cbs(ProgressiveResize)[0].sizes, learn._grab_cbs(SeedEpochs)[0].seed] == [.01, [16, 32], 3]
    assert learn.wd == .3 and learn.loss_func.func.label_smoothing == .1 and learn.opt_func.keywords['opt'] is OPTIMIZERS['adamw']
    plain = recipe_learner(tiny_recipe(), dls)
    assert not [cb for kind in (L1Penalty, ProgressiveResize, FreezeWhitening) for cb in plain._grab_cbs(kind)]
    assert recipe_learner(tiny_recipe(arch='speednet'), dls)._grab_cbs(FreezeWhitening)
    tfms = lambda **changes: {type(t).__name__: t for t in recipe_dls(tiny_recipe(**changes), shapes).train.after_batch.fs}
    usual,turns,none = tfms(cutout=11),tfms(augment='alternating', cutout=0),tfms(augment='none')
    assert usual['PadCrop'].pad == 4 and usual['Cutout'].size == 11 and 'HorizontalFlip' in usual
    assert turns['PadCrop'].pad == 2 and 'AlternatingFlip' in turns and not {'HorizontalFlip', 'Cutout'} & turns.keys()
    assert not {'PadCrop', 'HorizontalFlip', 'Cutout', 'AlternatingFlip'} & none.keys()


@pytest.mark.parametrize('schedule, share', [('linear', lambda t: 1 - t), ('cosine', lambda t: (1 + np.cos(np.pi*t))/2), ('constant', np.ones_like), ('one-cycle', None),
    ('flat-cosine', lambda t: np.where(t < .5, 1, (1 + np.cos(np.pi*(2*t - 1)))/2)), ('triangle', lambda t: 1 - .9*np.abs(2*t - 1))])
def test_the_learning_rate_moves_as_the_recipe_says(shapes, tmp_path, schedule, share):
    r = tiny_recipe(schedule=schedule, epochs=4, pct_start=.5, lr=.02, lr_min=.002)
    learn = recipe_learner(r, recipe_dls(r, shapes), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): recipes.fit_recipe(learn, r, (r.lr_min, r.lr))
    lrs = np.ravel(learn.recorder.lrs)
    t = np.arange(len(lrs))/len(lrs)
    if share is None: assert lrs.argmax() == len(lrs)//2 and lrs.max() == pytest.approx(.02)
    else: np.testing.assert_allclose(lrs, .02*share(t), rtol=1e-4, atol=1e-6)


# --- a run

@pytest.mark.parametrize('name', RECIPES)
def test_every_recipe_runs_end_to_end(tmp_path, narrow, monkeypatch, name, drawn):
    for arch in 'resnet18', 'davidnet': monkeypatch.setitem(MODELS, arch, narrow)
    few = shapes_path(tmp_path, n_train=120, n_test=100)
    run = run_recipe(name, few, tmp_path, epochs=1, bs=8)   # small batches: the LR finder takes a hundred of them
    assert all((run.path/f).stat().st_size for f in FILES) and run.path.parent == tmp_path and run.path.name.startswith(name)
    figures = {f.stem for f in (run.path/'figures').iterdir()}
    assert {'curves', 'confusion_matrix', 'class_accuracy', 'top_losses', 'misclassified', 'cams'} <= figures
    assert ('lr_find' in figures) == ('learning rate' in chooses(run.recipe)) and ('schedule' in figures) == (run.recipe.schedule=='triangle')
    m = run.metrics
    assert m['images'] == 100 and m['accuracy_interval'][0] <= m['accuracy'] <= m['accuracy_interval'][1] and 0 <= m['calibration_error'] <= 1
    assert np.mean(list(m['class_accuracy'].values())) == pytest.approx(m['accuracy'], abs=1e-6)
    recorded = json.loads((run.path/'recipe.json').read_text())
    assert set(recorded) == set(Recipe.__dataclass_fields__) and recorded['epochs'] == 1
    assert len(run.history) == 1 and not [f for f in run.path.rglob('.*')] and not (run.path/'models').exists()


def test_the_same_seed_gives_the_same_run(shapes, tmp_path):
    a,b,c = (run_recipe(tiny_recipe(lr='find', schedule='plateau', keep_best=True), shapes, tmp_path/str(i), seed) for i,seed in enumerate((0, 0, 1)))
    assert (a.path/'weights.safetensors').read_bytes() == (b.path/'weights.safetensors').read_bytes() != (c.path/'weights.safetensors').read_bytes()
    assert a.metrics == b.metrics and no_seconds(a.history).equals(no_seconds(b.history)) and a.lrs == b.lrs
    assert a.env['data_checksum'] == b.env['data_checksum'] and a.env['seed'] == 0


def test_a_loaded_run_predicts_what_was_measured(shapes, tmp_path):
    run = load_run(run_recipe(tiny_recipe(), shapes, tmp_path).path)
    assert (run.interp.preds == run.interp.targs).float().mean().item() == pytest.approx(run.metrics['accuracy'])
    assert run.recipe == tiny_recipe() and run.finished


@pytest.mark.parametrize('name', ['mine', '~/mine', 'x'*5000])
def test_a_run_whose_images_are_elsewhere_says_where_they_were(shapes, tmp_path, monkeypatch, name):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shapes, tmp_path/'mine')
    path = run_recipe(tiny_recipe(epochs=1), 'mine', 'runs').path.absolute()
    env = json.loads((path/'env.json').read_text())
    (path/'env.json').write_text(json.dumps(env | dict(data=name)))
    if 'mine' in name: assert len(load_run(path).dls.loaders) == 2
    (tmp_path/'mine').rename(tmp_path/'moved')
    with pytest.raises(InputError, match='mine: the images|xxx: the images'): load_run(path).dls


def test_a_run_opened_from_another_folder_says_where_to_go(shapes, tmp_path, monkeypatch):
    (tmp_path/'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shapes, 'mine')
    path = run_recipe(tiny_recipe(epochs=1), 'mine', 'runs').path.absolute()
    monkeypatch.chdir('elsewhere')
    load_run(path).model   # asking about a photo needs no images
    with pytest.raises(InputError, match='^mine: .*go to the folder where its training began'): load_run(path).dls
    monkeypatch.chdir(tmp_path)
    assert len(load_run(path).dls.loaders) == 2


def test_the_finder_of_a_run_leaves_other_figures_open(shapes, tmp_path, drawn):
    fig = plt.figure()
    run_recipe(tiny_recipe(lr='find', schedule='plateau', epochs=1), shapes, tmp_path)
    assert plt.fignum_exists(fig.number)
    plt.close(fig)


def test_the_report_of_a_renamed_recipe_and_of_an_older_run(shapes, tmp_path, monkeypatch, drawn):
    monkeypatch.setattr(Run, 'data_name', 'cifar10')
    run = run_recipe(tiny_recipe(epochs=1, published=91.77, published_as='best of 50'), shapes, tmp_path)
    page = (run.path/'report.html').read_text()
    assert 'The published experiment reached 91.77' in page and 'this run is not' not in page
    older = {k: v for k,v in run.metrics.items() if k not in ('accuracy_tta', 'tta')}
    (run.path/'metrics.json').write_text(json.dumps(older))
    assert 'flip and shift' not in write_report(run.path).read_text()


def test_a_published_curve_belongs_to_its_recipe_alone(shapes, tmp_path, monkeypatch, drawn):
    monkeypatch.setattr(Run, 'data_name', 'cifar10')
    (tmp_path/'davidnet.toml').write_text('base = "davidnet"\narch = "tiny"\nepochs = 1\nbs = 32\nlr = 0.05\nlr_min = 0.005\n')
    run = run_recipe(tmp_path/'davidnet.toml', shapes, tmp_path)   # its report too
    assert run.recipe.name == 'davidnet' and run.published is None and (run.path/'report.html').exists()


@pytest.mark.parametrize('name, told', [('davidnet', 'published: 61.37 % at epoch 1, 69.57 % at epoch 2.'), ('resnet18-layernorm', 'published: no numbers.')])
def test_the_published_curve_is_drawn_behind_ours(shapes, tmp_path, monkeypatch, name, told, drawn):
    monkeypatch.setattr(Run, 'data_name', 'cifar10')
    run = run_recipe(change_recipe(RECIPES[name], arch='tiny', epochs=2, bs=32, opt='sgd', lr=.05, lr_min=.005), shapes, tmp_path)
    assert run.published.equals(load_published(name))
    page = (run.path/'report.html').read_text()
    assert told in page and f'published: {RECIPES[name].published:g} %' in page
    lines = {l.get_label(): l.get_ydata() for l in plot_curves(run.history, run.published).axes[0].lines}
    whose = 'published (ResNet18)' if name=='davidnet' else 'published'  # the assignment's log is of another network
    assert list(lines[f'{whose}, test']) == list(load_published(name).test_accuracy) and list(lines[f'{whose}, train']) == list(load_published(name).train_accuracy)
    plt.close('all')


def test_the_last_row_of_the_history_is_what_is_measured_in_the_end(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr('cifar_cam.precision.has_bf16', lambda device: False)
    held,whole = (run_recipe(tiny_recipe(schedule=s), shapes, tmp_path/s) for s in ('plateau', 'one-cycle'))
    last,valid = held.history.iloc[-1],evaluate_learner(held.learn, held.dls[1])
    assert valid['images'] == 30 and last.valid_accuracy == pytest.approx(valid['accuracy'], abs=1e-6)
    assert last.test_accuracy == pytest.approx(held.metrics['accuracy'], abs=1e-6)
    assert 'test_accuracy' not in whole.history and whole.history.valid_accuracy.iloc[-1] == pytest.approx(whole.metrics['accuracy'], abs=1e-6)


def test_measures_are_those_of_the_averaged_logits():
    class Loader(list): pass
    F,random = nn.functional,torch.Generator().manual_seed(0)
    x,net = torch.randn(400, 3, 8, 8, generator=random),nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(4, 192, generator=random))
        net[1].bias.zero_()
        padded = [F.pad(o, (1,)*4, 'reflect') for o in (x, x.flip(-1))]
        plain,flip = net(x),net(x.flip(-1))
        y = (2*plain + 2*flip + sum(net(p[..., d:d+8, d:d+8]) for p in padded for d in (0, 2))).argmax(1)   # so the average of all views is always right
    batches = Loader([(x[:250], y[:250]), (x[250:], y[250:])])
    m = evaluate_learner(SimpleNamespace(model=net, dls=SimpleNamespace(vocab=list('abcd'))), batches, 'flip-translate')
    right = lambda logits: (logits.argmax(1) == y).double().mean().item()
    assert m['accuracy_tta'] == 1 > m['accuracy_flip_tta'] == right(plain + flip) > m['accuracy'] == right(plain)
    assert m['loss'] == pytest.approx(F.cross_entropy(plain, y).item(), rel=1e-5) and m['images'] == 400
    assert m['calibration_error'] == pytest.approx(calibration_error(plain.softmax(1), y), abs=1e-6)
    assert m['class_accuracy'] == pytest.approx({c: (plain.argmax(1) == y)[y == i].double().mean().item() for i,c in enumerate('abcd')})


def test_only_the_further_views_are_computed_in_bfloat16(shapes, tmp_path):
    r = tiny_recipe(tta='flip-translate')
    learn,seen = recipe_learner(r, recipe_dls(r, shapes), bf16=True),[]
    with learn.no_bar(), learn.no_logging(): learn.fit(2, .05)   # logits of random weights nearly tie
    learn.model[0].register_forward_hook(lambda m, i, o: seen.append((o.dtype, m.weight.is_contiguous(memory_format=torch.channels_last))))
    fast = evaluate_learner(learn, learn.dls.valid, r.tta)
    n = len(learn.dls.valid)
    assert seen == [(torch.float32, False)]*n + [(torch.bfloat16, True)]*5*n
    assert learn.model[0].weight.is_contiguous()
    learn.remove_cb(learn.half_precision)
    exact = evaluate_learner(learn, learn.dls.valid, r.tta)
    assert {k: v for k,v in exact.items() if not k.endswith('tta')} == {k: v for k,v in fast.items() if not k.endswith('tta')}
    assert abs(exact['accuracy_tta'] - fast['accuracy_tta']) <= .02


def test_the_best_epoch_is_kept(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr('cifar_cam.precision.has_bf16', lambda device: False)   # while training, bfloat16 may see an image otherwise than float32 afterwards
    before = SeedEpochs.before_train
    def spoil(self):
        before(self)
        if self.epoch == 3:
            with torch.no_grad(): self.model[-1].bias.copy_(100*torch.arange(10.))
    monkeypatch.setattr(SeedEpochs, 'before_train', spoil)   # so the last epoch is not the best
    run = run_recipe(tiny_recipe(keep_best=True, epochs=4, schedule='constant'), shapes, tmp_path)
    assert run.history.valid_accuracy.idxmax() < 3 and run.model[-1].bias.abs().max() < 100
    held = run.learn.get_preds(dl=run.dls[1])
    assert (held[0].argmax(1) == held[1]).float().mean().item() == pytest.approx(run.history.valid_accuracy.max(), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('last', [0, 2])   # before and after the whitening's bias is frozen
def test_a_speed_run_goes_on_to_the_same_numbers(shapes, tmp_path, monkeypatch, last):
    class Dead(BaseException): pass
    r,save = change_recipe(RECIPES['speedrun'], epochs=4, bs=60, lr=.05, resize='16,16,32,32'),Checkpoint.after_epoch
    whole = run_recipe(r, shapes, tmp_path/'whole')
    def die(self):
        save(self)
        if self.epoch == last: raise Dead
    with monkeypatch.context() as mp, pytest.raises(Dead):
        mp.setattr(Checkpoint, 'after_epoch', die)
        run_recipe(r, shapes, tmp_path/'cut')
    again = train_run(next((tmp_path/'cut').iterdir()))
    assert (again.path/'weights.safetensors').read_bytes() == (whole.path/'weights.safetensors').read_bytes()
    assert no_seconds(again.history).equals(no_seconds(whole.history)) and again.metrics == whole.metrics


# --- bad input leaves nothing behind

@pytest.mark.parametrize('kwargs', [dict(recipe='resnet'), dict(recipe='davidnet', epochs=0), dict(recipe='davidnet', data='/nowhere')])
def test_bad_input_makes_no_folder(shapes, tmp_path, kwargs):
    with pytest.raises(InputError): run_recipe(**{'data': shapes, 'out': tmp_path/'runs', **kwargs})
    assert not (tmp_path/'runs').exists()


def test_out_that_is_a_file_is_named(shapes, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(InputError, match='is a file'): new_run_folder('x', tmp_path/'file')


def test_two_runs_in_one_second_get_two_folders(tmp_path):
    assert len({new_run_folder('x', tmp_path) for _ in range(5)}) == 5


@pytest.mark.parametrize('spoil', [lambda p: (p/'recipe.json').unlink(), lambda p: (p/'recipe.json').write_text('{'), lambda p: (p/'env.json').unlink(),
                                   lambda p: (p/'recipe.json').write_text('{"name": "x", "colour": 3}')])
def test_what_is_no_run_is_named(tmp_path, spoil):
    path = new_run_folder('x', tmp_path)
    (path/'recipe.json').write_text(json.dumps(dict(name='x')))
    (path/'env.json').write_text(json.dumps(dict(data='shapes', data_checksum='', seed=0, device='cpu', published_protocol=False)))
    assert load_run(path).recipe == Recipe('x')
    spoil(path)
    with pytest.raises(InputError, match='no run folder') as e: load_run(path)
    assert '\n' not in str(e.value)


def test_weights_of_another_network_are_refused(shapes, tmp_path):
    run = run_recipe(tiny_recipe(epochs=1), shapes, tmp_path)
    with pytest.raises(InputError, match='cannot be loaded into this network'): load_weights(nn.Linear(2, 2), run.path/'weights.safetensors')
    (run.path/'weights.safetensors').write_bytes(b'x')
    with pytest.raises(InputError, match='weights.safetensors'): load_run(run.path).learn


# --- numbers

def test_calibration_error_is_guos():
    rng = np.random.default_rng(0)
    logits,y = torch.tensor(rng.normal(0, 2, (500, 4))),torch.tensor(rng.integers(0, 4, 500))
    probs = logits.softmax(1)
    conf,hit,expected = probs.max(1).values.numpy(),(probs.argmax(1)==y).numpy(),0.
    for lo,hi in zip(np.linspace(0, 1, 16)[:-1], np.linspace(0, 1, 16)[1:]):
        here = (conf > lo) & (conf <= hi)
        if here.any(): expected += here.mean()*abs(hit[here].mean() - conf[here].mean())
    assert calibration_error(probs, y) == pytest.approx(expected, abs=1e-9)
    assert calibration_error(torch.eye(3), torch.arange(3)) == 0
    assert calibration_error(torch.eye(3), torch.tensor([1, 2, 0])) == 1


def test_intervals():
    lo,hi = accuracy_interval(940, 1000)
    assert lo < .94 < hi and hi - lo == pytest.approx(.03, abs=.003)
    assert accuracy_interval(10, 10)[1] == 1 and accuracy_interval(0, 10)[0] == 0
    s = seed_summary([.90, .92, .94])
    assert s['mean'] == pytest.approx(.92) and s['std'] == pytest.approx(.02)
    assert s['interval'] == pytest.approx([.92 - 4.3027*.02/3**.5, .92 + 4.3027*.02/3**.5], rel=1e-4)
    assert seed_summary([.9])['interval'] is None


def test_several_seeds_go_on_where_they_were_interrupted(shapes, tmp_path, monkeypatch):
    whole = run_seeds(tiny_recipe(), shapes, tmp_path/'whole', seed=5, runs=3, lr=.02)
    class Stop(Callback):
        def after_batch(self):
            if self.training and (self.epoch, self.iter) == (1, 2) and self.path.name != first[0]: raise KeyboardInterrupt
    first,plain = [],run_module.recipe_learner
    def learner(*args, path=None, **kwargs):
        first.append(path.name)
        return plain(*args, path=path, **kwargs, cbs=[Stop()])
    with monkeypatch.context() as mp:
        mp.setattr(run_module, 'recipe_learner', learner)
        with pytest.raises(KeyboardInterrupt, match=r'--resume .*/tiny-3-seeds-[\d-]*`'): run_seeds(tiny_recipe(), shapes, tmp_path/'cut', seed=5, runs=3, lr=.02)
    path, = (tmp_path/'cut').iterdir()
    assert len([*path.glob('*/metrics.json')]) == 1 and len([*path.glob('*/checkpoint.pt')]) == 2
    assert train_seeds(path) == path and len([*path.glob('*/recipe.json')]) == 3
    a,b = (json.loads((p/'summary.json').read_text()) for p in (whole, path))
    assert a['accuracies'] == b['accuracies'] and load_run(path/b['runs'][2]).recipe.lr == .02
    plan = json.loads((path/'seeds.json').read_text())
    (path/'seeds.json').write_text(json.dumps(plan | dict(data=str(shapes_path(n_train=100, n_test=20)))))
    with pytest.raises(InputError, match='not the images'): train_seeds(path)


def test_several_seeds_are_summed_up(shapes, tmp_path):
    path = run_seeds(tiny_recipe(epochs=1), shapes, tmp_path, seed=5, runs=2)
    s = json.loads((path/'summary.json').read_text())
    assert s['seeds'] == 2 and [load_run(path/n).env['seed'] for n in s['runs']] == [5, 6]
    assert s['mean'] == pytest.approx(np.mean([load_run(path/n).metrics['accuracy'] for n in s['runs']]))
    with pytest.raises(InputError, match='runs=0'): run_seeds('davidnet', shapes, tmp_path, runs=0)
