"""DavidNet's 24 epochs in bfloat16 and in float16, each after a short training that warms up. Five minutes: python tests/gpu/davidnet_halves.py [--data cifar10] [--json PATH]"""
from tempfile import TemporaryDirectory

from cifar_cam.all import evaluate_learner, find_recipe, fit_recipe
from shared import BEST, collect, data_for, learner, options, seconds, StopAt


def rows(data, device, epochs=24, precisions=('bfloat16', 'float16'), **changes):
    r = find_recipe('davidnet', lr=.4, lr_min=.02, epochs=epochs, **changes)
    for precision in precisions:
        how = dict(precision=precision, lr=r.lr, lr_min=r.lr_min, epochs=epochs, **changes)
        warm = learner('davidnet', data, device, [StopAt(10)], **how)
        with warm.no_bar(), warm.no_logging(): warm.fit(1, .01)
        learn = learner('davidnet', data, device, **how)
        def train():
            with learn.no_bar(), learn.no_logging(): fit_recipe(learn, r, (r.lr_min, r.lr))
        took = seconds(train, device)
        yield dict(run=precision, seconds=took, skipped=learn.half_precision.skipped, accuracy=evaluate_learner(learn, learn.dls[-1])['accuracy'])


def main():
    a = options(__doc__, data='cifar10', device=BEST, epochs=24, bs=512).parse_args()
    with TemporaryDirectory() as tmp: collect('davidnet_halves', rows(data_for(a.data, tmp), a.device, a.epochs, bs=a.bs), a.device, a.json, epochs=a.epochs)


if __name__ == '__main__': main()
