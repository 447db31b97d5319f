"The report as a reader uses it: in headless Chromium, from disk, without a network"
import base64, io, json, os, re, shutil, warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import nn
from PIL import Image

from cifar_cam.cam import scale_maps
from cifar_cam.core import InputError
from cifar_cam.panels import overlay
from cifar_cam.models import MODELS
from cifar_cam.recipe import change_recipe, find_recipe, Recipe
from cifar_cam.evaluate import calibration_error, evaluate_learner, load_weights, save_weights
from cifar_cam.run import load_run
from cifar_cam.experiment import run_recipe
from cifar_cam.summary import class_table, paired_difference, reliability, run_command
from cifar_cam.triage import save_triage, VERDICTS
from cifar_cam.report import compare_runs, pick_images, write_report

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
EVIL = ['<img src=x onerror=alert(1)>', '"\'onmouseover=alert(1)', '{{7*7}}&amp;', 'plain']


def tiny(n_out=10, norm='batch'):
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, n_out))


def folder(root, classes, train=12, test=10, size=(32, 32)):
    "Images of noise around a colour of the class; half of the first class look like the second, so that there are mistakes"
    rng = np.random.default_rng(0)
    for i,name in enumerate(classes):
        for split,n in ('train', train), ('test', test):
            (root/split/name).mkdir(parents=True)
            for j in range(n):
                rgb = np.roll((200, 60, 60*(i//3)), i + (i==0 and j%2))
                Image.fromarray((rgb + rng.normal(0, 40, (*size, 3))).clip(0, 255).astype('uint8')).save(root/split/name/f'{j:03d}.png')
    return root


@pytest.fixture(scope='module', autouse=True)
def tiny_arch():
    mp = pytest.MonkeyPatch()
    mp.setitem(MODELS, 'tiny', tiny)
    yield
    mp.undo()


def train(data, out, **changes):
    "A run without figures, in a second"
    mp = pytest.MonkeyPatch()
    mp.setattr('cifar_cam.experiment.draw_run', lambda run: None)
    kwargs = {k: changes.pop(k) for k in ('seed', 'published_protocol') if k in changes}
    try: return run_recipe(Recipe(**{**dict(name='tiny', arch='tiny', epochs=3, bs=8, lr=.05, lr_min=.005), **changes}), data, out, **kwargs)
    finally: mp.undo()


@pytest.fixture(scope='module')
def runs(tmp_path_factory, tiny_arch):
    "Two runs on three classes, the second partial to the first class, the report of one and the page that compares them"
    root = tmp_path_factory.mktemp('reports')
    data = folder(root/'data', ['ant', 'bee', 'fly'], test=40)
    a,b = train(data, root/'runs', epochs=10),train(data, root/'runs', name='worse', epochs=1)
    load_weights(b.learn.model, a.path/'weights.safetensors')
    with torch.no_grad(): b.learn.model[-1].bias[0] += 3
    save_weights(b.learn.model, b.path/'weights.safetensors')
    (b.path/'metrics.json').write_text(json.dumps(dict(b.metrics, **evaluate_learner(b.learn, b.dls[-1]))))
    b = load_run(b.path)
    return dict(a=a, b=b, report=write_report(a, images=70), compared=compare_runs([a, b]))


@pytest.fixture(scope='module')
def browser():
    if CHROMIUM is None: pytest.skip('needs Chromium')
    api = pytest.importorskip('playwright.sync_api', reason='needs playwright')
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-dev-shm-usage'])
        yield b
        b.close()


@pytest.fixture
def visit(browser):
    "Open a file. After the test: no error, no word on the console, nothing asked of a network"
    pages,said,asked = [],[],[]
    def open_(path, hash='', width=1440, scheme='light'):
        page = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
        pages.append(page)
        for event in 'console', 'pageerror', 'dialog', 'requestfailed': page.on(event, lambda o, e=event: said.append(f'{e}: {o}'))
        page.on('request', lambda r: asked.append(r.url))
        page.goto(path.as_uri() + hash)
        page.wait_for_selector('.tile canvas:not([data-drawn])', state='detached')   # a function to wait for would be eval'd, which the page forbids
        return page
    yield open_
    for p in pages: p.close()
    assert not said and asked and all(u.startswith(('file:', 'data:')) for u in asked)


def escape(page):
    "Close the viewer; the browser tells the page of it a little later"
    page.keyboard.press('Escape')
    page.wait_for_url('**#gallery')

def names(page): return [json.loads(s) for s in page.eval_on_selector_all('.tile', 'ts => ts.map(t => JSON.stringify([+t.dataset.i, t.innerText]))')]
def tiles(page): return [i for i,_ in names(page)]
def triaged(run, path, verdicts=('label', 'ambiguous', 'copy', 'network', '')):
    "A copy of `run` at `path` with a triage: the verdicts in turn, the scores falling and rising with the place"
    run = load_run(shutil.copytree(run.path, path))
    interp,n = run.interp,len(run.interp.targs)
    names = np.array([str(c) for c in interp.vocab])
    said = [verdicts[i%len(verdicts)] for i in range(n)]
    table = pd.DataFrame(dict(file=interp.file_names(range(n)), label=names[interp.targs], suggested=names[(interp.targs + 1)%len(names)],
                              verdict=said, label_score=1 - np.arange(n)/n, ambiguity_score=np.arange(n)/n, predicted=names[interp.preds], mistaken=1,
                              copy_of=np.where(np.array(said)=='copy', 'train/ant/000.png', '')))
    save_triage(table, run.path)
    return run,table

def blob(path): return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)[1])


# --- the numbers

def test_class_table_counts_and_its_intervals_hold_the_accuracy(runs):
    t,run = class_table(runs['a'].interp),runs['a']
    assert t.images.sum() == run.metrics['images'] == 120 and t.correct.sum() == round(120*run.metrics['accuracy'])
    assert {r['class']: r.accuracy for _,r in t.iterrows()} == pytest.approx(run.metrics['class_accuracy'])
    assert (t.low <= t.accuracy).all() and (t.accuracy <= t.high).all() and t.accuracy.is_monotonic_decreasing
    from scipy.stats import binomtest
    ci = binomtest(int(t.correct[0]), int(t.images[0])).proportion_ci(method='wilson')
    assert (t.low[0], t.high[0]) == pytest.approx((ci.low, ci.high), abs=1e-4)


def test_reliability_is_what_the_calibration_error_is_the_mean_of():
    rng = torch.Generator().manual_seed(0)
    probs = (4*torch.randn(500, 5, generator=rng)).softmax(1)
    targets = torch.randint(5, (500,), generator=rng)
    bins = reliability(probs, targets)
    assert (bins.images*(bins.accuracy - bins.confidence).abs()).sum()/500 == pytest.approx(calibration_error(probs, targets), abs=1e-9)
    assert bins.images.sum() == 500 and ((bins.begin < bins.confidence) & (bins.confidence <= bins.end)).all()
    sure = reliability(torch.eye(3), torch.arange(3))   # confidence 1 is in the last bin, not beyond
    assert len(sure) == 1 and sure.end[0] == 1 and sure.accuracy[0] == 1


def test_paired_difference_counts_only_disagreements():
    d,low,high,p = paired_difference(260, 200, 10_000)
    assert d == pytest.approx(.006) and (low, high, p) == pytest.approx((.001792986, .010204614, .0058839225), abs=1e-9)
    assert paired_difference(30, 10, 500)[1:] == pytest.approx((.0150845165, .0645967584, .0022214337), abs=1e-9)
    assert paired_difference(0, 0, 100)[0] == 0 and paired_difference(0, 0, 100)[3] == 1
    forth,back = paired_difference(30, 10, 500),paired_difference(10, 30, 500)
    assert forth[0] == -back[0] and forth[1] == pytest.approx(-back[2]) and forth[3] == back[3]
    assert low > 0 and paired_difference(205, 200, 10_000)[1] < 0


def test_picked_images_are_the_worst_and_mistakes_of_every_kind(runs):
    interp = runs['a'].interp
    picked = pick_images(interp, 42)
    assert len(set(picked)) == 42 and picked[:18] == interp.indices('top_losses', 18) and picked == pick_images(interp, 42)
    assert sorted(pick_images(interp, 10**6)) == list(range(120))
    # 1,000 images, the losses falling: 500 times 0 taken for 1, then right ones, and among them a rare mistake of each other kind
    targs,preds = torch.zeros(1000, dtype=torch.long),torch.zeros(1000, dtype=torch.long)
    preds[:500],rare = 1,{(t, p) for t in range(4) for p in range(4) if t!=p} - {(0, 1)}
    for i,(t,p) in enumerate(sorted(rare)): targs[600 + 30*i],preds[600 + 30*i] = t,p
    some = SimpleNamespace(targs=targs, preds=preds, indices=lambda which: list(range(1000)))
    picked = pick_images(some, 70)
    assert picked[:30] == list(range(30)) and rare <= {(int(targs[i]), int(preds[i])) for i in picked}
    assert len(picked) == len(set(picked)) == 70 and sum(bool(targs[i]==preds[i]) for i in picked) >= 5


# --- how to make it again

def test_the_command_makes_the_same_recipe_again(runs, tmp_path):
    import shlex
    from cifar_cam.cli import _changes, parser
    mine = change_recipe(find_recipe('resnet18-plateau'), epochs=3, lr=.025, keep_best=False, norm='group')
    run = load_run(runs['a'].path)
    run.recipe,run.env = mine,dict(run.env, data="/a folder/it's", seed=7, published_protocol=True)
    command,toml = run_command(run)
    args = parser().parse_args(shlex.split(command)[1:])
    assert toml == '' and find_recipe(args.recipe, **_changes(args.set, epochs=args.epochs, bs=args.bs)) == mine
    assert (args.data, args.seed, args.published_protocol, args.device) == ("/a folder/it's", 7, True, run.env['device'])
    run.env = dict(run.env, processes=2)
    assert run_command(run)[0].startswith('torchrun --standalone --nproc-per-node 2 -m cifar_cam train resnet18-plateau ')
    run.env = dict(run.env, processes=1)
    run.recipe = change_recipe(mine, name='my-own', published=None)
    command,toml = run_command(run)
    (tmp_path/'my-own.toml').write_text(toml)
    assert find_recipe(str(tmp_path/shlex.split(command)[2])) == run.recipe


# --- the file

def test_the_report_is_one_file_written_at_once(runs, monkeypatch):
    a,path = runs['a'],runs['report']
    assert path == a.path/'report.html' and not list(a.path.glob('.*')) and path.stat().st_size < 1e6
    assert not re.findall(r'(?:src|href)="(?!#|data:,)[^"]*"', path.read_text())   # nothing beside it is needed
    before = path.read_text()
    monkeypatch.setattr('os.replace', lambda *_: (_ for _ in ()).throw(OSError('full')))
    with pytest.raises(OSError): write_report(a, images=10)
    assert path.read_text() == before and not list(a.path.glob('.*'))


def test_images_fit_into_the_budget(runs, tmp_path, monkeypatch):
    a,full = runs['a'],runs['report'].read_text()
    small = write_report(a, budget=60_000)
    assert 0 < len(blob(small)['images']) < 30 and sum(len(o['src']) for o in blob(small)['images']) < 60_000
    runs['report'].write_text(full)


def test_an_unfinished_run_and_a_lone_run_are_refused(runs, tmp_path):
    shutil.copytree(runs['a'].path, tmp_path/'stopped')
    (tmp_path/'stopped'/'metrics.json').unlink()
    with pytest.raises(InputError, match='resume'): write_report(tmp_path/'stopped')
    with pytest.raises(InputError, match='at least two'): compare_runs([runs['a']])
    with pytest.raises(InputError, match='nowhere'): compare_runs([runs['a'], tmp_path/'nowhere'])


def test_every_accuracy_of_a_run_selected_on_test_says_so(runs, tmp_path):
    data = runs['a'].env['data']
    chosen = train(data, tmp_path, epochs=1, keep_best=True, published_protocol=True)
    html = write_report(chosen).read_text()
    part = lambda id: re.search(rf'<section id="{id}">(.*?)</section>', html, re.S)[1]
    header = re.search(r'<header.*?</header>', html, re.S)[0]
    assert header.count('selected on the test set') >= 3   # the sentence, the accuracy, the one with flip TTA
    assert all('selected on' in part(id) for id in ('curves', 'classes')) and part('classes').count('selected on the test set') >= 2
    assert 'test (selected on it)' in part('curves') and 'a bin (selected on the test set)' in part('classes')
    assert 'TEST' in part('recipe') and 'selected on the test set' in re.search('<title>(.*?)</title>', html)[1]
    assert 'selected on' not in runs['report'].read_text()
    nothing_chosen = train(data, tmp_path, epochs=1, published_protocol=True)
    assert 'selected on' not in write_report(nothing_chosen).read_text()
    both = compare_runs([chosen, runs['a']], tmp_path/'both.html').read_text()
    rows = re.search(r'<section id="table">.*?<tbody>(.*?)</tbody>', both, re.S)[1].split('</tr>')
    assert 'selected on the test set' in rows[0] and 'selected on' not in rows[1] and 'tiny #1 *' in both and 'tiny #2 *' not in both


def test_a_scorecard_is_shown_if_there_is_one(runs, tmp_path):
    assert 'id="scorecard"' not in runs['report'].read_text()
    run = load_run(shutil.copytree(runs['a'].path, tmp_path/'scored'))
    stat = dict(mean=.6123, low=.55, high=.67, n=20, nan=0)
    card = dict(about=dict(images=20, seed=0, methods=['gradcam']), rows={'gradcam': dict(energy=stat, randomisation=stat, maps=dict(zero=0, nan=0)), '<b>chance': dict(energy=dict(stat, mean=None, low=None))},
                cascades=dict(gradcam=dict(fc=.9, layer4=None)), survivors=['gradcam'])
    (run.path/'score.json').write_text(json.dumps(card))
    html = write_report(run).read_text()
    assert '0.61 (0.55 to 0.67)†' in html and 'energy in object' in html and '&lt;b&gt;chance' in html and '<b>chance' not in html and '0.90' in html
    (run.path/'score.json').write_text('{"rows": 3}')
    with pytest.raises(InputError, match='score.json'): write_report(run)


def test_a_network_without_maps_still_has_a_gallery(runs, tmp_path, monkeypatch):
    def refuse(*_, **__): raise InputError('no stage of the model has a map of 5×5 or more at 32×32 input')
    monkeypatch.setattr('cifar_cam.interpret.CamInterpretation.cams', refuse)
    run = load_run(shutil.copytree(runs['a'].path, tmp_path/'blind'))
    html = write_report(run).read_text()
    assert 'no stage of the model' in html and blob(run.path/'report.html')['map_size'] is None


def test_a_triage_of_other_images_is_refused(runs, tmp_path):
    run,table = triaged(runs['a'], tmp_path/'judged')
    for spoilt in table[1:], table.assign(file=table.file + '~'):
        save_triage(spoilt, run.path)
        with pytest.raises(InputError, match='triage.csv: is of other images.*cifar-cam triage') as e: write_report(run)
        assert '\n' not in str(e.value)
    page = runs['report'].read_text()
    assert not any(s in page for s in ('id="triage"', 'class="verdicts"', 'most doubtful label'))


# --- in the browser

def test_the_first_screen_says_how_many_mistakes_have_each_verdict(runs, visit, tmp_path):
    run,table = triaged(runs['a'], tmp_path/'judged')
    wrong = table[table.predicted != table.label]
    for width,height in (1440, 900), (360, 800):
        page = visit(write_report(run), width=width)
        page.set_viewport_size(dict(width=width, height=height))
        said = page.inner_text('.verdicts')
        assert f'Of its {len(wrong)} mistakes' in said
        counts = page.eval_on_selector_all('.verdicts li b', 'bs => bs.map(b => +b.textContent)')
        assert counts == [(wrong.verdict==v).sum() for v in VERDICTS] and sum(counts) < len(wrong)
        box = page.locator('.verdicts').bounding_box()
        if width == 1440: assert box['y'] + box['height'] <= height
        assert page.evaluate('document.documentElement.scrollWidth') <= width
        page.click('.verdicts a[href="#verdict-0"]')
        assert sorted(tiles(page)) == sorted(wrong.index[wrong.verdict=='label']) and page.input_value('[data-filter=v]') == '0'
        assert page.input_value('[data-filter=only]') == 'wrong' and page.evaluate("document.activeElement.matches('.tile')")
        rows = page.eval_on_selector_all('#triage tbody tr', "rs => rs.map(r => [...r.cells].map(c => c.textContent))")
        assert [r[0] for r in rows] == [*VERDICTS] and [int(r[2]) for r in rows] == [(table.verdict==v).sum() for v in VERDICTS]
        assert [tuple(r[3:]) for r in rows] == [*VERDICTS.values()]


def test_the_gallery_filters_and_sorts_by_verdict(runs, visit, tmp_path):
    run,table = triaged(runs['a'], tmp_path/'judged')
    page = visit(write_report(run, images=70))
    held = [o['i'] for o in blob(run.path/'report.html')['images']]
    kinds = [*VERDICTS, '']
    of = lambda v: [i for i in held if table.verdict[i]==v]
    for v in 'label', 'copy', '':
        page.select_option('[data-filter=v]', str(kinds.index(v)))
        page.select_option('[data-filter=sort]', '-doubt')
        assert tiles(page) == sorted(of(v)) and len(of(v)) >= 5   # the scores fall with the place
        page.select_option('[data-filter=sort]', '-spread')
        assert tiles(page) == sorted(of(v))[::-1]
        assert f'{len(of(v))} images here, of {(table.verdict==v).sum()} in the test set' in page.inner_text('#count')
    page.select_option('[data-filter=v]', '3')
    assert tiles(page) == [] and 'No image is like that' in page.inner_text('#tiles')
    page.select_option('[data-filter=v]', '')
    page.select_option('[data-filter=sort]', '+verdict')
    assert tiles(page) == sorted(held, key=lambda i: (kinds.index(table.verdict[i]), i))[:60]
    page.select_option('[data-filter=v]', '2')
    page.click('.tile')
    assert 'Verdict: copy, a copy of train/ant/000.png; label score' in page.inner_text('#about')
    shown = int(page.url.rsplit('-', 1)[1])
    page.keyboard.press('ArrowRight')
    assert table.verdict[int(page.url.rsplit('-', 1)[1])] == 'copy' != shown
    escape(page)
    page.evaluate("location.hash = 'true-0-predicted-1'")
    page.wait_for_timeout(50)
    assert page.input_value('[data-filter=v]') == '' and tiles(page)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [360, 1440])
