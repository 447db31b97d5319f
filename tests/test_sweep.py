"A sweep judges on held-out images, goes on after a crash, is shared by processes, and ends with a recipe that trains"
import json, os, signal, sys, time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from torch import nn

optuna = pytest.importorskip('optuna')

from cifar_cam import search as module
from cifar_cam.core import InputError
from cifar_cam.models import MODELS
from cifar_cam.recipe import RECIPES, Recipe, change_recipe, chooses, find_recipe
from cifar_cam.run import load_run
from cifar_cam.search import Sweep, begin_sweep, trial_recipe, work_on_sweep
from cifar_cam.space import parse_space
from cifar_cam.sweep import (best_command, best_recipe, join_sweep, recipe_toml, sweep_command,
                             sweep_recipe, sweep_trials)
from cifar_cam.summary import run_command


def tiny(n_out=10, norm='batch'):
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(200, n_out))


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(MODELS, 'tiny', tiny)
    yield
    plt.close('all')


@pytest.fixture
def recipe(): return change_recipe(RECIPES['davidnet'], arch='tiny', epochs=2, bs=20, lr=.05, lr_min=.0005)


def states(sweep): return [t.state.name for t in sweep.study.trials]


def test_what_settings_stand_for(recipe):
    space,shared = parse_space(recipe, ['lr=0.05..1:log', 'bs=10..40:10', 'opt=sgd,adam', 'resize=24,32|32', 'epochs=3', 'cutout=0,8', 'keep_best=true,false'])
    lr,bs = space['lr'],space['bs']
    assert (lr.low, lr.high, lr.log) == (.05, 1., True) and (bs.low, bs.high, bs.step) == (10, 40, 10) and isinstance(bs, optuna.distributions.IntDistribution)
    assert space['opt'].choices == ('sgd', 'adam') and space['resize'].choices == ('24,32', '32') and space['cutout'].choices == (0, 8)
    assert space['keep_best'].choices == (True, False) and shared == dict(epochs=3)
    assert parse_space(recipe, ['resize=16,32'])[1] == dict(resize='16,32')   # a value of its own
    assert isinstance(parse_space(recipe, ['lr=1..2'])[0]['lr'], optuna.distributions.FloatDistribution)


@pytest.mark.parametrize('setting,told', [('lr', 'KEY=VALUE'), ('lr=', 'KEY=VALUE'), ('speed=1..2', 'speed'), ('lr=2..1', 'larger'), ('opt=sgd..adam', 'larger'),
    ('opt=sgd,nope', 'nope'), ('wd=0..1:log', 'above 0'), ('lr=.1..1:fast', 'step'), ('bs=1..64', 'bs'), ('lr=.1..x', 'lr'), ('lr=.1..1:0', 'step')])
def test_a_setting_that_cannot_be_is_one_line(recipe, setting, told):
    with pytest.raises(InputError, match=told) as e: parse_space(recipe, [setting])
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('kwargs,told', [(dict(settings=['epochs=2']), 'nothing is swept'), (dict(trials=0), 'trials'), (dict(seed=-1), 'seed'),
    (dict(data='nowhere'), 'nowhere'), (dict(storage='nodb://x/y'), 'nodb'), (dict(recipe='nope'), 'nope'), (dict(device='tpu9'), 'tpu9')])
def test_nothing_is_written_where_the_input_is_wrong(recipe, few, kwargs, told, tmp_path):
    with pytest.raises(InputError, match=told):
        sweep_recipe(**{**dict(recipe=recipe, settings=['lr=0.01..1'], data=few), **kwargs})
    assert not list(tmp_path.rglob('*'))


def test_a_trial_holds_images_out_whatever_it_trains_with(recipe):
    for r in recipe, change_recipe(recipe, keep_best=True), change_recipe(recipe, schedule='linear', lr=.1):
        assert 'best epoch' in chooses(trial_recipe(r, dict(bs=30)))


