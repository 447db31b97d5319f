"""Triage: scores against cases whose answer is known, copies that were made, verdicts, and what cannot be"""
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from sklearn.metrics import roc_auc_score

from cifar_cam.augment import cifar_augment
from cifar_cam.core import InputError
from cifar_cam.interpret import CamInterpretation
from cifar_cam.learner import cifar_learner
from cifar_cam.loaders import cifar_dls
from cifar_cam.triage import _COLUMNS
from cifar_cam.copies import copied, find_copies, thumbnails
from cifar_cam.evidence import (Evidence, check_evidence, classifier_of, item_names, load_evidence, neighbour_votes, plain_loader,
                                pooled_probs, see_images, temperature)
from cifar_cam.triage import (LABEL_SCORES, VERDICTS, ambiguity_scores, label_scores, read_triage, save_triage, triage_summary,
                              triage_table, verdicts)
from cifar_cam.truth import compare_scores, doubtful_set, flip_labels, measure_score, precision_at, recall_at

CLASSES = ['bird', 'cat', 'dog', 'frog']

def made(n=400, noise=1., seed=0, true=None, targs=None):
    "What a network that is mostly right says of `n` images"
    rng = np.random.default_rng(seed)
    true = np.arange(n)%4 if true is None else true
    logits = rng.normal(0, noise, (n, 4))
    logits[np.arange(n), true] += 4
    targs = true if targs is None else targs
    return Evidence([f'test/{CLASSES[t]}/{i}.png' for i,t in enumerate(targs)], CLASSES, targs, logits)

@pytest.fixture(scope='module')
def learn(shapes, narrow):
    return cifar_learner(cifar_dls(shapes, cifar_augment(cutout=0), bs=50, device='cpu'), narrow(10))


# What a network says

def test_the_logits_are_the_mean_over_the_views_and_nothing_is_left_on_the_network(learn):
    dl = learn.dls.valid
    learn.model.train()
    seen = see_images(learn.model, dl, 'flip')
    assert learn.model.training
    assert not any(m._forward_pre_hooks for m in learn.model.modules())
    learn.model.eval()
    x = torch.cat([b[0] for b in dl]).as_subclass(torch.Tensor)
    with torch.no_grad(): expected = (learn.model(x) + learn.model(x.flip(-1)))/2
    np.testing.assert_allclose(seen.logits, expected, atol=1e-4)
    # the last layer makes the logits of the plain view of the embedding
    plain = see_images(learn.model, dl, 'plain')
    head = classifier_of(learn.model)
    np.testing.assert_allclose(plain.embeddings @ head.weight.detach().numpy().T + head.bias.detach().numpy(), plain.logits, atol=1e-4)
    assert seen.targs.tolist() == dl.targets.tolist()

def test_training_images_are_seen_without_augmentation_in_the_order_of_the_files(learn):
    dl = learn.dls.train
    assert (see_images(learn.model, dl, 'plain').targs == dl.targets.numpy()).all()
    images = thumbnails(dl)
    for i in 0, 7, 299: assert (images[i] == np.asarray(Image.open(dl.items[i])).transpose(2, 0, 1)).all()

def test_unknown_views_and_a_network_without_a_linear_layer_are_refused(learn):
    with pytest.raises(InputError, match='choose'): see_images(learn.model, learn.dls.valid, 'sideways')
    with pytest.raises(InputError, match='no linear layer'): classifier_of(torch.nn.Sequential(torch.nn.Flatten()))

def test_the_temperature_is_the_one_that_the_logits_were_multiplied_by():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20000, 4))
    p = np.exp(logits)/np.exp(logits).sum(1, keepdims=True)
    targs = (p.cumsum(1) > rng.random((20000, 1))).argmax(1)
    assert temperature(logits, targs) == pytest.approx(1, abs=.05)
    assert temperature(5*logits, targs) == pytest.approx(5, abs=.25)


# Neighbours

def test_votes_are_those_of_the_nearest_by_angle():
    known = np.array([[1., 0], [10, .1], [0, 1], [.1, 10]])
    votes = neighbour_votes(np.array([[5., .2], [.3, 2]]), known, np.array([2, 2, 0, 0]), 3, k=2)
    assert votes.argmax(1).tolist() == [2, 0]
    np.testing.assert_allclose(votes.sum(1), 1)
    assert (votes > 0).all()  # no class is impossible
    with pytest.raises(InputError, match='smaller k'): neighbour_votes(known, known, np.zeros(4, int), 3, k=5)


# Evidence

