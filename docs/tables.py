"""The tables of results, made of the records in docs/results: python docs/tables.py [RUN...]

Copies the records of the finished runs named, if any, and writes the tables of runs, of CAM scores and of benchmarks, and the commands that repeat a run, into docs/results.md and nbs/index.ipynb, from which `.ci/readme` makes README.md, and what
`cifar-cam recipes` says into cifar_cam/published/ours.csv. A run of several seeds is the folder that `cifar-cam train --runs` made. Without a new record nothing changes."""
import ast, csv, json, re, shlex, shutil, subprocess, sys
from functools import cache
from pathlib import Path
from statistics import mean

import api

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT/'docs'/'results'
RECORD = 'recipe.json', 'env.json', 'history.csv', 'metrics.json', 'lrs.json', 'score.json'


def load(folder, name): return json.loads((folder/name).read_text())

def records():
    "The folders below docs/results that hold a finished run"
    return sorted(p.parent for p in RESULTS.rglob('metrics.json'))

def groups():
    "(folder, its runs): a run alone, or the runs of several seeds"
    found = {}
    for run in records(): found.setdefault(run.parent if (run.parent/'summary.json').exists() else run, []).append(run)
    return found.items()

def percent(x): return f'{100*x:.2f}'

def hardware(env):
    name = env.get('processor') or env['device']
    return name if env['device'].startswith('cuda') else f"{env['threads']} thread{'s'*(env['threads'] > 1)} of an {name}"

def minutes(run):
    "Training alone, where the history tells it apart from what was measured after each epoch"
    rows = list(csv.DictReader((run/'history.csv').open()))
    return sum(float(r.get('train_seconds') or r['seconds']) for r in rows)/60

def table(head, rows): return '\n'.join('| ' + ' | '.join(map(str, r)) + ' |' for r in [head, ['---']*len(head), *rows])


HEAD = 'recipe', 'published, %', 'ours, %', '95 % interval', 'with TTA, %', 'epochs', 'seeds', 'minutes', 'hardware'

def row(folder, runs, to):
    "A line of the table; `to` leads from where it stands to docs/results"
    metrics,env,recipe = [load(r, 'metrics.json') for r in runs],load(runs[0], 'env.json'),load(runs[0], 'recipe.json')
    lo,hi = load(folder, 'summary.json')['interval'] if len(runs) > 1 else metrics[0]['accuracy_interval']
    published = f"{recipe['published']} {recipe['published_as']}" if recipe['published'] else '—'
    with_tta = mean([m.get('accuracy_tta', m['accuracy_flip_tta']) for m in metrics])
    own = {k: v for k,v in (changed(recipe) or {}).items() if k!='epochs'}
    name = ', '.join([recipe['name'], *(f'`{k}={v}`' for k,v in own.items())] if len(own) < 4 else [recipe['name'], 'earlier settings'])
    return [f"[{name}]({to}{folder.relative_to(RESULTS)}/)", published, percent(mean([m['accuracy'] for m in metrics])), f'{percent(lo)} to {percent(hi)}',
            percent(with_tta), metrics[0]['epochs'], len(runs), f'{mean([minutes(r) for r in runs]):.0f}', hardware(env)]

@cache
def settings():
    "The defaults of all settings, and the built-in recipes, as dictionaries. They are read from the text of the module: this needs no PyTorch"
    names = api.Module(ROOT/'cifar_cam'/'recipe.py').names
    fields = {n.target.id: n.value for n in names['Recipe'].body if isinstance(n, ast.AnnAssign)}
    value = lambda node: eval(compile(ast.Expression(node), 'recipe', 'eval'), {'__builtins__': {}})
    defaults,found = {k: value(default) for k,default in fields.items() if default is not None},{}
    for call in ast.walk(names['RECIPES']):
        if not (isinstance(call, ast.Call) and getattr(call.func, 'id', '')=='Recipe'): continue
        given = dict(zip(fields, call.args)) | {k.arg: k.value for k in call.keywords}
        r = defaults | {k: value(v) for k,v in given.items()}
        found[r['name']] = r
    return defaults,found

def recipes(): return settings()[1]

def changed(recipe):
    "The settings that are not those of the built-in recipe of this name; None where there is none. An old record leaves newer settings at their defaults"
    base = recipes().get(recipe['name'])
    return base and {k: v for k,v in (settings()[0] | recipe).items() if base[k]!=v and k not in ('published', 'published_as')}

