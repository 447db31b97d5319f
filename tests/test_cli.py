import argparse, json, os, re, shutil, subprocess, sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from PIL import Image

import cifar_cam.cli as cli
from cifar_cam.cli import COMMANDS, main
from cifar_cam.images import image_files
from cifar_cam.models import MODELS
from cifar_cam.run import load_run
from cifar_cam.shapes import shapes_path


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plt.close('all')


def shell(*words, **env):
    return subprocess.run([sys.executable, '-m', 'cifar_cam', *map(str, words)], capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(Path(cli.__file__).parents[1]), **env))


@pytest.mark.slow
def test_a_shell_without_unicode_or_without_output():
    done = shell('recipes', PYTHONIOENCODING='latin-1', PYTHONUTF8='0')
    assert done.returncode == 0 and 'davidnet' in done.stdout and '\\u2014' in done.stdout
    closed = subprocess.run([sys.executable, '-c', 'import sys; sys.stdout = None; from cifar_cam.cli import main; sys.exit(main(["recipes"]))'], capture_output=True)
    assert closed.returncode == 0 and not closed.stderr


def test_explain_takes_the_mend_that_its_message_names(capsys, tmp_path):
    photo = tmp_path/'photo.png'
    Image.new('RGB', (40, 40), 'red').save(photo)
    assert main(['explain', str(photo), '--layer', 'group3']) == 2 and 'min_px=3' in capsys.readouterr().err
    assert main(['explain', str(photo), '--layer', 'group3', '--min-px', '3']) == 0


@pytest.mark.parametrize('words', [['train'], ['train', 'nope', '--data', 'shapes'], ['train', 'davidnet', '--data', 'no such folder'],
    ['train', 'davidnet', '--data', 'shapes', '--epochs', '0'], ['train', 'davidnet', '--data', 'shapes', '--set', 'norm=x'],
    ['train', 'davidnet', '--epochs', 'many'], ['train', 'davidnet', '--set', 'colour=red'], ['train', 'davidnet', '--colour'],
    ['train', '--resume', 'no such run'], ['train', 'davidnet', '--data', 'shapes', '--runs', '0'], ['cam', 'no such run'], ['cam'], ['score', 'no such run'], ['report', 'no such run'], ['report'], ['fly'], [],
    ['lr-find', 'nope'], ['train', 'davidnet', '--data', 'shapes', '--device', 'tpu9']])
def test_wrong_input_is_one_line_and_exit_code_2_and_leaves_nothing(capsys, tmp_path, words):
    assert main(words) == 2
    out,err = capsys.readouterr()
    assert err.count('\n') == 1 and err.startswith('cifar-cam: ') and not out and not list(tmp_path.iterdir())


def test_help_of_each_command_shows_its_options_and_defaults(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as e: main([name.replace('_', '-'), '--help'])
        assert e.value.code == 0
        out = capsys.readouterr().out
        assert COMMANDS[name].__doc__.split('.')[0].split()[-1] in out
        for k in COMMANDS[name].__annotations__: assert re.search(rf"--{k.lower().replace('_', '-')}\b|^  {k}\b", out, re.M), k
    with pytest.raises(SystemExit): main(['train', '--help'])
    assert '(default: runs)' in capsys.readouterr().out


def test_recipes_lists_them_all(capsys):
    assert main(['recipes']) == 0
    out = capsys.readouterr().out
    assert all(n in out for n in ('resnet18-plateau', '11,173,962', '91.77'))


@pytest.mark.slow   # `.ci/run` trains at the shell too
def test_a_training_at_the_shell_ends_with_its_folder(tmp_path_factory, tmp_path, capsys):
    shapes = shapes_path(tmp_path_factory.mktemp('few'), n_train=100, n_test=20)
    done = shell('train', 'speedrun', '--data', shapes, '--epochs', 1, '--bs', 10, '--out', 'my runs')   # of all networks the quickest
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    path = tmp_path/lines[-1]
    assert path.parent == tmp_path/'my runs' and (path/'metrics.json').exists() and (path/'figures'/'cams.png').exists()
    assert '\r' not in done.stdout.replace('\r█', '') and '%|' not in done.stdout and 'accuracy' in lines[-2]
    again = shell('train', '--resume', path)
    assert again.returncode == 0 and again.stdout.strip().splitlines()[-1] == str(path)
    assert main(['cam', str(path), '--k', '3', '--which', 'correct', '--method', 'layercam']) == 0
    assert Path(capsys.readouterr().out.strip().splitlines()[-1]).stat().st_size > 1000
    for words,word in (['--layer', 'group3'], 'min_px'), (['--method', 'nopecam'], 'nopecam'), (['--which', 'nice'], 'nice'):
        assert main(['cam', str(path), *words]) == 2
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and word in err
    assert (path/'report.html').stat().st_size > 10_000
    assert main(['score', str(path), '--n', '3', '--method', 'gradcam', '--method', 'layercam']) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1]==str(path) and {'score.json', 'figures/scorecard.png'} <= {p.relative_to(path).as_posix() for p in path.rglob('*')}
    assert 'layercam' in (path/'report.html').read_text()   # written anew, with the scores
    assert main(['score', str(path), '--method', 'nopecam']) == 2 and 'nopecam' in capsys.readouterr().err
    assert main(['report', str(path), str(path), '--out', str(tmp_path/'both.html')]) == 0 and (tmp_path/'both.html').stat().st_size > 10_000
    photo = image_files(shapes)[-1]
    capsys.readouterr()
    assert main(['explain', str(photo), '--run', str(path), '--out', str(tmp_path)]) == 0
    classes,picture = capsys.readouterr().out.strip().splitlines()[-2:]
    assert photo.name in classes and classes.count('%') == 3 and Path(picture).stat().st_size > 1000
    assert not plt.get_fignums()   # a thousand photos would pile up
    (tmp_path/'note.jpg').write_text('no picture')
    assert main(['explain', 'note.jpg', '--run', str(path)]) == 2 and 'note.jpg' in capsys.readouterr().err