def test_a_triaged_page_can_be_read(runs, visit, tmp_path, width, scheme):
    run,_ = triaged(runs['a'], tmp_path/'judged')
    page = visit(write_report(run), width=width, scheme=scheme)
    assert page.evaluate('document.documentElement.scrollWidth') <= width and page.evaluate(CONTRAST) == []


def test_gallery_filters_and_sorts(runs, visit):
    page,interp = visit(runs['report']),runs['a'].interp
    held = [o['i'] for o in blob(runs['report'])['images']]
    t,p = interp.targs.tolist(),interp.preds.tolist()
    loss,conf = interp.losses.tolist(),interp.probs.max(1).values.tolist()
    assert tiles(page) == sorted(held, key=lambda i: (-round(loss[i], 5), i))[:60]
    page.select_option('[data-filter=sort]', '+confidence')
    assert tiles(page) == sorted(held, key=lambda i: (round(conf[i], 5), i))[:60]
    page.select_option('[data-filter=sort]', '+i')
    page.select_option('[data-filter=only]', 'wrong')
    assert tiles(page) == sorted(i for i in held if t[i] != p[i]) != []
    page.select_option('[data-filter=t]', '0')
    page.select_option('[data-filter=p]', '1')
    want = sorted(i for i in held if (t[i], p[i]) == (0, 1))
    assert tiles(page) == want != [] and all('bee' in n and 'is ant' in n for _,n in names(page))
    assert page.inner_text('#count').startswith(f'{len(want)} image')
    page.select_option('[data-filter=only]', 'right')
    assert tiles(page) == [] and 'No image is like that' in page.inner_text('#tiles')
    for k in 'only', 't', 'p': page.select_option(f'[data-filter={k}]', '')
    assert '70 images here, of 120 in the test set' in page.inner_text('#count')
    page.click('#more')
    assert len(tiles(page)) == 70 and not page.is_visible('#more')


