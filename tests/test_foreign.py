"""Runs, weights and checkpoints from others: no code in them runs, nothing outside the folder is written, and names
stay text"""
import ast, json, os, pickle, re, shutil
from pathlib import Path

import pytest
import torch
from fastai.data.external import fastai_cfg
from hypothesis import HealthCheck, given, settings, strategies as st

import cifar_cam
from cifar_cam.cli import main
from cifar_cam.core import InputError
from cifar_cam.loaders import cached_images
from cifar_cam.photo import explain_image
from cifar_cam.evaluate import load_weights
from cifar_cam.run import fit_run, load_run
from cifar_cam.experiment import run_recipe, train_run
from cifar_cam.share import push_to_hub
from cifar_cam.report import compare_runs, write_report
from cifar_cam.core import save_atomically


class Payload:
    "Unpickled, it makes the file `path`"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


@pytest.fixture
def trap(tmp_path):
    "The file that a payload makes; after the test it is not there"
    path = tmp_path/'the payload ran'
    pickle.loads(pickle.dumps(Payload(path)))   # it does run, where pickle reads it
    assert path.is_dir()
    path.rmdir()
    yield path
    assert not path.exists()


def edit(path, **fields): path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def payloads(trap):
    "Files that run something if they are unpickled: as pickle, and as PyTorch's zip and its old format, alone and within a state"
    bad = Payload(trap)
    yield pickle.dumps(bad)
    for state in bad, dict(model=bad), dict(model={}, opt={}, epochs=bad, watchers={}, smooth_loss=(1, bad)):
        for zipped in True, False:
            torch.save(state, trap.parent/'p', _use_new_zipfile_serialization=zipped)
            yield (trap.parent/'p').read_bytes()


# --- nothing runs

