"What a training writes beside numbers and weights: the classification report, the layers, the network's diagram, galleries by class"
import json, re, shutil
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import nn
from PIL import Image
from sklearn.metrics import classification_report

from cifar_cam.core import InputError
from cifar_cam.experiment import draw_run, run_recipe
from cifar_cam.models import build_model, cifar_resnet34, count_parameters, davidnet, MODELS
from cifar_cam.network import layers_text, network_figure
from cifar_cam.recipe import Recipe
from cifar_cam.report import compare_runs, write_report
from cifar_cam.run import load_run
from cifar_cam.share import SHARED
from cifar_cam.summary import class_report, read_class_report, write_class_report

ROOT = Path(__file__).parents[1]
GALLERIES = {'correct', 'misclassified', 'correct_by_class', 'misclassified_by_class'}
MAPS = {'top_losses', 'cams', 'correct_by_class_cams', 'misclassified_by_class_cams'}


def predicted(targs, preds, vocab): return SimpleNamespace(targs=torch.tensor(targs), preds=torch.tensor(preds), vocab=vocab)

def figures(run): return {p.stem for p in (run.path/'figures').iterdir()}


@pytest.fixture(autouse=True)
def none_is_left_open():
    before = plt.get_fignums()
    yield
    assert plt.get_fignums()==before


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    "120 classes with a single test image each"
    root,rng = tmp_path_factory.mktemp('many'),np.random.default_rng(0)
    for i in range(120):
        for split in 'train', 'test':
            (root/split/f'a rather long name {i:03d}').mkdir(parents=True)
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), 'uint8')).save(root/split/f'a rather long name {i:03d}'/'0.png')
    return root


# --- the classification report

def test_the_report_is_scikit_learns():
    rng = np.random.default_rng(0)
    targs,preds = rng.integers(0, 4, 200).tolist(),rng.integers(0, 4, 200).tolist()
    names = ['ant', 'bee', 'cat', 'dog']
    ours,theirs = class_report(predicted(targs, preds, names)).set_index('class'),classification_report(targs, preds, target_names=names, output_dict=True)
    for name in *names, 'macro avg', 'weighted avg': assert ours.loc[name].tolist()==list(theirs[name].values())
    assert ours.loc['accuracy'].tolist()==[theirs['accuracy']]*3 + [200]


def test_a_class_that_is_never_predicted_and_one_without_images_are_zero():
    t = class_report(predicted([0, 0, 1, 1], [0, 0, 0, 2], ['ant', 'bee', 'cat', 'dog'])).set_index('class')
    assert t.loc['bee'].tolist()==[0, 0, 0, 2] and t.loc['cat'].tolist()==[0, 0, 0, 0] and t.loc['dog'].tolist()==[0, 0, 0, 0]
    assert t.loc['ant', 'precision']==pytest.approx(2/3) and t.loc['ant', 'recall']==1 and not t.isna().any(axis=None)


def test_classes_named_as_the_averages_keep_their_rows():
    t = class_report(predicted([0, 1, 2, 2], [0, 1, 2, 1], ['accuracy', 'macro avg', 'NA']))
    assert t['class'].tolist()==['accuracy', 'macro avg', 'NA', 'accuracy', 'macro avg', 'weighted avg']
    assert t.recall.tolist()[:4]==[1, 1, .5, .75] and t.support.tolist()==[1, 1, 2, 4, 4, 4]


def test_the_report_is_read_as_it_was_written(tmp_path):
    names = ['NA', 'a,b', '"quoted"\nline', '0']
    run = SimpleNamespace(path=tmp_path, interp=predicted([0, 1, 2, 3, 3], [0, 1, 2, 3, 0], names))
    assert read_class_report(tmp_path) is None
    path = write_class_report(run)
    pd.testing.assert_frame_equal(read_class_report(tmp_path), class_report(run.interp), check_exact=False, check_dtype=False)
    assert len(path.read_text().splitlines()) == 1 + 4 + 1 + 3
    for text in '', 'class,precision\nx,1\n', 'class,precision,recall,f1,support\nant,high,1,1,1\n', '\0'*9:
        path.write_text(text)
        with pytest.raises(InputError, match=r'classification_report\.csv: .*delete it$'): read_class_report(tmp_path)


