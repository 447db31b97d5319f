import json, re, shlex
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from cifar_cam.cli import _changes, parser
from cifar_cam.models import MODELS
from cifar_cam.recipe import find_recipe, recipe_table
from cifar_cam.run import MetricsRecord

ROOT = Path(__file__).parents[1]


def test_the_notebook_code_of_readme_runs(shapes, narrow, tmp_path, monkeypatch):
    [code] = re.findall(r'```python\n(.*?)```', (ROOT/'README.md').read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    assert 'def ' not in code and 'class ' not in code and code.count("'shapes'") == 1
    monkeypatch.setitem(MODELS, 'davidnet', narrow)
    exec(code.replace("'shapes'", repr(str(shapes))), {})
    plt.close('all')


def test_the_files_that_readme_points_to_are_there():
    for link in re.findall(r'\]\(([^)#]+)\)', (ROOT/'README.md').read_text()):
        if '://' not in link: assert (ROOT/link).exists(), link


def test_what_may_go_wrong_is_what_the_tests_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT/'docs')
    import reliability
    assert (ROOT/'docs'/'reliability.md').read_text() == reliability.page(), 'run python docs/reliability.py'


def test_the_table_of_results_is_what_the_records_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT/'docs')
    import tables
    for path,text in tables.pages().items(): assert path.read_text() == text, f'{path.name}: run python docs/tables.py'
    pages = [(ROOT/name).read_text().splitlines() for name in ('README.md', 'docs/results.md')]
    for folder,runs in tables.groups():
        accuracies,epochs = [json.loads((r/'metrics.json').read_text())['accuracy'] for r in runs],json.loads((runs[0]/'recipe.json').read_text())['epochs']
        lines = [l for page in pages for l in page if f'results/{folder.name}/)' in l and l.startswith('|')]
        assert len(lines) == 1   # each fact once
        for l in lines: assert f' {100*sum(accuracies)/len(runs):.2f} ' in l and f'| {epochs} | {len(runs)} |' in l


def test_the_recipes_at_the_shell_say_what_their_own_training_reached(monkeypatch):
    monkeypatch.syspath_prepend(ROOT/'docs')
    import tables
    told = recipe_table().set_index('recipe').ours
    for recipe in told.index:
        of = [(json.loads((r/'recipe.json').read_text()), json.loads((r/'metrics.json').read_text())) for r in tables.records()]
        best = max((m['epochs'] for r,m in of if r['name']==recipe and not tables.changed(r)), default=None)
        assert told[recipe] == '—' if best is None else f'in {best} epochs' in told[recipe] and float(told[recipe].split()[0]) > 0


def test_each_column_of_the_results_is_that_of_the_records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT/'docs')
    import tables
    lines = (ROOT/'docs'/'results.md').read_text().splitlines()
    for folder,runs in tables.groups():
        metrics,histories = [json.loads((r/'metrics.json').read_text()) for r in runs],[pd.read_csv(r/'history.csv') for r in runs]
        low,high = json.loads((folder/'summary.json').read_text())['interval'] if len(runs) > 1 else metrics[0]['accuracy_interval']
        minutes = np.mean([(h.train_seconds.fillna(h.seconds) if 'train_seconds' in h else h.seconds).sum()/60 for h in histories])
        tta = 100*np.mean([m.get('accuracy_tta', m['accuracy_flip_tta']) for m in metrics])
        [line] = [l for l in lines if l.startswith('|') and f'results/{folder.name}/)' in l]
        cells = [c.strip() for c in line.split('|')[1:-1]]
        assert cells[3:5] == [f'{100*low:.2f} to {100*high:.2f}', f'{tta:.2f}'] and cells[7] == f'{minutes:.0f}'
        recipe = json.loads((runs[0]/'recipe.json').read_text())
        if recipe['name']=='speedrun' and not tables.changed(recipe):
            said = f'{tta:.2f} % on CIFAR-10 after {minutes:.0f} minutes',f'reached {tta:.2f} % after {minutes:.0f} minutes'   # of the fastest record, of others
            assert any(o in (ROOT/'README.md').read_text() for o in said)


def test_a_record_is_copied_whole_and_an_unfinished_run_is_refused(finished, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT/'docs')
    import tables
    monkeypatch.setattr(tables, 'RESULTS', tmp_path/'results')
    tables.add(finished)
    assert {f.name for f in (tmp_path/'results'/'davidnet-1-epochs').iterdir()} == {'recipe.json', 'env.json', 'history.csv', 'metrics.json', 'lrs.json'}
    (tmp_path/'stopped').mkdir()
    with pytest.raises(SystemExit, match='no finished run'): tables.add(tmp_path/'stopped')


def test_the_page_about_the_run_folder_tells_what_lies_there(finished):
    text = (ROOT/'docs'/'run-folder.md').read_text()
    schema,metrics = json.loads(re.search(r'```json\n(.*?)```', text, re.S)[1]),json.loads((finished/'metrics.json').read_text())
    assert schema == MetricsRecord.model_json_schema()   # what reading the file checks
    assert set(schema['required']) <= set(metrics) <= set(schema['properties'])
    row = next(l for l in text.splitlines() if l.startswith('| `history.csv`'))
    assert [c for c in re.findall(r'`(\w+)`', row) if c != 'test_accuracy'] == (finished/'history.csv').read_text().splitlines()[0].split(',')
    for f in finished.iterdir(): assert f'`{f.name}`' in text, f.name


def test_each_row_has_the_command_that_trains_its_recipe(monkeypatch):
    monkeypatch.syspath_prepend(ROOT/'docs')
    import tables
    said = re.findall(r'^cifar-cam (train .+)$', (ROOT/'docs'/'results.md').read_text(), re.M)
    records = [runs for _,runs in tables.in_order()]
    assert len(said)==len(records) > 4
    for line,runs in zip(said, records):
        args,env = parser().parse_args(shlex.split(line)),json.loads((runs[0]/'env.json').read_text())
        recipe = find_recipe(args.recipe, **_changes(args.set, epochs=args.epochs, bs=args.bs))
        recorded = json.loads((runs[0]/'recipe.json').read_text())   # newer settings have the values that older runs had
        about = 'published', 'published_as'
        assert {k: v for k,v in asdict(recipe).items() if k in recorded and k not in about} == {k: v for k,v in recorded.items() if k not in about}
        assert (args.data or 'cifar10', args.runs, args.seed, args.published_protocol) == (env['data'], len(runs), env['seed'], env['published_protocol'])


@pytest.mark.parametrize('notebook', sorted((ROOT/'nbs'/'experiments').glob('*.ipynb')), ids=lambda p: p.stem)
def test_the_notebook_of_an_experiment_shows_the_run_of_its_record(notebook, monkeypatch):
    monkeypatch.syspath_prepend(ROOT/'docs')
    import tables
    shown = ''.join(''.join(o['data']['text/plain']) for c in json.loads(notebook.read_text())['cells'] for o in c.get('outputs', []) if 'text/plain' in o.get('data', {}))
    recipes = [(tables.load(runs[0], 'recipe.json'), runs) for _,runs in tables.groups()]
    [runs] = [runs for recipe,runs in recipes if recipe['name']==notebook.stem and not tables.changed(recipe)]
    assert f"'accuracy': {tables.load(runs[0], 'metrics.json')['accuracy']}" in shown
