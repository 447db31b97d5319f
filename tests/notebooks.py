"""Notebooks run whole in kernels of this environment, as a user opens them in Colab. tests/colab.sh calls it, in an empty folder:
`notebooks.py restart NOTEBOOK`: its first cell, in a session that imported fastai before, has to ask for a restart.
`notebooks.py run NOTEBOOK...`: each from its first cell to its last. The tour trains 2 epochs instead of 24, an experiment one, on 200
drawn images in batches of 32; all else is as it stands there."""
import json, re, subprocess, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

VERSIONS = "import importlib.metadata as m, json; print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
DRAW = "from cifar_cam.shapes import shapes_path; print(shapes_path('.', n_train=200, n_test=100).resolve())"


def printed(code):
    "The last line that `code` prints in a new process of this Python"
    return subprocess.run([sys.executable, '-c', code], check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]


def execute(nb): return NotebookClient(nb, timeout=3600, kernel_name='python3').execute()


def said(nb):
    "What the first code cell printed, pip's words among it"
    cell = next(c for c in nb.cells if c.cell_type=='code')
    return ''.join(o.get('text', '') for o in cell.outputs)


def changed(before, after):
    "A line for what the first cell changed; PyTorch must not be in it"
    old,new = json.loads(before),json.loads(after)
    raised = [f'{k} {old[k]} -> {new.get(k)}' for k in old if old[k]!=new.get(k)]
    added = [f'{k} {new[k]}' for k in new if k not in old]
    assert all(old[k]==new[k] for k in ('torch', 'torchvision')), raised
    return f"changed: {', '.join(raised) or 'nothing'}\nadded: {', '.join(added) or 'nothing'}"


def change(nb, pattern, words):
    "`nb` with all that matches `pattern` in its code replaced; it has to be there"
    changed = 0
    for cell in nb.cells:
        if cell.cell_type=='code':
            cell.source,n = re.subn(pattern, words, cell.source)
            changed += n
    assert changed, f'no cell has {pattern}'


def shorten_tour(nb): change(nb, r'fit_one_cycle\(24', 'fit_one_cycle(2')


def shorten_experiment(nb, data):
    "One epoch on `data`; what the notebook trains beside that is on `data` too"
    for cell in nb.cells: cell.source = cell.source.replace("'shapes'", repr(data))
    change(nb, r"data, epochs = 'cifar10', \w+", f"data, epochs = {data!r}, 1")
    change(nb, r"(find_recipe\('[\w-]+',)", r"\1 bs=32,")


def restart(path):
    "A session that has fastai, as Colab brings it, is told to restart after the first cell; so is one that had the package from the repository"
    first = next(c for c in nbformat.read(path, 4).cells if c.cell_type=='code')
    not_there = first.source.replace("('cifar_cam',", "('cifar_cam>=999',")
    assert not_there!=first.source
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in ('import fastai.vision.all', not_there)])
    try: execute(nb)
    except CellExecutionError as e:
        assert e.ename=='ImportError' and 'restart' in e.evalue, e
        print(f'{e.ename}: {e.evalue}')
    else: raise SystemExit('the first cell asked for no restart')


def run(paths):
    before = printed(VERSIONS)
    for i,path in enumerate(paths):
        begin,nb = time.time(),nbformat.read(path, 4)
        if path.parent.name=='experiments': shorten_experiment(nb, printed(DRAW))
        else: shorten_tour(nb)
        execute(nb)
        nbformat.write(nb, path.name)
        if i==0: print(said(nb) + changed(before, printed(VERSIONS)))
        print(f'{path.name}: {sum(c.cell_type=="code" for c in nb.cells)} cells, {time.time() - begin:.0f} s', flush=True)


if __name__=='__main__':
    paths = [Path(p) for p in sys.argv[2:]]
    if sys.argv[1]=='restart': restart(paths[0])
    else: run(paths)
