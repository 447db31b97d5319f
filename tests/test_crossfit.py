"""Cross-fitting: folds that share nothing, failures that lose nothing, decisions that touch nothing"""
import json, shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from torch import nn

from cifar_cam import crossfit as X
from cifar_cam.cli import main
from cifar_cam.core import InputError, sha256
from cifar_cam.crossfit import (crossfit, crossfit_command, crossfit_evidence, fold_dls, fold_splitter, resume_crossfit, run_evidence, suspects_page,
                                triage_command, triage_runs)
from cifar_cam.images import image_files
from cifar_cam.loaders import cifar_dls
from cifar_cam.models import MODELS
from cifar_cam.recipe import find_recipe
from cifar_cam.report import write_report
from cifar_cam.run import fit_run, load_run
from cifar_cam.summary import run_command
from cifar_cam.triage import _COLUMNS
from cifar_cam.evidence import load_evidence
from cifar_cam.triage import VERDICTS, read_triage

QUICK = dict(epochs=2, bs=20, lr=.05, lr_min=.005)

@pytest.fixture
def quick(narrow, monkeypatch): monkeypatch.setitem(MODELS, 'davidnet', narrow)

@pytest.fixture(scope='module')
def folded(colours, narrow, tmp_path_factory):
    "Three folds over the images of one colour"
    with pytest.MonkeyPatch.context() as mp:
        mp.setitem(MODELS, 'davidnet', narrow)
        return crossfit('davidnet', colours, 3, tmp_path_factory.mktemp('folded'), **QUICK)

def files(path): return {f.relative_to(path).as_posix(): f.read_bytes() for f in sorted(path.rglob('*')) if f.is_file()}


# Folds

@pytest.mark.parametrize('hold_out', [0, .1])
def test_each_training_image_is_in_one_fold_and_no_network_saw_its_fold(colours, hold_out):
    items = image_files(colours)
    splits = [fold_splitter(4, k, 3, hold_out)(items) for k in range(4)]
    assert sorted(i for s in splits for i in s[-2]) == [i for i,f in enumerate(items) if f.parent.parent.name=='train']
    for s in splits:
        parts = [set(p) for p in s]
        assert sum(map(len, parts)) == len(set.union(*parts)) == len(items)
        assert all(items[i].parent.parent.name=='test' for i in s[-1]) and len(s) == (4 if hold_out else 3)
        assert {items[i].parent.name: 0 for i in s[-2]}.keys() == {'blue', 'green', 'grey', 'red'}

def test_a_recipe_that_chooses_an_epoch_does_not_choose_it_by_the_fold(colours):
    assert len(fold_dls(find_recipe('davidnet', bs=10), colours, 2, 0).loaders) == 3
    assert len(fold_dls(find_recipe('davidnet', bs=10, keep_best=True), colours, 2, 0).loaders) == 4

def test_all_training_images_are_judged_once_in_the_order_of_their_names(folded, colours):
    e = crossfit_evidence(folded)
    assert e.files == sorted(f.relative_to(colours).as_posix() for f in image_files(colours) if f.parent.parent.name=='train')
    assert [e.classes[t] for t in e.targs] == [f.split('/')[1] for f in e.files]
    table = read_triage(folded)
    assert len(table) == 160 and list(table) == _COLUMNS and set(table.verdict) <= {*VERDICTS, ''}
    assert json.loads((folded/'triage.json').read_text())['images_of'] == 'train'

def test_a_killed_fold_is_trained_again_and_the_others_are_not(folded, quick, tmp_path):
    import shutil
    path = Path(shutil.copytree(folded, tmp_path/'again'))
    before = files(path)
    for name in 'fold-1.npz', 'triage.csv', 'triage.json': (path/name).unlink()
    (path/f'.fold-1.npz.{"0"*16}.999999999.tmp').write_bytes(b'half')
    with pytest.raises(InputError, match='fold 2 of 3 is missing.*--resume'): crossfit_evidence(path)
    resume_crossfit(path)
    assert files(path) == before  # the same bits on the same machine