def command(runs):
    "The line that trains `runs` again; None where their recipe is not a built-in one"
    recipe,env = load(runs[0], 'recipe.json'),load(runs[0], 'env.json')
    own = changed(recipe)
    if own is None: return None
    options = [f'--{k} {own.pop(k)}' for k in ('epochs', 'bs') if k in own] + [f"--set {shlex.quote(f'{k}={v}')}" for k,v in own.items()]
    options += [f'--runs {len(runs)}']*(len(runs) > 1) + [f"--seed {env['seed']}"]*(env['seed'] > 0) + ['--published-protocol']*env['published_protocol']
    return ' '.join(['cifar-cam train', recipe['name'], *options])

def commands():
    "The lines that repeat the rows of the table"
    return '\n'.join(['```sh', *filter(None, (command(runs) for _,runs in in_order())), '```'])

def in_order():
    "The groups in the order of the recipes: first the training that is the recipe's own, then the longest"
    order = [*recipes()]
    def key(group):
        recipe = load(group[1][0], 'recipe.json')
        return order.index(recipe['name']) if recipe['name'] in order else len(order), bool(changed(recipe)), -recipe['epochs']
    return sorted(groups(), key=key)

def results(to, shortest=1):
    "The table of trainings of at least `shortest` epochs"
    return table(HEAD, [row(folder, runs, to) for folder,runs in in_order() if load(runs[0], 'recipe.json')['epochs'] >= shortest])

def benchmarks(to):
    "The ratios of all docs/results/benchmarks-*.json, a column each"
    files = sorted(RESULTS.glob('benchmarks-*.json'))
    rows = [json.loads(f.read_text()) for f in files]
    ratios = [{name: value for r in benchmark for name,value in r['ratios'].items()} for benchmark in rows]
    return table(['ratio', *(f'[{hardware(r[0])}]({to}{f.name})' for f,r in zip(files, rows))],
                 [[name, *(f'{r[name]:.2f}' if name in r else '—' for r in ratios)] for name in dict.fromkeys(n for r in ratios for n in r)])

MEASURES = dict(gridpg='GridPG ↑', road='ROAD ↑', deletion='deletion ↓', insertion='insertion ↑', randomisation=r'random weights \|ρ\| ↓')

def _cell(score, marked):
    if score is None or score['mean'] is None: return '—'
    mean,low,high = (None if x is None else f'{round(x, 2) + 0:.2f}' for x in (score['mean'], score['low'], score['high']))
    return mean + f' ({low} to {high})'*(low is not None) + '†'*marked

def scorecards(to):
    "A table for each record whose CAMs were scored: means and their 95 % intervals"
    parts = []
    for run in (r for _,runs in in_order() for r in runs if (r/'score.json').exists()):
        card,name = load(run, 'score.json'),run.relative_to(RESULTS).as_posix()
        about,recipe,metrics = card['about'],load(run, 'recipe.json'),load(run, 'metrics.json')
        parts += [f"[{recipe['name']}]({to}{name}/), {metrics['epochs']} epochs, {percent(metrics['accuracy'])} %: {about['images']} test images at `{about['layer']}`, {about['montages']} montages at `{about['montage_layer']}`.",
                  table(['method', *MEASURES.values()], [[method, *(_cell(row.get(m), m=='randomisation' and method in card['survivors']) for m in MEASURES)] for method,row in card['rows'].items()])]
    return '\n\n'.join(parts)

def transformer(to):
    "A table for each set on which every method was scored on a ViT"
    parts = []
    for name,r in json.loads((RESULTS/'vit-tiny.json').read_text())['sets'].items():
        card,slow = r['scorecard'],r['scorecard']['slow']
        about,title = card['about'],dict(cifar10='CIFAR-10', shapes='Shapes10')[name]
        measures = {m: head for m,head in (dict(energy='energy in object ↑', pointing='pointing game ↑') | MEASURES).items() if any(m in row for row in card['rows'].values())}
        left_out = ''.join(f' {m} gives no map of this network.' for m in about['left_out'])
        parts += [f"{title}, {percent(r['accuracy'])} %: {about['images']} test images and {about['montages']} montages at `{about['layer']}`; of {' and '.join(slow['methods'])} {slow['montages']} montages, and {slow['cascaded']} images with random weights ([the scores]({to}vit-tiny.json)).{left_out}",
                  table(['method', *measures.values()], [[method, *(_cell(row.get(m), m=='randomisation' and method in card['survivors']) for m in measures)] for method,row in card['rows'].items()])]
    return '\n\n'.join(parts)

