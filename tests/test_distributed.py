"""Training in several processes: `torchrun` starts two on this machine with the gloo backend. Most tests share one
launch, since a launch takes 15 seconds"""
import json, os, random, shutil, subprocess, sys, textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.vision.all import TfmdDL
from safetensors.torch import load_file

import cifar_cam
from cifar_cam.core import InputError
from cifar_cam.loaders import cifar_dls
from cifar_cam.models import MODELS
from cifar_cam.recipe import change_recipe, Recipe, RECIPES
from cifar_cam.run import check_parts, load_run
from cifar_cam.experiment import run_recipe, train_run
from cifar_cam.shapes import shapes_path
from cifar_cam.core import save_atomically
from cifar_cam.parallel import from_first, one_process, shard_loader

# A network whose numbers do not depend on which images stand beside one another, and a run without its pictures
TINY = textwrap.dedent('''
    import matplotlib; matplotlib.use('Agg')
    import cifar_cam.experiment, cifar_cam.precision, cifar_cam.run
    import fastprogress.fastprogress; fastprogress.fastprogress.NO_BAR = True
    from torch import nn
    from cifar_cam.models import MODELS
    MODELS['tiny'] = lambda n_out=10, norm='batch': nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(),
                                                                  nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, n_out))
    cifar_cam.precision.has_bf16 = lambda device: False
    cifar_cam.experiment.draw_run = cifar_cam.experiment.write_report = lambda run: None
''')
SETTINGS = dict(name='tiny', arch='tiny', epochs=3, bs=32, augment='none', schedule='plateau', patience=1, keep_best=True, hold_out=.09)
TWO = TINY + textwrap.dedent('''
    import json, os, sys, torch
    from pathlib import Path
    from fastai.vision.all import Callback, get_model, rank_distrib
    from cifar_cam.core import InputError
    from cifar_cam.experiment import run_recipe, run_seeds, train_run
    from cifar_cam.learner import SeedEpochs
    from cifar_cam.callbacks import StopOnNaN
    from cifar_cam.recipe import Recipe
    from cifar_cam.cli import main
    data,out,stopped = map(Path, sys.argv[1:])
    rank,r,note,states = rank_distrib(),RECIPE,{},[]

    seed = SeedEpochs.before_train
    def before_train(self):
        seed(self)
        states.append((torch.initial_seed(), self.dls.train.rng.getstate()[1][:3]))
    SeedEpochs.before_train = before_train

    learns,dtypes,fit = [],[],cifar_cam.run.fit_recipe
    def fit_recipe(learn, *args):
        learns.append(learn)
        hook = get_model(learn.model)[0].register_forward_hook(lambda module, inputs, out: dtypes.append((module.training, str(out.dtype))))
        fit(learn, *args)
        hook.remove()
    cifar_cam.run.fit_recipe = fit_recipe
    run = run_recipe(r, data, out/'together')
    [learn] = learns
    note.update(folder=run.path.name, states=states[-r.epochs:], values=[list(v) for v in learn.recorder.values], lrs=learn.recorder.lrs,
                model=type(learn.model).__name__, loaders=[dl.n for dl in learn.dls.loaders])
    note['resumed'] = train_run(stopped).path.name
    check = StopOnNaN.after_loss
    def no_number(self):   # in one of the processes
        if rank and self.iter==3: self.learn.loss_grad = self.loss_grad*float('nan')
        check(self)
    StopOnNaN.after_loss = no_number
    try: run_recipe(r, data, out/'diverged', lr=.01)
    except InputError as e: note['diverged'] = str(e)
    StopOnNaN.after_loss = check
    note['seeds'] = run_seeds(r, data, out, 5, 3, epochs=1, lr=.02).name
    cifar_cam.precision.has_bf16 = lambda device: True
    dtypes.clear()
    run = run_recipe(r, data, out/'bf16', epochs=1, lr=.02)
    note['dtypes'] = sorted({dtype for training,dtype in dtypes if training})
    note['bf16'] = 'forward' in vars(learns[-1].model)
    (out/f'rank{rank}.json').write_text(json.dumps(note))
    note['exit'] = main(['train', 'davidnet', '--data', str(out/'nowhere'), '--out', str(out/'nothing')])
    (out/f'rank{rank}.json').write_text(json.dumps(note))
''').replace('RECIPE', f'Recipe(**{SETTINGS})')