def test_a_fold_that_fails_says_which_and_keeps_the_others(colours, quick, tmp_path, monkeypatch):
    real = X.fit_recipe
    def fails(learn, r, lrs, cbs=()):
        if (next(tmp_path.glob('davidnet*'))/'fold-0.npz').exists(): raise InputError('the loss is nan in epoch 0, step 3: try a lower one')
        real(learn, r, lrs)
    monkeypatch.setattr(X, 'fit_recipe', fails)
    with pytest.raises(InputError, match=r'fold 2 of 2: the loss is nan.*--resume .* --module .*conftest.py') as e: crossfit('davidnet', colours, 2, tmp_path, **QUICK)
    assert '\n' not in str(e.value)
    path = next(tmp_path.glob('davidnet*'))
    assert {f.name for f in path.iterdir()} >= {'crossfit.json', 'fold-0.npz', 'test-0.npz'} and not (path/'triage.csv').exists()
    monkeypatch.setattr(X, 'fit_recipe', real)
    assert (resume_crossfit(path)/'triage.csv').exists()

def images(root, **counts):
    "A folder of noise: `train_cat=3` makes three images of train/cat"
    rng = np.random.default_rng(0)
    for name,n in counts.items():
        (folder := root/name.replace('_', '/')).mkdir(parents=True)
        for i in range(n): Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder/f'{i}.png')
    return root

@pytest.mark.parametrize('counts, says', [
    (dict(train_a=9, test_a=5), 'all images are of the class a'), (dict(train_a=9, train_b=9, test_a=5), 'class b is not in all of'),
    (dict(train_a=9, train_b=9, test_a=5, test_b=5, test_c=5), 'class c is not in all of'), (dict(train_a=9, train_b=0, test_a=5, test_b=5), 'b: no images in this class'),
    (dict(a=9, b=9), 'only 7 images to train on')])
def test_folders_that_cannot_be_judged_are_refused_before_a_fold_is_trained(quick, tmp_path, counts, says):
    with pytest.raises(InputError, match=says) as e: crossfit('davidnet', images(tmp_path/'data', **counts), 2, tmp_path/'out', **QUICK)
    assert '\n' not in str(e.value) and not (tmp_path/'out').exists()

@pytest.mark.parametrize('folds, says', [(1, 'between 2 and 100'), (41, 'choose fewer folds')])
def test_folds_that_cannot_be_leave_nothing_behind(colours, quick, tmp_path, folds, says):
    with pytest.raises(InputError, match=says): crossfit('davidnet', colours, folds, tmp_path/'out', **QUICK)
    assert not (tmp_path/'out').exists()

def test_other_images_are_noticed(folded, tmp_path):
    import shutil
    path = Path(shutil.copytree(folded, tmp_path/'again'))
    plan = json.loads((path/'crossfit.json').read_text())
    (path/'crossfit.json').write_text(json.dumps(dict(plan, data_checksum='0')))
    with pytest.raises(InputError, match='are not the images'): resume_crossfit(path)
    with pytest.raises(InputError, match='crossfit.json'): resume_crossfit(tmp_path)


# Decisions

def test_decisions_change_the_labels_that_are_trained_on_and_nothing_on_disk(colours, tmp_path):
    before,table = files(colours),tmp_path/'decisions.csv'
    table.write_text('file,decision,label\ntrain/blue/0.png,relabel,red\ntrain/blue/1.png,drop,\ntrain/blue/2.png,keep,red\n')
    for memory in True, False:
        dls = cifar_dls(colours, bs=10, decisions=table, in_memory=memory, device='cpu')
        given = {f.relative_to(colours).as_posix(): dls.vocab[int(y)] for f,y in zip(dls.train.items, dls.train_ds.tls[1])}
        assert given['train/blue/0.png'] == 'red' and given['train/blue/2.png'] == 'blue' and 'train/blue/1.png' not in given
        assert len(given) == 159 and len(dls.valid_ds) == 40
    assert files(colours) == before

