"""Training steps of this package against those of another checkout of it: python tests/bench/step_turns.py --old FOLDER [--rounds 12] [--json PATH]

Each checkout has a process of its own; they take turns, so that other load meets both alike. Drawn images, batches that a CPU has done in a second or two."""
import argparse, json, os, subprocess, sys, tempfile
from pathlib import Path
from statistics import median

from turns import keep, machine

BATCHES = {'davidnet': 32, 'speedrun': 250, 'resnet18-onecycle': 16, 'resnet18-plateau': 16, 'resnet18-layernorm': 16}

WORKER = '''
import os, sys, time, warnings
warnings.simplefilter('ignore')
from cifar_cam.all import find_recipe, recipe_dls, recipe_learner
name,data,bs,steps = sys.argv[1],sys.argv[2],int(sys.argv[3]),int(sys.argv[4])
class Timed(Callback):
    order,run_valid = 99,False
    def after_batch(self):
        if self.train_iter==1: self.start = time.perf_counter()
        if self.train_iter > steps:
            self.took = time.perf_counter() - self.start
            raise CancelFitException
r = find_recipe(name, bs=bs, lr=.01, lr_min=.001, epochs=50, hold_out=.2, resize='')
timed = Timed()
learn = recipe_learner(r, recipe_dls(r, data, device=torch.device('cpu')), cbs=[timed])
print('ready', flush=True)
for _ in sys.stdin:
    with learn.no_bar(), learn.no_logging(): learn.fit(50, .01)
    print(timed.took/steps, flush=True)
'''


class Checkout:
    "A process that trains some steps each time it is asked to"
    def __init__(self, folder, *words):
        env = dict(os.environ, PYTHONPATH=str(folder))
        self.process = subprocess.Popen([sys.executable, '-c', WORKER, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=tempfile.gettempdir())
        while self.process.stdout.readline().strip()!='ready':
            if self.process.poll() is not None: sys.exit(f'{folder}: its training does not begin')
    def step(self):
        self.process.stdin.write('go\n')
        self.process.stdin.flush()
        while True:
            try: return float(line := self.process.stdout.readline())
            except ValueError:
                if not line: sys.exit('a training ended')
    def end(self): self.process.stdin.close(); self.process.wait()


def measure(old, rounds=12, steps=2, recipes=BATCHES):
    from cifar_cam.all import shapes_path
    rows,here = [],Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as tmp:
        data = shapes_path(tmp, n_train=2000, n_test=100)
        for name in recipes:
            both = [Checkout(folder, name, data, BATCHES[name], steps) for folder in (old, here)]
            for o in both: o.step()  # warms up
            pairs = [[o.step() for o in (both if i%2 else both[::-1])] for i in range(rounds)]
            pairs = [p if i%2 else p[::-1] for i,p in enumerate(pairs)]
            for o in both: o.end()
            rows.append(dict(recipe=name, batch=BATCHES[name], ms_old=1000*median(a for a,_ in pairs), ms_new=1000*median(b for _,b in pairs), ratio=median(b/a for a,b in pairs)))
            print(json.dumps(rows[-1]), flush=True)
    return dict(benchmark='step_turns', rounds=rounds, steps=steps, **machine(), rows=rows, ratios={f"{r['recipe']}: new ÷ old": r['ratio'] for r in rows})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--old', type=Path, required=True, help='a checkout of another commit')
    p.add_argument('--rounds', type=int, default=12)
    p.add_argument('--steps', type=int, default=2, help='of a round')
    p.add_argument('--recipes', nargs='+', choices=BATCHES, default=list(BATCHES))
    p.add_argument('--json', type=Path)
    a = p.parse_args()
    keep(measure(a.old.resolve(), a.rounds, a.steps, a.recipes), a.json)


if __name__ == '__main__': main()
