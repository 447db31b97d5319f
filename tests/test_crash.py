"""Training that is killed, interrupted or goes wrong leaves whole files only, and `cifar-cam train --resume RUN` ends
with the same numbers as an uninterrupted run"""
import os, random, shlex, signal, sys, threading, time
from itertools import count
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from cifar_cam.cli import main
from cifar_cam.core import remove_leftovers
from cifar_cam.loaders import cached_images
from cifar_cam.models import MODELS
from cifar_cam.run import fit_run, load_run, new_run_folder
from cifar_cam.shapes import shapes_path
from cifar_cam.learner import SeedEpochs

RECIPE = '''arch = "tiny"
epochs = 3
bs = 10
lr = "find"
schedule = "plateau"
patience = 1
keep_best = true
'''


def tiny(n_out=10, norm='batch'):
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
                         nn.Dropout(.1), nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(200, n_out))


# --- in the process that is stopped

def at_write(n, stage, signum, folder):
    "Stop at the `n`th file that gets its name in `folder`: when the file is half written, before it gets the name, or after"
    replace,writes = os.replace,count()
    def mortal(src, dst):
        here = Path(dst).is_relative_to(folder) and next(writes)==n
        if here and stage=='half': os.truncate(src, os.path.getsize(src)//2)
        if not here or stage=='after': replace(src, dst)
        if here: os.kill(os.getpid(), signum)
        if here and stage!='after': replace(src, dst)
    os.replace = mortal


def in_epoch(n, signum):
    "Stop when epoch `n` begins to train"
    before = SeedEpochs.before_train
    def mortal(self):
        before(self)
        if self.epoch==n and not hasattr(self.learn, 'lr_finder'): os.kill(os.getpid(), signum)
    SeedEpochs.before_train = mortal


def note_writes(file, folder):
    replace = os.replace
    def noting(src, dst):
        replace(src, dst)
        if Path(dst).is_relative_to(folder):
            with open(file, 'a') as f: print(Path(dst).name, file=f)
    os.replace = noting


def shell(words, out, prepare=None, args=()):
    "`cifar-cam` with these words; what it prints is written to `out`"
    MODELS['tiny'] = tiny
    signal.signal(signal.SIGINT, signal.default_int_handler)   # a test run in the background inherits that it is ignored
    sys.stdout = sys.stderr = open(out, 'w', buffering=1)
    if prepare: prepare(*args)
    sys.exit(main([str(w) for w in words]))


# --- in the process that looks on

class Bench:
    "Trains one recipe in processes of their own"
    def __init__(self, fork, path):
        self.fork,self.path,self.log = fork,path,path/'log'
        (path/'tiny.toml').write_text(RECIPE)
        self.data = shapes_path(path, n_train=100, n_test=20)

    def start(self, words, prepare=None, *args):
        p = self.fork.Process(target=shell, args=(words, self.log, prepare, args))
        p.start()
        return p

    def train(self, out, prepare=None, *args):
        return self.start(['train', self.path/'tiny.toml', '--data', self.data, '--out', out, '--device', 'cpu'], prepare, *args)

    def finish(self, p, code=0):
        p.join()
        assert p.exitcode==code, self.log.read_text()

    def resume(self, out):
        "The finished run in `out`, however far it had come; a folder without env.json is none yet"
        begun = list(out.glob('*/env.json'))
        self.finish(self.start(['train', '--resume', begun[0].parent]) if begun else self.train(out))
        [env] = out.glob('*/env.json')
        return load_run(env.parent)


@pytest.fixture(scope='module', autouse=True)
def tiny_arch():
    with pytest.MonkeyPatch.context() as mp:
        mp.setitem(MODELS, 'tiny', tiny)
        yield


@pytest.fixture(scope='module')
def bench(fork, tmp_path_factory): return Bench(fork, tmp_path_factory.mktemp('bench'))


@pytest.fixture(scope='module')
def whole(bench):
    "A run that nobody stops, the files it writes in their order, and its seconds"
    out,start = bench.path/'whole',time.perf_counter()
    bench.finish(bench.train(out, note_writes, bench.path/'writes', out))
    return load_run(next(out.iterdir())), (bench.path/'writes').read_text().split(), time.perf_counter() - start


def check_whole(path):
    "Every file of the folder that has a name of its own can be read to its end"
    for f in path.rglob('*'):
        if f.is_dir() or f.name.startswith('.'): continue
        match f.suffix:
            case '.json': assert f.read_text().endswith(('}\n', ']\n'))
            case '.csv': assert not pd.read_csv(f).isna().any(axis=None)
            case '.pt': torch.load(f, weights_only=True)
            case '.safetensors': load_file(f)
            case '.png': Image.open(f).load()
            case '.html': assert f.read_text().rstrip().endswith('</html>')
            case '.txt': assert f.read_text(encoding='utf-8').endswith('=\n')
            case _: raise AssertionError(f'{f.name}: what is this?')


def names(path): return {f.relative_to(path).as_posix() for f in path.rglob('*')}


def check_same(run, whole):
    "The same files, and the same numbers to the last bit; only seconds, and the folder's name in the report, may differ"
    assert names(run.path) == names(whole.path)
    for f in 'recipe.json', 'lrs.json', 'metrics.json', 'weights.safetensors', 'best.safetensors', 'layers.txt', 'classification_report.csv', *(f'figures/{p.name}' for p in whole.path.glob('figures/*.png')):
        assert (run.path/f).read_bytes() == (whole.path/f).read_bytes(), f
    rows = lambda o: [line.rsplit(',', 2)[0] for line in (o.path/'history.csv').read_text().splitlines()]
    assert rows(run) == rows(whole)
    a,b = (torch.load(o.path/'checkpoint.pt', weights_only=True) for o in (run, whole))
    assert a['epochs'] == b['epochs'] and all(torch.equal(a['model'][k], b['model'][k]) for k in b['model'])


def kill_in_time(bench, whole, out, share):
    p = bench.train(out)
    p.join(share*whole[2])
    p.kill(); p.join()
    return p.exitcode


def kill_at_write(bench, whole, out, n, stage):
    p = bench.train(out, at_write, n, stage, signal.SIGKILL, out)
    p.join()
    return p.exitcode


def crash(bench, whole, out, kill, *args):
    code = kill(bench, whole, out, *args)
    assert code == -signal.SIGKILL or kill is kill_in_time and code == 0, bench.log.read_text()   # perhaps it was faster
    for path in out.glob('*'): check_whole(path)
    run = bench.resume(out)
    check_whole(run.path)
    check_same(run, whole[0])


@pytest.mark.parametrize('name, nth, stage', [('checkpoint.pt', 1, 'half'), *(pytest.param(*o, marks=pytest.mark.slow) for o in
    [('metrics.json', 0, 'before'), ('checkpoint.pt', 2, 'before'), ('misclassified.png', 0, 'half'), ('report.html', 0, 'before')])])
def test_a_run_killed_in_a_write_leaves_whole_files_and_goes_on_to_the_same_numbers(bench, whole, tmp_path, name, nth, stage):
    "A run killed while it writes a file leaves whole files only and resumes to the same numbers"
    n = [i for i,w in enumerate(whole[1]) if w==name][nth]
    crash(bench, whole, tmp_path, kill_at_write, n, stage)


def test_a_run_killed_at_some_moment_goes_on_to_the_same_numbers(bench, whole, tmp_path):
    "A run killed at a random moment leaves whole files only and resumes to the same numbers"
    crash(bench, whole, tmp_path, kill_in_time, random.uniform(.1, .6))


@pytest.mark.slow
@pytest.mark.parametrize('i', range(50))
def test_a_run_killed_at_any_of_fifty_moments_goes_on_to_the_same_numbers(bench, whole, tmp_path, i):
    "Runs killed at 50 different moments, half of them during a write, resume to the same numbers"
    # 25 moments spread over the whole time, 25 in the middle of a write
    rng = random.Random(i)
    if i % 2: return crash(bench, whole, tmp_path, kill_in_time, (i//2 + rng.random())/25)
    crash(bench, whole, tmp_path, kill_at_write, rng.randrange(len(whole[1])), rng.choice(['half', 'before', 'after']))


@pytest.mark.parametrize('signum, code, prepare, args', [(signal.SIGINT, 130, at_write, ('checkpoint.pt', 'before')), (signal.SIGTERM, 143, in_epoch, (1,))],
                         ids=['Ctrl-C in a write', 'SIGTERM in an epoch'])
def test_an_interrupted_training_says_how_to_go_on(bench, whole, tmp_path, signum, code, prepare, args):
    "After Ctrl-C or SIGTERM, the last line gives the command that resumes the run to the same numbers"
    out = tmp_path/'my runs'
    if prepare is at_write: args = [i for i,w in enumerate(whole[1]) if w==args[0]][1], args[1], signum, out
    else: args = *args, signum
    bench.finish(bench.train(out, prepare, *args), code)
    last = bench.log.read_text().splitlines()[-1]
    assert 'Traceback' not in bench.log.read_text() and last.startswith('cifar-cam: interrupted; resume with `cifar-cam train --resume ')
    [path] = out.iterdir()
    check_whole(path)
    assert torch.load(path/'checkpoint.pt', weights_only=True)['epochs'] == 1 and not list(path.rglob('.*'))
    words = shlex.split(last.split('`')[1])[1:]
    bench.finish(bench.start(words))
    check_same(load_run(path), whole[0])


def test_leftovers_of_the_dead_are_removed_and_nothing_else(tmp_path):
    "Temporary files of dead processes are removed; those of live processes and all other files stay"
    dead = tmp_path/'figures'/'.curves.png.4194305.tmp'   # above the largest process id there is
    kept = [tmp_path/f'.checkpoint.pt.{os.getppid()}.tmp', tmp_path/'.mine.tmp', tmp_path/'.hidden', tmp_path/'history.csv']
    dead.parent.mkdir()
    for f in dead, *kept: f.write_text('x')
    remove_leftovers(tmp_path)
    assert not dead.exists() and all(f.exists() for f in kept)


def test_runs_that_begin_at_once_get_folders_of_their_own(tmp_path):
    "Runs that start at the same moment get separate folders"
    barrier,paths = threading.Barrier(16),[]
    def begin():
        barrier.wait()
        for _ in range(5): paths.append(new_run_folder('x', tmp_path/'runs'))
    threads = [threading.Thread(target=begin) for _ in range(16)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(set(paths)) == len(list((tmp_path/'runs').iterdir())) == 80


# --- training goes wrong

class Trouble(nn.Module):
    "Passes its input on, until the `at`th training batch"
    def __init__(self, at, what):
        super().__init__()
        self.at,self.what,self.batches = at,what,0
    def forward(self, x):
        if not self.training: return x
        self.batches += 1
        return self.what(x) if self.batches == self.at else x


def out_of_memory(x): raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total capacity of 8 GiB')


def bad_gradient(x):
    x.register_hook(lambda g: g*torch.nan)
    return x


def train_into(trouble, at, bench, tmp_path, monkeypatch, capsys):
    "10 batches an epoch, 3 epochs. (exit code, what was said, the folder)"
    monkeypatch.setitem(MODELS, 'tiny', lambda **k: nn.Sequential(*tiny()[:2], Trouble(at, trouble), *tiny()[2:]))
    capsys.readouterr()
    code = main(['train', str(bench.path/'tiny.toml'), '--data', str(bench.data), '--out', str(tmp_path), '--set', 'lr=.01', '--set', 'schedule=constant',
                 '--set', 'keep_best=no', '--device', 'cpu'])
    return code, capsys.readouterr().err, next(tmp_path.iterdir())


@pytest.mark.parametrize('trouble, at, words', [
    (lambda x: x*torch.nan, 15, 'the loss is nan in epoch 1, step 4, at learning rate 0.01: try a lower one'),
    (lambda x: x*torch.inf, 20, 'in epoch 1, step 9, at'),
    (bad_gradient, 20, 'a weight is not a finite number in epoch 1, step 9, ')], ids=['NaN', 'infinite', 'last step'])
def test_a_diverged_training_stops_and_keeps_the_last_good_checkpoint(bench, tmp_path, monkeypatch, capsys, trouble, at, words):
    "Training that diverges stops, names the epoch and the step, and keeps the last good checkpoint"
    code,err,path = train_into(trouble, at, bench, tmp_path, monkeypatch, capsys)
    assert code == 2 and err.count('\n') == 1 and words in err
    state = torch.load(path/'checkpoint.pt', weights_only=True)
    assert state['epochs'] == 1 and all(v.isfinite().all() for v in state['model'].values()) and len(load_run(path).history) == 1
    assert not load_run(path).finished and not list(path.rglob('.*'))
    # a cause that was outside the run, as a faulty device is: it goes on
    monkeypatch.setitem(MODELS, 'tiny', lambda **k: nn.Sequential(*tiny()[:2], Trouble(0, trouble), *tiny()[2:]))
    from cifar_cam.run import fit_run
    assert len(fit_run(path).history) == 3


def test_too_little_memory_names_half_the_batch(bench, tmp_path, monkeypatch, capsys):
    "If the GPU runs out of memory, the error suggests half the batch size and the last checkpoint stays"
    code,err,path = train_into(out_of_memory, 15, bench, tmp_path, monkeypatch, capsys)
    assert code == 2 and err == "cifar-cam: the GPU's memory does not hold a batch of 10 images: try half, bs=5\n"
    assert torch.load(path/'checkpoint.pt', weights_only=True)['epochs'] == 1


def test_a_python_session_hears_how_to_go_on_too(bench, tmp_path, monkeypatch):
    "In Python, the `KeyboardInterrupt` also gives the command that resumes the run"
    from cifar_cam.experiment import run_recipe
    def interrupt(x): raise KeyboardInterrupt
    monkeypatch.setitem(MODELS, 'tiny', lambda **k: nn.Sequential(Trouble(3, interrupt), *tiny()))
    with pytest.raises(KeyboardInterrupt, match=f'--resume {tmp_path}'):
        run_recipe(str(bench.path/'tiny.toml'), bench.data, tmp_path, lr=.01, device='cpu')


# --- the file of decoded images

def decode(home, data, go=None, prepare=None, args=()):
    from fastai.data.external import fastai_cfg
    fastai_cfg().d['data'] = str(home)
    if prepare: prepare(*args)
    if go: go.wait(60)
    cached_images(data)


def images_of(home, data, monkeypatch):
    "As `cached_images` has them from its file: nothing may be decoded"
    from fastai.data.external import fastai_cfg
    monkeypatch.setitem(fastai_cfg().d, 'data', str(home))
    monkeypatch.setattr('cifar_cam.loaders.read_images', lambda *_: pytest.fail('decoded again'))
    return cached_images(data)


@pytest.mark.parametrize('stage', ['half', 'before', 'after'])
def test_a_process_killed_while_it_keeps_decoded_images_leaves_none_or_whole_ones(bench, fork, tmp_path, monkeypatch, stage):
    "If a process is killed while it caches decoded images, the next one leaves a single whole cache file"
    p = fork.Process(target=decode, args=(tmp_path, bench.data, None, at_write, (0, stage, signal.SIGKILL, tmp_path)))
    p.start(); p.join()
    assert p.exitcode==-signal.SIGKILL and len(list((tmp_path/'cifar_cam-cache').iterdir()))==1
    p = fork.Process(target=decode, args=(tmp_path, bench.data))
    p.start(); p.join()
    assert p.exitcode==0 and [f.suffix for f in (tmp_path/'cifar_cam-cache').iterdir()]==['.safetensors']   # nothing of the killed one is left
    assert images_of(tmp_path, bench.data, monkeypatch).shape==(120, 3, 32, 32)


def test_two_processes_that_decode_at_once_leave_one_whole_file(bench, fork, tmp_path, monkeypatch):
    "Two processes that cache decoded images at the same time leave one whole cache file"
    go = fork.Barrier(2)
    both = [fork.Process(target=decode, args=(tmp_path, bench.data, go)) for _ in range(2)]
    for p in both: p.start()
    for p in both: p.join()
    assert [p.exitcode for p in both]==[0, 0] and [f.suffix for f in (tmp_path/'cifar_cam-cache').iterdir()]==['.safetensors']
    assert images_of(tmp_path, bench.data, monkeypatch).shape==(120, 3, 32, 32)