@pytest.mark.parametrize('row, says', [
    ('train/blue/0.png,relabel,pink', "line 2: label='pink'"), ('train/blue/0.png,maybe,', 'keep, relabel or drop'), ('train/blue/99.png,drop,', 'no training image'),
    ('test/blue/0.png,relabel,red', 'no training image'), ('../secret.png,drop,', 'no training image'), (',,', 'keep, relabel or drop')])
def test_a_decision_that_cannot_be_is_named(colours, tmp_path, row, says):
    (tmp_path/'d.csv').write_text(f'file,decision,label\n{row}\n')
    with pytest.raises(InputError, match=says) as e: cifar_dls(colours, bs=10, decisions=tmp_path/'d.csv')
    assert '\n' not in str(e.value)

def test_a_class_that_loses_all_its_images_is_named(colours, tmp_path):
    (tmp_path/'d.csv').write_text('file,decision,label\n' + ''.join(f'train/red/{i}.png,drop,\n' for i in range(40)))
    with pytest.raises(InputError, match='no training image of red is left'): cifar_dls(colours, bs=10, decisions=tmp_path/'d.csv')
    with pytest.raises(InputError, match='cannot be read'): cifar_dls(colours, bs=10, decisions=tmp_path/'none.csv')

def test_a_run_keeps_the_decisions_it_was_trained_with(colours, quick, tmp_path, monkeypatch):
    from cifar_cam import experiment
    monkeypatch.setattr(experiment, 'train_run', fit_run)
    (tmp_path/'d.csv').write_text('file,decision,label\ntrain/blue/0.png,relabel,red\ntrain/blue/1.png,drop,\n')
    run = experiment.run_recipe('davidnet', colours, tmp_path/'runs', decisions=tmp_path/'d.csv', **QUICK)
    assert run.env['decisions_checksum'] == sha256(tmp_path/'d.csv') == sha256(run.path/'decisions.csv')
    (tmp_path/'d.csv').unlink()
    assert len(load_run(run.path).dls.train_ds) == 159
    (run.path/'decisions.csv').write_text('file,decision,label\n')
    with pytest.raises(InputError, match='are not the decisions'): load_run(run.path).dls
    with pytest.raises(InputError, match='cannot be read'): experiment.run_recipe('davidnet', colours, tmp_path/'other', decisions=tmp_path/'none.csv', **QUICK)
    assert not (tmp_path/'other').exists()

def test_the_shell_trains_with_decisions_and_says_so(colours, quick, tmp_path, capsys, monkeypatch, undrawn):
    (tmp_path/'d.csv').write_text('file,decision,label\ntrain/red/0.png,drop,\ntrain/red/1.png,relabel,blue\n')
    words = ['train', 'davidnet', '--data', str(colours), '--out', str(tmp_path/'runs'), '--labels', str(tmp_path/'d.csv')]
    for k,v in QUICK.items(): words += ['--set', f'{k}={v}']
    assert main(words) == 0
    run = load_run(capsys.readouterr().out.splitlines()[-1])
    assert run.env['decisions_checksum'] == sha256(tmp_path/'d.csv') and len(run.dls.train_ds) == 159
    assert '--labels' in run_command(run)[0] and 'decisions.csv' in run_command(run)[0]
    assert main([*words, '--runs', '2']) == 2 and '--labels: is for one run' in capsys.readouterr().err


def test_folds_of_a_table_are_those_of_its_column(colours, tmp_path):
    rows = [(f, f.parent.name, f.parent.parent.name) for f in image_files(colours)]
    pd.DataFrame(rows, columns=['file', 'label', 'split']).to_csv(tmp_path/'table.csv', index=False)
    dls = fold_dls(find_recipe('davidnet', bs=10), tmp_path/'table.csv', 2, 0)
    assert [len(dl.dataset) for dl in dls.loaders] == [80, 80, 40]