def test_several_seeds_at_the_shell_go_on_too(few, narrow, tmp_path, monkeypatch, capsys, undrawn):
    monkeypatch.setitem(MODELS, 'davidnet', narrow)
    last = lambda: Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert main(['train', 'davidnet', '--data', str(few), '--epochs', '1', '--bs', '10', '--set', 'lr=.05', '--set', 'lr_min=.005', '--runs', '2', '--seed', '4']) == 0
    path = last()
    summary = json.loads((path/'summary.json').read_text())
    assert [load_run(path/name).env['seed'] for name in summary['runs']] == [4, 5]
    shutil.rmtree(path/summary['runs'][1])
    (path/'summary.json').unlink()
    assert main(['train', '--resume', str(path)]) == 0 and last() == path
    assert json.loads((path/'summary.json').read_text())['accuracies'] == summary['accuracies']


def test_a_triage_finds_images_that_have_moved(run, few, tmp_path, capsys):
    "Also for the page, which is written again"
    env = json.loads((run/'env.json').read_text())
    (run/'env.json').write_text(json.dumps(env | dict(data=str(tmp_path/'gone'))))
    (run/'report.html').write_text('older')
    assert main(['triage', str(run)]) == 2 and 'gone' in capsys.readouterr().err
    assert main(['triage', str(run), '--data', str(few)]) == 0
    assert (run/'triage.csv').exists() and (run/'report.html').read_text() != 'older'


def test_explain_has_one_figure_at_a_time(run, few, tmp_path, monkeypatch):
    there,draw = [],cli.explain_image
    def note(*args, **kwargs):
        there.append(len(plt.get_fignums()))
        return draw(*args, **kwargs)
    monkeypatch.setattr(cli, 'explain_image', note)
    photos = sorted((few/'test').glob('*/*.png'))[:3]
    assert main(['explain', *map(str, photos), '--run', str(run), '--out', str(tmp_path/'out')]) == 0 and there == [0, 0, 0]


def test_lr_find_prints_its_pick_and_draws_it(colours, narrow, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(MODELS, 'davidnet', narrow)
    assert main(['lr-find', 'davidnet', '--data', str(colours), '--set', 'bs=8', '--out', str(tmp_path)]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-2].split()[0].startswith('lr=') and Path(lines[-1]).suffix == '.png' and Path(lines[-1]).exists()
    assert not plt.get_fignums()


@pytest.mark.parametrize('name', COMMANDS)
@pytest.mark.parametrize('rank', [0, 1])
def test_each_command_where_a_launcher_started_several_processes(monkeypatch, name, rank):
    "Trainings and sweeps are shared out; what cannot be is done once, by a process that thinks itself alone"
    together,seen = name in ('demo', 'train', 'sweep'),[]
    def command(**kwargs): seen.append((os.environ.get('RANK'), os.environ.get('WORLD_SIZE')))
    if together: monkeypatch.setattr(cli, '_SHARED_OUT', (command,))
    for k,v in dict(RANK=rank, WORLD_SIZE=2).items(): monkeypatch.setenv(k, str(v))
    monkeypatch.setattr('sys.stdout', sys.stdout)   # `main` puts another in its place
    p = argparse.ArgumentParser()
    p.add_argument('command')
    monkeypatch.setattr(cli, 'parser', lambda: p)
    monkeypatch.setitem(COMMANDS, name, command)
    assert main([name.replace('_', '-')]) == 0
    assert seen == ([(str(rank), '2')] if together else [] if rank else [(None, None)])
    assert (os.environ['RANK'], os.environ['WORLD_SIZE']) == (str(rank), '2')


def test_what_is_shared_out(): assert {*cli._SHARED_OUT} == {COMMANDS[k] for k in ('demo', 'train', 'sweep')}


def test_the_help_of_a_training_shows_each_form_of_data_in_one_line(capsys):
    for name in 'train', 'sweep', 'crossfit', 'lr-find':
        with pytest.raises(SystemExit): main([name, '--help'])
        forms = capsys.readouterr().out.partition('forms of --data')[2].splitlines()[1:]
        assert [f.split()[0].rstrip(',') for f in forms if f] == ['cifar10', 'shapes', 'FOLDER/train/CLASS/IMAGE', 'FOLDER/CLASS/IMAGE', 'TABLE.csv', 'FOLDER', 'cifar-10-batches-py', 'FOLDER', 'ARCHIVE.zip']
        assert all(len(f) <= 120 for f in forms)
    with pytest.raises(SystemExit): main(['recipes', '--help'])
    assert 'forms of' not in capsys.readouterr().out
