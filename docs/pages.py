"""The sources of the site, gathered into one folder: notebooks without what only nbdev needs, pages of `docs/`, tables made from the
records of runs, the API. Links are written as they work in the repository, and rewritten here to where things are on the site."""
import base64, json, re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

import api
from tables import RESULTS, changed, command, groups, hardware, in_order, load, minutes, percent, recipes, table

ROOT = Path(__file__).resolve().parents[1]


# ---- where things of the repository are on the site

def place(path):
    "The place on the site of a file of the repository: nbs/index.ipynb is the home page"
    p = PurePosixPath(path)
    if p.match('nbs/index.ipynb'): return 'index.ipynb'
    if p.match('nbs/*_tour.ipynb'): return 'tour.ipynb'
    if p.is_relative_to('nbs/experiments'): return f'recipes/{p.name}'
    if p.is_relative_to('docs/results') and not p.match('docs/results/*.json'): return f"results.md#{'-'.join((p.parent if p.suffix else p).parts[2:])}".rstrip('#')
    return str(p.relative_to('docs')) if p.is_relative_to('docs') else str(p)

_fences = re.compile(r'(^ *(`{3,}|~{3,}).*?^ *\2`* *$)', re.M | re.S)
_picture = re.compile(r'!\[([^\]]*)\]\(https?:[^)]*\)')
_link = re.compile(r'(\]\()((?!\w+:|#|/)[^)\s#]+)(#[^)\s]*)?(?=[)\s])')

def relink(text, path):
    "Markdown of the repository's file `path`: links lead to the site's pages; pictures from the network, such as badges, become their text"
    here = PurePosixPath(place(path)).parent
    def to(m):
        target = place(normpath(f'{PurePosixPath(path).parent}/{m[2]}'))
        return m[1] + relpath(target, here) + (m[3] or '')
    parts = _fences.split(text)[::3], _fences.split(text)[1::3]
    prose = [_link.sub(to, _picture.sub(r'\1', p)) for p in parts[0]]
    return ''.join(p + f for p,f in zip(prose, [*parts[1], '']))


# ---- notebooks

def _source(cell): return ''.join(cell['source'])
def _directives(cell): return [l.replace(' ', '') for l in _source(cell).splitlines() if re.match(r'#\s*\|', l)]

def shown(cell):
    "Is this cell for a reader?"
    return cell['cell_type']!='raw' and not any(d.startswith('#|hide') for d in _directives(cell))

def _has_content(output):
    "fastai leaves outputs of nothing but a style and an empty box where a progress bar was"
    html = ''.join(output.get('data', {}).get('text/html', 'x'))
    return re.sub(r'<style.*?</style>|</?div[^>]*>|\s', '', html, flags=re.S)!=''

def read_notebook(path):
    "The cells of a notebook that are for readers, without nbdev's directives"
    nb = json.loads((ROOT/path).read_text())
    cells = []
    for cell in filter(shown, nb['cells']):
        if cell['cell_type']=='markdown': cell['source'] = relink(_source(cell), path)
        else:
            exported = any(d.startswith('#|export') for d in _directives(cell))
            lines = [l for l in _source(cell).splitlines() if not re.match(r'#\s*\|', l)]
            cell['source'] = '\n'.join(lines).strip('\n')
            cell['outputs'] = [o for o in cell['outputs'] if _has_content(o)]
            said = cell['source'].splitlines()[-1:]
            cell['metadata'] = dict(tags=['exported']*exported, mystnb=dict(image=dict(alt=f'What this code shows: {said[0].strip()}' if said else '')))
        if cell['source'].strip(): cells.append(cell)
    return dict(nb, cells=cells)

def front(nb):
    "Title and first quoted line of a notebook"
    text = '\n'.join(c['source'] for c in nb['cells'] if c['cell_type']=='markdown')
    title,quote = re.search(r'^# (.+)$', text, re.M),re.search(r'^> (.+)$', text, re.M)
    return title[1] if title else '', quote[1] if quote else ''

def pictures_of(nb):
    "(source of a cell, 'png' or 'jpeg', the picture's bytes) of all cells with one, in order"
    return [(c['source'], kind, base64.b64decode(''.join(o['data'][f'image/{kind}']))) for c in nb['cells'] if c['cell_type']=='code'
            for o in c['outputs'] for kind in ('png', 'jpeg') if f'image/{kind}' in o.get('data', {})]

_output = re.compile(r'^```\{output\} (\S+) (.+?)\n(.*?)^```$', re.M | re.S)