def test_no_module_unpickles_what_it_did_not_write():
    "No module calls `eval`, `exec` or `pickle.load`, and every `torch.load` has `weights_only=True`"
    for f in Path(cifar_cam.__file__).parent.glob('*.py'):
        for node in ast.walk(ast.parse(f.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ''
            harmless = called=='np.load' and any(k.arg=='allow_pickle' and k.value.value is False for k in node.keywords)
            assert harmless or called not in ('eval', 'exec', 'load_learner', 'np.load', 'pd.read_pickle', 'pickle.load', 'pickle.loads', 'os.system', 'yaml.load'), (f.name, called)
            if called=='torch.load': assert any(k.arg=='weights_only' and k.value.value is True for k in node.keywords), f.name
            if f.name=='batches.py': continue   # it reads CIFAR's own pickles by a list of names; `test_formats.py` has the malicious ones
            if isinstance(node, (ast.Import, ast.ImportFrom)): assert not {'pickle', 'dill', 'joblib', 'shelve', 'marshal', 'subprocess'} & {*(a.name for a in node.names), getattr(node, 'module', '')}, f.name


def test_a_file_in_the_place_of_decoded_images_runs_nothing(trap, few, tmp_path, monkeypatch):
    "A malicious file in place of the cache of decoded images runs no code, and the images stay the same"
    monkeypatch.setitem(fastai_cfg().d, 'data', str(tmp_path))
    images = cached_images(few)
    [file] = (tmp_path/'cifar_cam-cache').iterdir()
    for payload in payloads(trap):
        file.write_bytes(payload)
        assert torch.equal(cached_images(few), images)


def test_a_checkpoint_that_would_run_something_is_refused_and_does_not(run, trap):
    "A malicious checkpoint is refused with an `InputError`, and its code does not run"
    (run/'metrics.json').unlink()
    for payload in payloads(trap):
        (run/'checkpoint.pt').write_bytes(payload)
        with pytest.raises(InputError, match='checkpoint.pt') as e: train_run(run)
        assert str(e.value).isprintable() and main(['train', '--resume', str(run)])==2


def test_no_file_of_a_run_runs_something_when_it_is_read(run, trap, few):
    "A malicious file in a run folder runs no code when the run is read"
    photo = next((few/'test'/'star').iterdir())
    for payload in payloads(trap):
        for name in 'weights.safetensors', 'recipe.json', 'env.json', 'metrics.json', 'history.csv', 'score.json', 'best.safetensors', 'extra.pkl':
            old = (run/name).read_bytes() if (run/name).exists() else None
            (run/name).write_bytes(payload)
            for read in lambda: load_run(run).model, lambda: explain_image(load_run(run).model, photo, vocab=list('abcdefghij'), stats=([0.]*3, [1.]*3)), lambda: load_run(run).history:
                try: read()
                except InputError as e: assert name in str(e) and str(e).isprintable()
            (run/name).unlink() if old is None else (run/name).write_bytes(old)
    (run/'weights.safetensors').write_bytes(payload)
    for words in ['report', str(run)], ['cam', str(run)], ['score', str(run)], ['explain', str(photo), '--run', str(run)]: assert main(words)==2


@pytest.mark.parametrize('spoil', [lambda s: s.update(epochs=-5), lambda s: s.update(epochs='3'), lambda s: s.pop('opt'), lambda s: s.update(model={}), lambda s: s.update(opt=[1]),
                                   lambda s: s['model'].popitem(), lambda s: s.update(smooth_loss=None)])
def test_a_checkpoint_of_another_training_is_refused(run, spoil):
    "Resuming refuses a checkpoint whose contents do not fit the run"
    (run/'metrics.json').unlink()
    state = torch.load(run/'checkpoint.pt', weights_only=True)
    spoil(state)
    torch.save(state, run/'checkpoint.pt')
    with pytest.raises(InputError, match='not a checkpoint of this training'): train_run(run)


def test_a_checkpoint_sets_nothing_but_what_watchers_watch(few, run, tmp_path, monkeypatch, undrawn):
    "A checkpoint can set only the tracked state of a callback, not other attributes such as its `path`"
    made = run_recipe('davidnet', few, tmp_path/'o', epochs=1, bs=10, lr=.05, keep_best=True, schedule='constant').path
    (made/'metrics.json').unlink()
    state = torch.load(made/'checkpoint.pt', weights_only=True)
    name, = state['watchers']
    state['watchers'][name] |= dict(path=str(tmp_path/'elsewhere'), after_epoch=3)
    torch.save(dict(state, epochs=0), made/'checkpoint.pt')
    assert fit_run(made).finished and not (tmp_path/'elsewhere').exists()


# --- nothing outside is read or written

def test_a_run_opens_no_other_images_than_it_was_trained_on(run, few, tmp_path, capsys):
    "A run opens only the images it was trained on; any other path in `env.json` is refused in one line"
    private = Path(shutil.copytree(few, tmp_path/'private'))
    next((private/'test'/'star').iterdir()).unlink()
    for data,word in (private, 'trained on'), ('/dev/zero', '/dev/zero'), ('/etc', '/etc'), ('/etc/passwd', '/etc/passwd'), ('https://example.com/x.tgz', 'not there'), ('\0', 'not there'), ('x'*5000, 'not there'):
        edit(run/'env.json', data=str(data))
        for words in ['report', str(run)], ['cam', str(run)]:
            assert main(words)==2
            err = capsys.readouterr().err
            assert word in err and err.count('\n')==1
    assert not (run/'report.html').exists()


@pytest.mark.parametrize('device', ['meta', 'xpu', 'cuda:99', 'vulkan', '', 'os.system', 'cpu:3', 'hpu', 'privateuseone'])
def test_a_device_that_is_not_here_is_not_opened(run, device):
    "If `env.json` names a device that is not here, a finished run opens on another and an unfinished one is refused"
    edit(run/'env.json', device=device)
    assert load_run(run).dls.device.type in ('cpu', 'cuda', 'mps')
    (run/'metrics.json').unlink()
    if device:
        with pytest.raises(InputError, match='device'): load_run(run).dls


@pytest.mark.parametrize('name', ['figures', 'report.html', 'weights.safetensors', 'history.csv', 'metrics.json', 'recipe.json', 'checkpoint.pt', 'figures/cams.png', 'tensorboard', '.report.html.1234', 'README.md'])
def test_links_in_a_run_lead_nowhere(run, tmp_path, name):
    "Symbolic links in a run folder are refused, and the files they point to stay unchanged"
    (tmp_path/'outside').mkdir()
    (tmp_path/'outside'/'secret').write_text('{"secret": 1}')
    before = {p: p.read_bytes() for p in (tmp_path/'outside').iterdir()}
    path = run/name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path/'outside'/('' if name in ('figures', 'tensorboard') else 'secret'))
    for call in lambda: load_run(run), lambda: write_report(run), lambda: train_run(run), lambda: push_to_hub(run, 'me/net'):
        with pytest.raises(InputError) as e: call()
        assert Path(name).name in str(e.value) or 'hub' in str(e.value)
    assert {p: p.read_bytes() for p in (tmp_path/'outside').iterdir()}==before


def test_a_pipe_in_a_run_does_not_wait_for_ever(run):
    "A named pipe in a run folder raises an error instead of blocking forever"
    for name in 'metrics.json', 'history.csv', 'weights.safetensors':
        (run/name).rename(run/'kept')
        os.mkfifo(run/name)
        with pytest.raises(InputError, match=name): load_run(run).model
        (run/'kept').replace(run/name)
    (run/'env.json').unlink()
    os.mkfifo(run/'env.json')
    with pytest.raises(InputError, match='env.json'): load_run(run)


def test_a_temporary_name_cannot_be_taken_before(tmp_path):
    "Each save uses a new temporary file name that nobody can guess in advance"
    seen = []
    for _ in range(2): save_atomically(lambda f: (seen.append(f.name), f.write_text('x')), tmp_path/'page.html')
    assert len(set(seen))==2 and all(n.startswith('.page.html.') and len(n) > 25 for n in seen)


# --- what is shown stays text

EVIL = '</script><script>alert(1)</script><img src=x onerror=alert(2)>\'"{{7*7}}'

def rename(run, few, tmp_path):
    "The run, with hostile classes, files, history columns, environment and scores"
    data = Path(shutil.copytree(few, tmp_path/'d <b>ata'))
    evil = EVIL.replace('/', '\\')
    for s in 'train', 'test': (data/s/'star').rename(data/s/evil)
    f = next((data/'test'/evil).iterdir())
    f.rename(f.with_name(evil + '.png'))
    from cifar_cam.images import data_checksum
    m = json.loads((run/'metrics.json').read_text())
    vocab = sorted(d.name for d in (data/'train').iterdir())
    edit(run/'metrics.json', class_accuracy=dict(zip(vocab, m['class_accuracy'].values())), chosen_on=EVIL, **{EVIL: EVIL})
    edit(run/'env.json', data=str(data), data_checksum=data_checksum(data), processor=EVIL, torch=EVIL, python=[EVIL], **{EVIL: dict(a=EVIL)})
    edit(run/'recipe.json', name=EVIL.replace('/', '').replace(' ', '')[:60], published=50., published_as=EVIL)
    rows = (run/'history.csv').read_text().splitlines()
    (run/'history.csv').write_text('\n'.join([f'{rows[0]},"{EVIL.replace(chr(34), "")}"', *(f'{r},1' for r in rows[1:])]) + '\n')
    stat = dict(mean=.5, low=.4, high=.6, n=3, nan=0)
    (run/'score.json').write_text(json.dumps(dict(about={EVIL: EVIL, 'images': EVIL, 'seed': EVIL}, rows={EVIL: dict(energy=stat)}, cascades={EVIL: {EVIL: .5}}, survivors=[EVIL])))
    return evil


def test_hostile_names_everywhere_stay_text_in_the_report(run, few, tmp_path):
    "HTML and scripts in class names, file names and records stay plain text in the report"
    evil = rename(run, few, tmp_path)
    for path in write_report(run), compare_runs([run, run], tmp_path/'c.html'):
        html = path.read_text()
        visible = re.sub(r'<script type="application/json" id="data">.*?</script>|<script>.*?</script>|<style>.*?</style>', '', html, flags=re.S)
        assert '<script' not in visible and '<img' not in visible and '<b>ata' not in visible and 'onerror=alert' in visible
        assert html.count('<script')==html.count('</script')==2 and '{{7*7}}' in visible.replace('&#123;', '{')   # two scripts of our own; templates are not run again
        assert not re.findall(r'<[^>]*\son\w+=', re.sub(r'"[^"]*"', '""', visible))
        data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])
        assert evil in data['classes']
        csp = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
        assert "default-src 'none'" in csp and 'unsafe-inline' not in csp.split('script-src')[1]


@pytest.mark.parametrize('score', ['[]', '{', '{"rows": {}}', '{"rows": [], "cascades": [], "survivors": [], "about": []}', '['*100_000, '{"rows": {"a": {"energy": {"mean": "x"}}}, "cascades": {}, "survivors": [], "about": {}}'])
def test_a_scorecard_that_is_none_is_named(run, score):
    "A malformed `score.json` raises an `InputError` that names it, and no report is written"
    (run/'score.json').write_text(score)
    with pytest.raises(InputError, match='score.json'): write_report(run)
    assert not (run/'report.html').exists()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4), st.floats(.2, 1))
def test_changed_weights_are_read_or_refused(run, changes, keep):
    "Weights with changed or missing bytes either load or raise an `InputError` that names the file"
    model = load_run(run).model
    b = bytearray((run/'weights.safetensors').read_bytes())
    for at,xor in changes: b[int(at*min(len(b) - 1, 2000))] ^= xor
    (run.parent/'w.safetensors').write_bytes(b[:int(keep*len(b))])
    try: load_weights(model, run.parent/'w.safetensors')
    except InputError as e: assert 'w.safetensors' in str(e) and str(e).isprintable()