# --- the layers and the diagram

def test_layers_have_blocks_outputs_of_a_batch_totals_and_megabytes():
    model = davidnet()
    before = {k: v.clone() for k,v in model.state_dict().items()}
    text = layers_text(model.train(), 32, 512)
    assert re.search(r'Residual \(1\) +\[512, 128, 16, 16\]', text) and re.search(r'Linear \(fc\) +\[512, 10\] +5,130', text)
    assert f'Total params: {count_parameters(model):,}' in text and re.search(r'Params size \(MB\): 26\.29', text) and 'Total mult-adds (G): ' in text
    assert model.training and all(torch.equal(v, before[k]) for k,v in model.state_dict().items()) and not any(m._forward_hooks for m in model.modules())
    assert 'Forward/backward pass size (MB)' in layers_text(cifar_resnet34(), 48, 4) and '[4, 64, 48, 48]' in layers_text(cifar_resnet34(), 48, 4)


class Asks(nn.Module):
    "Its path depends on what it sees, so a network without values cannot take it"
    def __init__(self, n_out=10, norm='batch'):
        super().__init__()
        self.conv,self.fc = nn.Conv2d(3, 8, 3),nn.Linear(8, n_out)
    def forward(self, x): return self.fc(self.conv(x if x.mean() < 5 else -x).mean((2, 3)))

def test_a_network_that_looks_at_values_gets_the_plain_table():
    assert layers_text(Asks()).splitlines()==['layer,kind,output,parameters', 'conv,Conv2d,"(8, 30, 30)",224', 'fc,Linear,"(10,)",90']


@pytest.mark.parametrize('model', [cifar_resnet34, lambda: build_model('torchvision/googlenet')], ids=['resnet34', 'googlenet'])
def test_no_name_of_a_diagram_touches_another(model):
    fig = network_figure(model())
    fig.draw_without_rendering()
    boxes = [t.get_window_extent() for t in fig.axes[0].texts if t.get_text()]
    assert not any(a.overlaps(b) for i,a in enumerate(boxes) for b in boxes[:i]) and len(boxes) > 10
    plt.close(fig)


def test_a_network_of_fifty_stages_or_that_fails_is_not_drawn():
    with pytest.raises(InputError, match='Sequential: has too many stages to be drawn'):
        network_figure(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(50))))
    class Fails(Asks):
        def forward(self, x): raise KeyError('of\nits own')
    with pytest.raises(InputError, match=r'^Fails: cannot be drawn \(KeyError: '): network_figure(Fails())


# --- the folder

@pytest.fixture
def tiny_recipe(): return Recipe(name='tiny', arch='davidnet', epochs=2, bs=10, lr=.05, lr_min=.005)


def test_a_training_writes_all_of_it(few, narrow, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, 'davidnet', narrow)
    run = run_recipe(tiny_recipe, few, tmp_path)
    assert GALLERIES | MAPS | {'network', 'curves', 'confusion_matrix', 'class_accuracy'} <= figures(run)
    for f in (run.path/'figures').iterdir(): Image.open(f).load()
    t = read_class_report(run.path)
    assert t['class'].tolist()[:10]==[str(c) for c in run.dls.vocab] and t.support.tolist()[10:]==[20]*3
    assert t.recall[:10].tolist()==pytest.approx([*run.metrics['class_accuracy'].values()], abs=1e-5)
    assert '[10, 10]' in (run.path/'layers.txt').read_text(encoding='utf-8')
    assert run.metrics['best_train_accuracy']==run.history.train_accuracy.max() and run.metrics['parameters']==count_parameters(run.model)
    html = (run.path/'report.html').read_text()
    assert 'aria-label="Classification report"' in html and f"At its best it was {100*run.metrics['best_train_accuracy']:.2f}" in html
    assert all(any(f.match(p) for p in SHARED) for f in run.path.glob('*.txt')) and any(p=='classification_report.csv' for p in SHARED)
    written = (ROOT/'docs'/'run-folder.md').read_text()
    assert all(f'`{name}`' in written for name in figures(run)) and all(f'`{f.name}`' in written for f in run.path.iterdir() if f.is_file())


