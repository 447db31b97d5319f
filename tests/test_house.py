"The house rules of the notebooks: one subject each, imports that only point down, every public name at work, short lines."
import ast, json, re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {}  # module → notebook, in reading order
for f in sorted((ROOT/'nbs').glob('[0-9]*.ipynb')):
    cells = [(c['cell_type'], ''.join(c['source'])) for c in json.loads(f.read_text(encoding='utf-8'))['cells']]
    if m := re.search(r'^#\| default_exp (\w+)', '\n'.join(s for _,s in cells), re.M): NOTEBOOKS[m[1]] = (f, cells)
ORDER = list(NOTEBOOKS)
PRIVATE_OF_OTHERS = re.compile(r'^_(?!_)')


def exported(cells): return [s for kind,s in cells if kind=='code' and re.search(r'^#\| *exporti?\b', s, re.M)]

def visible(cells):
    return [s for kind,s in cells if kind=='code' and not re.search(r'^#\| *(exporti?|hide|default_exp)\b', s, re.M)]

def tree(source): return ast.parse('\n'.join(l for l in source.splitlines() if not l.lstrip().startswith(('%', '!'))))

def module_tree(module): return ast.parse((ROOT/'cifar_cam'/f'{module}.py').read_text(encoding='utf-8'))

def package_imports(t):
    "(module of the package, name) of each import, those inside functions too"
    for n in ast.walk(t):
        if isinstance(n, ast.ImportFrom):
            module = n.module or ''
            if n.level==1 and module: yield from ((module, a.name) for a in n.names)
            elif n.level==1: yield from ((a.name, None) for a in n.names)
            elif module=='cifar_cam': yield from ((a.name, None) for a in n.names)
            elif module.startswith('cifar_cam.'): yield from ((module.removeprefix('cifar_cam.'), a.name) for a in n.names)
        if isinstance(n, ast.Import):
            yield from ((a.name.removeprefix('cifar_cam.'), None) for a in n.names if a.name.startswith('cifar_cam.'))

def public_names(module):
    t = module_tree(module)
    for n in t.body:
        if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '')=='__all__': return ast.literal_eval(n.value)
    return []

def names_used(source):
    t = tree(source)
    return {n.id for n in ast.walk(t) if isinstance(n, ast.Name)} | {n.attr for n in ast.walk(t) if isinstance(n, ast.Attribute)}


@pytest.mark.parametrize('module', ORDER)
def test_imports_only_point_down(module):
    for other,name in package_imports(module_tree(module)):
        if other in ('__version__',): continue
        assert other in ORDER, f'{module} imports {other}, which is no module of a notebook'
        assert ORDER.index(other) < ORDER.index(module), f'{module} imports {other}, which stands below it'
        assert not (name and PRIVATE_OF_OTHERS.match(name)), f'{module} imports {name} of {other}'


@pytest.mark.parametrize('module', ORDER)
def test_a_notebook_exports_one_subject(module):
    lines = [l for s in exported(NOTEBOOKS[module][1]) for l in s.splitlines()]
    assert len(lines) <= 400, f'{module}: {len(lines)} exported lines'


@pytest.mark.parametrize('module', ORDER)
def test_every_public_name_is_seen_at_work(module):
    shown = set().union(*map(names_used, visible(NOTEBOOKS[module][1])))
    hidden = [n for n in public_names(module) if n not in shown]
    assert not hidden, f'{module}: not in any visible cell: {", ".join(hidden)}'


