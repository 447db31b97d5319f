"""What ROAD costs: python tests/bench/road_cost.py [--json PATH] [--arch davidnet] [--images 16] [--rounds 5]

Ours and pytorch-grad-cam's take turns in one process, so that other load on the machine meets them alike. Both remove the same
pixels of the same images: the maps have no ties. Once the filling in alone, 18 times for each image (9 percentiles, most and least
important first), and once the whole measure with the network's passes. The table has medians, and the medians of the ratios of each round."""
from math import ceil
from statistics import median

import torch
from pytorch_grad_cam.metrics.road import NoisyLinearImputer, ROADCombined
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

from cifar_cam.models import MODELS
from cifar_cam.measures import impute_pixels, removal_order, road
from turns import keep, machine, options, ratio, take_turns


def keeps(maps, size):
    "The pixels that stay, for each percentile and from both ends"
    order,n = removal_order(maps, (size, size)),size*size
    for p in range(10, 100, 10):
        for o in order,order.flip(1): yield torch.ones(len(maps), n, dtype=torch.bool).scatter(1, o[:, :n-ceil(p/100*(n-1))], False).view(-1, size, size)


def measure(arch='davidnet', images=16, size=32, rounds=5):
    "One row for each contender and part: median seconds an image, and how much faster ours is"
    torch.manual_seed(0)
    model,x,maps = MODELS[arch]().eval(),torch.randn(images, 3, size, size),torch.rand(images, size, size)
    y,masks,fill = torch.arange(images)%10,list(keeps(maps, size)),NoisyLinearImputer(noise=0)
    targets = [ClassifierOutputSoftmaxTarget(int(t)) for t in y]
    runs = {('imputation', 'cifar_cam'): lambda: torch.stack([impute_pixels(x, k) for k in masks]),
            ('imputation', 'pytorch-grad-cam'): lambda: torch.stack([torch.stack([fill(a, k) for a,k in zip(x, ks.float())]) for ks in masks]),
            ('ROAD', 'cifar_cam'): lambda: road(model, x, y, maps),
            ('ROAD', 'pytorch-grad-cam'): lambda: torch.from_numpy(ROADCombined()(x, maps.numpy(), targets, model))}
    difference = (runs['imputation', 'cifar_cam']() - runs['imputation', 'pytorch-grad-cam']()).abs().max().item()
    times = {n: [t/images for t in ts] for n,ts in take_turns(runs, rounds, warm_up=False).items()}
    rows = [dict(part=p, run=r, seconds_per_image=median(t)) for (p,r),t in times.items()]
    speedup = {p: ratio(times, (p, 'pytorch-grad-cam'), (p, 'cifar_cam')) for p in ('imputation', 'ROAD')}
    return dict(arch=arch, images=images, size=size, rounds=rounds, **machine(),
                rows=rows, speedup=speedup, max_abs_difference=difference)


def main():
    p = options(__doc__, images=16, rounds=5)
    p.add_argument('--arch', default='davidnet', choices=MODELS)
    a = p.parse_args()
    res = measure(a.arch, a.images, rounds=a.rounds)
    print(f"{res['arch']}, {res['images']} images of {res['size']}×{res['size']}, {res['threads']} threads, {res['rounds']} rounds")
    for r in res['rows']: print(f"{r['part']:12}{r['run']:18}{1000*r['seconds_per_image']:9.1f} ms an image")
    print(', '.join(f'{p}: {s:.1f} times as fast' for p,s in res['speedup'].items()) + f"; largest difference of a filled pixel {res['max_abs_difference']:.0e}")
    keep(res, a.json)


if __name__ == '__main__': main()