def test_a_record_without_the_newer_numbers_is_read_and_reported(run):
    old = json.loads((run/'metrics.json').read_text())
    for k in 'best_train_accuracy', 'parameters': del old[k]
    (run/'metrics.json').write_text(json.dumps(old | dict(of_a_later_version=1)))
    assert 'best_train_accuracy' not in load_run(run).metrics and 'At its best' not in write_report(run).read_text()


def test_a_network_without_maps_gets_its_other_figures(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(MODELS, 'linear', lambda n_out=10, norm='batch': nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, n_out)))
    run = run_recipe(Recipe(name='linear', arch='linear', epochs=1, bs=10, lr=.01, lr_min=.001), few, tmp_path)
    assert GALLERIES | {'network'} <= figures(run) and not MAPS & figures(run) and (run.path/'report.html').exists()
    assert sum(l.startswith('galleries with maps: not drawn: ') for l in capsys.readouterr().out.splitlines())==1


def test_what_cannot_be_drawn_is_a_line_and_the_rest_is_there(run, monkeypatch, capsys):
    def fails(*args): raise ValueError('no such shape')
    for f in 'plot_network', 'layer_table', 'summary': monkeypatch.setattr(f'cifar_cam.network.{f}', fails)
    draw_run(load_run(run))
    said = capsys.readouterr().out.splitlines()
    assert [l for l in said if l.startswith('layers.txt: not written: ')] and [l for l in said if l.startswith('network.png: not drawn: ')]
    assert not (run/'layers.txt').exists() and GALLERIES | MAPS <= figures(load_run(run)) and 'network' not in figures(load_run(run))


def test_a_full_disk_is_not_a_network_that_cannot_be_drawn(run, monkeypatch):
    def full(self, fig, name): plt.close(fig); raise InputError('the disk is full')
    monkeypatch.setattr('cifar_cam.run.Run.save_figure', full)
    from cifar_cam.network import write_network
    with pytest.raises(InputError, match='disk is full'): write_network(load_run(run))


def test_120_classes_with_a_test_image_each_stay_readable(many, narrow, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, 'davidnet', narrow)
    run = run_recipe(tiny_recipe, many, tmp_path)
    for name in 'correct_by_class', 'misclassified_by_class', 'misclassified_by_class_cams':
        assert max(Image.open(run.path/'figures'/f'{name}.png').size) < 2600
    assert len(read_class_report(run.path))==123
    assert re.search(r'<details><summary>The numbers of 120 classes</summary>\s*<div class="scroll"[^>]*aria-label="Classification report"', (run.path/'report.html').read_text())


def test_a_comparison_has_the_report_of_each_run_folded(run, many, narrow, tiny_recipe, tmp_path, monkeypatch):
    other = Path(shutil.copytree(run, tmp_path/'other'))
    def reports(path): return re.findall(r'<details><summary>([^<]+)</summary>\s*<div class="scroll"[^>]*aria-label="\1"', path.read_text())
    assert reports(compare_runs([run, other], tmp_path/'same.html'))==['davidnet #1', 'davidnet #2']
    for f in 'draw_run', 'write_report': monkeypatch.setattr(f'cifar_cam.experiment.{f}', lambda run: None)
    elsewhere = run_recipe(tiny_recipe, many, tmp_path)  # on other images: what its folder has is taken
    assert reports(compare_runs([run, elsewhere], tmp_path/'none.html'))==[] and 'id="reports"' not in (tmp_path/'none.html').read_text()
    write_class_report(elsewhere)
    assert reports(compare_runs([run, elsewhere], tmp_path/'one.html'))==['tiny']
