"""Whatever you type or pass either works or ends in one line that names the value and says how to fix it;
no files are left behind"""
import errno, json, os, shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import nn
from PIL import Image
from hypothesis import HealthCheck, given, settings, strategies as st

from cifar_cam.augment import Cutout
from cifar_cam.cli import main
from cifar_cam.core import InputError
from cifar_cam.photos import open_photo
from cifar_cam.images import data_path
from cifar_cam.loaders import cifar_dls
from cifar_cam.photo import explain_image
from cifar_cam.recipe import find_recipe, Recipe
from cifar_cam.run import load_run, new_run_folder
from cifar_cam.experiment import run_or_resume, run_recipe, run_seeds
from cifar_cam.cam import cam_maps
from cifar_cam.interpret import CamInterpretation
from cifar_cam.summary import run_command
from cifar_cam.schedule import Plateau
from cifar_cam.core import writing
from cifar_cam.shapes import load_mask, shapes_path
from cifar_cam.core import save_atomically
from cifar_cam.learner import cifar_learner
from cifar_cam.models import MODELS

LONG = 'x'*300
NAN = float('nan')


def tree(path): return {p: p.is_file() and p.stat().st_mtime_ns for p in path.rglob('*')}


def one_line(err, word):
    assert err.count('\n') == 1 and err.endswith('\n') and err.startswith('cifar-cam: ') and err[:-1].isprintable()
    assert word in err and 'Traceback' not in err


@pytest.fixture
def here(tmp_path, run, few, monkeypatch):
    "What `words` may name"
    (tmp_path/'file').write_text('no archive')
    (tmp_path/'dir.toml').mkdir()
    (tmp_path/'bytes.toml').write_bytes(b'\xff\xfe\0')
    (tmp_path/'empty').mkdir()
    monkeypatch.chdir(tmp_path)
    return dict(run=run, few=few, photo=next((few/'test'/'star').iterdir()))


