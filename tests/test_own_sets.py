"Images as people have them: which of them train, which test, and what they are called."
import io, json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import FlipItem, get_image_files, nn, RandomSplitter
from PIL import Image

from cifar_cam.batches import parquet_files
from cifar_cam.core import InputError
from cifar_cam.formats import is_archive
from cifar_cam.images import data_checksum, data_path, image_table
from cifar_cam.library import library_model
from cifar_cam.loaders import cifar_dls
from cifar_cam.photos import NamedImage
from cifar_cam.schedule import Plateau
from cifar_cam.truth import doubtful_set


def draw(path, seed=0, size=(32, 32), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path, **options)
    return path

def fill(root, n=6, classes=('cat', 'dog')):
    for i in range(n):
        for c in classes: draw(root/c/f'{i}.png', i + 100*classes.index(c))
    return root

def parquet(path, n, first=0):
    pq = pytest.importorskip('pyarrow.parquet')
    import pyarrow as pa
    def png(i):
        f = io.BytesIO()
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(f, 'png')
        return f.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(image=[dict(bytes=png(first + i), path=None) for i in range(n)], label=[i%2 for i in range(n)])), path)


# --- parquet

@pytest.mark.parametrize('train, test', [('train_set/0000', 'test_set/0000'), ('train/0000', 'test/0000'), ('train-00000-of-00001', 'test-00000-of-00001'), ('cifar-train', 'cifar-test')])
def test_a_part_of_parquet_is_named_by_a_word_of_file_or_folder(train, test, tmp_path):
    parquet(tmp_path/f'{train}.parquet', 20)
    parquet(tmp_path/f'{test}.parquet', 10, 50)
    assert image_table(data_path(tmp_path)).split.value_counts().to_dict() == dict(train=20, test=10)


def test_renamed_folders_of_parquet_are_read_again(tmp_path):
    parquet(tmp_path/'a'/'0000.parquet', 20)
    assert image_table(data_path(tmp_path)).attrs['note']   # no test images of its own
    (tmp_path/'a').rename(tmp_path/'train')
    parquet(tmp_path/'test'/'0000.parquet', 10, 50)
    assert image_table(data_path(tmp_path)).split.value_counts().to_dict() == dict(train=20, test=10)


def test_parquet_that_names_no_part_beside_others_is_refused(tmp_path):
    parquet(tmp_path/'train.parquet', 4)
    parquet(tmp_path/'more.parquet', 4, 10)
    with pytest.raises(InputError, match='more.parquet: names no part'): data_path(tmp_path)


def test_a_missing_shard_with_a_hash_in_its_name_is_missed(tmp_path):
    parquet(tmp_path/'train-00000-of-00002-0123456789abcdef.parquet', 4)
    with pytest.raises(InputError, match='train-00001-of-00002'): data_path(tmp_path)
    parquet(tmp_path/'train-00001-of-00002-fedcba9876543210.parquet', 4, 10)
    assert len(parquet_files(tmp_path)['train']) == 2


def test_two_versions_of_a_parquet_set_are_not_mixed(tmp_path):
    for name in 'full', 'small': parquet(tmp_path/name/'train'/'0000.parquet', 4)
    with pytest.raises(InputError, match='both hold train images'): data_path(tmp_path)


# --- folders, tables

def test_items_as_text_keep_their_parts(tmp_path):
    for part in 'train', 'test': fill(tmp_path/part)
    dls = cifar_dls(tmp_path, bs=4, get_items=lambda p: sorted(map(str, Path(p).glob('*/*/*.png'))), device='cpu')
    assert [dl.n for dl in dls.loaders] == [12, 12] and all('/test/' in str(o) for o in dls.valid.items)


@pytest.mark.parametrize('name', ['test', 'valid', 'val'])
def test_a_flat_folder_called_as_a_part_is_no_class(name, tmp_path):
    fill(tmp_path)
    draw(tmp_path/name/'a.png')
    with pytest.raises(InputError, match='no class folders; move it away'): data_path(tmp_path)