def defined_in(cell): return [n for n in tree(cell).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_')]

@pytest.mark.parametrize('module', ORDER)
def test_at_most_three_new_names_a_cell(module):
    for s in exported(NOTEBOOKS[module][1]):
        new = [n.name for n in defined_in(s)]
        assert len(new) <= 3, f'{module}: {", ".join(new)} in one cell'


@pytest.mark.parametrize('notebook', sorted((ROOT/'nbs').rglob('*.ipynb')), ids=lambda f: f.stem)
def test_lines_of_code_are_short(notebook):
    if '.ipynb_checkpoints' in notebook.parts: pytest.skip('a copy that Jupyter keeps')
    for c in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        long = [l for l in ''.join(c['source']).splitlines() if len(l) > 120] if c['cell_type']=='code' else []
        assert not long, f'{notebook.name}, {c["id"]}: {len(long[0])} characters: {long[0][:80]}…'


@pytest.mark.parametrize('module', ORDER)
def test_exported_code_reads_plainly(module):
    for s in exported(NOTEBOOKS[module][1]):
        for l in s.splitlines():
            assert len(l) <= 120, f'{module}: {len(l)} characters: {l[:80]}…'
            assert not re.match(r'\s*(if|else|elif|for|while)\b.*:\s*raise\b', l), f'{module}: a raise at the end of a line: {l.strip()[:90]}'
        for n in ast.walk(tree(s)):
            assert not (isinstance(n, ast.Assign) and isinstance(n.value, ast.Lambda)), f'{module}: a lambda with a name, line {ast.unparse(n)[:80]}'
            effect = isinstance(n, ast.Expr) and isinstance(n.value, (ast.ListComp, ast.SetComp, ast.GeneratorExp))
            assert not effect, f'{module}: a comprehension for its effect: {ast.unparse(n)[:80]}'


def test_no_name_of_fastai_is_hidden():
    import fastai.vision.all as fastai
    import cifar_cam.all as ours
    for n in dir(ours):
        if n.startswith('_') or getattr(fastai, n, None) is None: continue
        assert getattr(ours, n) is getattr(fastai, n), n


def test_the_star_import_has_every_module_in_reading_order():
    t = module_tree('all')
    starred = [n.module.removeprefix('cifar_cam.') for n in t.body if isinstance(n, ast.ImportFrom) and (n.module or '').startswith('cifar_cam.')]
    assert starred == [m for m in ORDER if m != 'cli']


def test_retired_names_and_modules_say_what_took_their_place():
    import cifar_cam.all as ours
    from cifar_cam import RETIRED_MODULES, RETIRED_NAMES
    for old,new in RETIRED_NAMES.items():
        if hasattr(__import__('fastai.vision.all', fromlist=['x']), old): continue
        with pytest.raises(ImportError, match=f"{old}.*{new.split()[0]}"): getattr(ours, old)
    for old,new in RETIRED_MODULES.items():
        with pytest.raises(ModuleNotFoundError, match=new.split(',')[0]): __import__(f'cifar_cam.{old}', fromlist=['x'])
    retired = '\n'.join((ROOT/'CHANGELOG.md').read_text(encoding='utf-8').splitlines())
    assert all(f'`{old}`' in retired for old in [*RETIRED_NAMES, *RETIRED_MODULES])


def assigned_kind(value):
    "What kind of thing an expression is: the name of the function called, a constant, an empty container, or the node's type"
    if isinstance(value, ast.Call): return getattr(value.func, 'id', getattr(value.func, 'attr', ''))
    if isinstance(value, (ast.List, ast.Dict, ast.Tuple)) and not ast.unparse(value).strip('[](){}'): return 'empty'
    return type(value).__name__

@pytest.mark.parametrize('module', ORDER)
def test_an_assignment_has_one_subject(module):
    "`a,b = f(x),f(y)` has one subject, two calls of `f`; `a,b = f(x),[]` has two, and takes two lines"
    for s in exported(NOTEBOOKS[module][1]):
        for n in ast.walk(tree(s)):
            if not (isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Tuple) and isinstance(n.value, ast.Tuple)): continue
            kinds = {assigned_kind(v) for v in n.value.elts}
            assert len(kinds)==1, f'{module}: {ast.unparse(n)}'


PAGES = sorted(f for f in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts)

def shows_something(source):
    "Does a cell end in a value, or in a call that draws?"
    last = tree(source).body[-1:]
    if not last or not isinstance(last[0], ast.Expr): return False
    value = last[0].value
    if not isinstance(value, ast.Call): return not source.rstrip().endswith(';')
    return ast.unparse(value.func).split('.')[-1].startswith(('show', 'plot', 'picture'))

@pytest.mark.parametrize('notebook', PAGES, ids=lambda p: p.stem)
def test_what_a_cell_shows_is_in_the_notebook(notebook):
    for c in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        source = ''.join(c['source'])
        if c['cell_type']!='code' or re.search(r'^#\| *(exporti?|hide|default_exp)\b', source, re.M): continue
        assert c['outputs'] or not shows_something(source), f"{notebook.stem}, {c['id']}: run it and keep its output"
        for o in (o.get('data', {}) for o in c['outputs']):
            drawn = 'Figure size' in (text := ''.join(o.get('text/plain', ''))) or '_ShownOnce size' in text
            assert not drawn or any(k.startswith('image/') for k in o), f"{notebook.stem}, {c['id']}: a figure without its picture"
