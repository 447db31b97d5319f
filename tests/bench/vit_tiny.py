"""timm's ViT-Tiny with patches of 4 pixels: which map of a transformer may be believed?

Train it:  cifar-cam train tests/bench/vit_tiny.toml
Score it:  python tests/bench/vit_tiny.py RUN --json PATH
The second command scores every method that fits on CIFAR-10; then it continues from the run's weights on Shapes10, whose masks are known, and
scores them there too. With --weights PATH it keeps the weights of that second training, or takes them if they are there."""
import argparse, json, tempfile, time
from pathlib import Path

from timm import create_model

from cifar_cam.augment import cifar_augment
from cifar_cam.callbacks import ProgressiveResize
from cifar_cam.cam import METHODS
from cifar_cam.evaluate import load_weights, save_weights
from cifar_cam.interpret import CamInterpretation
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


CYCLES = '3000:50:30:16,16,16,16,24,32:5e-4', '3000:50:16:16,16,24,32:1e-3', '30000:64:9:24,24,32:1e-3'  # what the record was trained with

def read_cycle(text):
    images,bs,epochs,sides,lr = text.split(':')
    return dict(images=int(images), bs=int(bs), epochs=int(epochs), sides=[*map(int, sides.split(','))], lr=float(lr))

def on_shapes(run, cycles, weights=None):
    "A learner on Shapes10 that begins with the run's weights, all but the head's, and trains for one cycle after the other"
    state = {k: v for k,v in run.model.state_dict().items() if not k.startswith('head.')}
    known = weights and Path(weights).is_file()
    for seed,c in enumerate(cycles[-1:] if known else cycles):
        dls = cifar_dls(shapes_path(tempfile.mkdtemp(), n_train=c['images']), item_tfms=cifar_augment(cutout=0), bs=c['bs'], device='cpu')
        learn = cifar_learner(dls, 'vit-tiny-4', opt='adamw', wd=.05, seed=seed)
        if known: load_weights(learn.model, weights)
        else:
            learn.model.load_state_dict(state, strict=False)
            learn.fit_one_cycle(c['epochs'], c['lr'], pct_start=.1, cbs=ProgressiveResize(c['sides']))
            state = learn.model.state_dict()
    if weights and not known: save_weights(learn.model, weights)
    return learn


SLOW = 'scorecam', 'ablationcam'  # a pass for each of 192 channels, for one map

def scored(interp, n, montages):
    "The scores of every method, those of the slow ones on a third of the montages, their random weights on a tenth of the images"
    start = time.time()
    methods = [*METHODS, 'rollout']
    card = json.loads(score_cams(interp, [m for m in methods if m not in SLOW], n=n, montages=montages).to_json())
    print(f'{time.time() - start:.0f} s', card['about']['left_out'], flush=True)
    slow = json.loads(score_cams(interp, SLOW, n=n, montages=montages//3, cascaded=max(1, n//10)).to_json())
    rows = card['rows'] | {m: slow['rows'][m] for m in SLOW}
    order = [m for m in methods if m in rows] + [r for r in rows if r not in methods]
    return dict(card, rows={r: rows[r] for r in order}, cascades=slow['cascades'] | card['cascades'], survivors=[*dict.fromkeys(card['survivors'] + slow['survivors'])],
                slow=dict(slow['about'], methods=SLOW), seconds=round(time.time() - start))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('run')
    p.add_argument('--json')
    p.add_argument('--cycles', nargs='+', type=read_cycle, default=[*map(read_cycle, CYCLES)], help='on Shapes10: images, batch size, epochs, sides of the images (an equal share of the epochs each), peak of the learning rate')
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
            learn,how = on_shapes(run, a.cycles, a.weights),dict(cycles=a.cycles, from_weights_of='cifar10')
        interp = CamInterpretation.from_learner(learn, len(learn.dls.loaders) - 1)
        accuracy = (interp.preds==interp.targs).double().mean().item()
        res['sets'][name] = dict(training=how, accuracy=accuracy, scorecard=scored(interp, n=a.n, montages=a.montages))
        print(name, res['sets'][name]['accuracy'], res['sets'][name]['scorecard']['about'].get('left_out'), flush=True)
        if a.json: Path(a.json).write_text(json.dumps(res, indent=1) + '\n')


if __name__ == '__main__': main()