TRAIN = 'train davidnet --data {few} '
WORDS = [(TRAIN + words, word) for words,word in [
    ('--seed -1', 'seed=-1'), ('--seed 4294967296', 'seed=4294967296'), ('--seed 1e3', '1e3'), ('--seed 4294967295 --runs 2', 'seed=4294967296'),
    ('--epochs -1', 'epochs=-1'), ('--epochs 0', 'epochs=0'), ('--epochs 100000', 'epochs=100000'), ('--epochs nan', 'nan'), ('--epochs 2.5', '2.5'),
    ('--bs 0', 'bs=0'), ('--bs 1', 'bs=1'), ('--bs -8', 'bs=-8'), ('--bs 128', 'to train on'), ('--bs 128 --runs 2', 'to train on'), ('--bs 99999999999', 'bs='),
    ('--set lr=nan', 'lr=nan'), ('--set lr=1e400', 'lr=1e400'), ('--set lr=-1', 'lr=-1'), ('--set lr=', 'lr='), ('--set lr', 'KEY=VALUE'), ('--set =3', "''"),
    ('--set lr=.1 --set lr_min=.2', 'lr_min=0.2'), ('--set size=0', 'size=0'), ('--set size=99999', 'size=99999'), ('--set cutout=-1', 'cutout=-1'),
    ('--set norm=', 'norm='), ('--set arch=vgg', 'vgg'), ('--set schedule=plateau --set hold_out=.0001', 'hold_out=.0001'), ('--set hold_out=nan', 'hold_out=nan'),
    ('--set name=../up', '../up'), ('--set seed=3', 'seed'), ('--set r=3', "'r'"), ('--set data=x', "'data'"), (f'--set name={LONG}', 'name='), ('--runs -1', 'runs=-1'), ('--device meta', 'meta'), ('--device cpu:7', 'cpu:7'), ('--device xpu', 'xpu'),
    ('--out file', 'file: is a file'), ('--out file/deeper', 'file'), (f'--out {LONG}', 'File name too long'), (f'--out new/and/{LONG}', 'File name too long'), ('--out /proc/none', '/proc/none'),
    ('--out new --bs 128', 'to train on'), ('--out new/er --runs 3 --bs 128', 'to train on'), ('--resume {run}', 'leave out recipe')]] + [
    ('train Davidnet', 'Davidnet'), ('train davidnet.toml', 'davidnet.toml'), ('train dir.toml', 'dir.toml'), ('train bytes.toml', 'bytes.toml'), ('train run', "'run'"),
    ('train davidnet --data file', 'file'), ('train davidnet --data empty', 'empty'), ('train davidnet --data /dev/zero', '/dev/zero'), (f'train davidnet --data {LONG}', 'too long'),
    ('train davidnet --data run', 'run: is the folder of a run'), ('demo --data nowhere', 'nowhere'), ('demo --data {few} --epochs 0', 'epochs=0'), ('demo --data {few} --seed -5', 'seed=-5'),
    ('train --resume nowhere', 'nowhere'), ('train --resume file', 'file'), ('train --resume empty', 'empty'), ('train --resume', 'resume'), ('train --resume {run} --seed 1', 'leave out --seed'), ('train --resume {run} --data shapes', 'shapes: are not the images'), ('train --resume {run} --published-protocol', 'leave out --published-protocol'),
    ('lr-find davidnet --data {few} --seed -1', 'seed=-1'), ('lr-find davidnet --data {few} --set bs=100000', 'bs='), ('lr-find davidnet --data {few} --out file', 'is a file'),
    ('lr-find davidnet --data nowhere --out new', 'nowhere'), ('lr-find nope --out new', 'nope'),
    ('cam nowhere', 'nowhere'), ('cam file', 'file'), ('cam {run} --k 0', 'k=0'), ('cam {run} --k -3', 'k=-3'), ('cam {run} --k nan', 'nan'), ('cam {run} --method nope', 'nope'),
    ('cam {run} --layer nope', 'nope'), ('cam {run} --layer fc', "layer 'fc' gives no"), ('cam {run} --which all', 'all'), ('cam {run} --min-px 1000', '1000'),
    ('explain nothing.png --run {run} --out new', 'nothing.png'), ('explain file --run {run}', 'file'), ('explain empty --run {run}', 'empty'), ('explain {photo} --run nowhere', 'nowhere'),
    ('explain {photo} --run {run} --out file', 'is a file'), ('explain {photo} --run {run} --layer nope --out new', 'nope'), ('explain {photo} --run {run} --method nope', 'nope'),
    ('explain --run {run}', 'images'), (f'explain {{photo}} --run {{run}} --out {LONG}', 'too long'), (f'explain {LONG} --run {{run}}', LONG),
    ('score {run} --n 0', 'n=0'), ('score {run} --n -1', 'n=-1'), ('score {run} --seed -1', 'seed=-1'), ('score {run} --montages -1', 'montages=-1'), ('score empty', 'empty'),
    ('report {run} --out page.html', '--out'), ('report {run} {run} --out empty', 'empty'), ('report {run} {run} --out no/page.html', 'no/page.html'), ('report {run} nowhere', 'nowhere'), ('report empty', 'empty')]


@pytest.mark.parametrize('words, word', WORDS, ids=[w[:60] for w,_ in WORDS])
def test_at_the_shell_it_is_exit_code_2_and_one_line_and_nothing_is_left(here, tmp_path, capsys, words, word):
    "At the shell, wrong input gives exit code 2 and one line that says what is wrong; no file is added or changed"
    before = tree(tmp_path)
    code = main([w.format(**here) for w in words.split()])
    err = capsys.readouterr().err
    assert code == 2
    one_line(err, word)
    assert tree(tmp_path) == before


@pytest.mark.parametrize('word', ['a\nb', 'a\x1b[31mred', 'a\rb', 'not \udcff UTF-8', ' ', 'blå ✓'])
def test_a_message_is_one_printable_line_whatever_was_typed(here, capsys, word):
    "A message is one printable line, even if you typed line breaks, escape codes or bytes that are not UTF-8"
    for words in ['train', word], ['train', 'davidnet', '--data', word], ['report', word], ['explain', word, '--run', str(here['run'])], ['train', 'davidnet', '--set', f'{word}=1']:
        assert main(words) == 2
        one_line(capsys.readouterr().err, ascii(word)[1:-1] if not word.isprintable() else word.strip())


