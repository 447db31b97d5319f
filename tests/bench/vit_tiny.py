"""timm's ViT-Tiny with patches of 4 pixels: which map of a transformer may be believed?

Train it:  cifar-cam train tests/bench/vit_tiny.toml
Score it:  python tests/bench/vit_tiny.py RUN --json PATH
The second command scores every method that fits on CIFAR-10; then it continues from the run's weights on Shapes10, whose masks are known, and
scores them there too. With --weights PATH it keeps the weights of that second training, or takes them if they are there."""
import argparse, json, tempfile, time
from pathlib import Path

from safetensors.torch import load_file, save_file
from timm import create_model

from cifar_cam.augment import cifar_augment
from cifar_cam.callbacks import ProgressiveResize
from cifar_cam.cam import METHODS
from cifar_cam.evaluate import predict_loader
from cifar_cam.learner import cifar_learner
from cifar_cam.loaders import cifar_dls
from cifar_cam.models import MODELS
from cifar_cam.run import environment, load_run
from cifar_cam.scorecard import score_cams
from cifar_cam.shapes import shapes_path


def vit_tiny(n_out=10, norm='batch'):
    "5.4 million parameters. Images of other sides pass too: the position embedding is resized. `norm` is not used, a transformer has its own"
    return create_model('vit_tiny_patch16_224', img_size=32, patch_size=4, num_classes=n_out, dynamic_img_size=True)

MODELS['vit-tiny-4'] = vit_tiny


def accuracy(learn):
    logits,targets = predict_loader(learn, learn.dls.loaders[-1])
    return (logits.argmax(1)==targets).double().mean().item()


def on_shapes(run, sides, lr, images, weights=None, seed=0):
    "A learner on Shapes10 that begins with the run's weights, all but the head's; an epoch for each of `sides`, the image side in pixels"
    dls = cifar_dls(shapes_path(tempfile.mkdtemp(), n_train=images), item_tfms=cifar_augment(cutout=0), bs=64, device='cpu')
    learn = cifar_learner(dls, 'vit-tiny-4', opt='adamw', wd=.05, seed=seed, cbs=ProgressiveResize(sides))
    if weights and Path(weights).is_file():
        learn.model.load_state_dict(load_file(weights))
        return learn
    body = {k: v for k,v in run.model.state_dict().items() if not k.startswith('head.')}
    learn.model.load_state_dict(body, strict=False)
    learn.fit_one_cycle(len(sides), lr, pct_start=.1)
    if weights: save_file(learn.model.state_dict(), weights)
    return learn


def scored(learn, **kwargs):
    start = time.time()
    card = score_cams(learn, tuple([*METHODS, 'rollout']), **kwargs)
    return dict(about=card.about, seconds=round(time.time() - start),
                rows={r: {m: card.stat(r, m) for m in card.metrics if card.stat(r, m)} for r in card.scores}, survivors=card.survivors)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('run')
    p.add_argument('--json')
    p.add_argument('--sides', type=int, nargs='+', default=(16, 24, 24, 24, 24, 32, 32, 32))
    p.add_argument('--images', type=int, default=30000)
    p.add_argument('--lr', type=float, default=1e-3)
    p.add_argument('--weights')
    p.add_argument('-n', type=int, default=100)
    p.add_argument('--montages', type=int, default=50)
    p.add_argument('--sets', nargs='+', choices=('cifar10', 'shapes'), default=('cifar10', 'shapes'))
    a = p.parse_args()
    run = load_run(a.run)
    env = environment('cifar10', 'cpu', 0)
    res = dict(about=__doc__.splitlines()[0], **{k: env[k] for k in ('processor', 'threads', 'python', 'torch', 'cifar_cam')}, sets={})
    if a.json and Path(a.json).is_file(): res['sets'] = json.loads(Path(a.json).read_text())['sets']  # a set alone can be scored again
    for name in a.sets:
        if name=='cifar10':
            learn,how = run.learn,dict(epochs=run.metrics['epochs'], minutes=round(run.history.train_seconds.sum()/60))
        else:
            learn = on_shapes(run, a.sides, a.lr, a.images, a.weights)
            how = dict(epochs=len(a.sides), sides=list(a.sides), images=a.images, bs=64, lr=a.lr, from_weights_of='cifar10')
        res['sets'][name] = dict(training=how, accuracy=accuracy(learn), scorecard=scored(learn, n=a.n, montages=a.montages))
        print(name, res['sets'][name]['accuracy'], res['sets'][name]['scorecard']['about'].get('left_out'), flush=True)
        if a.json: Path(a.json).write_text(json.dumps(res, indent=1) + '\n')


if __name__ == '__main__': main()