def test_a_number_of_the_matrix_leads_to_its_pictures(runs, visit):
    page,interp = visit(runs['report']),runs['a'].interp
    cells = page.eval_on_selector_all('table.matrix tbody tr', "rs => rs.map(r => [...r.querySelectorAll('td')].map(d => +d.textContent))")
    assert cells == interp.confusion_matrix().tolist()
    page.select_option('[data-filter=t]', '2')
    for _ in range(2):   # also if it is clicked again, from above
        page.evaluate("scrollTo({top: 0, behavior: 'instant'}); document.activeElement.blur()")
        page.click('table.matrix [href="#true-0-predicted-1"]')
        assert page.evaluate("document.activeElement.matches('.tile')")
        assert tiles(page) and all('bee' in n and 'is ant' in n for _,n in names(page)) and page.input_value('[data-filter=p]') == '1'


def test_the_keyboard_reaches_everything(runs, visit):
    page = visit(runs['report'])
    page.focus('.tools [data-view=difference]')
    page.keyboard.press('Tab')
    shown,at = tiles(page),lambda: page.evaluate('+document.activeElement.dataset.i')
    assert at() == shown[0]
    page.keyboard.press('ArrowRight'); page.keyboard.press('ArrowRight'); page.keyboard.press('ArrowLeft')
    assert at() == shown[1] and page.locator('.tile[tabindex="0"]').count() == 1
    across = page.evaluate("new Set([...document.querySelectorAll('.tile')].map(t => t.offsetLeft)).size")
    page.keyboard.press('ArrowDown')
    assert at() == shown[1 + across]
    page.keyboard.press('ArrowUp'); page.keyboard.press('Enter')
    assert page.is_visible('#viewer') and page.url.endswith(f'#image-{shown[1]}')
    page.keyboard.press('ArrowRight'); page.keyboard.press('ArrowRight'); page.keyboard.press('ArrowLeft'); page.keyboard.press('3')
    assert page.url.endswith(f'#image-{shown[2]}-actual') and page.get_attribute('.sheet [data-view=actual]', 'aria-pressed') == 'true'
    page.keyboard.press('Home')
    assert page.is_disabled('#previous') and page.inner_text('#place') == '1 of 70'
    page.keyboard.press('ArrowLeft')
    page.keyboard.press('End'); page.keyboard.press('ArrowLeft')
    page.focus('#next'); page.keyboard.press('Enter')   # the button goes off and takes no key with it
    page.keyboard.press('ArrowLeft')
    assert page.inner_text('#place') == '69 of 70'
    page.keyboard.press('End')
    assert page.is_disabled('#next') and page.inner_text('#place') == '70 of 70'
    escape(page)
    assert not page.is_visible('#viewer') and len(tiles(page)) == 70 and at() == tiles(page)[-1]   # grown to where one has come
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle + getComputedStyle(document.activeElement).outlineWidth")
    assert outline == 'solid3px'