# --- a folder that is no run, half a run, a run of another version

def edit(name, /, **fields):
    "`name` with other fields; a field set to `...` goes"
    def spoil(path):
        record = json.loads((path/name).read_text()) | fields
        (path/name).write_text(json.dumps({k: v for k,v in record.items() if v is not ...}))
    return spoil

def put(name, content): return lambda path: (path/name).write_bytes(content)
def no(name): return lambda path: (path/name).unlink()

HISTORY = b'epoch,train_loss,train_accuracy,valid_loss,valid_accuracy,lr\n'
SPOILED = dict(
    no_recipe=(no('recipe.json'), 'recipe.json'), no_env=(no('env.json'), 'env.json'), no_weights=(no('weights.safetensors'), 'weights.safetensors'), no_history=(no('history.csv'), 'history.csv'),
    unfinished=(no('metrics.json'), 'train --resume'), field_unknown=(edit('recipe.json', momentum=.9), 'momentum'), field_missing=(edit('recipe.json', name=...), 'name'),
    **{f'env_without_{k}': (edit('env.json', **{k: ...}), k) for k in ('data', 'data_checksum', 'seed', 'device', 'published_protocol')},
    **{f'metrics_without_{k}': (edit('metrics.json', **{k: ...}), k) for k in ('accuracy', 'class_accuracy', 'size', 'mean', 'std', 'images', 'loss')},
    other_classes=(edit('metrics.json', class_accuracy={c: 1. for c in 'abcdefghij'}), 'other classes'), fewer_classes=(edit('metrics.json', class_accuracy=dict(a=1.)), 'weights.safetensors'),
    other_network=(edit('recipe.json', arch='resnet18'), 'cannot be loaded into this network'), other_data=(edit('env.json', data_checksum='0'*64), 'trained on'), data_gone=(edit('env.json', data='/gone'), '/gone'),
    empty_history=(put('history.csv', b''), 'history.csv'), history_of_no_epoch=(put('history.csv', HISTORY), 'history.csv'), column_gone=(put('history.csv', b'epoch,lr\n1,2\n'), 'train_loss'),
    words_in_history=(put('history.csv', HISTORY + b'1,a,b,c,d,e\n'), 'train_loss'), epoch_twice=(put('history.csv', HISTORY + b'1,1,1,1,1,1\n1,1,1,1,1,1\n'), 'history.csv'),
    empty_metrics=(put('metrics.json', b''), 'metrics.json'), list_of_metrics=(put('metrics.json', b'[]'), 'metrics.json'))

@pytest.mark.parametrize('case', SPOILED)
def test_what_is_no_whole_run_of_this_version_is_named(run, tmp_path, capsys, case):
    "`cifar-cam report` refuses an incomplete, damaged or mismatched run, names the fault, and changes no file"
    spoil,word = SPOILED[case]
    spoil(run)
    before = tree(tmp_path)
    assert main(['report', str(run)]) == 2
    one_line(capsys.readouterr().err, word)
    assert tree(tmp_path) == before


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda o: st.lists(o, max_size=3) | st.dictionaries(st.text(max_size=5), o, max_size=3), max_leaves=5)

@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None, derandomize=True)
@given(st.data())
def test_any_value_in_a_record_is_taken_or_refused(run, data):
    "Any value in `recipe.json`, `env.json` or `metrics.json` either loads or raises a one-line `InputError`"
    name = data.draw(st.sampled_from(['recipe.json', 'env.json', 'metrics.json']))
    whole = json.loads((run/name).read_text())
    try:
        edit(name, **{data.draw(st.sampled_from(list(whole))): data.draw(VALUES)})(run)
        try:
            o = load_run(run)
            o.finished and o.metrics
            assert repr(o) and o.chosen_on and run_command(o)
        except InputError as e: assert str(e).isprintable()
    finally: (run/name).write_text(json.dumps(whole))


