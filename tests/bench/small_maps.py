"""Training steps on a CPU with AMX, as oneDNN computes them and with `ProductGradients`: python tests/bench/small_maps.py [--json PATH]

The same network, batch and precision take turns in one process: forward and backward pass, without an optimizer. The table has medians over the rounds, in bfloat16."""
from contextlib import nullcontext
from statistics import median

import torch
from torch.nn import functional as F

from cifar_cam.all import build_model, keep_memory, ProductGradients
from turns import keep, machine, options, ratio, take_turns

NETWORKS = 'resnet18', 'davidnet', 'speednet'


def steps(model, size, bs):
    "The two contenders: each trains on the same random images"
    x,y = torch.randn(bs, 3, size, size).contiguous(memory_format=torch.channels_last),torch.randint(0, 10, (bs,))
    def step(by_products):
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16), by_products(): out = model(x)
        F.cross_entropy(out.float(), y).backward()
    return {'oneDNN': lambda: step(nullcontext), 'products': lambda: step(ProductGradients)}


def measure(archs=NETWORKS, sizes=(16, 24, 32), bs=250, rounds=7):
    "A row for each network and side of the images: median seconds of both, and the median of their ratio"
    torch.manual_seed(0)
    rows = []
    for arch in archs:
        model = build_model(arch).to(memory_format=torch.channels_last).train()
        for size in sizes:
            with keep_memory(): times = take_turns(steps(model, size, bs), rounds)
            rows.append(dict(run=arch, size=size, ratio=ratio(times, 'oneDNN', 'products'), **{n: median(t) for n,t in times.items()}))
    ratios = {f"{r['run']}, {r['size']} pixels: oneDNN ÷ products": r['ratio'] for r in rows}
    return dict(benchmark='small maps', amx=torch.cpu._is_amx_tile_supported(), bs=bs, rounds=rounds, **machine(), rows=rows, ratios=ratios)


def main():
    a = options(__doc__, bs=250, rounds=7).parse_args()
    res = measure(bs=a.bs, rounds=a.rounds)
    print(f"{res['processor']}, {res['threads']} threads, AMX: {'yes' if res['amx'] else 'no'}, batches of {res['bs']}, {res['rounds']} rounds\n"
          f"{'network':12}{'side':>6}{'oneDNN, s':>12}{'products, s':>13}{'ratio':>8}")
    for r in res['rows']: print(f"{r['run']:12}{r['size']:6}{r['oneDNN']:12.3f}{r['products']:13.3f}{r['ratio']:8.2f}")
    keep(res, a.json)


if __name__ == '__main__': main()