def test_a_sweep_from_its_beginning_to_its_end(recipe, few):
    sweep = sweep_recipe(recipe, ['lr=0.001..1:log', 'opt=nesterov,adam'], few, trials=5, prune=False)
    table = sweep_trials(sweep)
    assert states(sweep) == ['COMPLETE']*5 and (table.accuracy.diff().dropna() <= 0).all()
    assert sweep.study.trials[0].params == dict(lr=.05, opt='nesterov')   # the recipe itself
    for t in table.itertuples():
        run = load_run(sweep.path/t.folder)
        assert run.finished and len(run.dls.loaders) == 3 and run.history.valid_accuracy.iloc[-1] == t.accuracy and run.recipe.lr == t.lr
        assert not (run.path/'checkpoint.pt').exists()
    best = find_recipe(str(sweep.path/'best.toml'))
    assert (best.lr, best.opt) == (table.lr[0], table.opt[0]) and not chooses(best) and best == best_recipe(sweep)
    page = (sweep.path/'sweep.html').read_text()
    assert best_command(sweep) in page.replace('&#39;', "'") and page.count('<img') >= 2 and f'{100*table.accuracy[0]:.2f}' in page
    assert len(pd.read_csv(sweep.path/'trials.csv')) == 5 and 'test' not in list(table)


def test_the_test_images_decide_nothing(recipe, few, monkeypatch):
    sweep = begin_sweep(recipe, ['lr=0.01..1:log'], few, trials=2)
    work_on_sweep(sweep)
    for t in sweep_trials(sweep).itertuples():
        history = load_run(sweep.path/t.folder).history
        assert t.accuracy == history.valid_accuracy.iloc[-1] and 'test_accuracy' in history   # the third loader is the test set, the second is not


def test_the_same_seed_proposes_the_same(recipe, few):
    params = []
    for out in 'a', 'b':
        sweep = begin_sweep(recipe, ['lr=0.01..1:log', 'wd=1e-5..1e-3:log'], few, trials=3, out=out)
        work_on_sweep(sweep)
        params.append([(t.params, t.value) for t in sweep.study.trials])
    assert params[0] == params[1]


def test_a_trial_that_falls_behind_is_stopped(recipe, few, monkeypatch):
    sweep = begin_sweep(change_recipe(recipe, epochs=3), ['lr=0.001..0.1:log'], few, trials=2)
    monkeypatch.setattr(optuna.trial.Trial, 'should_prune', lambda self: self.number==1)
    work_on_sweep(sweep)
    table = sweep_trials(sweep)
    assert states(sweep) == ['COMPLETE', 'PRUNED'] and table.epochs.tolist() == [3, 1]
    stopped = sweep.path/table.folder[1]
    assert not load_run(stopped).finished and len(load_run(stopped).history) == 1 and not (stopped/'checkpoint.pt').exists()


def test_a_rate_that_diverges_is_an_answer_and_three_errors_are_not(recipe, few, monkeypatch):
    sweep = sweep_recipe(change_recipe(recipe, lr=1000., lr_min='find'), ['lr=0.05,900'], few, trials=2)
    wild = [t for t in sweep.study.trials if t.params['lr']==900]
    assert all(t.state.name in ('PRUNED', 'COMPLETE') for t in sweep.study.trials) and len(sweep.study.trials) == 2 and wild is not None
    def broken(*args): raise InputError('the disk is full; make room, and try again')
    monkeypatch.setattr(module, 'fit_recipe', broken)
    with pytest.raises(InputError, match='three trials.*disk is full'): sweep_recipe(recipe, ['lr=0.01..1'], few, trials=10)


def test_a_sweep_without_a_finished_trial_has_no_best(recipe, few):
    with pytest.raises(InputError, match='--resume'): best_recipe(begin_sweep(recipe, ['lr=0.01..1'], few))
    for path in '.', 'nowhere':
        with pytest.raises(InputError, match='no sweep'): Sweep(path)


def test_ctrl_c_loses_that_trial_and_says_how_to_go_on(recipe, few, monkeypatch):
    sweep,train,calls = begin_sweep(recipe, ['lr=0.01..1:log'], few, trials=3),module._train_trial,[]
    def stop(*args):
        calls.append(1)
        if len(calls)==2: raise KeyboardInterrupt
        return train(*args)
    monkeypatch.setattr(module, '_train_trial', stop)
    with pytest.raises(KeyboardInterrupt, match='cifar-cam sweep --resume'): join_sweep(sweep.path)
    assert states(sweep) == ['COMPLETE', 'FAIL']
    assert states(join_sweep(sweep.path)) == ['COMPLETE', 'FAIL', 'COMPLETE', 'COMPLETE']


def test_other_images_are_not_gone_on_with(recipe, few, tmp_path):
    import shutil
    shutil.copytree(few, 'data')
    sweep = begin_sweep(recipe, ['lr=0.01..1'], 'data', trials=1)
    next(Path('data').glob('train/*/*.png')).unlink()  # an image, not a mask
    with pytest.raises(InputError, match='put those back'): join_sweep(sweep.path)


