"The API pages, read from the text of the modules: nothing is imported, so PyTorch is not needed to build the site"
import ast, json, re, tokenize
from io import StringIO


class Module:
    "What a module says about itself: its docstring, its public names, the comment on each line"
    def __init__(self, path):
        self.name,text = path.stem,path.read_text()
        self.tree = ast.parse(text)
        self.comments = {t.start[0]: t.string.lstrip('#').strip() for t in tokenize.generate_tokens(StringIO(text).readline)
                         if t.type==tokenize.COMMENT}
        self.doc = ast.get_docstring(self.tree)
        self.notebook = re.search(r'File to edit: \.\./(nbs/\S+?\.ipynb)', text).group(1)
        defined = {n.name: n for n in self.tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not _patched(n)}
        values = {t.id: n for n in self.tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
        self.names = {k: defined.get(k) or values[k] for k in ast.literal_eval(values['__all__'].value)}

    def patches(self):
        "Methods given to a class after its definition, class by class"
        found = {}
        for n in self.tree.body:
            if isinstance(n, ast.FunctionDef) and _patched(n):
                found.setdefault(ast.unparse(n.args.args[0].annotation), []).append(n)
        return found


def _decorators(node): return [ast.unparse(d) for d in node.decorator_list]
def _patched(node): return any(d.startswith('patch') for d in getattr(node, 'decorator_list', ()) and _decorators(node))
def _is_property(node): return any(d in ('property', 'cached_property', 'patch(as_prop=True)') for d in _decorators(node))
def _is_dataclass(node): return any(d.startswith('dataclass') for d in _decorators(node))
def _is_tuple(node): return any(ast.unparse(b)=='NamedTuple' for b in node.bases)
def _told(node): return ast.get_docstring(node) and (not node.name.startswith('_') or node.name.startswith('__'))


def text(s):
    "A comment as Markdown: what stands in backticks is code, all else is plain"
    parts = re.split(r'(`[^`]+`)', s or '')
    return ''.join(p.replace('|', r'\|') if p.startswith('`') else re.sub(r'([\\*_<>\[\]|$~])', r'\\\1', p) for p in parts)

def code(s): return f"`{s}`".replace('|', r'\|') if s else ''


DEFINED = {} # 'function' or 'Class.method' → (its node, the comments of its module): what `delegates` refers to

def _own_parameters(node, comments):
    "Name, type, default and comment of each parameter; a comment behind several parameters on one line is about all of them"
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None]*(len(plain) - len(a.defaults)) + a.defaults
    rows = [*zip(plain, defaults)] + ([(a.vararg, None)] if a.vararg else []) + [*zip(a.kwonlyargs, a.kw_defaults)] + ([(a.kwarg, None)] if a.kwarg else [])
    star = {a.vararg: '*', a.kwarg: '**'}
    unparse = lambda o: ast.unparse(o) if o else ''
    return [(star.get(p, '') + p.arg, unparse(p.annotation).replace(' | ', '|'), unparse(d), comments.get(p.lineno, ''))
            for p,d in rows if p.arg not in ('self', 'cls')]

def parameters(node, comments):
    "The same, and before `**kwargs` those that `delegates` takes over from another function"
    rows = _own_parameters(node, comments)
    for call in reversed(node.decorator_list): # the one below comes first
        if not (isinstance(call, ast.Call) and ast.unparse(call.func)=='delegates' and ast.unparse(call.args[0]) in DEFINED): continue
        but = next((ast.literal_eval(k.value) for k in call.keywords if k.arg=='but'), ())
        known = {name for name,*_ in rows} | set(but)
        taken = [r for r in _own_parameters(*DEFINED[ast.unparse(call.args[0])]) if r[2] and r[0] not in known]
        stars = [r for r in rows if r[0].startswith('**')]
        rows = [r for r in rows if r not in stars] + taken + stars
    return rows

def fields(node, comments):
    "The same of the fields of a dataclass or a named tuple"
    return [(f.target.id, ast.unparse(f.annotation).replace(' | ', '|'), ast.unparse(f.value) if f.value else '', comments.get(f.lineno, ''))
            for f in node.body if isinstance(f, ast.AnnAssign)]

def table(rows):
    "Parameters as a Markdown table, without the columns in which nothing stands"
    if not any(c or t for _,t,_,c in rows): return ''
    head = ['parameter', 'type', 'default', '']
    keep = [0] + [i for i in (1, 2) if any(r[i] for r in rows)] + [3]
    lines = ['| ' + ' | '.join(head[i] for i in keep) + ' |', '|' + '---|'*len(keep)]
    for name,kind,default,comment in rows:
        cells = [code(name), code(kind), code(default), text(comment)]
        lines.append('| ' + ' | '.join(cells[i] for i in keep) + ' |')
    return '\n'.join(lines)