def test_evidence_comes_back_from_a_file(tmp_path):
    e = made()
    e.votes = np.full((400, 4), .25)
    again = load_evidence(e.save(tmp_path/'logits.npz'))
    assert again.files == e.files and again.classes == e.classes and (again.targs == e.targs).all()
    np.testing.assert_allclose(again.logits, e.logits, atol=5e-3)
    np.testing.assert_allclose(again.votes, .25)
    assert [f.name for f in tmp_path.iterdir()] == ['logits.npz']

def test_evidence_of_ten_thousand_images_is_small(tmp_path):
    rng = np.random.default_rng(0)
    e = Evidence([f'test/c{i%10}/picture_s_{i:06}.png' for i in range(10000)], [f'c{i}' for i in range(10)], np.arange(10000)%10, *rng.normal(size=(2, 10000, 10)), rng.random((10000, 10)))
    assert e.save(tmp_path/'e.npz').stat().st_size < 1e6

@pytest.mark.parametrize('content', [b'', b'no zip', None])
def test_a_file_that_holds_no_evidence_is_named(tmp_path, content):
    f = tmp_path/'logits.npz'
    if content is not None: f.write_bytes(content)
    with pytest.raises(InputError, match='logits.npz.*no saved evidence'): load_evidence(f)

def test_a_pickle_in_the_place_of_evidence_is_not_opened(tmp_path):
    np.savez(tmp_path/'e.npz', files=np.array([{}], dtype=object))
    with pytest.raises(InputError, match='no saved evidence'): load_evidence(tmp_path/'e.npz')

def one_line(error): return '\n' not in str(error.value) and len(str(error.value)) < 300

@pytest.mark.parametrize('change, says', [
    (dict(classes=['cat']), '1 class'), (dict(classes=CLASSES + ['ship']), 'shape'), (dict(logits=np.full((400, 4), np.nan)), 'diverged'),
    (dict(logits=np.zeros((399, 4))), 'shape'), (dict(targs=np.arange(400)%3), 'frog: no image'), (dict(targs=np.full(400, 9)), 'labels'),
    (dict(votes=np.full((400, 4), np.inf)), 'infinity')])
def test_what_cannot_be_is_said_in_one_line(change, says):
    given = dict(vars(made()), **change)
    with pytest.raises(InputError, match=says) as e: Evidence(**given)
    assert one_line(e)

def test_one_nan_names_its_image():
    logits = made().logits
    logits[17, 2] = np.nan
    with pytest.raises(InputError, match='test/cat/17.png'): Evidence(made().files, CLASSES, made().targs, logits)

def test_runs_that_do_not_belong_together_are_refused():
    a = made()
    with pytest.raises(InputError, match='other classes') as e: check_evidence([a, Evidence(a.files, ['a', 'b', 'c', 'd'], a.targs, a.logits)])
    assert one_line(e)
    with pytest.raises(InputError, match='other images'): check_evidence([a, Evidence(a.files[::-1], CLASSES, a.targs, a.logits)])
    with pytest.raises(InputError, match='other labels'): check_evidence([a, Evidence(a.files, CLASSES, (a.targs + 1)%4, a.logits)])
    with pytest.raises(InputError, match='at least one'): check_evidence([])
    with pytest.raises(InputError, match='other images'): triage_table([a, made(200)])


# Scores

@pytest.mark.parametrize('method', [*LABEL_SCORES])
def test_flipped_labels_come_first(method):
    if method == 'cleanlab': pytest.importorskip('cleanlab')
    true = np.arange(400)%4
    given = flip_labels(true, .05, 4, seed=1)
    e = made(noise=.7, true=true, targs=given)
    bad = given != true
    assert bad.sum() == 20
    scores = label_scores(pooled_probs([e]), given, method)
    assert scores.min() >= 0 and scores.max() <= 1
    assert roc_auc_score(bad, scores) > .99 and precision_at(scores, bad) >= .95

@pytest.mark.parametrize('method', ['margin', 'odds'])
def test_the_score_is_a_half_where_two_classes_are_alike(method):
    p = np.array([[.5, .5, 0], [.2, .8, 0], [1, 0, 0]])
    np.testing.assert_allclose(label_scores(p, np.zeros(3, int), method), [.5, .8, 0])
    with pytest.raises(InputError, match='margin'): label_scores(p, np.zeros(3, int), 'guess')

