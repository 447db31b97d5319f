"The published logs, replayed: fed with a log's own losses or accuracies, each as-published schedule gives the log's learning rates."
from types import SimpleNamespace

import numpy as np
import pytest

from cifar_cam.all import (EXPERIMENTS, InputError, PUBLISHED_RECIPES, Plateau, combined_cos, find_recipe, load_published,
                           read_recipe, read_steps, recipe_dls, run_recipe, shapes_path, show_recipe, step_schedule)
from cifar_cam.cli import main
from cifar_cam.models import MODELS


class Opt:
    "What a plateau asks of an optimizer"
    def __init__(self, lr): self.hypers = [dict(lr=lr)]
    def set_hyper(self, name, values): self.hypers[0][name] = values[0] if isinstance(values, list) else values


def replayed(r, values):
    "The learning rate of each epoch, where epoch i ends with `values[i]`"
    opt,rates = Opt(r.lr),[]
    cb = Plateau(r.factor, r.patience, r.floor, r.watch)
    name = f'valid_{r.watch}'
    recorder = SimpleNamespace(metric_names=['epoch', name, 'time'], values=[])
    cb.learn = SimpleNamespace(opt=opt, recorder=recorder, epoch=0, create_opt=lambda: None)
    cb.before_fit()
    for i,v in enumerate(values):
        rates.append(opt.hypers[0]['lr'])
        recorder.values.append([v])
        cb.learn.epoch = i
        cb.after_epoch()
    return rates


@pytest.mark.parametrize('name, column', [('resnet18-plateau', 'test_loss'), ('resnet18-albumentations', 'test_accuracy')])
def test_a_plateau_falls_where_the_log_falls(name, column):
    log,r = load_published(name),find_recipe(name, as_published=True)
    rates = replayed(r, log[column].tolist())
    np.testing.assert_allclose(rates, log.lr, rtol=2e-6)   # the log prints 0.005123
    assert len(set(rates)) == len(set(log.lr)) == {'resnet18-plateau': 3, 'resnet18-albumentations': 2}[name]


def test_no_count_of_losses_gives_the_log_of_albumentations():
    log,r = load_published('resnet18-albumentations'),find_recipe('resnet18-albumentations', as_published=True)
    for patience in range(1, 12):
        rates = replayed(find_recipe(r.name, patience=patience, watch='loss'), log.test_loss.tolist())
        assert not np.allclose(rates, log.lr)


@pytest.mark.parametrize('name, digits', [('resnet18-onecycle', 5), ('resnet18-layernorm', 5)])
def test_a_cycle_has_the_rates_of_the_log_within_its_digits(name, digits):
    log,r = load_published(name),find_recipe(name, as_published=True)
    schedule = combined_cos(r.pct_start, r.lr/r.div, r.lr, r.lr/1e5)   # as `fit_one_cycle` makes it
    ours = np.array([float(schedule(min(1, e/r.epochs))) for e in log.epoch])
    np.testing.assert_allclose(ours, log.lr, atol=1.5*10**-digits, rtol=2e-3)


def test_steps_fall_after_the_epoch_they_name():
    r = find_recipe('resnet18-steps', as_published=True)
    f = step_schedule(r.lr, read_steps(r.steps), r.epochs)
    assert [f((e - .5)/r.epochs) for e in (1, 46, 47, 50)] == pytest.approx([r.lr, r.lr, r.lr/10, r.lr/10])
    for text in '4', '4:', 'a:b', '0:0.1', '4:-1', '4:0.1;5:0.1':
        with pytest.raises(InputError, match='steps='): find_recipe('davidnet', steps=text)


def test_published_settings_are_those_of_the_table():
    "Every cell that a log or its text gives"
    get = lambda name: find_recipe(name, as_published=True)
    plateau,cycle,david,albu,norm = map(get, ('resnet18-plateau', 'resnet18-onecycle', 'davidnet', 'resnet18-albumentations', 'resnet18-layernorm'))
    assert (plateau.lr, plateau.factor, plateau.patience, plateau.watch, plateau.wd, plateau.bs, plateau.epochs, plateau.l1 > 0) == (.0055, .9314545, 1, 'loss', 0, 64, 50, True)
    assert plateau.floor == pytest.approx(.0047917, abs=1e-7) and plateau.keep_best
    assert (cycle.padding, cycle.cutout, cycle.flip, cycle.bs, cycle.lr, cycle.div, cycle.epochs, cycle.label_smoothing) == ('zeros', 16, False, 128, .37, 8, 24, 0)
    assert (david.padding, david.flip, david.cutout, david.epochs, david.bs, david.lr, david.lr_min) == ('zeros', True, 8, 24, 512, 'find', 'find')
    assert david.pct_start*david.epochs == pytest.approx(5) and MODELS[david.arch]().scale.factor == 1
    assert (albu.lr, albu.factor, albu.patience, albu.watch, albu.bs, albu.epochs) == (.01, .5, 3, 'accuracy', 64, 50)
    assert (norm.opt, norm.epochs, norm.bs, norm.lr, norm.pct_start, norm.norm) == ('adam', 40, 256, .01, .3, 'layer')