def test_a_link_opens_one_image(runs, visit):
    held = [o['i'] for o in blob(runs['report'])['images']]
    page = visit(runs['report'], f'#image-{held[5]}-difference')
    assert page.is_visible('#viewer') and f'Image {held[5]},' in page.inner_text('#about')
    assert page.get_attribute('.sheet [data-view=difference]', 'aria-pressed') == 'true'
    escape(page)
    page.select_option('[data-filter=only]', 'right')
    wrong = next(o['i'] for o in blob(runs['report'])['images'] if o['t'] != o['p'][0])
    page.evaluate(f"location.hash = 'image-{wrong}'")   # an image that the filter hides
    page.wait_for_selector('#viewer[open]')
    assert f'Image {wrong},' in page.inner_text('#about') and page.input_value('[data-filter=only]') == ''
    assert not page.inner_text('#place').startswith('0 ')
    page.evaluate("location.hash = 'true-0-predicted-1'")   # from an open image to others, by the address bar
    page.wait_for_selector('#viewer', state='hidden')
    page.wait_for_timeout(50)   # the dialog tells of its closing in a later task
    assert page.url.endswith('#true-0-predicted-1') and page.evaluate("document.activeElement.matches('.tile')")
    other = next(i for i in range(120) if i not in held)
    page = visit(runs['report'], f'#image-{other}')
    assert not page.is_visible('#viewer') and f'Image {other} is not in this file' in page.inner_text('#count')