def test_ambiguity_goes_from_nothing_to_one():
    two,targs = np.array([[1, 0], [.5, .5], [.9, .1], [1, 0]]),np.array([0, 1, 0, 1])
    np.testing.assert_allclose(ambiguity_scores(two, targs, 0), [0, 1, .469, 0], atol=1e-3)
    assert ambiguity_scores(two, targs)[3] > .5  # the label is a vote too

def test_a_network_that_is_lost_is_outvoted_by_two_that_are_not():
    lost,sure = made(noise=6, seed=3),[made(noise=.5, seed=s) for s in (1, 2)]
    alone,together = ((pooled_probs(o).argmax(1) == lost.targs).mean() for o in ([lost], [lost, *sure]))
    assert together > .99 > alone


# Copies

def pictures(n, seed=0): return np.random.default_rng(seed).integers(0, 256, (n, 3, 8, 8), dtype=np.uint8).repeat(4, 2).repeat(4, 3)

def test_copies_are_found_and_nothing_else(shapes):
    train = thumbnails(cifar_dls(shapes, device='cpu').train)
    rng,how = np.random.default_rng(0),['moved', 'mirrored', 'saved']
    again = np.stack([np.asarray(copied(Image.fromarray(train[i].transpose(1, 2, 0)), how[i%3], rng)).transpose(2, 0, 1) for i in range(0, 300, 2)])
    test = thumbnails(cifar_dls(shapes, device='cpu').valid)
    found = find_copies(np.concatenate([again, test]), train)
    assert (found.image < 150).all()  # no false alarm
    assert len(found) >= .98*150
    assert (found.copy_of == 2*found.image).all()
    assert found.mirrored[found.image%3 == 2].all()

def test_an_image_is_no_copy_of_itself_but_its_twin_is():
    x = pictures(20)
    assert not len(find_copies(x))
    twin = np.concatenate([x, x[4:5, :, :, ::-1]])
    assert set(find_copies(twin).image) == {4, 20}

def test_one_image_and_evenly_coloured_ones_are_no_copies():
    assert not len(find_copies(pictures(1)))
    greys = np.arange(90, 93, dtype=np.uint8)[:, None, None, None].repeat(3, 1).repeat(32, 2).repeat(32, 3)
    assert not len(find_copies(greys))  # without structure nothing can be said of what is not equal

def with_little_structure():
    rng = np.random.default_rng(0)
    wide = lambda *shape: np.broadcast_to(rng.integers(0, 256, (60, 3, *shape), dtype=np.uint8), (60, 3, 32, 32)).copy()
    return dict(even=wide(1, 1), rows=wide(32, 1), columns=wide(1, 32), faint=rng.integers(100, 103, (60, 3, 32, 32), dtype=np.uint8))

@pytest.mark.parametrize('kind', with_little_structure())
def test_equal_pixels_are_always_a_copy(kind):
    x = with_little_structure()[kind]
    found = find_copies(x[10:30], x)
    assert found.image.tolist() == [*range(20)] and found.copy_of.tolist() == [*range(10, 30)]
    assert (found.likeness == 1).all() and not found.mirrored.any()
    found = find_copies(x[10:30, ..., ::-1], x)
    assert found.image.tolist() == [*range(20)] and found.copy_of.tolist() == [*range(10, 30)]
    assert found.mirrored.all() == (kind in ('columns', 'faint'))  # the others are their own mirror images
    assert not len(find_copies(x))
    found = find_copies(np.concatenate([x, x[7:8], x[7:8]]))
    assert found.image.tolist() == [7, 60, 61] and found.copy_of.tolist() == [60, 7, 7]


# Verdicts

def test_each_verdict_has_its_case():
    n = 200
    e = made(n, noise=.01)
    logits = [e.logits.copy() for _ in range(3)]
    for o in logits: o[0] = [0, 20, 0, 0]  # a bird that all three call a cat
    for o in logits: o[4] = [1, 1.2, 1, 1]  # nobody knows
    for o in logits[:2]: o[8] = [2, 2.8, 0, 0]  # most say cat, none is sure
    logits[2][8] = [3, 1, 0, 0]
    logits[0][12] = [2.5, 2.6, 0, 0]  # the first alone
    said = [Evidence(e.files, CLASSES, e.targs, o) for o in logits]
    table = triage_table(said, {e.files[16]: 'train/bird/7.png'}, torn=.8).set_index('file')
    at = lambda i: table.loc[e.files[i], 'verdict']
    assert [at(i) for i in (0, 4, 8, 12, 16, 20)] == ['label', 'ambiguous', 'shared', 'network', 'copy', '']
    assert table.loc[e.files[0], 'suggested'] == 'cat' and table.loc[e.files[16], 'copy_of'] == 'train/bird/7.png'
    assert table.mistaken[[e.files[0], e.files[12]]].tolist() == [3, 1]
    assert table.label_score.is_monotonic_decreasing and table.index[0] == e.files[0]

