"`checks` finds what is wrong, says how to fix it, changes nothing, and does not invent"
import os, shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from cifar_cam import checks
from cifar_cam.checks import check_data, check_device, check_disk, check_setup, check_speed, check_versions, checks_command, measure_recipe
from cifar_cam.core import InputError
from cifar_cam.recipe import RECIPES


def problems(found): return {f['check']: f['problem'] for f in found if f['problem']}


def test_here_all_versions_are_as_needed(): assert not problems(check_versions())


def test_an_old_or_missing_package_is_a_problem_and_a_missing_extra_is_none(monkeypatch):
    old = {'torch': '1.13', 'fastai': None, 'albumentations': '9.9'}
    monkeypatch.setattr(checks, '_requirements', lambda: ['torch>=2.6', 'fastai>=2.8.12', 'albumentations>=2', 'nope; extra=="x"', 'tomli; python_version<"3"'])
    monkeypatch.setattr(checks, '_version', lambda name: old.get(name))
    found = check_versions()
    assert set(problems(found)) == {'torch', 'fastai'} and 'pip install' in problems(found)['torch']
    assert 'nope' in found[-1]['found'] and not any(f['check']=='tomli' for f in found)


def test_precision_is_the_one_that_would_be_chosen(monkeypatch):
    for half,word in (True, 'bfloat16'), (False, 'float32'):
        monkeypatch.setattr('cifar_cam.precision.has_bf16', lambda device: half)
        assert next(f['found'] for f in check_device('cpu') if f['check']=='precision').startswith(word)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 10_000)
    assert 'OMP_NUM_THREADS' in problems(check_device('cpu'))['processor']
    with pytest.raises(InputError, match='tpu9'): check_device('tpu9')


def test_precision_of_a_gpu_that_imitates_bfloat16_is_that_of_its_training(monkeypatch):
    monkeypatch.setattr(checks, 'pick_device', lambda name: torch.device('cuda'))
    monkeypatch.setattr('cifar_cam.precision.has_bf16', lambda device: False)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(name='T4', total_memory=2**34, major=7, minor=5))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    for capability,word in ((7, 5), 'float16: '), ((6, 0), 'float32: '):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        assert next(f['found'] for f in check_device('cuda') if f['check']=='precision').startswith(word)


def test_the_state_of_the_data(few, tmp_path, fastai_home, monkeypatch):
    assert '20 in test, 100 in train' in check_data(few)[0]['found'] and not problems(check_data(few))
    shutil.copytree(few, tmp_path/'data')
    shutil.rmtree(tmp_path/'data'/'test'/'star')
    assert 'star' in problems(check_data(tmp_path/'data'))['data']
    assert problems(check_data(tmp_path/'nowhere')) and not problems(check_data())   # downloaded when it is needed
    monkeypatch.setenv('CIFAR_CAM_DATA', str(few))
    assert 'data' in problems(check_data())   # Shapes10 is not CIFAR-10
    (tmp_path/'set.tgz').write_bytes(b'x'*2_000_000)
    assert 'set.tgz' in problems(check_data(tmp_path/'set.tgz'))['data']   # a name makes no archive


def test_the_state_of_data_in_every_form(few, tmp_path, fastai_home, monkeypatch):
    there = set(fastai_home.rglob('*'))
    def found(data):
        assert not problems(check_data(data))
        return check_data(data)[0]['found']
    assert 'an archive of' in found(shutil.make_archive(tmp_path/'set', 'zip', few))
    assert '20 in test, 80 in train, 10 classes; the test set is 20 of 100 images, held out' in found(few/'train')
    files = sorted((few/'train').glob('*/*.png'))
    pd.DataFrame(dict(file=files, label=[f.parent.name for f in files], split=['train', 'val', 'test', 'train', 'train']*20)).to_csv(tmp_path/'list.csv', index=False)
    assert '20 in test, 60 in train, 20 in valid, 10 classes' in found(tmp_path/'list.csv')
    batches = tmp_path/'cifar-10-batches-py'
    batches.mkdir()
    for name in [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch', 'batches.meta']: (batches/name).touch()
    assert 'batches, written as images when' in found(batches) and 'drawn when' in found('shapes')
    monkeypatch.setenv('CIFAR_CAM_DATA', str(batches))
    assert 'batches' in found(None) and found('cifar10')==found(None)
    assert set(fastai_home.rglob('*')) == there


def test_the_home_folder_is_not_told(few, monkeypatch):
    monkeypatch.setenv('HOME', str(few.parent))
    for f in check_data(few) + check_disk(few/'runs'):
        if f['check'] in ('data', 'disk for runs'): assert f['found'].startswith(f'~/{few.name}')


def test_the_disk(tmp_path, monkeypatch):
    assert not problems(check_disk(tmp_path/'new'/'runs')) and not (tmp_path/'new').exists()
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10, 9, 5e8))
    assert 'make room' in problems(check_disk(tmp_path))['disk for runs']
    def denied(dir): raise PermissionError(13, 'Permission denied', str(dir))
    monkeypatch.setattr(checks.tempfile, 'TemporaryFile', denied)
    assert 'cannot be written' in problems(check_disk(tmp_path))['disk for runs']


def test_minutes_follow_from_the_rate(monkeypatch):
    monkeypatch.setattr(checks, 'measure_recipe', lambda r, device, seconds: 1000.)
    found = {f['check']: f['found'] for f in check_speed('cpu')}
    assert set(found) == set(RECIPES) and f"about {RECIPES['davidnet'].epochs*50/60:,.0f} minutes" in found['davidnet']


def test_a_network_is_measured():
    assert 0 < measure_recipe(RECIPES['speedrun'], 'cpu', seconds=.01) < 1e6


def test_it_prints_every_check_and_what_is_wrong_last(few, tmp_path, capsys):
    table = check_setup(few, tmp_path, 'cpu', seconds=0)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(table) and out[0].startswith('python') and not list(tmp_path.iterdir())
    checks_command(str(few), str(tmp_path), 'cpu', seconds=0)
    assert capsys.readouterr().out.splitlines()[-1] == 'nothing is wrong'
    with pytest.raises(InputError, match='data'): checks_command('nowhere', str(tmp_path), 'cpu', seconds=0)
    assert capsys.readouterr().out.splitlines()[-1].startswith('WRONG: data')


def test_a_home_that_cannot_be_written_is_a_finding_and_the_other_checks_go_on(monkeypatch, tmp_path, capsys):
    def refuse(): raise InputError('/home/x: cannot be written (Permission denied); set FASTAI_HOME to a folder that can')
    monkeypatch.setattr('cifar_cam.checks.data_home', refuse)
    table = check_setup(out=tmp_path, seconds=0).set_index('check')
    assert {'data', 'disk for data'} == set(table.index[table.problem.str.contains('FASTAI_HOME')])
    assert 'GB free' in table.found['disk for runs'] and 'device' in table.index
    assert capsys.readouterr().out.count('WRONG: ') >= 2
