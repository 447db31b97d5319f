"Contenders that take turns in one process, so that other load on the machine meets them alike."
import argparse, json, platform, time
from pathlib import Path
from statistics import median

import torch

from cifar_cam.all import load_run


def seconds(f, device='cpu'):
    "Wall time of one call, the device's queue included"
    if torch.device(device).type == 'cuda': torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if torch.device(device).type == 'cuda': torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(runs, rounds, device='cpu', warm_up=True):
    "Seconds of every call: name → a number a round. `runs` is name → function; each is called once before, unless `warm_up` is False"
    if warm_up:
        for f in runs.values(): f()
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name,f in runs.items(): times[name].append(seconds(f, device))
    return times


def ratio(times, a, b):
    "Median over the rounds of the time of `a` over the time of `b`"
    return median(x/y for x,y in zip(times[a], times[b]))


def machine(device='cpu'):
    "What the figures were measured on"
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor()) if platform.system() == 'Linux' else platform.processor()
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == 'cuda' else None
    return dict(device=str(device), processor=gpu or cpu, threads=torch.get_num_threads(), torch=torch.__version__)


BEST = 'cuda' if torch.cuda.is_available() else 'cpu'

def options(doc, **defaults):
    "A parser of what a benchmark takes: an option for each default, of its type, and --json"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name,value in defaults.items(): p.add_argument(f'--{name}', default=value, type=type(value))
    p.add_argument('--json', type=Path, help='write all rows here')
    return p


def seeds_in(folder):
    "(what `run_seeds` said of all, the runs in the order of their seeds)"
    summary = json.loads((folder/'summary.json').read_text())
    return summary, [load_run(folder/name) for name in summary['runs']]


def keep(results, path):
    "Write `results` to `path`, if there is one"
    if path: path.write_text(json.dumps(results, indent=1) + '\n')
