"What is resumed, compared, shipped or written over: the result is that of the run that is named, or one line says why not."
import json, os, shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.vision.all import nn
from PIL import Image

from cifar_cam import cli, crossfit, sweep as sweeps
from cifar_cam.core import InputError, write_json
from cifar_cam.crossfit import crossfit_command, fit_fold
from cifar_cam.experiment import run_or_resume, run_seeds, train_seeds
from cifar_cam.learner import Checkpoint, cifar_learner
from cifar_cam.loaders import cifar_dls
from cifar_cam.models import MODELS
from cifar_cam.predict import predict_command, predict_images
from cifar_cam.recipe import change_recipe, find_recipe, recipe_dls, RECIPES
from cifar_cam.report import _compared_gallery, compare_runs
from cifar_cam.run import load_run
from cifar_cam.scorecard import methods_at_chance, score_run
from cifar_cam.search import _absolute, trial_recipe
from cifar_cam.share import ship_run
from cifar_cam.space import parse_space
from cifar_cam.sweep import join_sweep, sweep_command, sweep_recipe, sweep_trials
from cifar_cam.validate import labelled_images

RUN = dict(epochs=1, bs=10, lr=.05, lr_min=.005)


def change_metrics(path, **changes): write_json(json.loads((path/'metrics.json').read_text()) | changes, path/'metrics.json')

def test_a_comparison_normalises_each_run_as_it_was_trained(run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path/'other'))
    change_metrics(other, mean=[.1, .6, .3], std=[.3, .3, .1])
    expected = load_run(other).interp.preds
    _,hits,_ = _compared_gallery([load_run(run), load_run(other)], ['a', 'b'], 10, 10**6)
    alone = load_run(other).interp
    assert np.array_equal(hits[1], (alone.preds==alone.targs).numpy()) and torch.equal(expected, alone.preds)


def test_a_comparison_from_within_a_run_lies_beside_it(run, tmp_path, monkeypatch):
    other = Path(shutil.copytree(run, tmp_path/'other'))
    monkeypatch.chdir(run)
    assert compare_runs([load_run('.'), load_run(other)]).parent == tmp_path


def test_an_interpretation_knows_at_once_which_methods_its_scorecard_finds_at_chance(run):
    interp = load_run(run).interp
    score_run(interp, run, methods='hirescam', n=2, montages=0, min_prob=0, progress=False)
    assert interp.at_chance == methods_at_chance(run/'score.json')


def test_a_folder_called_cifar10_is_not_cifar10(few, narrow, tmp_path, monkeypatch, undrawn):
    monkeypatch.setitem(MODELS, 'davidnet', narrow)
    shutil.copytree(few, tmp_path/'cifar10')
    run = cli.run_recipe('davidnet', str(tmp_path/'cifar10'), tmp_path/'runs', **RUN)
    assert run.data_name == 'cifar10, of your own' and run.published is None


# --- resumed

@pytest.mark.parametrize('command, given, told', [
    (sweep_command, dict(trials=50), '--trials'), (sweep_command, dict(no_prune=True), '--no-prune'), (sweep_command, dict(recipe='davidnet'), 'recipe'),
    (crossfit_command, dict(recipe='davidnet'), 'recipe'), (crossfit_command, dict(folds=10), '--folds'), (crossfit_command, dict(data='shapes'), '--data'), (cli.train, dict(epochs=3), '--epochs')])
def test_what_is_resumed_keeps_its_settings(command, given, told, tmp_path):
    with pytest.raises(InputError, match=f'leave out {told}$'): command(resume=str(tmp_path), **given)