def pixels(page, selector):
    page.wait_for_timeout(50)
    url = page.eval_on_selector(selector, 'c => c.toDataURL()')
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(',')[1]))).convert('RGB')).astype(int)


def rewritten(path, data, into):
    "The page at `path` with other data"
    html = re.sub(r'(id="data">).*?(</script>)', lambda m: m[1] + json.dumps(data) + m[2], path.read_text(), flags=re.S)
    (into/'report.html').write_text(html)
    return into/'report.html'


def test_the_page_holds_the_maps_of_the_network(runs):
    data,interp = blob(runs['report']),runs['a'].interp
    idxs = [o['i'] for o in data['images']]
    for k,target in enumerate(('predicted', 'rival')):
        held = np.stack([np.frombuffer(base64.b64decode(o['maps'][k]), np.uint8).reshape(data['map_size']) for o in data['images']])
        maps,blank = interp.cams(idxs, target)
        drawn = scale_maps(torch.from_numpy(held).float(), (32, 32))[0].numpy()
        assert np.abs(drawn - maps).max() < .01 and [o['blank'][k] for o in data['images']] == blank.tolist()


def test_the_browser_draws_maps_as_interpret_does(runs, visit, tmp_path):
    data = blob(runs['report'])
    o = next(o for o in data['images'] if o['t'] != o['p'][0])
    raw = np.zeros((2, 8, 8), np.uint8)
    raw[0, 1, 1],raw[0, 4],raw[1, 6, 6],raw[1, 4] = 255,90,255,90   # one looks at the upper left, the other at the lower right
    o['maps'],o['blank'],data['map_size'] = [base64.b64encode(r.tobytes()).decode() for r in raw],[False]*2,[8, 8]
    page = visit(rewritten(runs['report'], data, tmp_path), f"#image-{o['i']}")
    image,maps = runs['a'].interp.images([o['i']])[0],scale_maps(torch.from_numpy(raw).float(), (32, 32))[0].numpy()
    drawn = lambda v: page.wait_for_selector(f'#picture[data-drawn={v}]') and pixels(page, '#picture')
    assert (drawn('image') == np.kron(image, np.ones((12, 12, 1), int))).all()
    for key,view,k in ('2', 'predicted', 0), ('3', 'actual', 1):
        page.keyboard.press(key)
        got = drawn(view)[::12, ::12]
        apart = lambda m: np.abs(got - overlay(image, m)[::8, ::8]).mean()
        assert apart(maps[k]) < 3 and apart(maps[1 - k]) > 5*apart(maps[k])
    page.keyboard.press('4')
    got = drawn('difference')
    left,right = got[12*6:12*6 + 3, 12*6].mean(0),got[12*26:12*26 + 3, 12*26].mean(0)
    assert left[0] > left[2] + 40 and right[2] > right[0] + 40   # red for the first, blue for the second