@pytest.mark.parametrize('text', ['', '{', 'null', '3', '"a"', '['*100_000, '{"a":'*100_000, '9'*5000, '\ufeff{}', '{"seed": NaN}'])
@pytest.mark.parametrize('name', ['recipe.json', 'env.json', 'metrics.json', 'lrs.json'])
def test_a_record_that_is_no_record_is_named(run, name, text):
    "A run's JSON file that is empty, malformed or not a record raises an `InputError` that names the file"
    (run/name).write_text(text)
    with pytest.raises(InputError, match=name):
        o = load_run(run)
        o.metrics, o.lrs


def test_a_finished_run_of_a_machine_with_a_gpu_can_be_looked_at_but_not_gone_on_with(run):
    "A finished run opens without the GPU it was trained on; an unfinished one raises an error that names the GPU"
    edit('env.json', device='cuda:7')(run)
    if torch.cuda.device_count() > 7: pytest.skip('needs a machine with fewer GPUs')
    assert load_run(run).dls.device.type in ('cpu', 'cuda', 'mps')
    no('metrics.json')(run)
    with pytest.raises(InputError, match='cuda:7'): load_run(run).dls


# --- numbers and names in Python

@pytest.mark.parametrize('fields', [dict(epochs=2.5), dict(epochs=True), dict(epochs='3'), dict(bs=None), dict(bs=np.array([8])), dict(lr=None), dict(lr=[.1]), dict(keep_best='no'), dict(keep_best=1),
    dict(name=3), dict(name='a\x1bb'), dict(name='a\nb'), dict(norm=['batch']), dict(arch=None), dict(published='much'), dict(epochs=10**400), dict(wd=NAN), dict(label_smoothing=1), dict(size=10**9)])
def test_a_recipe_has_values_of_its_fields_types(fields):
    "`Recipe` refuses a value of the wrong type or out of range, and the error names the field"
    with pytest.raises(InputError, match=next(iter(fields))): Recipe(**{'name': 'x', **fields})


CALLS = {f'{f}: {word}': (call, word) for f,call,word in [
    ('shapes_path', lambda d: shapes_path(d, n_train=NAN), 'n_train'), ('shapes_path', lambda d: shapes_path(d, n_test=10.), 'n_test'), ('shapes_path', lambda d: shapes_path(d, seed=NAN), 'seed'),
    ('shapes_path', lambda d: shapes_path('/proc/none', 10, 10), '/proc/none'),
    ('data_path', lambda d: data_path('a\0b'), 'no such file'), ('data_path', lambda d: data_path(''), 'train/'),
    ('cifar_dls', lambda d: cifar_dls(d, bs=0), 'bs=0'), ('cifar_dls', lambda d: cifar_dls(d, bs=-1), 'bs=-1'), ('cifar_dls', lambda d: cifar_dls(d, bs=NAN), 'bs=nan'),
    ('cifar_dls', lambda d: cifar_dls(d, size=NAN), 'size nan'), ('cifar_dls', lambda d: cifar_dls(d, seed=-1), 'seed=-1'), ('cifar_dls', lambda d: cifar_dls(d, seed=1.5), 'seed=1.5'),
    *[('cifar_dls', lambda d, h=h: cifar_dls(d, hold_out=h), f'hold_out={h}') for h in (-1, -.1, NAN, float('inf'), 10**9)],
    ('cifar_learner', lambda d: cifar_learner(cifar_dls(d, bs=8), nn.Flatten(), seed=-1), 'seed=-1'), ('cifar_learner', lambda d: cifar_learner(cifar_dls(d, bs=8), 'vgg'), 'vgg'),
    ('Cutout', lambda d: Cutout(0), 'size 0'), ('Plateau', lambda d: Plateau(factor=NAN), 'factor=nan'), ('new_run_folder', lambda d: new_run_folder('x', '/dev/null'), '/dev/null'),
    ('run_recipe', lambda d: run_recipe('davidnet', d, 'a\0b'), 'folder'), ('run_recipe', lambda d: run_recipe('davidnet', d, device=object()), 'device'),
    ('run_recipe', lambda d: run_recipe('davidnet', d, seed=True), 'seed=True'), ('run_seeds', lambda d: run_seeds('davidnet', d, seed=-2), 'seed=-2'),
    ('load_run', lambda d: load_run('a\0b'), 'no run folder'), ('find_recipe', lambda d: find_recipe(None), 'None'),
    ('save_atomically', lambda d: save_atomically(lambda f: f.write_text(''), d/'none'/'x'), 'none/x'), ('save_atomically', lambda d: save_atomically(lambda f: f.write_text(''), d/'test'), 'test'),
    ('open_photo', lambda d: open_photo('a\0b'), 'no such file'), ('open_photo', lambda d: open_photo('x'*5000), 'xxx'), ('load_mask', lambda d: load_mask(d/'none.png'), 'none.png')]}