def test_toml_of_a_recipe_is_that_recipe():
    for r in RECIPES.values():
        changed = change_recipe(r, name='mine', lr=.123456789012345, published=None, published_as='')
        for base in r.name, None, 'nope':
            Path('mine.toml').write_text(recipe_toml(changed, base))
            assert find_recipe('mine.toml') == changed


def test_a_best_recipe_has_no_setting_without_effect_in_its_file(recipe):
    best = change_recipe(recipe, name='mine', schedule='one-cycle', patience=7, padding='zeros', augment='none')   # as a sweep over schedules leaves it
    for base in 'davidnet', None:
        Path('mine.toml').write_text(recipe_toml(best, base))
        again = find_recipe('mine.toml')
        assert {k for k,v in vars(again).items() if v != getattr(best, k)} == {'patience', 'padding'}


@pytest.mark.parametrize('settings', [['lr=0.1..0.5:0.1'], ['lr=0.05..1:0.05', 'wd=0..0.001:0.0001'], ['bs=10..40:10', 'lr=0.1,0.4'], ['lr=0.4..1:0.2']])
def test_the_first_trial_is_the_recipe_itself_on_any_grid(recipe, few, settings):
    own = change_recipe(recipe, lr=.4, wd=.0003)
    first, = begin_sweep(own, settings, few, trials=1).all_trials()
    asked = first.system_attrs['fixed_params']
    assert asked == {k: getattr(own, k) for k in asked} and len(asked) == len(settings)
    assert not begin_sweep(own, ['lr=0.15..0.55:0.1'], few, trials=1, out='other').all_trials()   # not on this one


def test_a_setting_that_no_trial_would_use_is_refused(recipe, few):
    for settings,told in ((['patience=2..5'], "patience=2: acts only with schedule='plateau'"), (['lr=0.1,0.2', 'steps=3:0.1'], 'acts only'),
                          (['schedule=steps,linear'], 'needs steps'), (['schedule=linear,cosine', 'div=10..20'], 'div=10')):
        with pytest.raises(InputError, match=told): begin_sweep(recipe, settings, few)
    assert not Path('runs').exists()
    for settings in ['schedule=plateau,linear', 'patience=2..5'], ['schedule=plateau', 'patience=2..5'], ['schedule=steps,linear', 'steps=1:0.1|1:0.5'], ['augment=none,alternating', 'cutout=0,4,6']:
        assert begin_sweep(recipe, settings, few).space


def test_a_sweep_over_a_table_in_memory(recipe, few):
    files = [f for f in sorted(Path(few).glob('*/*/*.png')) if f.parent.parent.name in ('train', 'test')]
    table = pd.DataFrame(dict(file=[str(f) for f in files], label=[f.parent.name for f in files], split=[f.parent.parent.name for f in files]))
    sweep = sweep_recipe(change_recipe(recipe, epochs=1), ['lr=0.01,0.1'], table, trials=1)
    assert states(sweep) == ['COMPLETE'] and Path(sweep.plan['data']).is_file() and f"--data {sweep.plan['data']}" in best_command(sweep)


def test_the_command_of_a_sweep_runs_the_files_of_own_networks(few, capsys, undrawn):
    "Those that a TOML file names, and those of --module"
    import shlex
    from cifar_cam.cli import main
    Path('own').mkdir()
    for name in 'net_a', 'net_b':
        Path(f'own/{name}.py').write_text("from torch import nn\nfrom cifar_cam.models import MODELS\n"
            f"MODELS['{name}'] = lambda n_out=10, norm='batch': nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n_out))\n")
    Path('own/mine.toml').write_text('arch = "net_a"\nmodule = "net_a.py"\nepochs = 1\nbs = 20\nlr = 0.1\n')
    words = ['sweep', 'own/mine.toml', '--module', 'own/net_b.py', '--set', 'arch=net_a,net_b', '--trials', '2', '--data', str(few)]
    try:
        assert main(words) == 0
        *_,command,path = capsys.readouterr().out.strip().splitlines()
        named = [str(Path(f'own/{n}.py').absolute()) for n in ('net_a', 'net_b')]
        assert Sweep(path).plan['modules'] == named
        with pytest.raises(InputError) as e: best_recipe(begin_sweep('own/mine.toml', ['arch=net_a,net_b'], few))   # says how to go on
        assert all(f'--module {f}' in str(e.value) for f in named)
        for n in 'net_a', 'net_b': del MODELS[n]
        assert main(shlex.split(command)[1:] + ['--out', 'best']) == 0   # as a new process would
        run = load_run(capsys.readouterr().out.strip().splitlines()[-1])
        again = shlex.split(run_command(run)[0])
        assert again[again.index('--module') + 1] == str(Path(f'own/{run.recipe.arch}.py').absolute())
    finally:
        for n in 'net_a', 'net_b': MODELS.pop(n, None)