def test_blank_maps_are_marked_not_drawn(runs, visit, tmp_path):
    data = blob(runs['report'])
    o = next(o for o in data['images'] if o['t'] == o['p'][0])
    o['blank'] = [True, False]
    page = visit(rewritten(runs['report'], data, tmp_path), f"#image-{o['i']}-predicted")
    page.wait_for_selector('#picture[data-drawn=predicted]')
    assert 'says nothing' in page.inner_text('#caption')
    marked = pixels(page, '#picture')
    page.keyboard.press('1')
    page.wait_for_selector('#picture[data-drawn=image]')
    plain = pixels(page, '#picture')
    assert (marked[:280] == plain[:280]).all() and (marked != plain).any()


CONTRAST = '''() => {
  const rgb = s => s.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= .04045 ? v/12.92 : ((v + .055)/1.055)**2.4).reduce((s, v, i) => s + v*[.2126, .7152, .0722][i], 0);
  const ground = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let n; n = walker.nextNode();) {
    const e = n.parentElement, s = getComputedStyle(e);
    if (!n.textContent.trim() || !e.getClientRects().length || s.visibility === 'hidden' || e.closest('script, style, :disabled')) continue;
    const [a, b] = [light(rgb(s.color)), light(ground(e))].sort((x, y) => y - x), ratio = (a + .05)/(b + .05);
    const large = parseFloat(s.fontSize) >= 24 || parseFloat(s.fontSize) >= 18.66 && s.fontWeight >= 700;
    if (ratio < (large ? 3 : 4.5)) bad.push([n.textContent.trim().slice(0, 30), ratio.toFixed(2)]);
  }
  for (const p of document.querySelectorAll('.panel path:not(.grid)')) { // lines need 3 to 1
    const s = getComputedStyle(p), [a, b] = [light(rgb(s.stroke === 'none' ? s.fill : s.stroke)), light(ground(p))].sort((x, y) => y - x);
    if ((a + .05)/(b + .05) < 3) bad.push([p.getAttribute('class'), ((a + .05)/(b + .05)).toFixed(2)]);
  }
  return bad;
}'''


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [360, 1440])
def test_pages_fit_and_can_be_read(runs, visit, width, scheme):
    for path in runs['report'],runs['compared']:
        page = visit(path, width=width, scheme=scheme)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate('document.documentElement.scrollWidth') <= width, path
        assert page.evaluate(CONTRAST) == []
        page.click('.tile')
        assert page.evaluate(CONTRAST) == [] and page.evaluate("document.querySelector('#viewer').scrollWidth") <= width
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != 'rgb(255, 255, 255)'
        assert dark == (scheme == 'dark')


