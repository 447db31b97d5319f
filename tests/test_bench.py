"The benchmarks run, and keep the rows that the tables and the notebook read. What they measure here means nothing: a few images, one round."
import json
from pathlib import Path

import pytest
import torch

from cifar_cam.models import MODELS
from cifar_cam.recipe import change_recipe, RECIPES


@pytest.fixture(autouse=True)
def bench(monkeypatch, narrow):
    monkeypatch.syspath_prepend(Path(__file__).parent/'bench')
    for arch in 'davidnet', 'resnet18': monkeypatch.setitem(MODELS, arch, narrow)
    for name in 'davidnet', 'speedrun': monkeypatch.setitem(RECIPES, name, change_recipe(RECIPES[name], bs=64))


def check(res, n, *columns):
    assert len(res['rows']) == n and all({'run', *columns} <= r.keys() for r in res['rows'])
    assert all(0 < x < 1e6 for r in res['rows'] for c,x in r.items() if c in columns)
    assert all(0 < x < 1e6 for x in res['ratios'].values())
    assert res['device'] == 'cpu' and res['threads'] == torch.get_num_threads() and json.dumps(res)


def test_loader(shapes):
    from loader_cost import measure
    res = measure(shapes, bs=32, batches=2, rounds=1, workers=0)
    check(res, 3, 'us_per_image')
    assert len(res['ratios']) == 2


def test_loop():
    from loop_cost import measure
    res = measure(steps=3, rounds=1)
    check(res, 3, 'us_per_step')
    assert len(res['ratios']) == 2


@pytest.mark.slow
def test_step(shapes):
    from step_cost import measure
    res = measure(shapes, steps=1, rounds=1)
    check(res, 7, 'seconds_per_step')
    assert {r['recipe'] for r in res['rows']} == {'davidnet', 'speedrun'} and len(res['ratios']) == 5


def test_cam():
    from cam_cost import measure
    res = measure(bs=2, rounds=1)
    check(res, 7, 'seconds', 'forwards')
    assert res['max_abs_difference'] < 1e-4


def test_small_maps():
    from small_maps import measure
    res = measure(('davidnet',), sizes=(8,), convolutions=[(8, 2)], bs=4, rounds=1)
    check(res, 2, 'oneDNN', 'products', 'ratio')
    assert len(res['ratios']) == 2


def test_memory_and_files(shapes):
    from paths import measure
    res = measure(shapes, n=200, epochs=2, seeds=1)
    check(res, 2, 'accuracy')
    assert {r['run'] for r in res['rows']} == {'in memory', 'from files'} and all(.05 < a['mean'] <= 1 for a in res['accuracy'].values())


@pytest.mark.slow
def test_davidnet_whole(shapes, tmp_path):
    from davidnet import measure
    res = measure(shapes, seeds=1, out=tmp_path, epochs=1, lr=.1, lr_min=.01)
    check(res, 1, 'accuracy', 'seconds')
    assert res['mean'] == res['rows'][0]['accuracy'] and res['rows'][0]['epochs'] == 1


@pytest.mark.slow
def test_speedrun_by_airbenchs_rule(shapes, tmp_path):
    import speedrun
    from cifar_cam.experiment import run_seeds
    folder = run_seeds(change_recipe(RECIPES['speedrun'], epochs=1, resize='20'), shapes, tmp_path, runs=1)
    (accuracy,seconds), = speedrun.ours(folder, 'cpu')
    run = json.loads(next(folder.glob('*/metrics.json')).read_text())
    assert accuracy == run['accuracy_tta'] and seconds > 0
    (tmp_path/'airbench').mkdir()
    speedrun.prepare(shapes, tmp_path/'airbench')
    for split,n in ('train', 300), ('test', 100):
        data = torch.load(tmp_path/'airbench'/'cifar10'/f'{split}.pt')
        assert data['images'].shape == (n, 32, 32, 3) and data['images'].dtype == torch.uint8 and data['labels'].bincount().tolist() == [n//10]*10


def test_the_multiplications_of_a_training_are_counted():
    import multiplications
    r = change_recipe(RECIPES['speedrun'], epochs=8, resize='', bs=2000)
    whole,half = (multiplications.count(change_recipe(r, epochs=n))['training'] for n in (8, 4))
    assert 2*whole == pytest.approx(.29e15, rel=.03)  # what airbench94_muon's author says of it
    assert whole == pytest.approx(2*half)
    smaller = multiplications.count(change_recipe(r, resize='16,32'))
    assert smaller['sides'] == [16]*4 + [32]*4 and .55*whole < smaller['training'] < .63*whole