def outputs(text, notebooks, pictures):
    """A fence `{output} 000_tour plot_cams` becomes the picture that this notebook's first cell with that text shows, and nothing
    where there is none. Pictures are added to `pictures`"""
    def figure(m):
        nb = notebooks.get(f'nbs/{m[1]}.ipynb')
        kind,data = next(((k, p) for s,k,p in pictures_of(nb) if m[2] in s), (None, None)) if nb else (None, None)
        if kind is None: return ''
        file = f'pictures/{m[1]}-{re.sub("[^a-z0-9]+", "-", m[2].lower()).strip("-")}.{kind}'
        pictures[file] = data
        return f'```{{figure}} {file}\n{m[3]}```'
    return _output.sub(figure, text)


# ---- tables

def recipe_pages(notebooks):
    "(Markdown, pictures): a section for each experiment, with its curves and its last gallery; and the settings of all"
    parts,pictures = [],{}
    ours = {load(runs[0], 'recipe.json')['name']: command(runs) for _,runs in reversed(in_order())}  # the first of each name stays
    for path,nb in notebooks.items():
        if not path.startswith('nbs/experiments/'): continue
        name,(title,quote),found = Path(path).stem,front(nb),pictures_of(nb)
        lines = dict.fromkeys([f'cifar-cam train {name}', ours.get(name, f'cifar-cam train {name}')])
        parts.append(f'## {title}\n\n{quote}\n\n```sh\n' + '\n'.join(lines) + '\n```')
        curves = [f for f in found if 'plot_curves' in f[0]][-1:]
        for what,(_,kind,data) in [*(('accuracy, loss and learning rate by epoch', f) for f in curves), *(('class activation maps', f) for f in found[-1:])]:
            file = f'pictures/{name}-{len(pictures)}.{kind}'
            pictures[file] = data
            parts.append(f'![{title}: {what}]({file})')
        parts.append(f'[The whole experiment]({place(path)})')
    found = recipes()
    settings = [k for k in next(iter(found.values())) if k not in ('name', 'published', 'published_as')]
    value = lambda v: f'{v:.4g}' if isinstance(v, float) else str(v).lower() if isinstance(v, bool) else v
    rows = [[f'`{k}`', *(value(r[k]) for r in found.values())] for k in settings]
    rows.append(['published, %', *(f"{r['published']} {r['published_as']}" if r['published'] else '—' for r in found.values())])
    return '\n\n'.join(parts), table(['', *found], rows), pictures


# ---- records of runs

def result_pages():
    "(Markdown, files): a section for each record with its epochs, what differs from the recipe, and its files"
    sections,copies = [],{f'results/{f.name}': f.read_bytes() for f in RESULTS.glob('*.json')}
    for group,runs in groups():
        if len(runs) > 1: sections.append(_seeds(group, runs))
        for folder in runs:
            m,env,r = (load(folder, f'{n}.json') for n in ('metrics', 'env', 'recipe'))
            name = folder.relative_to(RESULTS).as_posix()
            protocol = 'on the test set, as published' if env.get('published_protocol') else m['chosen_on']
            sections.append(_section(folder, name, m, env, r, protocol))
        for f in (f for folder in {group, *runs} for f in sorted(folder.iterdir()) if f.is_file()): copies[f'results/{f.relative_to(RESULTS).as_posix()}'] = f.read_bytes()
    return '\n\n'.join(sections), copies

def _seeds(group, runs):
    summary,name = load(group, 'summary.json'),group.name
    lo,hi = summary['interval']
    return (f"({name})=\n## {name}\n\n{len(runs)} seeds of `{load(runs[0], 'recipe.json')['name']}`, which follow: {percent(summary['mean'])} % in the mean, standard deviation {percent(summary['std'])}, "
            f"95 % interval of the mean {percent(lo)} to {percent(hi)}. The record: [summary.json](results/{name}/summary.json).")