def test_all_colours_of_the_matrix_can_be_read_in_both_schemes():
    from importlib.resources import files
    css = (files('cifar_cam')/'templates'/'style.css').read_text()
    light,dark = (dict(re.findall(r'--([\w-]+): (#\w{6})', part)) for part in css.split('prefers-color-scheme: dark')[:2])
    def luminance(h):
        c = [int(h[i:i+2], 16)/255 for i in (1, 3, 5)]
        return sum(w*(v/12.92 if v <= .04045 else ((v + .055)/1.055)**2.4) for w,v in zip((.2126, .7152, .0722), c))
    def ratio(a, b): hi,lo = sorted(map(luminance, (a, b)), reverse=True); return (hi + .05)/(lo + .05)
    for c in light,dict(light, **dark):
        pairs = [(c[k], c[f'{k}-ink']) for k in c if f'{k}-ink' in c] + [(c[k], c[g]) for k in ('ink', 'muted', 'accent', 'good', 'bad') for g in ('bg', 'panel')]
        assert len(pairs) > 15 and min(ratio(*p) for p in pairs) >= 4.5
        assert min(ratio(c[k], c['bg']) for k in ('s1', 's2', 's3', 's4', 's5', 's6', 'grey', 'edge')) >= 3


def test_figures_have_words_and_numbers(runs, visit):
    page = visit(runs['report'])
    alts = page.eval_on_selector_all('[role=img][aria-label]', 'es => es.map(e => e.ariaLabel)')
    assert any('Accuracy, % by epoch' in a and f"{100*runs['a'].history.valid_accuracy.iloc[-1]:.4g} % at epoch 10" in a for a in alts)
    assert any('Loss by epoch' in a for a in alts) and any('confidence' in a for a in alts)
    assert page.locator('#curves details td').count() >= 10*5
    assert page.evaluate("[...document.querySelectorAll('canvas:not(#viewer *)')].every(c => c.ariaLabel || c.closest('[aria-hidden]') || c.closest('button')?.innerText.trim())")
    assert page.evaluate("[...document.querySelectorAll('select')].every(s => s.labels.length && s.labels[0].firstChild.nodeType === 3 && s.labels[0].firstChild.textContent.trim())")


def test_hostile_names_stay_text(visit, tmp_path):
    data = folder(tmp_path/'<b>data<'/'script><script>alert(3)'/os.fsdecode(b'not \xff UTF-8'), EVIL, train=6, test=4)   # a path may hold </script>
    worst = next((data/'test'/'plain').iterdir())
    worst.rename(worst.with_name('<script>alert(2)<!--.png'))
    out = tmp_path/"it's <i>out"
    run = train(data, out, name='<u>"x"', epochs=1, bs=4)
    again = train(data, out, name='<u>"x"', epochs=1, bs=4, seed=1)
    for path in write_report(run), compare_runs([run, again], out/'compared.html'):
        html = path.read_text()
        assert not any(s in html for s in ('<img src=x', '<b>data', '</script><script>alert', '<script>alert', '<u>', '<i>out')) and '49&amp;amp' not in html
        page = visit(path)
        assert all(e in page.inner_text('body') for e in EVIL[:1])
        assert page.evaluate("document.querySelectorAll('#main img, #main script, #main u, #main b b, #main i[onmouseover]').length") == 0
    page = visit(run.path/'report.html')
    assert page.eval_on_selector_all('[data-filter=t] option', 'os => os.map(o => o.textContent)') == ['any', *sorted(EVIL)]
    assert '<script>alert(2)<!--.png' in [o['file'].rsplit('/')[-1] for o in blob(run.path/'report.html')['images']]
    page.click('.tile')
    assert page.eval_on_selector_all('#odds th', 'ts => ts.map(t => t.textContent.replace(" ✓", ""))')[0] in EVIL


def test_the_comparison_shows_both_directions(runs, visit):
    a,b = runs['a'].interp,runs['b'].interp
    page,held = visit(runs['compared']),{o['i'] for o in blob(runs['compared'])['images']}
    right_a,right_b = (a.preds==a.targs).numpy(),(b.preds==b.targs).numpy()
    only_a,only_b = np.flatnonzero(right_a & ~right_b),np.flatnonzero(right_b & ~right_a)
    assert held == {*only_a, *only_b} and len(only_a) and len(only_b)
    assert sorted(tiles(page)) == sorted(only_a)[:60]
    page.select_option('[data-filter=a]', '1')   # the two change places
    assert page.input_value('[data-filter=b]') == '0' and sorted(tiles(page)) == sorted(only_b)[:60]
    c = int(a.targs[only_b[0]])
    page.select_option('[data-filter=t]', str(c))
    assert sorted(tiles(page)) == [i for i in only_b if a.targs[i] == c]
    page.click('.tile'); page.keyboard.press('4')
    assert 'blue' in page.inner_text('#caption') and page.locator('#odds tr').count() == 2
    d,low,high,p = paired_difference(len(only_b), len(only_a), 120)
    row = page.locator('#table tbody tr').nth(1).inner_text()
    assert f'{100*d:+.2f}'.replace('-', '−') in row and 'worse' in row
    assert page.locator('#curves [role=img]').count() == 2 and page.locator('#settings tbody th').all_inner_texts() == ['name', 'epochs']


