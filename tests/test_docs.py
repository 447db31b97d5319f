"The site: built once, offline; its links, what its API pages say, and that it loads nothing"
import ast, fcntl, json, os, re, subprocess
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).parents[1]
MISSING = [m for m in ('sphinx', 'myst_nb', 'furo') if find_spec(m) is None]
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb')) + sorted((ROOT/'nbs'/'experiments').glob('*.ipynb'))
MODULES = [p for p in sorted((ROOT/'cifar_cam').glob('*.py')) if p.stem not in ('__init__', '__main__', '_modidx', 'all')]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the site needs {', '.join(MISSING)}: pip install -e '.[docs]'")


class Page(HTMLParser):
    "Links, what is loaded, anchors and text of a page"
    def __init__(self, path):
        super().__init__()
        self.alts,self.links,self.loaded,self.at,self.words,self.skip = [],[],[],{},[],False
        self.feed(path.read_text())
        self.text = ' '.join(''.join(self.words).split())
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.skip = tag in ('script', 'style')
        if 'id' in a: self.at[a['id']] = len(self.words)
        if tag=='a' and a.get('href'): self.links.append(a['href'])
        if tag=='img': self.alts.append(a.get('alt', ''))
        if tag in ('script', 'img', 'iframe', 'source', 'video', 'audio', 'embed') and a.get('src'): self.loaded.append(a['src'])
        if tag=='link' and a.get('rel') not in ('next', 'prev', 'index', 'search', 'canonical', 'author'): self.loaded.append(a['href'])
    def handle_endtag(self, tag): self.skip = self.skip and tag not in ('script', 'style')
    def handle_data(self, data):
        if not self.skip: self.words.append(data)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The folder of the site; built once, though pytest-xdist runs several processes"
    if 'CIFAR_CAM_SITE' in os.environ: return Path(os.environ['CIFAR_CAM_SITE'])   # CI has built it already
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base)/'site'
    with open(out.with_suffix('.lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out/'built').exists():
            done = subprocess.run([ROOT/'docs'/'build', out], capture_output=True, text=True)
            assert done.returncode==0, done.stderr[-3000:]
            (out/'built').touch()
    return out/'html'


@pytest.fixture(scope='module')
def pages(site): return {p.relative_to(site).as_posix(): Page(p) for p in sorted(site.rglob('*.html'))}


def is_outside(link): return re.match(r'(https?|mailto):|//', link) is not None


def test_every_link_and_anchor_inside_the_site_resolves(site, pages):
    n = 0
    for name,page in pages.items():
        for link in page.links + page.loaded:
            if is_outside(link) or link.startswith('data:'): continue
            url,anchor = urldefrag(link)
            url = unquote(url.split('?')[0])
            target = (site/name).parent/url if url else site/name
            assert target.resolve().is_relative_to(site.resolve()) and target.is_file(), f'{name}: {link}'
            if anchor and target.suffix=='.html':
                assert unquote(anchor) in pages[target.resolve().relative_to(site.resolve()).as_posix()].at, f'{name}: {link}'
            n += 1
    assert n > 1000


def test_nothing_is_loaded_from_the_network(site, pages):
    for name,page in pages.items(): assert not [l for l in page.loaded if is_outside(l)], name
    for css in site.rglob('*.css'): assert not re.search(r'(@import|url\()\s*[\'"]?(https?:)?//', css.read_text()), css


def test_every_picture_has_words_in_its_place(pages):
    for name,page in pages.items():
        for alt in page.alts: assert len(alt.split()) > 2, f'{name}: {alt!r}'


def test_no_page_tells_where_it_was_made(pages):
    for name,page in pages.items():
        found = re.search(r'(?<![\w.~…-])/(home|root|tmp|work|opt|mnt|Users)/\w', page.text)
        assert not found, f'{name}: {page.text[found.start() - 40:found.start() + 60]}'


def test_home_is_the_index_notebook_with_its_picture(site, pages):
    cells = json.loads((ROOT/'nbs'/'index.ipynb').read_text())['cells']
    heads = re.findall(r'^#+ (.+)$', '\n'.join(''.join(c['source']) for c in cells if c['cell_type']=='markdown'), re.M)
    assert len(heads) >= 3 and all(h in pages['index.html'].text for h in heads)
    assert any('top_losses' in s for s in pages['index.html'].loaded) and 'tour.html' in pages['index.html'].links


def test_every_notebook_is_a_page_and_a_reader_sees_no_directives(pages):
    for nb in NOTEBOOKS:
        where = {'index': 'index.html'}.get(nb.stem, f'nbs/{nb.stem}.html')
        if nb.stem.endswith('_tour'): where = 'tour.html'
        if nb.parent.name=='experiments': where = f'recipes/{nb.stem}.html'
        text = pages[where].text
        assert '#|' not in text.replace('# |', '#|') and 'skip_exec' not in text, where
        cells = json.loads(nb.read_text())['cells']
        pictures = [c for c in cells if c['cell_type']=='code' and not re.search(r'#\s*\|\s*hide', ''.join(c['source']))
                    and any('image/png' in o.get('data', {}) for o in c['outputs'])]
        assert len([s for s in pages[where].loaded if '_images' in s]) >= len(pictures), where


def test_no_notebook_shows_an_error_that_stopped_it(pages):
    for name,page in pages.items(): assert 'Traceback (most recent call last)' not in page.text, name


def test_notebooks_are_listed_in_reading_order(pages):
    numbers = [m[1] for l in pages['notebooks.html'].links if (m := re.match(r'nbs/(\d\d[a-z]?)_\w+\.html$', l))]
    there = [f.stem.split('_')[0] for f in NOTEBOOKS if re.match(r'\d\d[a-z]?_', f.stem) and not f.stem.endswith('_tour')]
    assert list(dict.fromkeys(numbers))==list(dict.fromkeys(there))


def public(path):
    "(names of a module's __all__, those among them that have parameters of their own)"
    tree = ast.parse(path.read_text())
    names = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0])=='__all__')
    init = lambda n: any(isinstance(o, ast.FunctionDef) and o.name=='__init__' for o in n.body) or any('dataclass' in ast.unparse(d) for d in n.decorator_list)
    return names, [n.name for n in tree.body if getattr(n, 'name', '') in names and (isinstance(n, ast.FunctionDef) or init(n))]