def test_the_finders_pick_stands_in_the_recipe(recipe, colours):
    sweep = sweep_recipe(change_recipe(recipe, lr='find', lr_min='find', bs=8), ['wd=1e-5..1e-3:log'], colours, trials=1)
    found = json.loads((sweep.path/'trial-000'/'lrs.json').read_text())
    assert [best_recipe(sweep).lr_min, best_recipe(sweep).lr] == found and not chooses(best_recipe(sweep))


# --- processes

def worker(path, kill_at):
    "Takes part in a sweep; dies in the second epoch of a trial with a number of at least `kill_at`"
    MODELS['tiny'] = tiny
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stderr = open(os.devnull, 'w')
    after_epoch = module.JudgeTrial.after_epoch
    def mortal(self):
        after_epoch(self)
        if kill_at is not None and self.trial.number >= kill_at: os.kill(os.getpid(), signal.SIGKILL)
    module.JudgeTrial.after_epoch = mortal
    join_sweep(path)


@pytest.mark.parametrize('storage', ['sqlite', 'journal'])
@pytest.mark.slow
def test_two_processes_share_a_sweep_and_one_that_is_killed_loses_its_trial_only(recipe, few, fork, storage):
    sweep = begin_sweep(recipe, ['lr=0.01..1:log'], few, trials=6, storage=storage, prune=False)
    first,second = (fork.Process(target=worker, args=(sweep.path.absolute(), at)) for at in (None, 1))
    first.start()
    second.start()
    second.join(900)
    first.join(900)
    assert first.exitcode == 0 and second.exitcode == -signal.SIGKILL
    done = states(sweep)
    assert done.count('COMPLETE') >= 5 and set(done) <= {'COMPLETE', 'FAIL', 'RUNNING'} and len(done) - done.count('COMPLETE') == 1
    finished = join_sweep(sweep.path)   # the lost one is made up for
    done = states(finished)
    assert done.count('COMPLETE') == 6 and done.count('FAIL') == 1 and (sweep.path/'best.toml').exists()
    params = [t.params['lr'] for t in finished.study.trials]
    assert len(set(params)) == 7   # nobody trained what another one did


def test_the_shell_ends_with_the_recipe_the_command_and_the_folder(recipe, few, capsys):
    Path('mine.toml').write_text(recipe_toml(recipe))
    sweep_command('mine.toml', ['opt=sgd,adam', 'epochs=1'], trials=2, data=str(few))
    lines = capsys.readouterr().out.strip().splitlines()
    path = Path(lines[-1])
    assert (path/'sweep.html').exists() and lines[-2].startswith('cifar-cam train') and 'trial 0: opt=' in '\n'.join(lines)
    sweep_command(resume=str(path))
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(path)
    for kwargs,told in (dict(resume=str(path), set=['lr=1..2']), '--set'), ({}, 'recipe'), (dict(recipe='davidnet'), 'nothing is swept'):
        with pytest.raises(InputError, match=told): sweep_command(**{'data': str(few), **kwargs})


@pytest.mark.slow
def test_torchrun_starts_processes_that_share_a_sweep(few):
    "As docs/after-training.md starts it"
    import subprocess
    words = ['sweep', 'speedrun', '--set', 'lr=0.01..1:log', '--set', 'epochs=1', '--set', 'bs=10', '--trials', '4', '--data', few, '--out', 'runs']
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'cifar_cam', *map(str, words)], capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(Path(module.__file__).parents[1]), OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr
    path, = Path('runs').iterdir()
    sweep = Sweep(path)
    assert states(sweep) == ['COMPLETE']*4 and len({t.user_attrs['process'][1] for t in sweep.study.trials}) == 2
    assert len({t.params['lr'] for t in sweep.study.trials}) == 4 and (path/'best.toml').exists() and done.stdout.strip().splitlines()[-1] == str(path)