def test_a_comparison_leaves_the_runs_as_they_were(runs, tmp_path):
    a,b = load_run(runs['a'].path),load_run(runs['b'].path)
    dls = a.dls,b.dls
    compare_runs([a, b], tmp_path/'c.html', images=5)
    assert (a.dls, b.dls) == dls and b.learn.dls is dls[1]


def test_runs_on_other_data_are_compared_without_pictures(runs, visit, tmp_path):
    other = train(folder(tmp_path/'other', ['ant', 'bee', 'fly'], test=12), tmp_path, epochs=1)
    page = visit(compare_runs([runs['a'], other], tmp_path/'c.html'))
    assert 'tested on different images' in page.inner_text('#gallery') and page.locator('#table tbody tr').count() == 2
    assert 'McNemar' not in page.inner_text('#table')


def test_many_classes_have_no_matrix_but_their_pairs(visit, tmp_path):
    names = [f'class number {i:02d}' for i in range(60)]
    run = train(folder(tmp_path/'many', names, train=2, test=2), tmp_path, epochs=1)
    for width in 360,1440:
        page = visit(write_report(run), width=width)
        assert page.locator('table.matrix').count() == 0 and '60 classes' in page.inner_text('#confusion') and page.locator('table.classes tbody tr').count() == 60
        assert page.locator('table.pairs tbody tr').count() == 12 and page.evaluate('document.documentElement.scrollWidth') <= width


def test_a_run_that_diverged_has_a_report(runs, visit, tmp_path):
    run = load_run(shutil.copytree(runs['a'].path, tmp_path/'diverged'))
    for p in run.learn.model.parameters(): p.data.fill_(float('nan'))
    save_weights(run.learn.model, run.path/'weights.safetensors')
    run.history.assign(valid_loss=float('nan')).to_csv(run.path/'history.csv', index=False)
    (run.path/'metrics.json').write_text(json.dumps(dict(run.metrics, **evaluate_learner(run.learn, run.dls[-1]))))
    page = visit(write_report(run.path))
    assert 'nan' not in page.inner_html('#curves svg >> nth=0') and 'nan' not in page.inner_html('#classes svg >> nth=0') and len(tiles(page)) == 60


def test_three_runs_are_compared_two_by_two(runs, visit, tmp_path):
    third = train(runs['a'].env['data'], tmp_path, epochs=1, seed=3)
    page = visit(compare_runs([runs['a'], runs['b'], third], tmp_path/'three.html'))
    hits = [(o.interp.preds==o.interp.targs).numpy() for o in (runs['a'], runs['b'], third)]
    table = page.eval_on_selector_all('#gallery table.loose tbody tr', "rs => rs.map(r => [...r.querySelectorAll('td')].map(d => d.textContent))")
    for i,j in (0, 1), (0, 2), (1, 2), (2, 1):
        page.select_option('[data-filter=a]', str(i))
        page.select_option('[data-filter=b]', str(j))
        if page.input_value('[data-filter=a]') != str(i): page.select_option('[data-filter=a]', str(i))
        want = np.flatnonzero(hits[i] & ~hits[j])
        assert sorted(tiles(page)) == list(want[:60]) and table[i][j] == str(len(want))
    assert page.locator('#table tbody tr').count() == 3 and {'tiny #1', 'worse', 'tiny #2'} == set(page.locator('#settings thead th').all_inner_texts()[1:])


def test_maps_that_the_scorecard_finds_at_chance_are_drawn_with_a_warning(runs, tmp_path):
    "Where the gallery is, and on the page; other methods are drawn without a word"
    run = load_run(shutil.copytree(runs['a'].path, tmp_path/'chance'))
    def score(low): return {'road': {'mean': low + .02, 'low': low, 'high': low + .04, 'n': 9, 'nan': 0}, 'maps': dict(zero=0, nan=0)}
    rows = {'gradcam': score(.3), 'hirescam': score(.01), 'randomcam': score(0), 'gradcam, random weights': score(-.1), 'chance': score(-.01)}
    card = dict(about=dict(methods=['gradcam', 'hirescam'], images=9, seed=0), rows=rows, cascades={}, survivors=[])
    (run.path/'score.json').write_text(json.dumps(card))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        run.interp.cams([0], method='gradcam', layer='0')
    with pytest.warns(UserWarning, match='finds the maps of hirescam at chance'): run.interp.cams([0], layer='0')
    with pytest.warns(UserWarning, match='at chance'): page = write_report(run)
    assert 'finds these maps at chance' in page.read_text()
