"""How well triage finds what we spoilt ourselves: python tests/bench/triage_truth.py flips|shapes|copies|crossfit --json PATH [--logits NPZ] [--data cifar10]

flips: labels of a test set flipped by seed, and what was said of its images before (`Evidence.save`): no data, no network, seconds.
shapes: test labels of Shapes10 flipped by seed, and a network that was trained on its training images: a minute or two.
copies: training images of Shapes10 moved by a pixel, mirrored and saved as JPEG, among images that are none.
crossfit: training labels of CIFAR-10 flipped by seed, found by networks that have not seen them: folds × a training of the recipe."""
import argparse, json, shutil, tempfile
from pathlib import Path
from time import process_time, time

import numpy as np
import pandas as pd
from PIL import Image

from cifar_cam.copies import copied, find_copies, thumbnails
from cifar_cam.evidence import Evidence, load_evidence
from cifar_cam.run import environment
from cifar_cam.truth import compare_scores, flip_labels, measure_score, recall_at

ALIKE = dict(circle='ring', ring='circle', square='house', house='square', triangle='arrow', arrow='triangle', star='cross', cross='star', heart='moon', moon='heart')  # shapes
SIMILAR = {3: 5, 5: 3, 1: 9, 9: 1, 0: 8, 8: 0, 4: 7, 7: 4}  # cat and dog, automobile and truck, airplane and ship, deer and horse
HERE = 'docs/results/speedrun-3-seeds/speedrun-20261123-082237/logits.npz'


def flips(logits=(HERE,), shares=(.01, .03, .1), seeds=(0, 1, 2)):
    "A row for each share, way of flipping, seed and way of scoring"
    kept,rows = [load_evidence(f) for f in logits],[]
    first = kept[0]
    for share in shares:
        for name,similar in ('any class', None), ('similar class', SIMILAR):
            for seed in seeds if share==.03 else seeds[:1]:
                given = flip_labels(first.targs, share, len(first.classes), seed, similar)
                table = compare_scores([Evidence(o.files, o.classes, given, o.logits, o.plain) for o in kept], given != first.targs)
                rows += [dict(share=share, flipped_to=name, seed=seed, **r) for r in table.to_dict('records')]
    return rows


def said_of_shapes(recipe='speedrun', epochs=8, bs=64, lr=.05):
    "What a network that was trained on Shapes10 says of its test images"
    from cifar_cam.interpret import CamInterpretation
    from cifar_cam.recipe import find_recipe, fit_recipe, pick_lrs, recipe_dls, recipe_learner
    from cifar_cam.shapes import shapes_path
    with tempfile.TemporaryDirectory() as tmp:
        r = find_recipe(recipe, epochs=epochs, bs=bs, lr=lr, lr_min=lr/10)
        learn = recipe_learner(r, recipe_dls(r, shapes_path(tmp), 0, hold_out=False, device='cpu'), 0)
        with learn.no_bar(): fit_recipe(learn, r, pick_lrs(learn, r, show_plot=False))
        return CamInterpretation.from_learner(learn).evidence(), dict(recipe=recipe, epochs=epochs, bs=bs, lr=lr, seed=0, trained_on=len(learn.dls.train_ds))


def shapes(shares=(.05,), seeds=(0, 1, 2)):
    "A row for each share, way of flipping, seed and way of scoring; how right the network is"
    first,trained = said_of_shapes()
    pairs = {first.classes.index(a): first.classes.index(b) for a,b in ALIKE.items()}
    rows = []
    for share in shares:
        for name,similar in ('any class', None), ('similar class', pairs):
            for seed in seeds:
                given = flip_labels(first.targs, share, len(first.classes), seed, similar)
                table = compare_scores([Evidence(first.files, first.classes, given, first.logits, first.plain)], given != first.targs)
                rows += [dict(share=share, flipped_to=name, seed=seed, **r) for r in table.to_dict('records')]
    return dict(network=dict(trained, accuracy=float((first.plain.argmax(1) == first.targs).mean()), tested_on=len(first.targs)), rows=rows)


