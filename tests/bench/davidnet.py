"""The recipe `davidnet` whole, several seeds: python tests/bench/davidnet.py [--data cifar10] [--seeds 5] [--json PATH]

The accuracy of the last epoch in one view, and the seconds of training (decoding, warming up and the evaluation after each epoch do not count). Seconds on a GPU; on two CPU cores a
seed takes two hours."""
from pathlib import Path

from cifar_cam.all import find_recipe, run_seeds
from turns import BEST, keep, machine, options, seeds_in


def measure(data='cifar10', device='cpu', seeds=5, out='runs', **changes):
    "A row for each seed, and Student's interval for the mean accuracy"
    summary,runs = seeds_in(run_seeds(find_recipe('davidnet', **changes), data, out, runs=seeds, device=device))
    rows = [dict(run='davidnet', seed=r.env['seed'], epochs=r.recipe.epochs, accuracy=r.metrics['accuracy'], seconds=r.history.train_seconds.sum()) for r in runs]
    return dict(benchmark='davidnet', **machine(device), rows=rows, ratios={}, mean=summary['mean'], interval=summary['interval'])


def main():
    p = options(__doc__, data='cifar10', device=BEST, seeds=5)
    p.add_argument('--out', type=Path, default='runs', help='the folder that gets the run folders')
    a = p.parse_args()
    res = measure(a.data, a.device, a.seeds, a.out)
    for r in res['rows']: print(f"  seed {r['seed']}  {100*r['accuracy']:.2f} %  {r['seconds']:.1f} s of training")
    print(f"mean {100*res['mean']:.2f} %")
    keep(res, a.json)


if __name__ == '__main__': main()