@pytest.mark.parametrize('case', CALLS)
def test_in_python_it_is_an_input_error_of_one_line(few, tmp_path, monkeypatch, case):
    "In Python, wrong input raises a one-line `InputError` that says what is wrong, and leaves no files"
    call,word = CALLS[case]
    monkeypatch.chdir(tmp_path)
    before = tree(few)
    with pytest.raises(InputError) as e: call(few)
    assert word in str(e.value) and str(e.value).isprintable() and tree(few) == before and not tree(tmp_path)


def test_the_line_of_a_worker_process_is_the_same_line(tmp_path, few):
    "An unreadable image in a `DataLoader` worker also raises a one-line `InputError` that begins with its path"
    root = Path(shutil.copytree(few, tmp_path/'s'))
    for f in (root/'train'/'star').iterdir(): f.write_bytes(b'no')
    with pytest.raises(InputError) as e: list(cifar_dls(root, bs=50, in_memory=False, num_workers=1).train)
    assert str(e.value).startswith(str(root/'train'/'star')) and str(e.value).isprintable()


def test_more_panels_than_a_figure_can_hold_are_refused(run):
    "`plot_cams` refuses more images than one figure can hold"
    interp = load_run(run).interp
    with pytest.raises(InputError, match='too many for one figure'): interp.plot_cams(1000, [0]*1000)  # two images a row


def test_a_class_may_be_called_anything(run, tmp_path):
    "Class names may hold any characters, such as `$`, braces, HTML or line breaks, and the figures still draw"
    o = load_run(run)
    interp,names = o.interp,['$', '$5 and $6', r'$\frac{$', 'x^{$_', '%s', '{0}', '</script>', '_hidden', 'a\nb', ' ']
    for i,name in enumerate(names): interp.dl.vocab[i] = name
    assert interp._names==names
    for fig in interp.plot_confusion_matrix(), interp.plot_per_class_accuracy(), interp.plot_images(10, range(10)), interp.plot_cams(2, [0, 19]): fig.savefig(tmp_path/'x.png')
    explain_image(o.model, next((Path(o.env['data'])/'test'/'star').iterdir()), vocab=names, stats=([.5]*3, [.2]*3))[0].savefig(tmp_path/'x.png')


# --- paths

@pytest.mark.parametrize('name', ['with spaces, blå ✓ 日本', "it's $HOME; `x` #%&", '-leading\nbreak', os.fsdecode(b'not \xff UTF-8')])
def test_any_path_works(run, few, tmp_path, monkeypatch, capfd, name):
    "File and folder names with spaces, quotes, line breaks or bytes that are not UTF-8 work at the shell"
    monkeypatch.chdir(tmp_path)
    photo,folder = tmp_path/f'{name}.png',tmp_path/name
    shutil.copy(next((few/'test'/'star').iterdir()), photo)
    run.rename(folder)
    data = Path(shutil.copytree(few, tmp_path/f'{name} data'))
    edit('env.json', data=str(data))(folder)
    monkeypatch.setattr('sys.stdout', open(tmp_path/'said', 'w'))   # as strict as a file at the shell
    assert main(['explain', f'./{name}.png', f'--run=./{name}', f'--out={name} out']) == 0
    assert main(['report', f'./{name}']) == 0
    assert (tmp_path/f'{name} out'/f'{name}-hirescam.png').stat().st_size > 1000 and (folder/'report.html').stat().st_size > 1000
    assert os.fsencode(f'{name}/report.html') in (tmp_path/'said').read_bytes()