def test_every_image_has_one_row_and_every_row_every_score():
    e = made(noise=3)
    table = triage_table([e])
    assert list(table) == _COLUMNS and sorted(table.file) == sorted(e.files)
    assert table[['label_score', 'ambiguity_score']].map(lambda v: 0 <= v <= 1).all(None)
    assert set(table.verdict) <= {*VERDICTS, ''}
    mistakes = table.predicted != table.label
    first = mistakes.sum()//10
    assert mistakes.sum() >= 50 and (table.verdict[:first] == 'label').all()
    assert (table.suggested != table.label)[table.verdict=='label'].all()

def test_with_fewer_than_fifty_mistakes_no_label_is_blamed_for_the_number():
    e = made(noise=1.2)
    mistakes = (e.logits.argmax(1) != e.targs).sum()
    assert 0 < mistakes < 50
    doubt = np.full(400, .1)
    assert not (verdicts([e], doubt, np.zeros(400)) == 'label').any()

def test_a_label_that_the_networks_together_believe_is_not_blamed_for_the_number():
    lost,sure = made(noise=6, seed=3),[made(noise=.1, seed=s) for s in range(1, 6)]
    assert (lost.logits.argmax(1) != lost.targs).sum() >= 50
    table = triage_table([lost, *sure])
    assert (table.label_score[table.verdict=='label'] > .5).all() and not (table.verdict=='label').sum()

def test_training_images_are_refused_by_whatever_loader_they_come(learn):
    again = learn.dls.test_dl(learn.dls.train_ds.items, with_labels=True)
    mixed = learn.dls.test_dl([*learn.dls.valid_ds.items, learn.dls.train_ds.items[0]], with_labels=True)
    for dl in again, mixed:
        with pytest.raises(InputError, match='crossfit'): CamInterpretation.from_learner(learn, dl=dl).triage()

def test_the_summary_counts_each_image_once_and_says_what_is_left_out():
    table = triage_table([made(noise=3)])
    s = triage_summary(table)
    assert sum(s['mistakes_by_verdict'].values()) == s['mistakes'] == (table.predicted != table.label).sum()
    assert s['accuracy'] == pytest.approx((table.predicted == table.label).mean())
    clear = table[~table.verdict.isin(['label', 'ambiguous'])]
    assert s['accuracy_label_not_in_doubt'] == pytest.approx((clear.predicted == clear.label).mean()) and s['images_label_not_in_doubt'] == len(clear)

def test_the_table_comes_back_with_classes_that_look_like_numbers(tmp_path):
    e = made()
    e = Evidence(e.files, ['1', '2', '007', 'nan'], e.targs, e.logits)
    table = triage_table([e])
    again = read_triage(save_triage(table, tmp_path, runs=['a']))
    pd.testing.assert_frame_equal(again.astype(object), table.astype(object))
    assert json.loads((tmp_path/'triage.json').read_text())['runs'] == ['a']
    (tmp_path/'triage.csv').write_text('file,label\n')
    with pytest.raises(InputError, match="'suggested' is missing"): read_triage(tmp_path)
    with pytest.raises(InputError, match='cannot be read'): read_triage(tmp_path/'none.csv')


# Truth that is made, and measures

def test_flips_are_as_many_as_asked_and_never_to_the_same_class():
    true = np.arange(1000)%10
    given = flip_labels(true, .03, 10, seed=5)
    assert (given != true).sum() == 30 and given.max() < 10
    assert (flip_labels(true, .03, 10, seed=5) == given).all() and (flip_labels(true, .03, 10, seed=6) != given).any()
    pairs = flip_labels(true, .5, 10, similar={3: 5, 5: 3})
    assert set(zip(true[pairs != true], pairs[pairs != true])) == {(3, 5), (5, 3)}
    for share in 0, 1, 1.5: pytest.raises(InputError, flip_labels, true, share, 10)

def test_measures_of_a_perfect_a_reversed_and_a_blind_score():
    bad = np.arange(200) < 20
    good = measure_score(bad.astype(float), bad)
    assert good['precision'] == good['area'] == 1 and good['chance'] == .1
    assert measure_score(-bad.astype(float), bad)['area'] == 0
    blind = measure_score(np.random.default_rng(0).random(200), bad)
    assert blind['area_interval'][0] < .5 < blind['area_interval'][1]
    assert recall_at(np.array([4, 3, 2, 1.]), np.array([True, True, False, True])) == pytest.approx(2/3)
    with pytest.raises(InputError, match='some of both'): measure_score(np.ones(3), np.zeros(3, bool))