def test_several_seeds_are_resumed_where_the_images_are_now(few, narrow, tmp_path, monkeypatch, undrawn):
    monkeypatch.setitem(MODELS, 'davidnet', narrow)
    here = Path(shutil.copytree(few, tmp_path/'here'))
    path = run_seeds('davidnet', here, tmp_path, runs=2, **RUN)
    accuracies = json.loads((path/'summary.json').read_text())['accuracies']
    second = max(path.glob('*/env.json'), key=lambda f: json.loads(f.read_text())['seed']).parent
    shutil.rmtree(second)
    here.rename(tmp_path/'there')
    with pytest.raises(InputError): train_seeds(path)
    cli.train(resume=str(path), data=str(tmp_path/'there'))
    assert json.loads((path/'summary.json').read_text())['accuracies'] == accuracies


def test_a_run_with_decisions_is_not_taken_for_the_plain_one(run, few, monkeypatch):
    env = json.loads((run/'env.json').read_text())
    run_or_resume('davidnet', few, run, **RUN)
    write_json(env | dict(decisions='d.csv', decisions_checksum='0'*64), run/'env.json')
    with pytest.raises(InputError, match='with decisions about labels'): run_or_resume('davidnet', few, run, **RUN)


def test_a_checkpoint_of_a_finished_fit_says_so(few, tmp_path, capsys):
    def learner(): return cifar_learner(cifar_dls(few, bs=20, device='cpu'), nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), cbs=Checkpoint(tmp_path/'c.pt'), precision='float32')
    for _ in range(2):
        with (learn := learner()).no_bar(), learn.no_logging(): learn.fit(1, .01)
    assert 'c.pt: has this fit; delete it to train anew' in capsys.readouterr().out


def test_rates_that_were_found_are_not_looked_for_in_a_trained_network(run):
    recipe = json.loads((run/'recipe.json').read_text())
    write_json(recipe | dict(lr='find', lr_min='find'), run/'recipe.json')
    (run/'lrs.json').unlink()
    with pytest.raises(InputError, match='lrs.json: is missing'): load_run(run).lrs
    assert not (run/'lrs.json').exists()


def test_a_crossfit_of_the_best_epoch_ends_with_it(few, narrow, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, 'davidnet', narrow)
    loaded = []
    monkeypatch.setattr('cifar_cam.crossfit.load_weights', lambda model, path: loaded.append(path))
    path = crossfit.crossfit('davidnet', few, 2, tmp_path, keep_best=True, **RUN)
    assert len(loaded) == 2 and not list(path.glob('*.safetensors'))


# --- sweeps

def sweep_of(few, settings, out, **kwargs): return sweep_recipe(change_recipe(RECIPES['davidnet'], arch='tiny', bs=20, lr=.05, lr_min=.0005, epochs=1), settings, few, out=out, **{'trials': 2, **kwargs})

@pytest.fixture
def tiny(monkeypatch):
    pytest.importorskip('optuna')
    monkeypatch.setitem(MODELS, 'tiny', lambda n_out=10, norm='batch': nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, n_out)))