def test_networks_saved_beside_the_classes_are_no_class(tmp_path):
    fill(tmp_path)
    (tmp_path/'models').mkdir()
    assert set(image_table(data_path(tmp_path)).label) == {'cat', 'dog'}
    (tmp_path/'models'/'a.pth').touch()
    assert set(image_table(data_path(tmp_path)).label) == {'cat', 'dog'}


@pytest.mark.parametrize('name', ['cifar10', 'shapes'])
def test_a_path_is_the_users_own_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path/name)
    assert set(image_table(data_path(Path(name))).label) == {'cat', 'dog'}


def test_few_images_a_class_still_give_held_out_ones(tmp_path):
    classes = tuple(f'c{i:02d}' for i in range(20))
    for part in 'train', 'test': fill(tmp_path/part, 5, classes)
    train,held,_ = cifar_dls(tmp_path, bs=4, hold_out=.1, device='cpu').loaders
    assert (train.n, held.n) == (80, 20)


def test_two_ways_to_hold_images_out_are_refused(tmp_path):
    fill(tmp_path)
    for asked in dict(hold_out=.2), dict(valid_pct=.2):
        with pytest.raises(InputError, match='give one'): cifar_dls(tmp_path, splitter=RandomSplitter(.2), **asked)


def test_a_folder_without_images_is_one_line_also_with_functions_of_ones_own(tmp_path):
    with pytest.raises(InputError, match='holds no images'): cifar_dls(tmp_path/'nothere', get_items=get_image_files, get_y=lambda o: o.parent.name)