def torchrun(*words, n=2, timeout=3600):
    env = dict(os.environ, PYTHONPATH=str(Path(cifar_cam.__file__).parents[1]), OMP_NUM_THREADS='1')
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n), *map(str, words)],
                          env=env, capture_output=True, text=True, timeout=timeout)


def near(a, b, tol=1e-4): return np.allclose(a, b, rtol=tol, atol=tol)


def same_history(a, b, tol=1e-4):
    a,b = (h.drop(columns=['train_seconds', 'seconds']) for h in (a, b))
    return list(a.columns) == list(b.columns) and near(a, b, tol)


def same_weights(a, b, tol=1e-4):
    a,b = (load_file(run.path/'weights.safetensors') for run in (a, b))
    return a.keys() == b.keys() and all(near(a[k], b[k], tol) for k in a)


# --- parts of batches, without processes

@pytest.mark.parametrize('in_memory, workers, n', [(True, 0, 2), (True, 0, 3), (False, 0, 3), (False, 2, 2)])
def test_the_parts_of_each_batch_are_the_batch(colours, in_memory, workers, n):
    "The parts that the processes load add up to the batches of one process, plus padding"
    dls = cifar_dls(colours, bs=36, hold_out=31, in_memory=in_memory, num_workers=workers)
    for dl in dls.loaders:
        parts = [shard_loader(dl, rank, n) for rank in range(n)]
        for o in [dl, *parts]: o.rng = random.Random(7)   # what `SeedEpochs` does in each process
        batches = [[torch.cat(o) for o in zip(*b)] for b in zip(*parts)]
        dl.rng = random.Random(7)
        assert len(batches) == len(dl) == len(parts[0])
        for (x,y),(xs,ys) in zip(dl, batches):
            k = len(y)
            assert torch.equal(xs[:k], x) and torch.equal(ys[:k], y) and len(ys) - k < n


