"""The recipe `speedrun` against airbench94_muon: python tests/bench/speedrun.py --airbench airbench94_muon.py [--data cifar10] [--runs 3] [--json PATH]

airbench (github.com/KellerJordan/cifar10-airbench) is not part of this repository: name its script. On a GPU it runs as it is, but for the number of its runs. On a CPU it is read
with its calls of CUDA and `torch.compile` taken out and its network in float32 under bfloat16 autocast, which is more accurate and no slower there than bfloat16 weights.

Both by airbench's rule: training and the evaluation with test-time augmentation count; decoding, compiling and the evaluation after each epoch do not."""
import os, sys, tempfile, time
from pathlib import Path
from statistics import mean

import torch

from cifar_cam.all import cached_images, data_path, evaluate_learner, image_files, recipe_learner, run_seeds
from turns import BEST, keep, machine, options, seconds, seeds_in


def prepare(data, folder):
    "The files that airbench reads, made of the same images: cifar10/train.pt and test.pt"
    path = data_path(data)
    files,images = image_files(path),cached_images(path).permute(0, 2, 3, 1)
    classes = sorted({f.parent.name for f in files})
    for split in 'train', 'test':
        i = torch.tensor([j for j,f in enumerate(files) if f.parent.parent.name == split])
        labels = torch.tensor([classes.index(files[j].parent.name) for j in i.tolist()])
        order = torch.randperm(len(i), generator=torch.Generator().manual_seed(0))   # the first 5,000 make its whitening
        (folder/'cifar10').mkdir(exist_ok=True)
        torch.save(dict(images=images[i[order]].contiguous(), labels=labels[order], classes=classes), folder/'cifar10'/f'{split}.pt')


CPU = [('@torch.compile\n', ''), ('torch.device("cuda")', 'torch.device("cpu")'), ('self.images.half()', 'self.images.float()'), ('mod.half()', 'mod.float()'),
       ('CifarNet().cuda()', 'CifarNet()'), ('    model.compile(mode="max-autotune")\n', ''), ('torch.cuda.Event(enable_timing=True)', 'Clock()'), ('torch.cuda.synchronize()', 'None'),
       ('    main("warmup", model)\n', ''), ('        x = F.conv2d(x, self.whiten.weight', '        with torch.autocast("cpu", torch.bfloat16): return self.half_forward(x, b, whiten_bias_grad).float()\n\n    def half_forward(self, x, b, whiten_bias_grad):\n        x = F.conv2d(x, self.whiten.weight')]


class Clock:
    "In place of a CUDA event"
    def record(self): self.time = time.perf_counter()
    def elapsed_time(self, other): return 1000*(other.time - self.time)


def airbench(script, data, device, runs):
    "(accuracy with its TTA, seconds by its own timer) of each run"
    code = Path(script).read_text()
    edits = CPU if device == 'cpu' else []
    for old,new in [*edits, ('range(200)', f'range({runs})')]:
        if old not in code: sys.exit(f'{script}: {old!r} is not in it; another version than the one this benchmark knows')
        code = code.replace(old, new)
    times = []
    code = code.replace('    return tta_val_acc\n', '    TIMES.append((tta_val_acc, time_seconds)) if epoch == "eval" else None\n    return tta_val_acc\n')
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as tmp:
        prepare(data, Path(tmp))
        (Path(tmp)/'airbench.py').write_text(code)
        os.chdir(tmp)
        argv,sys.argv = sys.argv,['airbench.py']
        try: exec(compile(code, 'airbench.py', 'exec'), dict(__name__='__main__', Clock=Clock, TIMES=times))
        finally: os.chdir(here); sys.argv = argv
    return times[-runs:]


def ours(folder, device):
    "(accuracy with its TTA, seconds by the same rule) of each run in the folder of `run_seeds`: training, whitening and the evaluation"
    rows = []
    for run in seeds_in(folder)[1]:
        learn,dl = run.learn,run.dls[-1]
        evaluation = seconds(lambda: evaluate_learner(learn, dl, run.recipe.tta), device)
        whitening = seconds(lambda: recipe_learner(run.recipe, run.dls, run.env['seed']), device)
        rows.append((run.metrics['accuracy_tta'], run.history.train_seconds.sum() + evaluation + whitening))
    return rows


def measure(script, data='cifar10', device='cpu', runs=3, airbench_runs=1, out='runs', trained=None):
    "Accuracy with test-time augmentation and seconds of each run, and the ratio of the mean times"
    folder = trained or run_seeds('speedrun', data, out, runs=runs, device=device)
    results = {'speedrun': ours(folder, device), 'airbench94_muon': airbench(script.resolve(), data, device, airbench_runs)}
    rows = [dict(run=name, accuracy=acc, seconds=s) for name,pairs in results.items() for acc,s in pairs]
    time = {name: mean(s for _,s in pairs) for name,pairs in results.items()}
    return dict(benchmark='speedrun', **machine(device), rows=rows, ratios={'speedrun ÷ airbench94_muon': time['speedrun']/time['airbench94_muon']})


def main():
    p = options(__doc__, data='cifar10', device=BEST)
    p.add_argument('--airbench', type=Path, required=True, help='airbench94_muon.py')
    p.add_argument('--runs', type=int, default=3, help='seeds of ours')
    p.add_argument('--airbench-runs', type=int, default=1)
    p.add_argument('--out', type=Path, default='runs', help='the folder that gets our run folders')
    p.add_argument('--trained', type=Path, help='the folder of several seeds trained before on this machine: only their evaluation is timed again')
    a = p.parse_args()
    res = measure(a.airbench, a.data, a.device, a.runs, a.airbench_runs, a.out, a.trained)
    for r in res['rows']: print(f"  {r['run']:18}{100*r['accuracy']:7.2f} % {r['seconds']:9.1f} s")
    for name,r in res['ratios'].items(): print(f'{name}: {r:.2f}')
    keep(res, a.json)


if __name__ == '__main__': main()