def test_photos_of_one_name_get_pictures_of_their_own(run, few, tmp_path):
    "`cifar-cam explain` writes one picture for each photo, even if two photos have the same file name"
    for d in 'ab': (tmp_path/d).mkdir(); shutil.copy(next((few/'test'/'star').iterdir()), tmp_path/d/'cat.png')
    assert main(['explain', str(tmp_path/'a'/'cat.png'), str(tmp_path/'b'/'cat.png'), '--run', str(run), '--out', str(tmp_path/'o')]) == 0
    assert len(list((tmp_path/'o').iterdir())) == 2


# --- what cannot be written

@pytest.mark.parametrize('code', [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_what_the_system_says_becomes_a_line_that_names_the_file(tmp_path, code):
    "A system error on writing becomes an `InputError` that names the file and says whether the disk is full"
    with pytest.raises(InputError) as e:
        with writing(tmp_path/'place'): raise OSError(code, os.strerror(code), 'elsewhere')
    assert str(tmp_path/'place') in str(e.value) and ('disk is full' in str(e.value)) == (code in (errno.ENOSPC, errno.EDQUOT))
    with pytest.raises(KeyError), writing(tmp_path): raise KeyError('a fault of the program stays one')


def test_a_read_only_place_is_named_and_a_run_there_can_still_be_asked(run, few, tmp_path, mounted, monkeypatch, capsys):
    "A read-only disk is reported in one line, and `cifar-cam explain` can still use a run stored on it"
    place = mounted('place', 'size=4m')
    shutil.copytree(run, place/'run')
    os.system(f'mount -o remount,ro {place}')
    monkeypatch.chdir(tmp_path)
    photo = str(next((few/'test'/'star').iterdir()))
    for words in (['train', 'davidnet', '--data', str(few), '--out', str(place/'new')], ['demo', '--data', str(few), '--out', str(place)], ['report', str(place/'run')],
                  ['cam', str(place/'run'), '--k', '1'], ['explain', photo, '--run', str(run), '--out', str(place)], ['report', str(run), str(run), '--out', str(place/'c.html')]):
        assert main(words) == 2
        one_line(capsys.readouterr().err, 'Read-only')
    assert main(['explain', photo, '--run', str(place/'run'), '--out', str(tmp_path)]) == 0


def test_a_reader_that_goes_away_is_no_fault(monkeypatch, capfd):
    "If the reader of a pipe closes it early, as `head` does, the command ends with exit code 1 and no message"
    read,write = os.pipe()
    os.close(read)
    monkeypatch.setattr('cifar_cam.cli.recipe_table', lambda: pd.DataFrame(dict(recipe=['x'])))
    monkeypatch.setattr('sys.stdout', os.fdopen(write, 'w'))
    assert main(['recipes'])==1 and capfd.readouterr().err==''


@pytest.mark.parametrize('there', ['other runs', 'a file of mine', 'a hidden file', 'nothing'])
def test_run_or_resume_removes_nothing_but_what_it_made(few, narrow, monkeypatch, tmp_path, there):
    "`run_or_resume` refuses a folder that holds something else, and removes no file that it did not make"
    monkeypatch.setitem(MODELS, 'davidnet', narrow)
    path = tmp_path/'runs'
    if there!='nothing': path.mkdir()
    if there=='other runs': (path/'davidnet-1').mkdir()
    if there=='a file of mine': (path/'thesis.txt').write_text('mine')
    if there=='a hidden file': (path/'.DS_Store').write_text('of the system')
    before = tree(tmp_path)
    with pytest.raises(InputError, match='is no run' if there in ('other runs', 'a file of mine') else 'bs=5000'):
        run_or_resume('davidnet', few, path, epochs=1, bs=5000, lr=.1, lr_min=.01)
    assert tree(tmp_path)==before


def test_run_or_resume_says_that_a_run_chose_by_other_images(few, narrow, monkeypatch, tmp_path):
    "`run_or_resume` refuses a run that chose its best epoch by other images than you ask for now"
    monkeypatch.setitem(MODELS, 'davidnet', narrow)
    asked = dict(epochs=1, bs=20, lr=.1, lr_min=.01, keep_best=True, hold_out=.2)
    run = run_or_resume('davidnet', few, tmp_path/'run', **asked)
    with pytest.raises(InputError, match='chose by held-out images'): run_or_resume('davidnet', few, tmp_path/'run', published_protocol=True, **asked)
    assert run_or_resume('davidnet', few, tmp_path/'run', **asked).metrics==run.metrics


LEARNERS = {'a frozen network': (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).requires_grad_(False), {}, 'frozen'),
            'float16': (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).half(), {}, 'float()'),
            'float64': (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).double(), {}, 'float()'),
            'two outputs': (lambda: Two(), {}, 'tuple'),
            'label_smoothing': (lambda: nn.Flatten(), dict(label_smoothing=2), 'label_smoothing=2'),
            'negative label_smoothing': (lambda: nn.Flatten(), dict(label_smoothing=-.5), 'label_smoothing=-0.5')}