@pytest.mark.parametrize('named', ['below the table', 'beside the folder of the table', 'in memory'])
def test_the_shell_and_python_find_the_suspects_of_a_table(colours, quick, tmp_path, monkeypatch, capsys, named):
    "Whatever the table names its images by; a third of the labels is wrong, so some are doubted"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(colours, 'images')
    files = [Path(f.relative_to(colours)) for f in image_files(colours)]
    labels = ['red' if i%3==0 else f.parent.name for i,f in enumerate(files)]
    table = pd.DataFrame(dict(file=[str(Path('images')/f) for f in files], label=labels, split=[f.parts[0] for f in files]))
    if named=='in memory': path = crossfit('davidnet', table, 2, 'runs', **QUICK)
    else:
        folder = Path('tables' if named.startswith('beside') else '.')
        folder.mkdir(exist_ok=True)
        table.assign(file=['../'*named.startswith('beside') + f for f in table.file]).to_csv(folder/'t.csv', index=False)
        Path('mine.toml').write_text('base = "davidnet"\n' + ''.join(f'{k} = {v}\n' for k,v in QUICK.items()))
        assert main(['crossfit', 'mine.toml', '--data', str(folder/'t.csv'), '--folds', '2']) == 0
        path = Path(capsys.readouterr().out.splitlines()[-1])
    monkeypatch.chdir(tmp_path)
    assert main(['crossfit', '--resume', str(path)]) == 0
    doubted = read_triage(path).query('suggested != label')
    assert len(doubted) > 5 and (path/'suspects.html').read_text().count('data:image/png;base64,') == len(doubted)
    decided = doubted[:3].assign(decision='relabel', label=doubted.suggested)
    decided[['file', 'decision', 'label']].to_csv('d.csv', index=False)
    data = json.loads((path/'crossfit.json').read_text())['data']
    assert len(cifar_dls(data, bs=10, decisions='d.csv').train_ds) == 160