def test_a_storage_is_found_from_any_folder(few, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sweep = sweep_of(few, ['lr=0.05,0.1'], 'runs', storage='my.journal')
    path = sweep.path.absolute()
    (tmp_path/'else').mkdir()
    monkeypatch.chdir(tmp_path/'else')
    assert len(join_sweep(path).all_trials()) == 2 and not list((tmp_path/'else').glob('*.journal'))
    (tmp_path/'my.journal').unlink()
    before = (path/'trial-000'/'metrics.json').read_bytes()
    with pytest.raises(InputError, match='no trial was finished'): join_sweep(path)   # and none was trained in a folder of another
    assert 'knows of no such trial' in capsys.readouterr().out and (path/'trial-000'/'metrics.json').read_bytes() == before


@pytest.mark.parametrize('storage, expected', [('sqlite', 'sqlite'), ('journal', 'journal'), ('mysql://u@h/db', 'mysql://u@h/db'), ('sqlite:///:memory:', 'sqlite:///:memory:'),
                                               ('a.journal', '{}/a.journal'), ('sqlite:///b.db', 'sqlite:///{}/b.db'), ('sqlite:////x/b.db', 'sqlite:////x/b.db')])
def test_a_storage_in_a_file_is_named_from_everywhere(storage, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _absolute(storage) == expected.format(tmp_path)


@pytest.mark.parametrize('settings', [['epochs=1,2'], ['keep_best=True,False']])
def test_settings_that_the_sweep_itself_uses_are_swept(settings, few, tiny, tmp_path):
    table = sweep_trials(sweep_of(few, settings, tmp_path))
    key,_,values = settings[0].partition('=')
    assert set(map(str, table[key])) <= {*values.split(',')} and (table.state=='complete').all()
    assert trial_recipe(find_recipe('davidnet'), dict(keep_best=False)).keep_best   # the weights that are judged are kept


def test_networks_with_commas_between_them_are_choices():
    pytest.importorskip('optuna')
    space,shared = parse_space(find_recipe('davidnet'), ['arch=timm/resnet18,timm/resnet34'])
    assert space['arch'].choices == ('timm/resnet18', 'timm/resnet34') and not shared
    assert parse_space(find_recipe('speedrun'), ['lr=.1,.2', 'resize=24,32'])[1] == dict(resize='24,32')


def test_fewer_epochs_than_the_first_step_are_told_of(recwarn):
    with pytest.warns(UserWarning, match='come after the last of 20 epochs'): find_recipe('resnet18-steps', as_published=True, epochs=20)
    recwarn.clear()
    assert find_recipe('resnet18-steps', as_published=True, epochs=20, steps='15:0.1').epochs == 20 and find_recipe('resnet18-steps', as_published=True) and not recwarn.list


# --- shipped, predicted, validated

def test_a_folder_that_was_shipped_to_before_keeps_nothing_of_the_other_run(run, tmp_path):
    ship_run(load_run(run), tmp_path/'to')
    for name in 'score.json', 'decisions.csv': (tmp_path/'to'/name).write_text('{}')
    shipped = ship_run(load_run(run), tmp_path/'to')
    assert not (shipped.path/'score.json').exists() and not (shipped.path/'decisions.csv').exists() and shipped.lrs == load_run(run).lrs
    with pytest.raises(InputError, match='is the run itself'): ship_run(load_run(run), run)


def picture(path):
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(path)
    return path

def test_lists_of_images_are_read_whole_or_refused(run, tmp_path):
    picture(tmp_path/'a.png')
    (tmp_path/'list.csv').write_text('a.png\na.png\n')
    with pytest.raises(InputError, match='names an image and no column'): predict_images(tmp_path/'list.csv', run, tmp_path/'1.csv')
    (tmp_path/'latin.csv').write_bytes('file,label\na.png,x\ncaf\xe9.png,y\n'.encode('latin-1'))
    (tmp_path/'quote.csv').write_text('file,label\na.png,x\n"b.png,y\n')
    for name in 'latin.csv', 'quote.csv':
        with pytest.raises(InputError, match='is not a table'): predict_images(tmp_path/name, run, tmp_path/'2.csv')


def test_pictures_need_a_folder(run, tmp_path):
    with pytest.raises(InputError, match='is a file; name a folder'): predict_images(picture(tmp_path/'a.png'), run, tmp_path/'o.csv', cams=picture(tmp_path/'b.png'))


def test_unreadable_images_of_a_submission_are_told_of_without_a_column_that_is_not_there(run, tmp_path, capsys):
    (tmp_path/'bad.png').write_bytes(b'no')
    predict_command([str(tmp_path/'bad.png'), str(picture(tmp_path/'1.png'))], str(run), str(tmp_path/'o.csv'), kaggle=True)
    assert 'their labels are empty' in capsys.readouterr().out


def test_kaggles_own_table_is_validated_by_name(tmp_path, monkeypatch):
    picture(tmp_path/'1.png')
    (tmp_path/'trainLabels.csv').write_text('id,label\n1,cat\n')
    monkeypatch.setattr('cifar_cam.validate.data_path', lambda data: tmp_path/'trainLabels.csv')
    assert [(Path(f).name, c) for f,c in labelled_images('cifar10')] == [('1.png', 'cat')]
