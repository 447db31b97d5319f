"""All benchmarks, one table of ratios: python tests/bench/run_all.py [--data cifar10] [--device cpu|cuda] [--airbench airbench94_muon.py] [--json PATH]

Loader, loop, training step, CAM pass, trainings from memory and from files; on a GPU also `davidnet` whole (five seeds); with --airbench also whole training runs (`speedrun`, three
seeds) against that script: some minutes on a GPU, more than an hour on two CPU cores. Nothing else should run on the machine.
The ratios are of contenders that took turns in one process; the times of each are in the JSON file."""
from pathlib import Path

import cam_cost, davidnet, loader_cost, loop_cost, paths, speedrun, step_cost
from turns import BEST, keep, options


def main():
    p = options(__doc__, data='cifar10', device=BEST, rounds=5)
    p.add_argument('--airbench', type=Path, help='airbench94_muon.py; without it the whole runs are left out')
    p.add_argument('--out', type=Path, default='runs', help='the folder that gets the run folders')
    a = p.parse_args()
    results = []
    def take(res):
        results.append(res)
        for name,r in res['ratios'].items(): print(f'{name:44}{r:8.3f}', flush=True)
        keep(results, a.json)
    take(loader_cost.measure(a.data, rounds=a.rounds, device=a.device))
    take(loop_cost.measure(device=a.device))
    take(step_cost.measure(a.data, rounds=a.rounds, device=a.device))
    take(cam_cost.measure(rounds=a.rounds, device=a.device))
    take(paths.measure(a.data, device=a.device))
    if a.device.startswith('cuda'): take(davidnet.measure(a.data, a.device, out=a.out))
    if a.airbench: take(speedrun.measure(a.airbench, a.data, a.device, out=a.out))


if __name__ == '__main__': main()