def entry(page, module, names, name):
    "What an API page says under a name"
    i = names.index(name) + 1
    end = page.at[f'cifar_cam.{module}.{names[i]}'] if i < len(names) else None
    return ''.join(page.words[page.at[f'cifar_cam.{module}.{name}']:end])


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_every_public_name_is_in_the_api_with_the_comment_of_each_parameter(path, pages):
    from fastcore.docments import docments
    from importlib import import_module
    page,module = pages[f'api/{path.stem}.html'],import_module(f'cifar_cam.{path.stem}')
    plain = lambda s: re.sub(r'[`\s]', '', s)
    names,with_parameters = public(path)
    for name in names: assert f'cifar_cam.{path.stem}.{name}' in page.at, name
    for name in with_parameters:
        text = plain(entry(page, path.stem, names, name))
        said = docments(getattr(module, name))
        if isinstance(getattr(module, name), type): said.pop('return', None)  # docments takes the last comment for it
        for parameter,comment in said.items():
            assert parameter in ('self', 'return') or parameter in text, f'{name}: {parameter}'
            assert plain(comment or '') in text, f'{name}, {parameter}: {comment}'


def test_methods_given_to_a_class_are_in_the_api(pages):
    ids = pages['api/interpret.html'].at.keys() | pages['api/schedule.html'].at.keys()
    assert {'cifar_cam.interpret.CamInterpretation.plot_cams', 'cifar_cam.schedule.Learner.fit_triangle'} <= ids
    assert 'see cams' in pages['api/interpret.html'].text and not any('._' in i and '__' not in i for i in ids)


def test_results_are_the_records(pages):
    records = sorted((ROOT/'docs'/'results').rglob('metrics.json'))
    text = pages['results.html'].text
    for f in records:
        m,env,r = (json.loads((f.parent/n).read_text()) for n in ('metrics.json', 'env.json', 'recipe.json'))
        for s in (f"{100*m['accuracy']:.2f}", f"seed {env['seed']}", r['name'], f"{m['epochs']} epochs", env.get('processor') or env['device']): assert s in text
    assert records


def test_every_recipe_has_its_section_and_settings(pages):
    from cifar_cam.recipe import RECIPES
    for r in RECIPES.values():
        assert f'cifar-cam train {r.name}' in pages['recipes.html'].text
        if r.published: assert f'{r.published} {r.published_as}' in pages['recipes.html'].text


def test_pictures_of_the_page_about_figures_are_there(pages):
    wanted = re.findall(r'^```\{output\} (\S+) (.+)$', (ROOT/'docs'/'figures.md').read_text(), re.M)
    there = [w for w in wanted if (ROOT/'nbs'/f'{w[0]}.ipynb').exists()]
    assert len([s for s in pages['figures.html'].loaded if '_images' in s])==len(there) > 5


def code(page, language): return re.findall(rf'^```{language}\n(.*?)^```', (ROOT/'docs'/f'{page}.md').read_text(), re.M | re.S)


def test_recipes_of_the_how_to_are_recipes(tmp_path):
    from cifar_cam.recipe import read_recipe
    for i,text in enumerate(blocks := code('own-recipe', 'toml')):
        (tmp_path/f'mine{i}.toml').write_text(text)
        assert read_recipe(tmp_path/f'mine{i}.toml').name==f'mine{i}'
    assert len(blocks)==2


@pytest.mark.slow
def test_the_network_of_the_how_to_trains_and_shows_its_maps(shapes, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    from cifar_cam import models
    monkeypatch.chdir(tmp_path)
    names,blocks = {},code('own-network', 'python')
    try:
        for block in blocks:
            block = block.replace("'cifar10'", repr(str(shapes))).replace('one_cycle(5', 'one_cycle(1').replace('epochs=5', 'epochs=1, bs=50, lr=.05, lr_min=.005')
            exec(block, names)
            plt.close('all')
        assert names['run'].finished and names['run'].recipe.arch=='mine'
        assert names['cam_layer'](names['learn'].model, size=(32, 32))[0]=='stage2'
    finally: models.MODELS.pop('mine', None)


def test_commands_of_the_pages_are_commands(tmp_path):
    from cifar_cam.cli import parser
    lines = [l.partition('#')[0].split() for f in (ROOT/'docs').glob('*.md') for l in '\n'.join(code(f.stem, 'sh')).splitlines()]
    commands = [l[1:] for l in lines if l and l[0]=='cifar-cam']
    for c in commands: parser().parse_args(c)
    assert len(commands) > 8
