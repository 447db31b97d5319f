"""What a training step costs in a `Learner`, against a plain PyTorch loop and against stock fastai: python tests/bench/step_cost.py [--json PATH]

*Learner ÷ plain loop*: the same network, loader, optimizer and precision; the plain loop has nothing else. *Memory given
back ÷ kept*: the plain loop without and with `keep_memory`. *Stock fastai ÷ ours*: the same network trained by
`ImageDataLoaders`, `Learner` and `fit_one_cycle` in float32. Everything takes turns in one process; the table has medians over the rounds."""
from itertools import islice
from statistics import median

import torch
from fastai.vision.all import Callback, CancelTrainException, CancelValidException, CrossEntropyLossFlat, Learner, OptimWrapper, accuracy, partial
from torch.nn import functional as F

from cifar_cam.all import OPTIMIZERS, build_model, change_recipe, data_path, find_recipe, has_bf16, keep_memory, recipe_dls, recipe_learner
from loader_cost import stock_dls
from turns import keep, machine, options, ratio, take_turns


class Few(Callback):
    "End an epoch after `n` steps, without validation"
    order = 90
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.training and self.iter + 1 >= self.n: raise CancelTrainException
    def before_validate(self): raise CancelValidException


def in_learner(name, dls, steps, bf16):
    r = change_recipe(find_recipe(name), lr=.05, lr_min=.01, resize='', epochs=1)
    learn = recipe_learner(r, dls, bf16=bf16)
    def run():
        with learn.no_logging(): learn.fit(1, .01, cbs=Few(steps))
    return run


def plainly(name, dls, steps, bf16):
    r = find_recipe(name)
    device = dls.device
    model = build_model(r.arch).to(device, memory_format=torch.channels_last if bf16 else torch.contiguous_format).train()
    opt = OPTIMIZERS[r.opt]([p for p in model.parameters() if p.requires_grad], lr=.01, weight_decay=r.wd)
    def run():
        for x,y in islice(iter(dls.train), steps):
            x,y = x.as_subclass(torch.Tensor),y.as_subclass(torch.Tensor)
            if bf16: x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16): out = model(x)
            F.cross_entropy(out.float(), y, label_smoothing=r.label_smoothing).backward()
            opt.step()
            opt.zero_grad(set_to_none=True)
    return run


def stock(name, path, bs, steps, device):
    learn = Learner(stock_dls(path, bs, device), build_model(find_recipe(name).arch), loss_func=CrossEntropyLossFlat(), metrics=accuracy,
                    opt_func=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9, nesterov=True)), cbs=Few(steps))
    def run():
        with learn.no_logging(): learn.fit(1, .01)
    return run


def measure(data='cifar10', archs=('davidnet', 'speedrun'), steps=4, rounds=5, device='cpu'):
    "Rows of median seconds a step, and the ratios"
    rows,ratios,path,bf16 = [],{},data_path(data),has_bf16(device)
    for name in archs:
        r = find_recipe(name)
        dls = recipe_dls(change_recipe(r, lr=.05, lr_min=.01), path, device=torch.device(device))
        runs = {'Learner': in_learner(name, dls, steps, bf16), 'plain loop': keep_memory()(plain := plainly(name, dls, steps, bf16)), 'plain loop, memory given back': plain}
        if name == 'davidnet': runs['stock fastai, float32'] = stock(name, path, r.bs, steps, device)
        times = take_turns(runs, rounds, device)
        rows += [dict(recipe=name, bs=r.bs, run=n, seconds_per_step=median(t)/steps) for n,t in times.items()]
        ratios[f'{name}: Learner ÷ plain loop'] = ratio(times, 'Learner', 'plain loop')
        ratios[f'{name}: memory given back ÷ kept'] = ratio(times, 'plain loop, memory given back', 'plain loop')
        if name == 'davidnet': ratios[f'{name}: stock fastai ÷ Learner'] = ratio(times, 'stock fastai, float32', 'Learner')
    return dict(benchmark='step', steps=steps, rounds=rounds, precision='bfloat16' if bf16 else 'float32', **machine(device), rows=rows, ratios=ratios)


def show(res):
    print(f"training steps, {res['precision']}, {res['rounds']} rounds of {res['steps']} steps, {res['threads']} threads, {res['processor']}")
    for r in res['rows']: print(f"  {r['recipe']:12}{r['run']:32}{1000*r['seconds_per_step']:9.1f} ms a step of {r['bs']} images")
    for name,r in res['ratios'].items(): print(f"  {name}: {r:.3f}")


def main():
    a = options(__doc__, data='cifar10', device='cpu', rounds=5, steps=4).parse_args()
    show(res := measure(a.data, steps=a.steps, rounds=a.rounds, device=a.device))
    keep(res, a.json)


if __name__ == '__main__': main()