def headline(to):
    "The sentence about `speedrun` on README's first screen: its fastest record, and what its other records reached"
    own = [(folder, runs) for folder,runs in in_order() if load(runs[0], 'recipe.json')['name']=='speedrun' and not changed(load(runs[0], 'recipe.json'))]
    folder,runs = min(own, key=lambda group: mean([minutes(r) for r in group[1]]))
    m = [load(r, 'metrics.json') for r in runs]
    env = load(runs[0], 'env.json')
    where = hardware(env) + ('' if env['device'].startswith('cuda') else ', without a GPU')
    seeds = f'mean of {len(runs)} seeds' if len(runs) > 1 else 'one seed'
    return (f"**{percent(mean([o['accuracy_tta'] for o in m]))} % on CIFAR-10 after {mean([minutes(r) for r in runs]):.0f} minutes of training on {where}:** "
            f"`cifar-cam train speedrun`, {m[0]['epochs']} epochs, {seeds}, the last epoch with test-time augmentation; {percent(mean([o['accuracy'] for o in m]))} % without ([its record]({to}{folder.relative_to(RESULTS)}/)).{''.join(elsewhere(*group, to) for group in own if group[0]!=folder)}")

def elsewhere(folder, runs, to):
    "The sentence about a record of the same recipe on another machine"
    env,n = load(runs[0], 'env.json'),len(runs)
    reached = percent(mean([load(r, 'metrics.json')['accuracy_tta'] for r in runs]))
    return (f" On {hardware(env)} in {env.get('precision', 'bfloat16')}, {f'{n} seeds' if n > 1 else 'one seed'} reached {reached} % after {mean([minutes(r) for r in runs]):.0f} minutes "
            f"([{'their' if n > 1 else 'its'} record]({to}{folder.relative_to(RESULTS)}/)).")

def launches():
    "Operations that a training step gives a device, before and after they were put together"
    record = json.loads((RESULTS/'launches.json').read_text())
    before = {r['recipe']: r for r in record['before']['rows']}
    parts = 'loader', 'forward', 'loss', 'backward', 'optimizer', 'callbacks'
    rows = [[r['recipe'], *(f"{before[r['recipe']][p]:.0f} → {r[p]:.0f}" for p in (*parts, 'launches', 'waits'))] for r in record['rows']]
    return table(['recipe', *parts, 'together', 'waits'], rows)

def ours():
    "A training of each recipe, its own where there is one, that of most seeds where there are several, as CSV"
    chosen = {}
    for _,runs in in_order():
        name = load(runs[0], 'recipe.json')['name']
        if len(runs) > len(chosen.get(name, ())): chosen[name] = runs
    lines = [f"{name},{percent(mean([load(r, 'metrics.json')['accuracy'] for r in runs]))},{load(runs[0], 'recipe.json')['epochs']},{len(runs)}\n" for name,runs in chosen.items()]
    return 'recipe,accuracy,epochs,seeds\n' + ''.join(lines)


def filled(text, **tables):
    "`text` with each table between its marks"
    for mark,t in tables.items():
        text,n = re.subn(rf'(<!-- {mark} -->\n).*?(\n<!-- /{mark} -->)', lambda m: f'{m[1]}\n{t}\n{m[2]}', text, flags=re.S)
        assert n==1, f'{n} places marked {mark}, not one'
    return text

def pages():
    "Path → text of what is made of the records"
    index = json.loads((ROOT/'nbs'/'index.ipynb').read_text())
    to = '../docs/results/'
    for mark,t in dict(headline=headline(to)).items():
        cell = next(c for c in index['cells'] if f'<!-- {mark} -->\n' in c['source'])
        cell['source'] = filled(''.join(cell['source']), **{mark: t}).splitlines(keepends=True)
    return {ROOT/'docs'/'results.md': filled((ROOT/'docs'/'results.md').read_text(), results=results('results/'), commands=commands(), benchmarks=benchmarks('results/'), scorecards=scorecards('results/'), launches=launches(), transformer=transformer('results/')),
            ROOT/'cifar_cam'/'published'/'ours.csv': ours(),
            ROOT/'nbs'/'index.ipynb': json.dumps(index, ensure_ascii=False, indent=1) + '\n'}


def add(folder):
    "Copy what a record needs of a run's folder, or of a folder of several seeds"
    if not (folder/'metrics.json').exists() and not (folder/'summary.json').exists(): sys.exit(f'{folder}: is no finished run')
    seeds = [p.parent for p in folder.glob('*/metrics.json')]
    recipe = load(seeds[0] if seeds else folder, 'recipe.json')
    name = f"{recipe['name']}-{len(seeds)}-seeds" if seeds else f"{recipe['name']}-{recipe['epochs']}-epochs"
    shutil.rmtree(RESULTS/name, ignore_errors=True)  # files of another training
    for part in [folder, *seeds]:
        to = RESULTS/name/part.relative_to(folder)
        to.mkdir(parents=True, exist_ok=True)
        for file in (*RECORD, 'summary.json'):
            if (part/file).exists(): shutil.copy(part/file, to/file)


if __name__ == '__main__':
    for name in sys.argv[1:]: add(Path(name).resolve())
    for path,text in pages().items(): path.write_text(text)
    subprocess.run([ROOT/'.ci'/'readme'], check=True)
