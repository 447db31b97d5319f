"""All scripts of this folder, one after another, each with a limit: python tests/gpu/run_all.py OUT [--data cifar10] [--airbench airbench94_muon.py]

OUT gets a JSON file of each and a log. A script that reaches its limit keeps the rows it has. Nothing else should run on the GPU: the first five minutes measure times."""
import argparse, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).parent
LIMITS = dict(busy=90, davidnet_halves=120, beside_airbench=240, repeats=90, no_waits=120) # seconds; times first


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', type=Path)
    p.add_argument('--data', default='cifar10')
    p.add_argument('--airbench', type=Path)
    p.add_argument('--only', nargs='+', choices=LIMITS, default=list(LIMITS))
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    for name in a.only:
        more = ['--airbench', a.airbench.resolve()] if name=='beside_airbench' and a.airbench else []
        words = [sys.executable, HERE/f'{name}.py', '--data', 'few' if name=='no_waits' else a.data, '--json', a.out.resolve()/f'{name}.json', *more]
        start = time.perf_counter()
        with open(a.out/f'{name}.log', 'w') as log:
            try: ended = subprocess.run(words, cwd=HERE, stdout=log, stderr=subprocess.STDOUT, timeout=LIMITS[name]).returncode
            except subprocess.TimeoutExpired: ended = 'its limit'
        print(f'{name}: ended with {ended} after {time.perf_counter() - start:.0f} s', flush=True)


if __name__ == '__main__': main()
