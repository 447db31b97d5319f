"""What the loop itself costs: python tests/bench/loop_cost.py [--json PATH]

A linear layer on 16 vectors, where a step of the network is nothing: what remains is the loop. Plain PyTorch, stock fastai and `cifar_learner` take turns; the table has
medians over the rounds."""
from statistics import median

import torch
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, OptimWrapper, TfmdDL, accuracy, partial
from torch import nn

from cifar_cam.all import cifar_learner
from step_cost import Few
from turns import keep, machine, options, ratio, take_turns


class OneBatch(TfmdDL):
    "The same batch over and over"
    dataset,vocab = None,list(range(10))
    def __init__(self, steps, device):
        self.steps,self.device,self.n,self.bs = steps,torch.device(device),steps*16,16
        self.batch = torch.randn(16, 8, device=device),torch.randint(10, (16,), device=device)
    def __iter__(self): return (self.batch for _ in range(self.steps))
    def __len__(self): return self.steps


def measure(steps=500, rounds=7, device='cpu'):
    "Microseconds a step of each contender"
    dl = OneBatch(steps, device)
    sgd = partial(torch.optim.SGD, lr=.01, momentum=.9, nesterov=True)
    def net(): return nn.Linear(8, 10).to(device)
    def plain(model=net(), loss=nn.CrossEntropyLoss()):
        opt = sgd(model.parameters())
        for x,y in dl:
            loss(model(x), y).backward()
            opt.step()
            opt.zero_grad(set_to_none=True)
    def loaders():
        dls = DataLoaders(dl, dl)
        dls.vocab = dl.vocab
        return dls
    stock = Learner(loaders(), net(), loss_func=CrossEntropyLossFlat(), opt_func=partial(OptimWrapper, opt=sgd), metrics=accuracy, cbs=Few(steps))
    light = cifar_learner(loaders(), net(), bf16=False, cbs=[Few(steps)])
    def fit(learn):
        with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
    times = take_turns({'plain loop': plain, 'fastai Learner': lambda: fit(stock), 'cifar_learner': lambda: fit(light)}, rounds, device)
    rows = [dict(run=n, us_per_step=1e6*median(t)/steps) for n,t in times.items()]
    return dict(benchmark='loop', steps=steps, rounds=rounds, **machine(device), rows=rows,
                ratios={'loop alone: fastai Learner ÷ plain': ratio(times, 'fastai Learner', 'plain loop'), 'loop alone: cifar_learner ÷ plain': ratio(times, 'cifar_learner', 'plain loop')})


def main():
    a = options(__doc__, device='cpu', rounds=7).parse_args()
    res = measure(rounds=a.rounds, device=a.device)
    for r in res['rows']: print(f"  {r['run']:16}{r['us_per_step']:9.0f} µs a step")
    keep(res, a.json)


if __name__ == '__main__': main()
