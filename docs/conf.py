"The site. `docs/build` makes it: offline, without running a notebook, and with warnings as errors"
import ast, sys
from pathlib import Path

from docutils import nodes
from sphinx.util.nodes import make_refnode

sys.path.insert(0, str(Path(__file__).parent))
import api, pages

project,author,copyright = 'cifar_cam', '', ''
extensions = ['myst_nb']
html_static_path = ['_static']
html_css_files = ['site.css']
html_theme = 'furo'
html_title = 'cifar_cam'
html_show_sourcelink = html_copy_source = html_show_copyright = html_show_sphinx = False
html_permalinks_icon,html_domain_indices = '#', False
html_theme_options = dict(
    light_css_variables={'color-brand-primary': '#2b5fa4', 'color-brand-content': '#2b5fa4'},
    dark_css_variables={'color-brand-primary': '#7fb2f0', 'color-brand-content': '#7fb2f0'})
pygments_style,pygments_dark_style = 'friendly', 'github-dark'
nb_execution_mode = 'off'
nb_merge_streams = True
myst_enable_extensions = ['deflist']
myst_heading_anchors = 3
add_module_names = smartquotes = False # comments speak of 'batch' and --data
toc_object_entries_show_parents = 'hide'


def link_names(app, tree, docname):
    "Notebooks and public names in code type become links; not names that are also a parameter, a setting or a recipe"
    objects = {full.split('.', 2)[-1]: o for full,o in app.env.domains['py'].objects.items()
               if o.objtype!='module' and not full.startswith('cifar_cam.cli')}
    for node in list(tree.findall(nodes.literal)):
        page = pages.place(node.astext()).removesuffix('.ipynb')
        if node.astext().startswith('nbs/') and page in app.env.found_docs and not isinstance(node.parent, nodes.reference):
            node.replace_self(make_refnode(app.builder, docname, page, '', node.deepcopy()))
        o = objects.get(node.astext().removesuffix('()'))
        if o is None or node.astext() in app.ambiguous or isinstance(node.parent, (nodes.reference, nodes.title)): continue
        if o.node_id not in _around(node): node.replace_self(make_refnode(app.builder, docname, o.docname, o.node_id, node.deepcopy()))

def _around(node):
    "The ids of the API entries that a node stands in"
    found = []
    while node := node.parent:
        if node.tagname=='desc': found += node[0]['ids']
    return found


def _ambiguous():
    modules = api.modules(pages.ROOT/'cifar_cam')
    walked = [n for m in modules for n in ast.walk(m.tree)]
    named = {k for m in modules for n in m.names.values() if isinstance(n, ast.Assign) for k in api.keys(n.value)}
    return named | {n.arg for n in walked if isinstance(n, ast.arg)} | {ast.unparse(n.target) for n in walked if isinstance(n, ast.AnnAssign)}


def setup(app):
    pages.write(Path(app.srcdir))
    app.ambiguous = _ambiguous()
    app.connect('doctree-resolved', link_names)