def test_a_table_may_name_files_both_ways(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [draw(tmp_path/f'{i}.png', i) for i in range(8)]
    pd.DataFrame(dict(file=[str(f) if i%2 else f.name for i,f in enumerate(files)], label=['a', 'b']*4)).to_csv('l.csv', index=False)
    assert len(data_checksum(data_path('l.csv'))) == 64


def test_two_columns_of_one_name_are_refused(tmp_path):
    files = [str(draw(tmp_path/f'{i}.png', i)) for i in range(4)]
    table = pd.concat([pd.DataFrame(dict(file=files, label=list('abab'))), pd.DataFrame(dict(label=list('cdcd')))], axis=1)
    with pytest.raises(InputError, match="two columns 'label'"): data_path(table)


def test_a_table_that_begins_with_pk_is_no_archive(tmp_path):
    (tmp_path/'t.csv').write_text('PK,label\n1.png,a\n')
    assert not is_archive(tmp_path/'t.csv')


def test_bytes_and_arrays_are_opened_as_files_are(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6   # turned by a quarter
    path = draw(tmp_path/'a.jpg', size=(20, 40), exif=exif)
    assert NamedImage.create(path.read_bytes()).size == NamedImage.create(path).size == (20, 40)
    assert NamedImage.create(np.zeros((8, 8), np.uint8)).mode == 'RGB'
    with pytest.raises(InputError, match='no image'): NamedImage.create(b'not one')


def test_an_item_transform_with_one_draw_for_a_batch_is_refused_in_memory(tmp_path):
    fill(tmp_path)
    with pytest.raises(InputError, match='in_memory=False'): cifar_dls(tmp_path, [FlipItem()], bs=4)
    assert cifar_dls(tmp_path, [FlipItem()], bs=4, in_memory=False, num_workers=0, device='cpu').one_batch()


# --- decisions

def decide(tmp_path, rows): (tmp_path/'d.csv').write_text('file,decision,label\n' + '\n'.join(rows) + '\n'); return tmp_path/'d.csv'

def test_decisions_work_with_numbers_as_labels(tmp_path):
    fill(tmp_path/'s'/'train'); fill(tmp_path/'s'/'test')
    table = decide(tmp_path, [f"{tmp_path/'s'/'train'/'cat'/'0.png'},relabel,1"])
    dls = cifar_dls(tmp_path/'s', bs=2, get_items=get_image_files, get_y=lambda o: ['cat', 'dog'].index(o.parent.name), decisions=table,
                    splitter=lambda items: tuple([i for i,o in enumerate(items) if o.parent.parent.name==part] for part in ('train', 'test')), device='cpu')
    assert list(dls.vocab) == [0, 1] and sum(int(y) for _,y in dls.train_ds) == 7


def test_decisions_that_leave_nothing_to_train_on_are_named(tmp_path):
    for part in 'train', 'test': fill(tmp_path/'s'/part)
    for i in range(4): draw(tmp_path/'s'/('train' if i < 2 else 'test')/'rare'/f'{i}.png', 300 + i)
    dls = cifar_dls(tmp_path/'s', bs=2, hold_out=.2, device='cpu')
    left = [o for o in dls.train.items if o.parent.name=='rare']
    table = decide(tmp_path, [f'train/rare/{o.name},drop,' for o in left])
    with pytest.raises(InputError, match='no image of rare is left'): cifar_dls(tmp_path/'s', bs=2, hold_out=.2, decisions=table)


# --- networks and schedules

def test_torchvisions_own_renaming_of_old_weights_is_used(monkeypatch):
    import re
    import torchvision
    torch.manual_seed(0)
    whole = torchvision.models.densenet121(weights=None)
    old = {re.sub(r'(denselayer\d+\.(?:norm|relu|conv))([12])\.', r'\1.\2.', k): v for k,v in whole.state_dict().items() if not k.endswith('num_batches_tracked')}   # as released
    assert old.keys() != whole.state_dict().keys()
    monkeypatch.setattr('torchvision.models.densenet.load_state_dict_from_url', lambda *a, **k: old, raising=False)
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', lambda *a, **k: old)
    net = library_model('torchvision/densenet121', 3, pretrained=True).net
    given = whole.state_dict()
    assert [k for k,v in net.state_dict().items() if not (v.shape==given[k].shape and torch.equal(v, given[k]))] == ['classifier.weight', 'classifier.bias']


def test_a_misspelt_tag_of_timm_is_one_line():
    pytest.importorskip('timm')
    with pytest.raises(InputError, match='Invalid pretrained tag'): library_model('timm/resnet18.foo')


def test_a_plateau_raises_no_rate_to_its_floor():
    from types import SimpleNamespace
    p = Plateau(factor=.5, patience=1, min_lr=1e-4)
    rates = dict(hypers=[dict(lr=1e-6), dict(lr=1e-2)])
    set_to = []
    p.learn = SimpleNamespace(epoch=3, opt=SimpleNamespace(hypers=rates['hypers'], set_hyper=lambda k,v: set_to.append(v)), recorder=SimpleNamespace(values=[[9.]], metric_names=['epoch', 'valid_loss']))
    p.best,p.idx,p.wait,p.new_best = 1.,0,0,False
    p.after_epoch()
    assert set_to[-1] == [1e-6, 5e-3]


# --- a set that is spoilt on purpose

def test_a_spoilt_set_is_whole_or_not_there(tmp_path, monkeypatch):
    for part in 'train', 'test': fill(tmp_path/'s'/part)
    draw(tmp_path/'s'/'test'/'cat'/'wide.png', size=(20, 50))
    with pytest.raises(InputError, match='only 12 training images'): doubtful_set(tmp_path/'new', tmp_path/'s')
    assert not (tmp_path/'new').exists()
    assert (doubtful_set(tmp_path/'new', tmp_path/'s', blends=20, copies=3)/'truth.csv').exists()   # of photos of two sizes
    monkeypatch.setattr('cifar_cam.truth._copies', lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): doubtful_set(tmp_path/'half', tmp_path/'s', copies=3)
    assert not (tmp_path/'half').exists()
