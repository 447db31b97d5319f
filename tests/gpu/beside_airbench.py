"""speedrun beside airbench94_muon on the same GPU, both warm. Eight minutes: python tests/gpu/beside_airbench.py --airbench airbench94_muon.py [--data cifar10] [--runs 3] [--json PATH]

A first run of ours warms up and does not count; airbench warms up by itself. Ours eager and compiled."""
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import torch

from cifar_cam.all import Compiled, evaluate_learner, find_recipe, fit_recipe, recipe_dls, recipe_learner
from shared import BEST, collect, data_for, options, seconds
from turns import keep
import speedrun


def ours(dls, r, device, seed, cbs):
    "Accuracy and seconds of one run by airbench's rule, but for the evaluation after each epoch, which counts here"
    found = {}
    def run():
        learn = recipe_learner(r, dls, seed, cbs=cbs)
        with learn.no_bar(), learn.no_logging(): fit_recipe(learn, r, (None, r.lr))
        found.update(evaluate_learner(learn, dls[-1], r.tta))
    return seconds(run, device), found['accuracy_tta']


def rows(script, data, device, runs=3, backend='inductor', **changes):
    r = find_recipe('speedrun', **changes)
    dls = recipe_dls(r, data, device=torch.device(device))
    def of_ours(name, cbs):
        for seed in range(runs + 1):
            took,accuracy = ours(dls, r, device, seed, cbs())
            if seed: yield dict(run=name, seconds=took, accuracy=accuracy)  # the first one warms up
    yield from of_ours('speedrun', list)
    if script: yield from (dict(run='airbench94_muon', seconds=s, accuracy=acc) for acc,s in speedrun.airbench(script.resolve(), data, device, runs))
    yield from of_ours('speedrun, compiled', lambda: [Compiled(backend)])


def times_airbench(rows):
    "Mean seconds of each of ours over airbench's"
    time = {name: mean(row['seconds'] for row in rows if row['run']==name) for name in {row['run'] for row in rows}}
    theirs = time.pop('airbench94_muon', None)
    return {f'{name} ÷ airbench94_muon': t/theirs for name,t in time.items()} if theirs else {}


def main():
    p = options(__doc__, data='cifar10', device=BEST, runs=3, epochs=10, bs=2000, backend='inductor')
    p.add_argument('--airbench', type=Path, help='airbench94_muon.py; without it ours alone')
    a = p.parse_args()
    with TemporaryDirectory() as tmp:
        found = rows(a.airbench, data_for(a.data, tmp), a.device, a.runs, a.backend, epochs=a.epochs, bs=a.bs)
        res = collect('beside_airbench', found, a.device, a.json)
    res['ratios'] = times_airbench(res['rows'])
    for name,x in res['ratios'].items(): print(f'{name}: {x:.2f}')
    keep(res, a.json)


if __name__ == '__main__': main()