def test_what_would_fail_after_the_first_fold_fails_before_it(colours, folded, tmp_path, monkeypatch):
    "A network whose embedding nobody finds, and a page without images"
    monkeypatch.setitem(MODELS, 'davidnet', lambda n_out=10, norm='batch': nn.Sequential(nn.Conv2d(3, n_out, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    monkeypatch.setattr(X, 'fit_fold', lambda *args: pytest.fail('a fold is trained'))
    with pytest.raises(InputError, match='no linear layer'): crossfit('davidnet', colours, 2, tmp_path/'out', **QUICK)
    with pytest.raises(InputError, match='--suspects 0'): crossfit_command('davidnet', str(colours), suspects=0)
    with pytest.raises(InputError, match='--suspects -5'): crossfit_command(resume=str(folded), suspects=-5)
    assert not (tmp_path/'out').exists()


def test_the_triage_of_training_images_is_not_written_over(folded, two, quick):
    "By that of test images, into the same folder"
    before = files(folded)
    for call in lambda: triage_runs([folded]), lambda: triage_runs(two, folded):
        with pytest.raises(InputError, match='holds the triage of its training images'): call()
    assert files(folded) == before


def test_a_comparison_and_a_model_card_tell_of_decisions(two, quick, colours, tmp_path, monkeypatch):
    from cifar_cam import experiment
    from cifar_cam.report import compare_runs
    from cifar_cam.share import model_card, ship_run
    from cifar_cam.summary import differing_settings
    monkeypatch.setattr(experiment, 'train_run', fit_run)
    decided = {}
    for name,rows in dict(a='train/blue/0.png,relabel,red\ntrain/blue/1.png,drop,\n', b='train/blue/0.png,drop,\n').items():
        (tmp_path/name).mkdir()
        (tmp_path/name/'d.csv').write_text('file,decision,label\n' + rows)
        decided[name] = experiment.run_recipe('davidnet', colours, tmp_path/'runs', decisions=tmp_path/name/'d.csv', **QUICK)
    plain = load_run(two[0])
    for runs in [plain, decided['a']], [decided['a'], decided['b']]:
        assert [*differing_settings(runs)] == ['decisions']
        page = compare_runs(runs, tmp_path/'c.html').read_text()
        assert 'None: the runs have the same recipe' not in page and 'd.csv (' in page
    assert not differing_settings([plain, load_run(two[0])]) and 'None: the runs have the same recipe' in compare_runs([plain, plain], tmp_path/'c.html').read_text()
    assert 'd.csv (' in write_report(decided['a']).read_text()
    assert 'labels changed 1, images dropped 1.' in model_card(decided['a']) and 'decisions' not in model_card(plain)
    shipped = ship_run(decided['a'], tmp_path/'shipped')
    assert 'labels changed 1, images dropped 1.' in (shipped.path/'README.md').read_text() and len(shipped.dls.train_ds) == 159
    (shipped.path/'decisions.csv').unlink()
    assert 'A table of decisions changed or dropped training labels.' in model_card(shipped)


def test_a_comparison_is_written_over_no_file_of_a_run(two, quick, tmp_path):
    from cifar_cam.report import compare_runs
    run = Path(shutil.copytree(two[0], tmp_path/'run'))
    write_report(run)
    before = files(run)
    for name in 'recipe.json', 'history.csv', 'report.html', 'weights.safetensors':
        with pytest.raises(InputError, match=f'{name}: is there already'): compare_runs([run, two[1]], run/name)
    assert files(run) == before
    for _ in range(2): compare_runs([run, two[1]], tmp_path/'c.html')


def test_the_page_holds_the_images_and_cannot_be_broken_by_a_name(folded, colours, tmp_path):
    table = read_triage(folded)
    table.loc[0, ['label', 'suggested']] = ['a</script>', 'b"']
    page = suspects_page(table[:3], colours, tmp_path/'s.html').read_text()
    assert page.count('data:image/png;base64,') == (table[:3].suggested != table[:3].label).sum() and page.count('</script>') == 1
    same = table.assign(suggested=table.label)
    with pytest.raises(InputError, match='nothing to decide'): suspects_page(same, colours, tmp_path/'t.html')


@pytest.fixture
def page():
    "A page of headless Chromium. After the test: no word on its console, nothing asked of a network"
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if chromium is None: pytest.skip('needs Chromium')
    api,said,asked = pytest.importorskip('playwright.sync_api', reason='needs playwright'),[],[]
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-dev-shm-usage'])
        page = browser.new_page(viewport=dict(width=360, height=700))
        for event in 'console', 'pageerror': page.on(event, lambda o, e=event: said.append(f'{e}: {o}'))
        page.on('request', lambda r: asked.append(r.url))
        yield page
        browser.close()
    assert not said and all(u.startswith(('file:', 'data:')) for u in asked)

def test_suspects_are_decided_by_keys_and_the_file_trains(colours, tmp_path, page):
    table = pd.DataFrame(dict(file=[f'train/blue/{i}.png' for i in range(5)], label='blue', suggested='red'))
    file = suspects_page(table, colours, tmp_path/'suspects.html')
    page.goto(file.as_uri())
    at = lambda: page.inner_text('#where')
    assert at() == 'image 1 of 5, 0 decided' and page.inner_text('#what') == 'label: blue, suggested: red'
    assert page.evaluate("document.querySelector('#image').naturalWidth") == 32
    for key in 'r', 'd', 'k', 'Shift', 'x': page.keyboard.press(key)
    assert at() == 'image 4 of 5, 3 decided' and page.inner_text('#said') == ''
    page.keyboard.press('ArrowLeft')
    assert page.inner_text('#said') == 'keep' and page.get_attribute('#image', 'alt') == 'train/blue/2.png'
    page.keyboard.press('r')  # another mind
    page.keyboard.press('ArrowRight'); page.keyboard.press('ArrowRight')
    assert at() == 'image 5 of 5, 3 decided'  # the last one stays
    page.click('text=keep')
    page.reload()
    assert at() == 'image 1 of 5, 4 decided' and page.inner_text('#said') == 'relabel'  # where one was is remembered
    with page.expect_download() as got: page.click('#save')
    assert got.value.suggested_filename == 'decisions.csv'
    got.value.save_as(tmp_path/'decisions.csv')
    told = pd.read_csv(tmp_path/'decisions.csv')
    assert told.values.tolist() == [['train/blue/0.png', 'relabel', 'red'], ['train/blue/1.png', 'drop', 'blue'], ['train/blue/2.png', 'relabel', 'red'], ['train/blue/4.png', 'keep', 'blue']]
    assert page.evaluate('document.documentElement.scrollWidth') <= 360
    dls = cifar_dls(colours, bs=10, decisions=tmp_path/'decisions.csv', device='cpu')
    given = {f.relative_to(colours).as_posix(): dls.vocab[int(y)] for f,y in zip(dls.train.items, dls.train_ds.tls[1])}
    assert len(given) == 159 and [given[f'train/blue/{i}.png'] for i in (0, 2, 3, 4)] == ['red', 'red', 'blue', 'blue']

def test_decisions_keep_commas_and_quotes_of_names(colours, tmp_path, page):
    odd = 'a "b", c'
    (tmp_path/'train'/odd).mkdir(parents=True)
    shutil.copy(colours/'train'/'blue'/'0.png', tmp_path/'train'/odd/'0,1.png')
    table = pd.DataFrame(dict(file=[f'train/{odd}/0,1.png'], label=odd, suggested='</script>\n'))
    page.goto(suspects_page(table, tmp_path, tmp_path/'s.html').as_uri())
    page.keyboard.press('d')
    with page.expect_download() as got: page.click('#save')
    got.value.save_as(tmp_path/'decisions.csv')
    assert pd.read_csv(tmp_path/'decisions.csv').values.tolist() == [[f'train/{odd}/0,1.png', 'drop', odd]]


# Runs

@pytest.fixture(scope='module')
def two(colours, narrow, tmp_path_factory):
    "Two seeds of a narrow network"
    from cifar_cam import experiment
    with pytest.MonkeyPatch.context() as mp:
        mp.setitem(MODELS, 'davidnet', narrow)
        mp.setattr(experiment, 'train_run', fit_run)
        return [experiment.run_recipe('davidnet', colours, tmp_path_factory.mktemp('two'), s, **QUICK).path for s in (0, 1)]

def test_triage_of_runs_keeps_what_the_networks_say(two, folded, quick, colours, capsys):
    for p in two: write_report(p)
    triage_command([*map(str, two), str(folded)])
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == str(two[0]) and 'mistakes' in said[-2]
    table,told = read_triage(two[0]),json.loads((two[0]/'triage.json').read_text())
    assert len(table) == 40 and told['networks'] == 5 and sum(told['mistakes_by_verdict'].values()) == told['mistakes']
    for p in two: assert len(load_evidence(p/'logits.npz').files) == 40
    assert f"Of its {told['mistakes']} mistakes" in (two[0]/'report.html').read_text()  # written again
    assert 'mistakes:' not in (two[1]/'report.html').read_text()
    assert len(run_evidence(folded)) == 3

def test_runs_on_other_images_are_refused_before_anything_is_written(two, quick, tmp_path, few, monkeypatch):
    from cifar_cam import experiment
    monkeypatch.setattr(experiment, 'train_run', fit_run)
    other = experiment.run_recipe('davidnet', few, tmp_path, epochs=1, bs=10, lr=.05, lr_min=.005).path
    with pytest.raises(InputError, match='other classes') as e: triage_runs([two[0], other], tmp_path/'out')
    assert '\n' not in str(e.value) and not (tmp_path/'out').exists()

def test_an_unfinished_run_and_no_run_are_refused(two, quick, tmp_path):
    import shutil
    path = Path(shutil.copytree(two[1], tmp_path/'half', ignore=shutil.ignore_patterns('metrics.json', 'logits.npz')))
    with pytest.raises(InputError, match='not finished'): triage_runs([path])
    with pytest.raises(InputError, match='no run folder'): triage_runs([tmp_path/'nothing'])
    with pytest.raises(InputError, match='name a recipe'): crossfit_command()

def test_the_command_writes_the_page_of_suspects(folded, capsys):
    table = read_triage(folded)
    crossfit_command(resume=str(folded))
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == str(folded)
    assert (folded/'suspects.html').exists() == (table.suggested != table.label).any()
