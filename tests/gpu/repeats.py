"""Does one seed give the same bits twice, and does half a batch work after one that was too large? Three minutes: python tests/gpu/repeats.py [--data cifar10] [--json PATH]"""
from tempfile import TemporaryDirectory

import torch

from cifar_cam.all import deterministic_algorithms, InputError
from shared import BEST, collect, data_for, learner, options, seconds, StopAt


def weights(name, data, device, steps, **changes):
    learn = learner(name, data, device, [StopAt(steps)], **changes)
    with learn.no_bar(), learn.no_logging(): learn.fit(50, .01)
    return torch.cat([v.float().flatten() for v in learn.model.state_dict().values()]).cpu()


def twice(name, on, data, device, steps, **changes):
    "Largest difference between the weights of two trainings of one seed, and the seconds of the second"
    found = []
    with deterministic_algorithms(on):
        took = [seconds(lambda: found.append(weights(name, data, device, steps, **changes)), device) for _ in range(2)]
    return dict(run=f'{name}, deterministic={on}', difference=(found[0] - found[1]).abs().max().item(), same_bits=torch.equal(*found), seconds=took[1])


def out_of_memory(data, device):
    "Batches grow until one does not fit; then half of it in the same process"
    if torch.device(device).type != 'cuda': return dict(run='out of memory', tried=False)
    torch.cuda.set_per_process_memory_fraction(.05)
    try:
        bs = 512
        while bs <= 2**15:
            try: weights('resnet18-onecycle', data, device, 2, bs=bs)
            except InputError as e:
                weights('resnet18-onecycle', data, device, 2, bs=bs//2)
                return dict(run='out of memory', tried=True, too_large=bs, half_works=True, said=str(e))
            bs *= 2
        return dict(run='out of memory', tried=False)
    finally: torch.cuda.set_per_process_memory_fraction(1.)


def rows(data, device, steps=50, **changes):
    for name in 'davidnet', 'speedrun':
        for on in False, True: yield twice(name, on, data, device, steps, **changes)
    yield out_of_memory(data, device)


def main():
    a = options(__doc__, data='cifar10', device=BEST, steps=50, bs=0).parse_args()
    changes = dict(bs=a.bs) if a.bs else {}
    with TemporaryDirectory() as tmp: collect('repeats', rows(data_for(a.data, tmp), a.device, a.steps, **changes), a.device, a.json, steps=a.steps)


if __name__ == '__main__': main()