class Two(nn.Module):
    "A network that returns its features too"
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3072, 10)
    def forward(self, x): return self.fc(x.flatten(1)),x

@pytest.mark.parametrize('case', LEARNERS)
def test_a_network_that_cannot_be_trained_is_named(few, tmp_path, case):
    "`cifar_learner` and its `fit` say in one line why a network cannot be trained"
    make,kwargs,word = LEARNERS[case]
    with pytest.raises(InputError) as e: cifar_learner(cifar_dls(few, bs=20), make(), path=tmp_path, **kwargs).fit(1, .01)
    assert word in str(e.value)


MAPS = {'an index that is no whole number': (lambda o: o.indices([1.7]), 'whole numbers'),
        'a place that is not there': (lambda o: o.plot_top_losses([10**6]), 'out of range'), 'a place before the first': (lambda o: o.plot_top_losses([-1]), 'out of range'),
        'no classes': (lambda o: o.plot_per_class_accuracy(classes=[]), 'at least one class'), 'no layers': (lambda o: cam_maps(o.learn.model, torch.zeros(1, 3, 32, 32), layer=[]), 'at least one layer'),
        'a number for a layer': (lambda o: cam_maps(o.learn.model, torch.zeros(1, 3, 32, 32), layer=3), 'no layer'), 'a loader that is not there': (lambda o: CamInterpretation.from_learner(o.learn, 9), 'ds_idx=9'),
        'a folder that is not there': (lambda o: o.save_maps('/nonexistent/x.npz', which='top_losses', k=2), '/nonexistent'),
        'no deviation': (lambda o: explain_image(o.learn, np_image(), stats=([.5]*3, [.2, 0, .2])), 'above 0'),
        'a class named twice': (lambda o: explain_image(o.learn, np_image(), vocab=['a']*10), "'a' twice")}

def np_image(): return Image.fromarray(np.full((40, 40, 3), 99, np.uint8))

@pytest.mark.parametrize('case', MAPS)
def test_what_cannot_be_shown_is_said_in_one_line(run, case):
    "Galleries, maps and explanations say in one line which argument is wrong"
    call,word = MAPS[case]
    with pytest.raises(InputError) as e: call(load_run(run).interp)
    assert word in str(e.value) and str(e.value).isprintable()


def test_the_side_of_the_training_images_is_enough(run):
    "`explain_image` takes the side of the images in place of height and width"
    learn = load_run(run).learn
    known = dict(vocab=learn.dls.vocab, stats=([.5]*3, [.2]*3))
    one,two = (explain_image(learn.model, np_image(), size=size, **known)[1] for size in (32, (32, 32)))
    assert one==two


def test_maps_are_saved_whole_or_not_at_all(run, tmp_path, monkeypatch):
    "If the disk is full, `save_maps` keeps the maps that were there"
    interp = load_run(run).interp
    path = interp.save_maps(tmp_path/'m.npz', 2, 'top_losses')
    kept = path.read_bytes()
    def full(f, **arrays):
        f.write(b'half')
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(np, 'savez_compressed', full)
    with pytest.raises(InputError): interp.save_maps(path, 3, 'top_losses')
    assert path.read_bytes()==kept and len([*tmp_path.glob('*.npz')])==1