def copies(n=600, seed=1):
    "Recall of each kind of copy, and false alarms"
    from cifar_cam.loaders import cifar_dls
    from cifar_cam.shapes import shapes_path
    with tempfile.TemporaryDirectory() as tmp:
        dls = cifar_dls(shapes_path(tmp), device='cpu')
        train,test = thumbnails(dls.train),thumbnails(dls.valid)
    rng = np.random.default_rng(seed)
    i,how = rng.choice(len(train), n, replace=False),np.array(['moved', 'mirrored', 'saved'])[np.arange(n)%3]
    again = np.stack([np.asarray(copied(Image.fromarray(train[k].transpose(1, 2, 0)), h, rng)).transpose(2, 0, 1) for k,h in zip(i, how)])
    start = process_time()
    found = find_copies(np.concatenate([again, test]), train, least=-1).set_index('image')
    seconds,alike = process_time() - start,np.full(n + len(test), -1.)
    alike[found.index] = found.likeness
    right = np.array([k in found.index and found.copy_of[k]==of for k,of in enumerate(i)])
    made,taken = np.arange(len(alike)) < n,alike >= .88
    return dict(made=n, not_made=len(test), among=len(train), seed=seed, recall=float((right & taken[:n]).mean()), recall_by_kind={h: float((right & taken[:n])[how==h].mean()) for h in sorted({*how})},
                false_alarms=int(taken[n:].sum()), recall_at_precision_99=recall_at(alike, made), cpu_seconds=round(seconds, 1))


def crossfit(data='cifar10', share=.03, seeds=(0, 1, 2), folds=5, recipe='speedrun', epochs=None, out='runs', keep=lambda rows: None):
    "A row for each seed and way of scoring; `keep` gets the rows so far after each seed, which takes long"
    from cifar_cam.crossfit import crossfit, crossfit_evidence
    from cifar_cam.images import data_path
    from cifar_cam.recipe import find_recipe
    from cifar_cam.truth import doubtful_set
    rows,r = [],find_recipe(recipe, epochs=epochs)
    for seed in seeds:
        spoilt = doubtful_set(Path(out)/f'spoilt-{share}-{seed}', data_path(data), share, 0, 0, seed, split='train')
        start = time()
        path = crossfit(r, spoilt, folds, out, seed)
        minutes = (time() - start)/60
        wrong,said = set(pd.read_csv(spoilt/'truth.csv').file),crossfit_evidence(path)
        bad = np.array([f in wrong for f in said.files])
        right = float((said.plain.argmax(1) == said.targs)[~bad].mean())
        about = dict(share=share, seed=seed, folds=folds, recipe=recipe, epochs=r.epochs, minutes=round(minutes, 1), agree_where_the_label_is_right=round(right, 4))
        rows += [dict(about, **row) for row in compare_scores([said], bad).to_dict('records')]
        keep(rows)
        shutil.rmtree(spoilt)
    return rows


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['flips', 'shapes', 'copies', 'crossfit'])
    p.add_argument('--json', help='the file that gets the record')
    p.add_argument('--logits', nargs='+', default=[HERE])
    p.add_argument('--data', default='cifar10')
    p.add_argument('--share', type=float, default=.03)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--folds', type=int, default=5)
    p.add_argument('--epochs', type=int, help="of crossfit's recipe")
    p.add_argument('--out', default='runs')
    a = p.parse_args()
    start = process_time()
    env = environment('shapes', 'cpu', 0)
    machine = {k: env[k] for k in ('processor', 'threads', 'python', 'torch', 'cifar_cam')}
    def keep(made):
        record = dict(command=f'python tests/bench/triage_truth.py {a.what}', **machine, cpu_seconds=round(process_time() - start), result=made)
        if a.json: Path(a.json).write_text(json.dumps(record, indent=1) + '\n')
        return record
    judge = lambda: crossfit(a.data, a.share, a.seeds, a.folds, epochs=a.epochs, out=a.out, keep=keep)
    made = dict(flips=lambda: flips(a.logits, seeds=a.seeds), shapes=lambda: shapes(seeds=a.seeds), copies=copies, crossfit=judge)[a.what]()
    record = keep(made)
    rows = dict(flips=made, crossfit=made, shapes=made['rows'] if a.what=='shapes' else None).get(a.what)
    columns = [c for c in ('share', 'flipped_to', 'way') if rows and c in rows[0]]
    print(json.dumps(record, indent=1) if rows is None else pd.DataFrame(rows).groupby(columns)[['precision', 'area']].mean().round(3).to_string())