def test_an_experiment_without_a_published_log_says_so():
    with pytest.raises(InputError, match='speedrun: was not published; .*davidnet'): find_recipe('speedrun', as_published=True)


def test_a_recipe_is_shown_beside_the_published_one(capsys):
    for name in EXPERIMENTS:
        table = show_recipe(name)
        assert {'setting', 'published', 'log', 'ours', 'why'} <= set(table) and len(table) > 3
    assert main(['show', 'resnet18-plateau-as-published']) == 0 and 'replayed with the test losses' in capsys.readouterr().out
    assert main(['recipes']) == 0 and 'ResNet18 + plateau + L1' in capsys.readouterr().out


@pytest.mark.parametrize('name', PUBLISHED_RECIPES)
def test_every_published_variant_trains(tmp_path, narrow, monkeypatch, name, undrawn):
    for arch in 'resnet18', 'davidnet-unscaled': monkeypatch.setitem(MODELS, arch, narrow)
    few = shapes_path(tmp_path, n_train=100, n_test=50)
    run = run_recipe(name, few, tmp_path, epochs=1, bs=8)
    assert run.finished and run.recipe.name == name and run.env['published_protocol'] and 'TEST' in run.chosen_on or not run.chosen_on.count('chosen on')


def test_padding_and_flips_are_as_asked(tmp_path):
    few = shapes_path(tmp_path, n_train=100, n_test=50)
    tfms = lambda **changes: {type(t).__name__: t for t in recipe_dls(find_recipe('davidnet', bs=10, **changes), few).train.after_batch.fs}
    assert tfms(padding='zeros')['PadCrop'].mode == 'constant' and tfms()['PadCrop'].mode == 'reflect'
    assert 'HorizontalFlip' not in tfms(flip=False) and 'HorizontalFlip' in tfms()


def test_a_pipeline_of_albumentations_own_comes_from_a_file(tmp_path):
    import albumentations as A
    A.save(A.Compose([A.HorizontalFlip(p=1)]), tmp_path/'flip.json')
    few = shapes_path(tmp_path, n_train=100, n_test=50)
    r = find_recipe('resnet18-albumentations', bs=10, pipeline=str(tmp_path/'flip.json'))
    recipe_dls(r, few).train.one_batch()
    (tmp_path/'bad.json').write_text('{}')
    with pytest.raises(InputError, match='bad.json: is no pipeline of albumentations'): recipe_dls(find_recipe(r.name, pipeline=str(tmp_path/'bad.json')), few)


def test_a_recipe_names_code_that_the_shell_runs_and_a_run_folder_does_not(tmp_path, capsys, monkeypatch, undrawn):
    few = shapes_path(tmp_path, n_train=100, n_test=50)
    (tmp_path/'net.py').write_text("from torch import nn\nfrom cifar_cam.models import MODELS\n"
        "MODELS['mine'] = lambda n_out=10, norm='batch': nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_out))\n")
    toml = tmp_path/'mine.toml'
    toml.write_text('arch = "mine"\nepochs = 1\nbs = 20\nlr = 0.05\nmodule = ["net.py"]\n')
    try:
        assert main(['train', str(toml), '--data', str(few), '--out', str(tmp_path/'runs')]) == 0
        folder = capsys.readouterr().out.splitlines()[-1]
        assert 'net.py' not in ''.join(p.read_text() for p in (tmp_path/'runs').rglob('*.json'))
    finally: MODELS.pop('mine', None)
    for words in ['lr-find', str(toml), '--data', str(few)], ['crossfit', str(toml), '--folds', '2', '--data', str(few)], \
                 ['explain', str(next(few.glob('test/*/*.png'))), '--run', folder, '--min-px', '1', '--module', str(tmp_path/'net.py')]:
        try: assert main([*words, '--out', str(tmp_path/'others')]) == 0, capsys.readouterr().err
        finally: MODELS.pop('mine', None)
    assert main(['report', folder]) == 2 and "arch='mine'" in capsys.readouterr().err
    assert main(['report', folder, '--module', str(tmp_path/'gone.py')]) == 2 and 'gone.py: no such file' in capsys.readouterr().err
    toml.write_text('base = "davidnet"\nmodule = 5\n')
    assert main(['train', str(toml)]) == 2 and 'module=5' in capsys.readouterr().err
    with pytest.raises(InputError): read_recipe(tmp_path/'none.toml')