@pytest.mark.parametrize('size, bs, n', [(11, 4, 2), (10, 4, 4), (9, 4, 3), (1, 8, 8), (5, 5, 2), (64, 8, 8)])
def test_every_image_is_in_one_part_padding_aside(size, bs, n):
    "Every image goes to one of the processes, all get equally many, and only padding is repeated"
    parts = [shard_loader(TfmdDL(range(size), bs=bs), rank, n) for rank in range(n)]
    assert {len(o.get_idxs()) for o in parts} == {parts[0].n} and set().union(*(o.get_idxs() for o in parts)) == set(range(size))
    assert sum(o.n for o in parts) - size < n*-(-size//bs)
    dropped = [i for rank in range(n) for i in shard_loader(TfmdDL(range(size), bs=bs, drop_last=True), rank, n).get_idxs()]
    if bs % n == 0: assert sorted(dropped) == list(range(size//bs*bs))


def test_a_batch_that_does_not_divide_is_refused(shapes):
    "A batch size that does not divide evenly among the processes is refused"
    r = change_recipe(RECIPES['davidnet'], bs=32)
    for n in 0, 1, 2: check_parts(r, n)
    with pytest.raises(InputError, match='bs=32: does not divide among 3 processes'): check_parts(r, 3)


def test_one_process_does_not_wait_for_others_and_the_first_writes(tmp_path, monkeypatch):
    "Only the first process writes files; inside `one_process()` each works alone and waits for no other"
    monkeypatch.setenv('RANK', '1'); monkeypatch.setenv('WORLD_SIZE', '2')
    save_atomically(lambda f: f.write_text('x'), tmp_path/'file')
    assert not list(tmp_path.iterdir())
    with one_process():
        assert from_first(lambda: 3) == 3   # else it would look for the others here
        save_atomically(lambda f: f.write_text('x'), tmp_path/'file')
    assert (tmp_path/'file').read_text() == 'x' and os.environ['RANK'] == '1' and os.environ['WORLD_SIZE'] == '2'


# --- two processes

@pytest.fixture(scope='module')
def tiny():
    "The same network and runs without pictures in this process"
    import cifar_cam.experiment, cifar_cam.precision
    import fastprogress.fastprogress as fastprogress
    with pytest.MonkeyPatch.context() as mp:
        mp.setitem(MODELS, 'tiny', None)
        for m,name in (cifar_cam.experiment, 'draw_run'), (cifar_cam.experiment, 'write_report'), (cifar_cam.precision, 'has_bf16'), (fastprogress, 'NO_BAR'):
            mp.setattr(m, name, None)
        exec(TINY, {})
        yield


@pytest.fixture(scope='module')
def whole(shapes, tiny, tmp_path_factory):
    "A run in one process"
    return run_recipe(Recipe(**SETTINGS), shapes, tmp_path_factory.mktemp('whole'))


class Dead(BaseException): pass


@pytest.fixture(scope='module')
def stopped(shapes, tiny, tmp_path_factory):
    "A run in one process that ended after its first epoch"
    from cifar_cam.learner import Checkpoint
    save,out = Checkpoint.after_epoch,tmp_path_factory.mktemp('stopped')
    def die(self): save(self); raise Dead
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(Checkpoint, 'after_epoch', die)
        with pytest.raises(Dead): run_recipe(Recipe(**SETTINGS), shapes, out)
    return next(out.iterdir())


@pytest.fixture(scope='module')
def two(shapes, stopped, tmp_path_factory):
    "What two processes did: their folder, what each noted, what was printed"
    out = tmp_path_factory.mktemp('two')
    (out/'two.py').write_text(TWO)
    done = torchrun(out/'two.py', shapes, out, stopped)
    assert done.returncode == 0, done.stderr[-5000:]
    return out,[json.loads((out/f'rank{i}.json').read_text()) for i in range(2)],done


def test_two_processes_give_the_numbers_of_one(two, whole):
    "Two processes give the same history, weights and metrics as one, up to rounding"
    run = load_run(next((two[0]/'together').iterdir()))
    assert run.lrs == whole.lrs and run.env['processes'] == 2 and whole.env['processes'] == 1
    assert same_history(run.history, whole.history) and same_weights(run, whole)
    assert run.metrics.keys() == whole.metrics.keys()
    for k in 'loss', 'accuracy', 'accuracy_flip_tta', 'accuracy_tta', 'calibration_error': assert run.metrics[k] == pytest.approx(whole.metrics[k], rel=1e-4, abs=1e-4)


def test_all_processes_decide_alike_and_know_the_folder(two):
    "All processes use the same run folder and learning rates and see identical validation results"
    a,b = two[1]
    assert a['folder'] == b['folder'] and a['lrs'] == b['lrs']
    assert [v[2:] for v in a['values']] == [v[2:] for v in b['values']]   # of the validation images, to the last bit
    assert len(list((two[0]/'together').iterdir())) == 1


def test_each_process_draws_its_own_augmentation_in_the_order_of_all(two):
    "Each process draws its own random augmentations, and all shuffle the images in the same order"
    (draws_a,order_a),(draws_b,order_b) = (zip(*note['states']) for note in two[1])
    assert order_a == order_b and len(set(draws_a + draws_b)) == 2*SETTINGS['epochs']


def test_nothing_is_left_on_the_learner(two):
    "After training, the learner has its own network and data loaders back, not the distributed ones"
    for note in two[1]: assert note['model'] == 'Sequential' and note['loaders'] == [273, 27, 100]


def test_a_checkpoint_of_several_processes_is_that_of_one(two, whole):
    "A checkpoint written by several processes has the same entries as one written by a single process"
    a,b = (torch.load(p/'checkpoint.pt', weights_only=True) for p in (next((two[0]/'together').iterdir()), whole.path))
    assert a['model'].keys() == b['model'].keys() and a.keys() == b.keys() and a['epochs'] == b['epochs']


def test_a_run_of_one_process_goes_on_in_two(two, stopped, whole):
    "A run started in one process resumes in two, to the same history and weights up to rounding"
    run = load_run(stopped)
    assert run.finished and len(run.history) == SETTINGS['epochs']
    assert same_history(run.history, whole.history) and same_weights(run, whole)


def test_a_loss_that_is_no_number_stops_all_at_the_same_step(two):
    "If the loss becomes NaN in one process, all processes stop at the same step"
    a,b = (note['diverged'] for note in two[1])
    assert a == b and 'the loss is nan in epoch 0, step 3' in a


def test_seeds_are_shared_out(two, shapes, tiny, tmp_path):
    "`run_seeds` shares the seeds among the processes, and each run has the metrics of a run on its own"
    path = two[0]/two[1][1]['seeds']
    s = json.loads((path/'summary.json').read_text())
    runs = [load_run(path/n) for n in s['runs']]
    assert [o.env['seed'] for o in runs] == [5, 6, 7] and s['accuracies'] == [o.metrics['accuracy'] for o in runs]
    alone = run_recipe(Recipe(**SETTINGS), shapes, tmp_path, seed=6, epochs=1, lr=.02)   # the second process had that seed
    assert runs[1].metrics == alone.metrics and runs[1].env['processes'] == 1


def test_bfloat16_trains_in_two_processes(two):
    "Two processes train in bfloat16, to a validation loss near that of float32"
    one,bf16 = (load_run(next(p for p in (two[0]/d).iterdir() if p.is_dir())) for d in (two[1][0]['seeds'], 'bf16'))
    assert two[1][0]['bf16'] is two[1][1]['bf16'] is False and bf16.finished
    assert abs(bf16.history.valid_loss[0] - one.history.valid_loss[0]) < .3
    for note in two[1]: assert note['dtypes'] == ['torch.bfloat16']


def test_one_process_speaks(two):
    "An error that all processes meet is printed once, and each process returns exit code 2"
    out,notes,done = two
    assert [n['exit'] for n in notes] == [2, 2] and not (out/'nothing').exists()
    assert done.stderr.count('cifar-cam: ') == 1 and 'nowhere: no such file or folder' in done.stderr


# --- launches of their own

@pytest.mark.slow
def test_the_command_in_two_processes_prints_as_in_one(tmp_path):
    "Under `torchrun`, `cifar-cam train` prints each result and each error once"
    few = shapes_path(tmp_path, n_train=100, n_test=20)
    words = ['-m', 'cifar_cam', 'train', 'davidnet', '--data', few, '--epochs', 1, '--bs', 10, '--set', 'lr=.05', '--set', 'lr_min=.005', '--out', tmp_path/'runs']
    done = torchrun(*words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    [path] = (tmp_path/'runs').iterdir()
    assert lines[-1] == str(path) and sum('accuracy' in l and '%' in l for l in lines) == 1 and (path/'figures'/'cams.png').exists() and (path/'report.html').exists()
    assert len([l for l in lines if l.startswith('0 ')]) == 1, lines
    done = torchrun(*words, '--runs', 2)
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip().splitlines()[-1])/'summary.json').exists()
    for wrong in ['--colour'], ['--bs', 9]:   # found before the processes meet, and after
        done = torchrun(*words, *wrong)
        assert done.returncode == 1 and done.stderr.count('cifar-cam: ') == 1 and not done.stdout.strip(), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('augment', ['none', 'albumentations'])   # in memory, and from files
def test_a_killed_worker_ends_all_and_the_run_goes_on_in_one_process_or_three(shapes, tiny, tmp_path, augment):
    "If a worker is killed, all processes end, and the run resumes in one process or in three"
    r = Recipe(**SETTINGS | dict(augment=augment, bs=48, lr=.05))
    script = tmp_path/'killed.py'
    script.write_text(TINY + textwrap.dedent(f'''
        import os, signal, sys
        from cifar_cam.experiment import run_recipe, train_run
        from cifar_cam.callbacks import StopOnNaN
        from cifar_cam.recipe import Recipe
        check = StopOnNaN.after_loss
        def after_loss(self):
            if len(sys.argv)==1 and self.rank and self.epoch==1 and self.iter==3: os.kill(os.getpid(), signal.SIGKILL)
            check(self)
        StopOnNaN.after_loss,StopOnNaN.rank = after_loss,int(os.environ['RANK'])
        if len(sys.argv) > 1: train_run(sys.argv[1])
        else: run_recipe({r!r}, {str(shapes)!r}, {str(tmp_path/'killed')!r})
    '''))
    done = torchrun(script, timeout=120)
    assert done.returncode == 1 and 'SIGKILL' in done.stderr
    [path] = (tmp_path/'killed').iterdir()
    assert len(load_run(path).history) == 1 and not load_run(path).finished
    shutil.copytree(path, tmp_path/'three')
    one = train_run(path)
    done = torchrun(script, tmp_path/'three', n=3)
    assert done.returncode == 0, done.stderr
    three = load_run(tmp_path/'three')
    assert one.finished and three.finished and len(one.history) == len(three.history) == r.epochs
    if augment=='none': assert same_history(one.history, three.history) and same_weights(one, three)