def signature(rows): return ', '.join(f'{n}={d}' if d else n for n,_,d,_ in rows)

def returned(node, comments):
    kind = ast.unparse(node.returns).replace(' | ', '|').strip("'") if node.returns else ''
    about = comments.get(node.returns.lineno, '') if node.returns and node.returns.lineno > node.lineno else ''
    if 'contextmanager' in _decorators(node): return 'A context manager.'
    return f"Returns {code(kind)}" + (f': {text(about)}' if about else '') if kind and kind!='None' else ''


def entry(kind, name, body, depth, args=None, options=()):
    fence = '`'*(8 - depth)
    head = f'{name}({args})' if args is not None else name
    return '\n\n'.join(s for s in ('\n'.join([f'{fence}{{py:{kind}}} {head}', *options]), *body, fence) if s)

def function(node, comments, name, kind='function', depth=1):
    if _is_property(node): return entry('property', name, [text(ast.get_docstring(node)), returned(node, comments)], depth)
    rows = parameters(node, comments)
    options = [':classmethod:']*('classmethod' in _decorators(node))
    return entry(kind, name, [text(ast.get_docstring(node)), table(rows), returned(node, comments)], depth, signature(rows), options)

def klass(node, comments, patches):
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name=='__init__'), None)
    rows = fields(node, comments) if _is_dataclass(node) or _is_tuple(node) else parameters(init, comments) if init else []
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and n is not init and _told(n)] + [n for n in patches if _told(n)]
    args = signature(rows) if rows else None
    bases = ' and '.join(code(ast.unparse(b)) for b in node.bases)
    return entry('class', node.name, [text(ast.get_docstring(node)), f'Extends {bases}.' if bases else '', table(rows),
                                      *(function(m, comments, m.name, 'method', 2) for m in methods)], 1, args)

def value(node, comments, name):
    v = ast.unparse(node.value)
    body = [text(comments.get(node.lineno, '') or comments.get(node.end_lineno, ''))]
    if members := keys(node.value): return entry('data', name, [*body, ', '.join(map(code, members))], 1)
    return entry('data', name, body, 1, options=[f':value: {json.dumps(v, ensure_ascii=False)}'] if len(v) < 100 else [])

def keys(v):
    "The keys of a dictionary and the members of a tuple, as far as they are written out; of a table of recipes, their names"
    if isinstance(v, ast.DictComp) and isinstance(v.generators[0].iter, ast.Tuple): found = [c.args[0] for c in v.generators[0].iter.elts]
    elif isinstance(v, ast.Call) and ast.unparse(v.func)=='dict': return [k.arg for k in v.keywords if k.arg]
    else: found = v.keys if isinstance(v, ast.Dict) else v.elts if isinstance(v, ast.Tuple) else []
    return [k.value for k in found if isinstance(k, ast.Constant)]


def page(m):
    "A module as a MyST page"
    patches,out = m.patches(),[]
    for name,node in m.names.items():
        if isinstance(node, ast.ClassDef): out.append(klass(node, m.comments, patches.pop(name, [])))
        elif isinstance(node, ast.FunctionDef): out.append(function(node, m.comments, name))
        else: out.append(value(node, m.comments, name))
    for cls,nodes in patches.items(): # of classes that are not the module's own
        out += [function(n, m.comments, f'{cls}.{n.name}', 'method') for n in nodes if _told(n)]
    link = f'Exported from [{m.notebook.split("/")[-1]}](/{m.notebook}), which tells the why and shows each part at work.'
    return '\n\n'.join([f'# cifar_cam.{m.name}', text(m.doc), link, f'```{{py:module}} cifar_cam.{m.name}\n```', *out]) + '\n'


def modules(package):
    "The modules exported from a notebook, in the order of the notebooks"
    found = [Module(p) for p in package.glob('*.py') if p.stem not in ('__init__', '__main__', '_modidx', 'all')]
    for m in found:
        DEFINED.update({name: (n, m.comments) for name,n in m.names.items() if isinstance(n, ast.FunctionDef)})
        DEFINED.update({f'{cls}.{n.name}': (n, m.comments) for cls,nodes in m.patches().items() for n in nodes})
    return sorted(found, key=lambda m: m.notebook)
