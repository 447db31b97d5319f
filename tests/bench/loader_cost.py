"""What an augmented image costs before it reaches the network: python tests/bench/loader_cost.py [--data cifar10] [--json PATH]

Three ways to the same batches (padded and cropped, mirrored, normalised): fastai's `ImageDataLoaders`, torchvision's `ImageFolder` in
`torch.utils.data.DataLoader`, and `cifar_dls`. They take turns; the table has medians. Two worker processes for the first two."""
from itertools import islice
from statistics import median

import torch
from fastai.vision.all import CropPad, Flip as FastaiFlip, ImageDataLoaders, Normalize, RandomCrop, cifar_stats
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from cifar_cam.all import cifar_augment, cifar_dls, data_path
from turns import keep, machine, options, ratio, take_turns


def stock_dls(path, bs, device, workers=2):
    "What fastai alone makes of the folder"
    return ImageDataLoaders.from_folder(path, train='train', valid='test', bs=bs, device=device, num_workers=workers,
                                        item_tfms=[CropPad(40, pad_mode='reflection'), RandomCrop(32)], batch_tfms=[FastaiFlip(), Normalize.from_stats(*cifar_stats)])


def loaders(path, bs, device, workers):
    "name → loader of augmented training batches"
    path,(mean,std) = data_path(path),cifar_stats
    tfms = T.Compose([T.RandomCrop(32, 4, padding_mode='reflect'), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(mean, std)])
    plain = DataLoader(ImageFolder(path/'train', tfms), bs, shuffle=True, num_workers=workers, drop_last=True)
    return {'fastai ImageDataLoaders': stock_dls(path, bs, device, workers).train, 'torchvision + DataLoader': plain,
            'cifar_dls': cifar_dls(path, cifar_augment(cutout=0), bs=bs, device=torch.device(device)).train}


def measure(data='cifar10', bs=512, batches=20, rounds=3, device='cpu', workers=2):
    "One row for each way: median microseconds an image over `batches` batches; the loaders in memory go through ten times as many"
    dls = loaders(data, bs, device, workers)
    many = {name: batches*(10 if name=='cifar_dls' else 1) for name in dls}
    def run(name):
        for x,y in islice(iter(dls[name]), many[name]): x.to(device)
    times = take_turns({name: lambda name=name: run(name) for name in dls}, rounds, device)
    times = {name: [1e6*t/bs/min(many[name], len(dls[name])) for t in ts] for name,ts in times.items()}
    rows = [dict(run=name, us_per_image=median(t)) for name,t in times.items()]
    return dict(benchmark='loader', bs=bs, rounds=rounds, workers=workers, **machine(device), rows=rows,
                ratios={f'loader: {name} ÷ cifar_dls': ratio(times, name, 'cifar_dls') for name in dls if name!='cifar_dls'})


def show(res):
    print(f"loading and augmenting, batches of {res['bs']}, {res['rounds']} rounds, {res['threads']} threads, {res['processor']}")
    for r in res['rows']: print(f"  {r['run']:28}{r['us_per_image']:9.1f} µs an image")
    for name,r in res['ratios'].items(): print(f"  {name}: {r:.1f}")


def main():
    a = options(__doc__, data='cifar10', device='cpu', rounds=3).parse_args()
    show(res := measure(a.data, rounds=a.rounds, device=a.device))
    keep(res, a.json)


if __name__ == '__main__': main()