def test_a_spoilt_folder_says_what_was_spoilt(shapes, tmp_path):
    path = doubtful_set(tmp_path/'spoilt', shapes, .1, 8, 9)
    truth = pd.read_csv(path/'truth.csv').fillna('')
    assert truth.kind.value_counts().to_dict() == dict(flipped=10, copy=9, blend=8)
    assert all((path/f).is_file() for f in truth.file)
    flipped = truth[truth.kind=='flipped']
    assert all(f.split('/')[1] != l for f,l in zip(flipped.file, flipped.label))
    assert len(list((path/'test').rglob('*.png'))) == 117 and len(list((path/'train').rglob('*.png'))) == 300
    with pytest.raises(InputError, match='is there already'): doubtful_set(path, shapes)


# The whole

def test_triage_of_an_interpretation_on_an_own_folder(shapes, tmp_path, narrow):
    spoilt = doubtful_set(tmp_path/'spoilt', shapes, .1, 5, 9)
    mine = cifar_learner(cifar_dls(spoilt, cifar_augment(cutout=0), bs=50, device='cpu'), narrow(10))
    interp = CamInterpretation.from_learner(mine)
    table = interp.triage(views='plain')
    assert len(table) == 114 and table.file.str.match(r'test/\w+/\w+\.png').all()
    truth = pd.read_csv(spoilt/'truth.csv').query('kind=="copy"').set_index('file')
    found = table.set_index('file').copy_of
    assert (found[truth.index] == truth.of).mean() > .8
    for v in VERDICTS:
        chosen,fig = table[table.verdict==v][:3],interp.plot_triage(table, v, 3)
        said = ' '.join(t.get_text() for t in fig.findobj(Text))
        assert len([ax for ax in fig.axes if ax.images]) == len(chosen)
        assert all(f'→ {s}' in said for s in chosen.suggested) if len(chosen) else f'No image has the verdict {v!r}' in said
    assert (table.verdict=='label').sum() >= 3
    with pytest.raises(InputError, match='choose'): interp.plot_triage(table, 'nobody')
    two = interp.triage([interp], 'plain', neighbours=False, copies=False)
    assert two.mistaken.max() == 2
    assert read_triage(save_triage(table, tmp_path), interp.file_names(range(114))).file.tolist() == interp.file_names(range(114))
    with pytest.raises(InputError, match='other images'): read_triage(tmp_path, ['test/a/1.png'])

def test_a_plain_loader_has_all_images_of_a_shuffled_one_in_their_order(learn):
    with plain_loader(learn.dls.train) as dl:
        targs = [int(y) for _,ys in dl for y in ys]
    names = item_names(learn.dls.train, learn.dls.path)
    assert [learn.dls.vocab[t] for t in targs] == [n.split('/')[1] for n in names] and len(names) == 300
    with pytest.raises(ZeroDivisionError):
        with plain_loader(learn.dls.train): 1/0
    assert learn.dls.train.dataset.split_idx == 0  # augmented again

def test_names_of_images_that_are_no_files_below_the_folder(tmp_path):
    class dl: items = [tmp_path/'a'/'1.png', Path('/elsewhere/2.png'), 7]
    assert item_names(dl, tmp_path) == ['a/1.png', '/elsewhere/2.png', '7']
    class table: items = pd.DataFrame(dict(image=['x.png', 'y.png'], label=['a', 'b']))
    assert item_names(table, tmp_path) == ['x.png', 'y.png']

def test_images_that_were_trained_on_are_refused(learn):
    with pytest.raises(InputError, match='crossfit'): CamInterpretation.from_learner(learn, 0).triage()

def test_ways_to_score_stand_beside_chance_and_plain_loss():
    pytest.importorskip('cleanlab')
    true = np.arange(400)%4
    given = flip_labels(true, .05, 4)
    table = compare_scores([made(true=true, targs=given, seed=s) for s in range(2)], given != true).set_index('way')
    assert [*table.index] == ['chance', 'loss of the first network', *(f'views of 2 networks, {m}' for m in LABEL_SCORES)]
    assert table.area['views of 2 networks, odds'] > .9 > .7 > table.area['chance']
    assert (table.precision_interval.str[0] <= table.precision).all() and (table.bad == 20).all()