def _section(folder, name, m, env, r, protocol):
    other = [f'`{k} = {json.dumps(v)}`' for k,v in (changed(r) or {}).items()]
    history = [l.split(',') for l in (folder/'history.csv').read_text().splitlines()]
    show = lambda k,v: v if k=='epoch' else percent(float(v)) if k.endswith('accuracy') else f'{float(v):.0f}' if k=='seconds' else f'{float(v):.4g}'
    rows = [[show(k, v) for k,v in zip(history[0], row)] for row in history[1:]]
    head = [h.replace('_', ' ') + ', %'*h.endswith('accuracy') for h in history[0]]
    classes = sorted(m['class_accuracy'].items(), key=lambda o: -o[1])
    versions = ', '.join(f'{k} {env[k]}' for k in ('python', 'torch', 'torchvision', 'fastai', 'grad-cam') if k in env)
    files = ', '.join(f'[{f.name}](results/{name}/{f.name})' for f in sorted(folder.iterdir()) if f.is_file())
    facts = [f"One run of `{r['name']}`, seed {env['seed']}, {m['epochs']} epochs, {minutes(folder):.0f} minutes of training on {hardware(env)}.",
             f"{'What differs from the recipe: ' + ', '.join(other) if other else 'The recipe as it is'}. While it trained: {protocol}.",
             f"Published: {r['published']} % ({r['published_as']})." if r.get('published') else '',
             f"On {m['images']:,} test images the accuracy is {percent(m['accuracy'])} %, {percent(m.get('accuracy_tta', m['accuracy_flip_tta']))} % with test-time augmentation, the loss {m['loss']:.4f}, the calibration error {m['calibration_error']:.4f}.",
             f'With {versions}.']
    return '\n\n'.join([f'({name.replace("/", "-")})=\n## {name.replace("/", ", ")}', ' '.join(filter(None, facts)), 'Epoch by epoch:', table(head, rows),
                        'Accuracy of each class, %:', table([c for c,_ in classes], [[percent(a) for _,a in classes]]), f'The record: {files}.'])


# ---- all of it

def _toctree(caption, entries): return '\n'.join(['```{toctree}', ':hidden:', f':caption: {caption}', '', *entries, '```'])

HOW_TO = 'own-recipe', 'own-images', 'own-network', 'after-training', 'wrong-labels', 'repeat', 'several-gpus', 'colab-kaggle-gpus'

def gather():
    "Everything that the site is built from: path on the site → bytes"
    out = {}
    folders = ROOT/'nbs', ROOT/'nbs'/'experiments'
    notebooks = {f.relative_to(ROOT).as_posix(): read_notebook(f.relative_to(ROOT).as_posix()) for d in folders for f in sorted(d.glob('*.ipynb'))}
    numbered = [p for p in notebooks if re.fullmatch(r'nbs/\d\d[a-z]?_\w+\.ipynb', p)]
    modules = api.modules(ROOT/'cifar_cam')
    doc = lambda p: place(p).rsplit('.', 1)[0]

    trees = [_toctree('Begin', ['A ten-minute tour <tour>', 'recipes', 'results']), _toctree('How to', HOW_TO), _toctree('Understand', ['figures', 'run-folder', 'like-fastai', 'devices', 'reliability']),
             _toctree('Notebooks', ['In reading order <notebooks>', *(f"{Path(p).stem.replace('_', ' ')} <{doc(p)}>" for p in numbered if doc(p)!='tour')]),
             _toctree('API', ['All modules <api/index>', *(f'{m.name} <api/{m.name}>' for m in modules)])]
    home = notebooks['nbs/index.ipynb']
    home['cells'].append(dict(cell_type='markdown', id='contents', metadata={}, source='\n\n'.join(trees)))
    for path,nb in notebooks.items(): out[place(path)] = json.dumps(nb).encode()

    sections,settings,pictures = recipe_pages(notebooks)
    details,copies = result_pages()
    for m in modules: out[f'api/{m.name}.md'] = api.page(m).encode()
    reading = table(['notebook', 'about'], [[f'[{Path(p).stem}]({place(p)})', front(notebooks[p])[1]] for p in numbered])
    listed = table(['module', 'about'], [[f'[{m.name}](api/{m.name}.md)', api.text(m.doc)] for m in modules])
    starred = re.findall(r'^from cifar_cam\.(\w+) import \*', (ROOT/'cifar_cam'/'all.py').read_text(), re.M)
    filled = dict(all=f"The names are those of {', '.join(f'`{m}`' for m in starred)}.", recipes=sections, settings=settings, records=details, notebooks=reading, modules=listed.replace('](api/', ']('),
                  experiments=_toctree('', [doc(p) for p in notebooks if p.startswith('nbs/experiments/')]).replace(':caption: \n', ''))
    for f in sorted((ROOT/'docs').glob('*.md')):
        source = re.sub('<!-- github -->.*?<!-- /github -->\n*', '', f.read_text(), flags=re.S)  # says that this page is not the site's
        text = outputs(relink(source, f'docs/{f.name}'), notebooks, pictures)
        out[f.name if f.name!='api.md' else 'api/index.md'] = re.sub(r'<!-- (\w+) -->', lambda m: filled.get(m[1], m[0]), text).encode()
    for f in (ROOT/'docs'/'images').iterdir(): out[f'images/{f.name}'] = f.read_bytes()
    return out | pictures | copies

def write(folder):
    "Make `folder` hold what `gather` gives"
    for name,data in gather().items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(data)
