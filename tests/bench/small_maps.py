"""Training steps on a CPU with AMX, as oneDNN computes them and with `ProductGradients`: python tests/bench/small_maps.py [--json PATH]

First the weights' gradient of one convolution of 3×3 alone, then forward and backward pass of whole networks, without an optimizer.
Both take turns in one process, in bfloat16. The tables have medians over the rounds."""
from contextlib import nullcontext
from functools import partial
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

from cifar_cam.all import build_model, keep_memory, ProductGradients
from cifar_cam.precision import _ConvByProduct
from turns import keep, machine, options, ratio, take_turns

NETWORKS = 'resnet18', 'davidnet', 'speednet'


def steps(model, size, bs):
    "The two contenders: each trains on the same random images"
    x = torch.randn(bs, 3, size, size).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (bs,))
    def step(by_products):
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16), by_products(): out = model(x)
        F.cross_entropy(out.float(), y).backward()
    return {'oneDNN': lambda: step(nullcontext), 'products': lambda: step(ProductGradients)}


CONVOLUTIONS = (512, 2), (512, 3), (512, 4), (256, 4), (256, 6), (256, 8)

def gradients(channels, side, bs):
    "The two contenders: the weights' gradient of a convolution of 3×3, for a map of `side` × `side`"
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(torch.bfloat16, memory_format=torch.channels_last)
    x,grad = (torch.randn(bs, channels, side, side).to(torch.bfloat16, memory_format=torch.channels_last) for _ in range(2))
    def gradient(out): return torch.autograd.grad(out, conv.weight, grad, retain_graph=True)
    return {'oneDNN': partial(gradient, conv(x)), 'products': partial(gradient, _ConvByProduct.apply(x, conv.weight, (1, 1), (1, 1)))}


def measure(archs=NETWORKS, sizes=(16, 24, 32), convolutions=CONVOLUTIONS, bs=250, rounds=7):
    "A row for each convolution, and for each network and side of the images: median seconds of both, and the median of their ratio"
    torch.manual_seed(0)
    rows = []
    def row(run, size, runs):
        with keep_memory(): times = take_turns(runs, rounds)
        rows.append(dict(run=run, size=size, ratio=ratio(times, 'oneDNN', 'products'), **{n: median(t) for n,t in times.items()}))
    for channels,side in convolutions: row(f'{channels} channels', side, gradients(channels, side, bs))
    for arch in archs:
        model = build_model(arch).to(memory_format=torch.channels_last).train()
        for size in sizes: row(arch, size, steps(model, size, bs))
    ratios = {f"{r['run']}, side {r['size']}: oneDNN ÷ products": r['ratio'] for r in rows}
    return dict(benchmark='small maps', amx=torch.cpu._is_amx_tile_supported(), bs=bs, rounds=rounds, **machine(), rows=rows, ratios=ratios)


def main():
    a = options(__doc__, bs=250, rounds=7).parse_args()
    res = measure(bs=a.bs, rounds=a.rounds)
    print(f"{res['processor']}, {res['threads']} threads, AMX: {'yes' if res['amx'] else 'no'}, batches of {res['bs']}, {res['rounds']} rounds\n"
          f"{'what':14}{'side':>6}{'oneDNN, s':>12}{'products, s':>13}{'ratio':>8}")
    for r in res['rows']: print(f"{r['run']:14}{r['size']:6}{r['oneDNN']:12.3f}{r['products']:13.3f}{r['ratio']:8.2f}")
    keep(res, a.json)


if __name__ == '__main__': main()
