"""Multiplications of a whole training, counted: python tests/bench/multiplications.py [RECIPE...] [--json PATH]

One step of each image side runs under PyTorch's counter of operations: forward pass, loss, backward pass and the optimizer's own products, all images that are read included, also those
of a discarded last batch. It is scaled to 50,000 images and the recipe's epochs. Evaluation and its views are counted apart. airbench94_muon has the network of `speedrun` and trains it for
eight epochs at 32 pixels."""
import argparse, json
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from cifar_cam.augment import TTA
from cifar_cam.models import build_model
from cifar_cam.optimizers import opt_func
from cifar_cam.recipe import RECIPES, change_recipe

IMAGES,TESTED = 50000,10000


def products(f):
    "Multiplications of one call"
    with FlopCounterMode(display=False) as counter: f()
    return counter.get_total_flops()/2  # the counter takes a product and its sum for two


def step(r, side, images=16):
    "Multiplications (of an image forward and backward, of an image forward alone, of the optimizer in a step)"
    model = build_model(r.arch, norm=r.norm)
    opt = opt_func(r.opt)([p for p in model.parameters() if p.requires_grad], lr=.01)
    x,y = torch.randn(images, 3, side, side),torch.randint(0, 10, (images,))
    both = products(lambda: torch.nn.functional.cross_entropy(model(x), y).backward())
    with torch.no_grad(): forward = products(lambda: model.eval()(x))
    return both/images, forward/images, products(opt.step)


def count(r):
    "A row of the table"
    sides = [int(s) for s in r.resize.split(',')] if r.resize else [32]
    costs = {side: step(r, side) for side in {*sides, 32}}
    epochs = [sides[int(e*len(sides)/r.epochs)] for e in range(r.epochs)]
    training = sum(IMAGES*costs[s][0] + IMAGES/r.bs*costs[s][2] for s in epochs)
    return dict(recipe=r.name, epochs=r.epochs, sides=epochs, training=training, evaluation=TESTED*len(TTA[r.tta])*costs[32][1])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('recipes', nargs='*', default=[*RECIPES])
    p.add_argument('--json', type=Path)
    a = p.parse_args()
    rows = [count(RECIPES[name]) for name in a.recipes]
    if 'speedrun' in a.recipes:
        rows.append(count(change_recipe(RECIPES['speedrun'], epochs=8, resize='')) | dict(recipe='airbench94_muon'))
    for row in rows: print(f"{row['recipe']:24}{row['epochs']:4} epochs {row['training']/1e12:8.1f} 10^12 in training {row['evaluation']/1e12:6.2f} in the evaluation, views included")
    if a.json: a.json.write_text(json.dumps(dict(about=__doc__.splitlines()[0], images=IMAGES, torch=torch.__version__, rows=rows), indent=1) + '\n')


if __name__ == '__main__': main()
