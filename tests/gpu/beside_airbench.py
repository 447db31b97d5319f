"""speedrun beside airbench94_muon on the same GPU, both warm. Eight minutes: python tests/gpu/beside_airbench.py --airbench airbench94_muon.py [--data cifar10] [--runs 3] [--json PATH]

A first run of ours warms up and does not count; airbench warms up by itself. Ours eager and compiled."""
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import torch

from cifar_cam.all import Compiled, evaluate_learner, find_recipe, fit_recipe, recipe_dls, recipe_learner
from shared import BEST, data_for, keep, machine, options, seconds
import speedrun


def ours(dls, r, device, seed, cbs):
    "Accuracy and seconds of one run by airbench's rule, but for the evaluation after each epoch, which counts here"
    found = {}
    def run():
        learn = recipe_learner(r, dls, seed, cbs=cbs)
        with learn.no_bar(), learn.no_logging(): fit_recipe(learn, r, (None, r.lr))
        found.update(evaluate_learner(learn, dls[-1], r.tta))
    return seconds(run, device), found['accuracy_tta']


def measure(script, data, device, runs=3, backend='inductor', **changes):
    r,rows = find_recipe('speedrun', **changes),[]
    dls = recipe_dls(r, data, device=torch.device(device))
    for name,cbs in {'speedrun': list, 'speedrun, compiled': lambda: [Compiled(backend)]}.items():
        for seed in range(runs + 1):
            took,accuracy = ours(dls, r, device, seed, cbs())
            if seed: rows.append(dict(run=name, seconds=took, accuracy=accuracy))  # the first one warms up
    if script: rows += [dict(run='airbench94_muon', seconds=s, accuracy=acc) for acc,s in speedrun.airbench(script.resolve(), data, device, runs)]
    time = {name: mean(row['seconds'] for row in rows if row['run'] == name) for name in {row['run'] for row in rows}}
    ratios = {f'{n} ÷ airbench94_muon': t/time['airbench94_muon'] for n,t in time.items() if n != 'airbench94_muon'} if script else {}
    return dict(benchmark='beside_airbench', **machine(device), rows=rows, ratios=ratios)


def main():
    p = options(__doc__, data='cifar10', device=BEST, runs=3, epochs=10, bs=2000, backend='inductor')
    p.add_argument('--airbench', type=Path, help='airbench94_muon.py; without it ours alone')
    a = p.parse_args()
    with TemporaryDirectory() as tmp: res = measure(a.airbench, data_for(a.data, tmp), a.device, a.runs, a.backend, epochs=a.epochs, bs=a.bs)
    for r in res['rows']: print(f"{r['run']:22}{r['seconds']:9.2f} s {100*r['accuracy']:7.2f} %")
    for name,x in res['ratios'].items(): print(f'{name}: {x:.2f}')
    keep(res, a.json)


if __name__ == '__main__': main()
