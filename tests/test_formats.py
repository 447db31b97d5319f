"Data as people have it. The layouts are made as their sources document them, with a few images; what is wrong in one is a line that names it"
import hashlib, io, json, os, pickle, shutil, tarfile, zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.external import fastai_cfg
from fastai.vision.all import get_image_files, GrandparentSplitter, imagenet_stats, load_learner, Normalize, RandomSplitter, Resize, TensorImage
from PIL import Image

from cifar_cam.batches import read_pickle, stored_png
from cifar_cam.core import InputError
from cifar_cam.images import (cifar_block, cifar_path, CIFAR10, data_checksum, data_path, held_out_note, image_files, image_stats,
                              image_table)
from cifar_cam.loaders import cached_images, cifar_dls, MemoryImages
from cifar_cam import loaders
from cifar_cam.models import MODELS
from cifar_cam.run import load_run
from cifar_cam.crossfit import triage_runs
from cifar_cam.experiment import run_or_resume, run_recipe, run_seeds

NAMES = CIFAR10
rng = np.random.default_rng(0)


def pixels(n=1): return rng.integers(0, 256, (n, 3072), dtype=np.uint8)

def paint(path, i=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels()[0].reshape(32, 32, 3)).save(path)
    return path

def refused(data, *words, **kwargs):
    "One line that has all `words`, and nothing left of it"
    with pytest.raises(InputError) as e: cifar_dls(data, bs=2, **kwargs)
    message = str(e.value)
    assert all(w in message for w in words) and message.isprintable() and len(message) < 600, message
    assert not [p for p in Path(fastai_cfg().d['data']).glob('.unpacking*')]

def sizes(dls): return [len(dl.dataset) for dl in dls.loaders]


# --- CIFAR's batches: https://www.cs.toronto.edu/~kriz/cifar.html; torchvision/datasets/cifar.py

def dump(o, path, protocol=2):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(o, protocol=protocol))

def ten(root, n=20, key=str.encode, protocol=2):
    d = root/'cifar-10-batches-py'
    for batch in [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']:
        dump({key('batch_label'): key(batch), key('labels'): [i % 10 for i in range(n)], key('data'): pixels(n),
              key('filenames'): [key(f'{batch}_{i}.png') for i in range(n)]}, d/batch, protocol)
    dump({key('num_cases_per_batch'): n, key('label_names'): [key(c) for c in NAMES], key('num_vis'): 3072}, d/'batches.meta', protocol)
    return d

def hundred(root, n=40):
    d = root/'cifar-100-python'
    for split in 'train', 'test':
        dump({b'data': pixels(n), b'fine_labels': [i % 20 for i in range(n)], b'coarse_labels': [i % 4 for i in range(n)],
              b'filenames': [f'{split}_{i}.png'.encode() for i in range(n)]}, d/split)
    dump({b'fine_label_names': [f'fine{i}'.encode() for i in range(20)], b'coarse_label_names': [f'coarse{i}'.encode() for i in range(4)]}, d/'meta')
    return d

def change(path, **fields):
    batch = pickle.loads(path.read_bytes())
    for k,v in fields.items():
        if v is None: del batch[k.encode()]
        else: batch[k.encode()] = v
    dump(batch, path)


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('key', [str.encode, str])
def test_batches_of_every_protocol_are_the_images_they_hold(tmp_path, protocol, key):
    d = ten(tmp_path, 10, key, protocol)
    whole = pickle.loads((d/'data_batch_3').read_bytes())
    root = data_path(d)
    for i in 0, 9:
        image = np.asarray(Image.open(root/'train'/NAMES[i]/f'data_batch_3_{i}.png'))
        assert np.array_equal(image, whole[key('data')][i].reshape(3, 32, 32).transpose(1, 2, 0))
    assert len(image_files(root)) == 60


def test_a_pickle_of_python_2_and_one_of_old_numpy_are_read():
    old = (b'\x80\x02}q\x01U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x01K\x02\x86'
           b'cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\xfe\x01tbs.')
    path = Path(fastai_cfg().d['data'])/'old.pickle'
    path.write_bytes(old)
    assert read_pickle(path)['data'].tolist() == [[254, 1]]


@pytest.mark.parametrize('wrap', ['folder', 'parent', 'beside others', 'renamed', 'tar.gz', 'zip', 'inside a folder'])
def test_batches_are_found_wherever_they_lie(tmp_path, wrap):
    d = ten(tmp_path, 10)
    if wrap == 'parent': d = tmp_path
    if wrap == 'beside others':
        for o in 'MNIST/raw', 'notes': (tmp_path/o).mkdir(parents=True)
        d = tmp_path
    if wrap == 'renamed': d = d.rename(tmp_path/'mine')
    if wrap == 'tar.gz':
        with tarfile.open(tmp_path/'some.name', 'w:gz') as t: t.add(d, d.name)
        d = tmp_path/'some.name'
    if wrap == 'zip': d = Path(shutil.make_archive(tmp_path/'x', 'zip', d))
    if wrap == 'inside a folder':
        (tmp_path/'a').mkdir()
        d = d.rename(tmp_path/'a'/'b').parent
    dls = cifar_dls(d, bs=10)
    assert (sizes(dls), list(dls.vocab), dls.test_note) == ([50, 10], NAMES, '')


def test_cifar_100_has_two_kinds_of_labels(tmp_path):
    d = hundred(tmp_path)
    assert len(cifar_dls(d, bs=10).vocab) == 20 and list(cifar_dls(d, bs=10, labels='coarse').vocab) == [f'coarse{i}' for i in range(4)]
    assert data_checksum(data_path(d)) != data_checksum(data_path(d, labels='coarse'))
    assert len(cifar_block(labels='coarse').dataloaders(d, bs=10, num_workers=0).vocab) == 4
    with tarfile.open(tmp_path/'cifar-100-python.tar.gz', 'w:gz') as t: t.add(d, d.name)
    packed = tmp_path/'cifar-100-python.tar.gz'
    assert len(cifar_dls(packed, bs=10).vocab) == 20 and len(cifar_dls(packed, bs=10, labels='coarse').vocab) == 4
    df = listed(tmp_path).drop(columns='label').assign(fine_label=[*'abcd']*6, coarse_label=[*'xy']*12)
    df['file'] = [str(tmp_path/f) for f in df.file]
    assert list(cifar_dls(df, bs=4).vocab) == [*'abcd'] and list(cifar_dls(df, bs=4, labels='coarse').vocab) == [*'xy']
    refused(ten(tmp_path, 10), 'CIFAR-10 has no coarse labels', labels='coarse')
    refused(drawn(tmp_path/'f'), 'has no coarse labels', labels='coarse')
    refused(d, "labels='both'", labels='both')


def test_two_data_sets_side_by_side_are_not_chosen_from(tmp_path):
    ten(tmp_path, 10), hundred(tmp_path)
    refused(tmp_path, 'cifar-10-batches-py', 'cifar-100-python', 'name one')


BAD_BATCH = dict(
    missing=(lambda d: (d/'data_batch_4').unlink(), 'data_batch_4 is missing'), no_test=(lambda d: (d/'test_batch').unlink(), 'test_batch is missing'),
    no_meta=(lambda d: (d/'batches.meta').unlink(), 'batches.meta is missing'), a_sixth=(lambda d: shutil.copy(d/'data_batch_1', d/'data_batch_6'), 'data_batch_6'),
    half=(lambda d: (d/'data_batch_2').write_bytes((d/'data_batch_2').read_bytes()[:900]), 'data_batch_2'), empty=(lambda d: (d/'test_batch').write_bytes(b''), 'test_batch'),
    text=(lambda d: (d/'test_batch').write_text('no pickle'), 'test_batch'), a_list=(lambda d: dump([1], d/'data_batch_5'), 'data_batch_5'),
    label_is_text=(lambda d: change(d/'data_batch_1', labels=['cat']*20), "data_batch_1: the label of image 0 is 'cat'"),
    label_is_nothing=(lambda d: change(d/'data_batch_1', labels=[0]*7 + [None]*13), 'the label of image 7 is None'),
    label_is_a_fraction=(lambda d: change(d/'data_batch_1', labels=[.5]*20), 'the label of image 0 is 0.5'), label_is_true=(lambda d: change(d/'data_batch_1', labels=[True]*20), 'True'),
    label_too_high=(lambda d: change(d/'data_batch_1', labels=[3]*19 + [10]), 'the label of image 19 is 10'), label_below_0=(lambda d: change(d/'test_batch', labels=[-1]*20), 'test_batch'),
    a_label_less=(lambda d: change(d/'data_batch_1', labels=[0]*19), 'data_batch_1: 20 images'), no_labels=(lambda d: change(d/'data_batch_1', labels=None), 'labels'),
    no_data=(lambda d: change(d/'data_batch_1', data=None), "'data'"), wrong_shape=(lambda d: change(d/'data_batch_1', data=pixels(20)[:, :3000]), '3,072'),
    floats=(lambda d: change(d/'data_batch_1', data=pixels(20).astype(float)), '3,072'), not_an_array=(lambda d: change(d/'data_batch_1', data=[1]*20), '3,072'),
    twice=(lambda d: change(d/'data_batch_1', filenames=[b'a.png']*20), 'a.png is there twice'), no_name=(lambda d: change(d/'data_batch_1', filenames=[b'..']*20), 'file name'),
    name_is_a_number=(lambda d: change(d/'data_batch_1', filenames=[*range(20)]), 'file name'),
    class_twice=(lambda d: change(d/'batches.meta', label_names=[b'cat']*10), 'class name'), no_classes=(lambda d: change(d/'batches.meta', label_names=[]), 'batches.meta'),
    class_leads_out=(lambda d: change(d/'batches.meta', label_names=[b'..', *map(str.encode, NAMES[1:])]), "'..'"))

@pytest.mark.parametrize('case', BAD_BATCH)
def test_what_is_wrong_with_a_batch_is_named(tmp_path, case):
    d = ten(tmp_path)
    spoil,word = BAD_BATCH[case]
    spoil(d)
    refused(d, str(tmp_path), word)


def test_names_that_lead_out_or_are_missing_do_no_harm(tmp_path):
    d = ten(tmp_path, 10)
    change(d/'data_batch_1', filenames=[f'../../../up{i}.png'.encode() for i in range(10)])
    change(d/'data_batch_2', filenames=None)
    change(d/'data_batch_3', filenames=[f'data_batch_4_{i}.png'.encode() for i in range(10)])   # the same names in two batches: none is lost
    root = data_path(d)
    assert len(image_files(root)) == 60 and (root/'train'/NAMES[3]/'up3.png').is_file() and not [*tmp_path.rglob('up*')]


class Call:
    def __init__(self, f, *args): self.call = f,args
    def __reduce__(self): return self.call

def planted(path): return path.write_text('ran')

EVIL = dict(system=lambda p: Call(os.system, f'touch {p}'), eval=lambda p: Call(eval, f'open({str(p)!r}, "w")'), write=lambda p: Call(planted, p), open=lambda p: Call(open, str(p), 'w'),
            load=lambda p: Call(np.load, str(p)), numpy_by_prefix=lambda p: Call(np.savetxt, str(p), [1]), encode=lambda p: Call(__import__('_codecs').encode, 'x', 'rot13'),
            objects=lambda p: np.array([Call(os.system, f'touch {p}')], dtype=object), getattr=lambda p: Call(getattr, 'x', 'upper'))

@pytest.mark.parametrize('case', EVIL)
@pytest.mark.parametrize('protocol', [2, 5])
def test_a_malicious_pickle_does_nothing(tmp_path, case, protocol):
    d = ten(tmp_path)
    for name in 'data_batch_1', 'batches.meta':
        dump({b'data': EVIL[case](tmp_path/'it ran')}, d/name, protocol)
        with pytest.raises(InputError, match=name): read_pickle(d/name)
    refused(d, 'batches.meta')
    assert not (tmp_path/'it ran').exists()


def test_a_pickle_cannot_change_what_the_next_one_calls(tmp_path):
    change_encode = b'\x80\x02c_codecs\nencode\n(N}X\x0c\x00\x00\x00__defaults__X\x05\x00\x00\x00rot13\x85stb.'
    (tmp_path/'x').write_bytes(change_encode)
    with pytest.raises(InputError): read_pickle(tmp_path/'x')
    d = ten(tmp_path, 10)
    assert len(image_files(data_path(d))) == 60


def test_a_stored_png_is_the_same_bytes_everywhere_and_the_same_image(tmp_path):
    for h,w in (32, 32), (1, 1), (200, 300):
        image = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored_png(image)))), image)
    fixed = stored_png(np.arange(150*150*3).astype(np.uint8).reshape(150, 150, 3))
    assert hashlib.sha256(fixed).hexdigest() == '2f218d2f9d0b2f792e1b30eef05e0192b7b530636c330a0f785ee84e29f52546'


# --- Kaggle's CIFAR-10: https://www.kaggle.com/c/cifar-10/data; tables

def kaggle(root, n=40, tests=8):
    for split,k in ('train', n), ('test', tests):
        for i in range(1, k + 1): paint(root/split/f'{i}.png')
    pd.DataFrame(dict(id=range(1, n + 1), label=[NAMES[i % 4] for i in range(n)])).to_csv(root/'trainLabels.csv', index=False)
    return root

def test_kaggles_folder_with_its_sample_of_what_to_hand_in(tmp_path):
    kaggle(tmp_path)
    pd.DataFrame(dict(id=range(1, 9), label='cat')).to_csv(tmp_path/'sampleSubmission.csv', index=False)
    dls = cifar_dls(tmp_path, bs=4)
    assert sizes(dls) == [32, 8] and {f.parent.name for f in [*dls.train.items, *dls.valid.items]} == {'train'} and 'held out' in dls.test_note
    assert sizes(cifar_dls(tmp_path, bs=4, valid_pct=.25)) == [30, 10] and sizes(cifar_dls(tmp_path, bs=4, hold_out=.25)) == [24, 8, 8]
    labels = dict(zip(range(1, 41), [NAMES[i % 4] for i in range(40)]))
    assert all(dls.vocab[y] == labels[int(f.stem)] for f,y in zip(dls.train.items, dls.train.targets))
    packed = shutil.make_archive(tmp_path.parent/'competition', 'zip', tmp_path)
    assert sizes(cifar_dls(packed, bs=4)) == [32, 8]

def wrapped(folder):
    "What an unpacker leaves that makes a folder of the archive's name: train/train/1.png"
    folder.rename(folder.with_name('aside'))
    folder.mkdir()
    folder.with_name('aside').rename(folder/folder.name)

KAGGLE = dict(
    upper_case=lambda d: (d/'trainLabels.csv').rename(d/'TRAINLABELS.CSV'), capital=lambda d: (d/'train').rename(d/'Train'), train_twice=lambda d: wrapped(d/'train'),
    both_twice=lambda d: [wrapped(d/s) for s in ('train', 'test')], beside_the_images=lambda d: (d/'trainLabels.csv').rename(d/'train'/'trainLabels.csv'))

@pytest.mark.parametrize('case', KAGGLE)
@pytest.mark.parametrize('deep', [False, True])
def test_kaggles_folder_as_people_unpack_it(tmp_path, case, deep):
    d = tmp_path/'c'/'cifar-10' if deep else tmp_path/'c'
    d.mkdir(parents=True)
    KAGGLE[case](kaggle(d))
    dls = cifar_dls(d/'train' if case == 'beside_the_images' else tmp_path/'c', bs=4)
    assert sizes(dls) == [32, 8] and list(dls.vocab) == sorted(NAMES[:4])   # train/train/ is no class
    assert all(dls.vocab[y] == NAMES[(int(f.stem) - 1) % 4] for f,y in zip(dls.train.items, dls.train.targets))
    assert {f.parent.name.lower() for dl in dls.loaders for f in dl.items} == {'train'}

def test_kaggles_packed_images_are_named(tmp_path):
    (tmp_path/'train.7z').write_bytes(b'7z')
    pd.DataFrame(dict(id=[1], label=['cat'])).to_csv(tmp_path/'trainLabels.csv', index=False)
    with pytest.raises(InputError, match='1 is not there|train.7z'): data_path(tmp_path)

def listed(root, n=24):
    for i in range(n): paint(root/'pictures'/f'{i}.jpg')
    return pd.DataFrame(dict(file=[f'pictures/{i}.jpg' for i in range(n)], label=['NA', '007', 'a, b'][:3]*(n//3)))

@pytest.mark.parametrize('columns', [('file', 'label'), ('Filename', 'Class'), ('image_id', 'Category'), (' Image ', 'TARGET')])
@pytest.mark.parametrize('sep', [',', ';', '\t'])
def test_a_table_of_any_usual_columns(tmp_path, columns, sep):
    listed(tmp_path).set_axis(columns, axis=1).to_csv(tmp_path/'list.csv', index=False, sep=sep, encoding='utf-8-sig')
    assert list(cifar_dls(tmp_path/'list.csv', bs=4).vocab) == ['007', 'NA', 'a, b'] == list(cifar_dls(tmp_path, bs=4).vocab)

def test_a_table_that_says_the_parts(tmp_path):
    df = listed(tmp_path)
    for column,values,expected in (('split', ['train', 'Val', 'TEST'], [8, 8, 8]), ('subset', ['training', 'training', 'validation'], [16, 8]), ('is_valid', [False, False, True], [16, 8])):
        t = df.assign(label=[f'{i//3%2}' for i in range(24)], **{column: values*8})
        t.to_csv(tmp_path/'list.csv', index=False)
        a = cifar_dls(tmp_path/'list.csv', bs=4)
        b = cifar_dls(t.assign(file=[tmp_path/f for f in t.file]), bs=4)
        assert sizes(a) == sizes(b) == expected and a.test_note == b.test_note == '' and [f.name for f in a.train.items] == [f.name for f in b.train.items]

@pytest.mark.parametrize('words, expected', [(('train', 'val'), [12, 12]), (('Training', 'VALIDATION'), [12, 12]), (('train', 'dev', 'test'), [8, 8, 8]), (('train', 'testing'), [12, 12])])
def test_a_dataframe_that_says_the_parts_in_its_own_words(tmp_path, words, expected):
    df = listed(tmp_path).assign(label=['a']*12 + ['b']*12)
    df = df.assign(file=[tmp_path/f for f in df.file], Split=[words[i % len(words)] for i in range(24)])   # paths as well as text
    assert sizes(cifar_dls(df, bs=4)) == expected

def test_labels_that_are_numbers_keep_their_text_and_numbers_without_end_are_no_classes(tmp_path):
    df = listed(tmp_path)
    df['file'] = [str(tmp_path/f) for f in df.file]
    for values,vocab in (([0, 1], ['0', '1']), ([0., 1.], ['0.0', '1.0']), ([True, False], ['False', 'True'])):
        t = df.assign(label=values*12)
        t.to_csv(tmp_path/'list.csv', index=False)
        assert list(cifar_dls(t, bs=4).vocab) == list(cifar_dls(tmp_path/'list.csv', bs=4).vocab) == vocab
    refused(df.assign(label=[i/7 for i in range(24)]), '0.0: one image alone cannot be held out')   # something to be measured, not a class
    refused(df.assign(label=[float('nan')] + [1.]*23), 'row 0', 'no label')

def test_one_class_is_nothing_to_tell_apart(tmp_path):
    refused(listed(tmp_path).assign(label='cat', file=[str(tmp_path/f'pictures/{i}.jpg') for i in range(24)]), 'class cat', 'nothing to tell apart')
    refused(drawn(tmp_path/'d', classes=('rose',)), str(tmp_path), 'class rose')

BAD_TABLE = dict(
    not_there=(lambda t: t.assign(file=t.file.replace('pictures/5.jpg', 'pictures/500.jpg')), 'line 7: pictures/500.jpg is not there'), no_label=(lambda t: t.assign(label=['', *t.label[1:]]), 'line 2'),
    no_file=(lambda t: t.assign(file=[*t.file[:-1], '']), 'line 25'), twice=(lambda t: pd.concat([t, t[3:4]]), '3.jpg is in line 5 and in line 26'),
    twice_in_other_words=(lambda t: pd.concat([t, t[3:4].assign(file='pictures/../pictures/3.jpg')]), '3.jpg is in line 5 and in line 26'),
    odd_split=(lambda t: t.assign(split=['train']*23 + ['exam']), "line 25: the split 'exam'"), no_column=(lambda t: t.rename(columns=dict(label='what')), "no column 'label'"),
    no_rows=(lambda t: t[:0], 'no rows'), no_train=(lambda t: t.assign(split='test'), 'train'), one_alone=(lambda t: t.assign(label=['rare', *['x', 'y']*11, 'x']), 'rare'),
    class_in_test_only=(lambda t: t.assign(split=['test']*3 + ['train']*21, label=['new', 'x', 'y'] + ['x', 'y', 'x']*7), 'new'))

@pytest.mark.parametrize('case', BAD_TABLE)
def test_what_is_wrong_with_a_table_is_named_with_its_line(tmp_path, case):
    spoil,word = BAD_TABLE[case]
    spoil(listed(tmp_path)).to_csv(tmp_path/'list.csv', index=False)
    refused(tmp_path/'list.csv', 'list.csv' if case != 'one_alone' else '', word)

@pytest.mark.parametrize('content', [b'', b'\n\n', b'file\na.png\n', b'a.png,cat\nb.png,dog\n', b'\x00\xff\x00', b'file,label\na,b,c,d\n', b'\xff\xfef\x00i\x00', b'{"file": 1}'])
def test_a_file_that_is_no_table_is_named(tmp_path, content):
    (tmp_path/'list.csv').write_bytes(content)
    refused(tmp_path/'list.csv', 'list.csv')

def test_two_tables_and_a_table_beside_class_folders_are_not_chosen_from(tmp_path):
    df = listed(tmp_path)
    for name in 'a.csv', 'b.csv': df.to_csv(tmp_path/name, index=False)
    refused(tmp_path, 'a.csv and b.csv')
    classes = tmp_path/'classes'
    for c in 'rose', 'tulip':
        for i in range(6): paint(classes/c/f'{c}{i}.png')
    files = get_image_files(classes)
    pd.DataFrame(dict(file=[f.relative_to(classes) for f in files], label='guess')).to_csv(classes/'predictions.csv', index=False)
    refused(classes, 'predictions.csv', 'class folders')
    pd.DataFrame(dict(name=['x'], kind=['y'])).to_csv(classes/'predictions.csv', index=False)   # a table of something else
    assert sizes(cifar_dls(classes, bs=2)) == [10, 2]

def test_an_image_twice_with_two_labels_is_named(tmp_path):
    df = listed(tmp_path)
    pd.concat([df, df[2:3].assign(label='other')]).to_csv(tmp_path/'list.csv', index=False)
    refused(tmp_path, '2.jpg is in line 4 and in line 26')

def test_a_name_that_two_files_have_is_not_guessed(tmp_path):
    for d in 'a', 'b': paint(tmp_path/d/'1.png')
    (tmp_path/'list.csv').write_text('id,label\n1,x\n')
    refused(tmp_path/'list.csv', 'line 2', 'could be')


# --- parquet, as the Hugging Face Hub keeps cifar10 (plain_text/train-00000-of-00001.parquet)

def hub(root, path=None, **options):
    pa,pq = pytest.importorskip('pyarrow'),pytest.importorskip('pyarrow.parquet')
    d = root/'plain_text'
    d.mkdir(exist_ok=True)
    about = {'info': {'features': {'img': {'_type': 'Image'}, 'label': {'names': NAMES, '_type': 'ClassLabel'}}}}
    for split,n in ('train', 40), ('test', 20):
        data = pixels(n)
        rows = dict(img=[dict(bytes=stored_png(o.reshape(32, 32, 3)), path=path) for o in data], label=[i % 10 for i in range(n)])
        rows.update({k: v(n, split) for k,v in options.items()})
        pq.write_table(pa.table(rows).replace_schema_metadata({'huggingface': json.dumps(about)}), d/f'{split}-00000-of-00001.parquet')
    return d

def test_parquet_files_of_the_hub(tmp_path):
    d = hub(tmp_path)
    for data in d, tmp_path:
        dls = cifar_dls(data, bs=10)
        assert (sizes(dls), list(dls.vocab), dls.test_note) == ([40, 20], NAMES, '')
    alone = cifar_dls(d/'train-00000-of-00001.parquet', bs=10)
    assert sizes(alone) == [30, 10] and 'held out' in alone.test_note
    assert sizes(cifar_dls(hub(tmp_path, path='../same.png'), bs=10)) == [40, 20]   # one name for all: none is lost

@pytest.mark.parametrize('image', ['img', 'image', 'picture'])
@pytest.mark.parametrize('names', ['train-00000-of-00001 test-00000-of-00001', 'train/0000 test/0000', 'cifar10-train cifar10-test', 'Train Validation', 'cats_train_v2 cats_val_v2'])
@pytest.mark.parametrize('column', ['struct', 'bytes'])
def test_parquet_files_under_other_names(tmp_path, image, names, column):
    pa,pq = pytest.importorskip('pyarrow'),pytest.importorskip('pyarrow.parquet')
    for name,n in zip(names.split(), (40, 20)):
        files = [stored_png(o.reshape(32, 32, 3)) for o in pixels(n)]
        (tmp_path/f'{name}.parquet').parent.mkdir(exist_ok=True)
        cells = [dict(bytes=f, path=None) for f in files] if column == 'struct' else files
        pq.write_table(pa.table({image: cells, 'label': [NAMES[i % 10] for i in range(n)]}), tmp_path/f'{name}.parquet')
    dls = cifar_dls(tmp_path, bs=10)
    assert (sizes(dls), list(dls.vocab), dls.test_note) == ([40, 20], NAMES, '')   # no image to test on is trained on

def test_an_unlabelled_test_set_of_the_hub_is_left(tmp_path):
    assert sizes(cifar_dls(hub(tmp_path, label=lambda n, split: [-1]*n if split == 'test' else [i % 10 for i in range(n)]), bs=10)) == [30, 10]

BAD_PARQUET = dict(label_too_high=(dict(label=lambda n, s: [10]*n), 'row 0: the label is 10'), no_label=(dict(label=lambda n, s: [1]*5 + [None]*(n - 5)), 'row 5'), no_image=(dict(img=lambda n, s: [dict(bytes=b'x', path=None)]*n), 'row 0: holds no image'),
                   null=(dict(img=lambda n, s: [None]*n), 'column of images'), text=(dict(img=lambda n, s: ['a']*n), 'column of images'))

@pytest.mark.parametrize('case', BAD_PARQUET)
def test_what_is_wrong_with_a_parquet_file_is_named(tmp_path, case):
    options,word = BAD_PARQUET[case]
    refused(hub(tmp_path, **options), '.parquet', word)

def test_a_broken_or_missing_parquet_file_is_named(tmp_path):
    d = hub(tmp_path)
    f = d/'train-00000-of-00001.parquet'
    whole = f.read_bytes()
    f.write_bytes(whole[:500])
    refused(d, f.name)
    f.rename(d/'train-00000-of-00002.parquet').write_bytes(whole)
    refused(d, 'train-00001-of-00002.parquet is missing')

def test_without_pyarrow_the_line_says_what_to_install(tmp_path, monkeypatch):
    d = hub(tmp_path)
    monkeypatch.setitem(__import__('sys').modules, 'pyarrow.parquet', None)
    refused(d, "pip install 'cifar_cam[parquet]'")


# --- archives

def drawn(root, parts=('train', 'test'), classes=('rose', 'tulip'), n=4):
    for p in parts:
        for c in classes:
            for i in range(n): paint(root/p/c/f'{c}{i}.png')
    return root

@pytest.mark.parametrize('kind', ['zip', 'tar', 'gztar', 'bztar', 'xztar'])
@pytest.mark.parametrize('top', ['parts', 'folder', 'classes'])
def test_archives_of_every_kind_under_any_name(tmp_path, kind, top):
    root = drawn(tmp_path/'flowers')
    for junk in '__MACOSX/flowers/train/rose/._rose0.png', 'train/rose/._rose0.png', '.DS_Store':
        (root/junk).parent.mkdir(parents=True, exist_ok=True)
        (root/junk).write_bytes(b'junk')
    base = dict(parts=(root,), folder=(root.parent, 'flowers'), classes=(root/'train',))[top]
    archive = Path(shutil.make_archive(tmp_path/'x', kind, *base)).rename(tmp_path/'any.name')
    dls = cifar_dls(archive, bs=2)
    assert sizes(dls) == ([6, 2] if top == 'classes' else [8, 8]) and list(dls.vocab) == ['rose', 'tulip'] and not [*data_path(archive).rglob('._*')]

@pytest.mark.parametrize('mode', ['w', 'w:gz', 'w:bz2'])
@pytest.mark.parametrize('top', ['./', './flowers/', 'flowers/./'])
@pytest.mark.parametrize('whole', [True, False])
def test_a_tar_whose_names_begin_with_a_dot(tmp_path, mode, top, whole):
    root = drawn(tmp_path/'flowers')
    with tarfile.open(tmp_path/'x.tar', mode) as t:
        if whole: t.add(root, top)
        else:
            for f in sorted(root.rglob('*.png')): t.add(f, top + f.relative_to(root).as_posix())
    dls = cifar_dls(tmp_path/'x.tar', bs=2)
    assert sizes(dls) == [8, 8] and list(dls.vocab) == ['rose', 'tulip']

def zipped(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, 'w', compression) as z:
        for name,content,mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr,info.compress_type = mode << 16,compression
            z.writestr(info, content)
    return path

EVIL_ZIP = dict(up=('../out.png', b'x', 0), from_within=('set/../../out.png', b'x', 0), absolute=('/tmp/cifar-cam-zip-out.png', b'x', 0), windows=('C:\\out.png', b'x', 0), backslash=('..\\out.png', b'x', 0),
                link=('train/rose/link.png', b'/etc/passwd', 0o120777), device=('train/rose/null.png', b'', 0o020666), pipe=('train/rose/pipe.png', b'', 0o010666), bomb=('train/rose/x.png', b'\0'*10**8, 0),
                file_then_folder=('train', b'x', 0), long_name=('train/rose/' + 'x'*300 + '.png', b'x', 0))

@pytest.mark.parametrize('case', EVIL_ZIP)
def test_a_zip_that_leads_out_or_is_odd_is_refused_and_leaves_nothing(tmp_path, fastai_home, case):
    good = [(f'train/rose/{i}.png', b'x', 0) for i in range(3)]
    z = zipped(tmp_path/'evil.zip', [*good, EVIL_ZIP[case]])
    there,here = set(fastai_home.rglob('*')),set(tmp_path.rglob('*'))
    refused(z, 'evil.zip')
    assert set(fastai_home.rglob('*')) == there and set(tmp_path.rglob('*')) == here and not Path('/tmp/cifar-cam-zip-out.png').exists()

@pytest.mark.parametrize('mode', ['w:gz', 'w:xz', 'w:bz2'])
def test_a_bomb_in_a_tar_is_refused(tmp_path, fastai_home, mode):
    with tarfile.open(tmp_path/'bomb', mode) as t:
        info = tarfile.TarInfo('train/rose/x.png')
        info.size = 10**8
        t.addfile(info, io.BytesIO(b'\0'*10**8))
    there = set(fastai_home.rglob('*'))
    refused(tmp_path/'bomb', '200 times')
    assert set(fastai_home.rglob('*')) == there

@pytest.mark.parametrize('keep', [10, 200, .5, -30])
def test_a_cut_zip_is_refused(tmp_path, fastai_home, keep):
    z = Path(shutil.make_archive(tmp_path/'cut', 'zip', drawn(tmp_path/'s')))
    b = z.read_bytes()
    z.write_bytes(b[:int(keep*len(b)) if keep == .5 else keep])
    there = set(fastai_home.rglob('*'))
    refused(z, 'cut.zip')
    assert set(fastai_home.rglob('*')) == there

def test_a_zip_with_a_password_or_a_changed_byte_is_refused(tmp_path):
    z = zipped(tmp_path/'x.zip', [(f'{p}/rose/{i}.png', b'x'*50, 0) for p in ('train', 'test') for i in range(3)], zipfile.ZIP_STORED)
    whole = z.read_bytes()
    z.write_bytes(whole.replace(b'x'*50, b'x'*49 + b'y', 1))
    refused(z, 'x.zip', 'CRC')
    z.write_bytes(whole.replace(b'PK\x01\x02\x14\x03\x14\0\0\0', b'PK\x01\x02\x14\x03\x14\0\1\0').replace(b'PK\x03\x04\x14\0\0\0', b'PK\x03\x04\x14\0\1\0'))
    refused(z, 'x.zip', 'password')

def test_names_of_a_mac_and_of_windows_in_a_zip(tmp_path):
    z = zipped(tmp_path/'x.zip', [(f'{p}\\{c}\\{i}.png', stored_png(pixels()[0].reshape(32, 32, 3)), 0) for p in ('train', 'test') for c in ('blaa', 'rot') for i in range(3)])
    z.write_bytes(z.read_bytes().replace(b'blaa', 'blå'.encode()))   # UTF-8 without the flag that says so
    assert list(cifar_dls(z, bs=2).vocab) == ['blå', 'rot']

def test_a_table_in_an_archive_does_not_reach_out(tmp_path):
    secret = paint(tmp_path/'secret.png')
    for name in str(secret), '../secret.png', '../../../../../../../../../..' + str(secret):
        z = zipped(tmp_path/'x.zip', [('list.csv', f'file,label\n{name},a\n1.png,b\n', 0), ('1.png', b'x', 0)])
        refused(z, 'x.zip')


# --- folders

@pytest.mark.parametrize('names', [('Train', 'Test'), ('training', 'val'), ('TRAIN', 'validation'), ('train', 'valid'), ('train', 'testing')])
def test_parts_under_their_usual_names(tmp_path, names):
    drawn(tmp_path, names)
    dls = cifar_dls(tmp_path, bs=2)
    assert sizes(dls) == [8, 8] and {f.parent.parent.name for f in dls.valid.items} == {names[1]} and dls.test_note == ''
    assert sizes(cifar_dls(tmp_path, bs=2, hold_out=.25)) == [6, 2, 8] == sizes(cifar_dls(tmp_path, bs=2, valid_pct=.25))

@pytest.mark.parametrize('valid', ['valid', 'val', 'Validation'])
def test_valid_is_held_out_where_there_is_a_test_too(tmp_path, valid):
    drawn(tmp_path, ('train', valid, 'test'))
    for kwargs in {}, dict(hold_out=.25), dict(in_memory=False, num_workers=0):
        dls = cifar_dls(tmp_path, bs=2, **kwargs)
        assert [{f.parent.parent.name for f in dl.items} for dl in dls.loaders] == [{'train'}, {valid}, {'test'}]
    before = data_checksum(data_path(tmp_path))
    paint(tmp_path/valid/'rose'/'rose0.png')
    assert data_checksum(data_path(tmp_path)) != before
    refused(tmp_path, 'valid_pct=0.2', valid_pct=.2)
    paint(tmp_path/valid/'weed'/'1.png')
    refused(tmp_path, 'weed')

def test_a_share_of_class_folders_is_the_test_set_whatever_the_seed(tmp_path):
    drawn(tmp_path, ('',), n=10)
    (tmp_path/'models').mkdir()
    (tmp_path/'models'/'model.pth').write_bytes(b'x')   # what `learn.save` leaves
    a,b,c = (cifar_dls(tmp_path, bs=2, seed=s, hold_out=h) for s,h in ((0, 0), (1, 0), (2, .25)))
    assert sizes(a) == [16, 4] and sizes(c) == [12, 4, 4] and list(a.vocab) == ['rose', 'tulip']
    assert a.valid.items == b.valid.items == c.loaders[2].items and sorted(f.parent.name for f in a.valid.items) == ['rose']*2 + ['tulip']*2
    assert a.test_note == held_out_note(tmp_path) == '4 of 20 images, held out of a set without test images (seed 0)'
    one,two = (cifar_dls(tmp_path, bs=2, seed=s, valid_pct=.3).valid.items for s in (1, 2))
    assert len(one) == len(two) == 6 and one != two
    assert one == cifar_dls(tmp_path, bs=2, seed=1, valid_pct=.3).valid.items

def test_train_alone_and_a_test_folder_without_labels(tmp_path):
    drawn(tmp_path, ('train',), n=10)
    assert sizes(cifar_dls(tmp_path, bs=2)) == [16, 4]
    paint(tmp_path/'test'/'1.png')
    assert sizes(cifar_dls(tmp_path, bs=2)) == [16, 4] and 'held out' in held_out_note(tmp_path)

@pytest.mark.parametrize('parts, expected', [(('train', 'val'), [16, 16]), (('train', 'validation'), [16, 16]), (('Train', 'Val', 'Test'), [16, 16, 16]), (('training', 'dev', 'testing'), [16, 16, 16]), (('',), [12, 4])])
@pytest.mark.parametrize('packed', [False, True])
def test_classes_with_spaces_and_letters_of_any_alphabet(tmp_path, parts, expected, packed):
    classes = ['Große Katze', "d'or & co, 50 %", 'a.b', '犬 と 猫']
    root = drawn(tmp_path/'my photos', parts, classes)
    dls = cifar_dls(shutil.make_archive(tmp_path/'z', 'zip', root) if packed else root, bs=2)
    assert sizes(dls) == expected and list(dls.vocab) == sorted(classes)
    assert all(f.parent.name == dls.vocab[y] for f,y in zip(dls.train.items, dls.train.targets))

def test_trains_are_a_class_too(tmp_path):
    drawn(tmp_path, ('',), ('car', 'train', 'test'), n=6)
    assert list(cifar_dls(tmp_path, bs=2).vocab) == ['car', 'test', 'train']

BAD_FOLDER = dict(val_and_valid=(lambda d: drawn(d, ('valid', 'val')), ('val/', 'valid/')), empty_test=(lambda d: (shutil.rmtree(d/'test'), (d/'test').mkdir()), ('test/',)),
                  flat_train=(lambda d: (shutil.rmtree(d/'train'), shutil.rmtree(d/'test'), paint(d/'train'/'1.png')), ('train/',)), nothing=(lambda d: (shutil.rmtree(d), d.mkdir()), ('train/',)),
                  one_class_alone=(lambda d: (shutil.rmtree(d/'train'), shutil.rmtree(d/'test'), paint(d/'rose'/'1.png')), ('train/',)))

@pytest.mark.parametrize('case', BAD_FOLDER)
def test_what_is_wrong_with_a_folder_is_named(tmp_path, case):
    spoil,words = BAD_FOLDER[case]
    spoil(drawn(tmp_path/'d'))
    refused(tmp_path/'d', str(tmp_path), *words)


def test_the_folder_of_a_run_is_no_folder_of_images(tmp_path, run, few):
    named = 'is the folder of a run, not of images'
    (tmp_path/'runs').mkdir()
    shutil.copytree(run, tmp_path/'runs'/'one')
    for data in run, tmp_path/'runs', shutil.make_archive(tmp_path/'z', 'zip', run): refused(data, named)
    shutil.copytree(run, tmp_path/'runs'/'two')
    refused(tmp_path/'runs', named)
    shutil.copytree(few/'test', tmp_path/'runs'/'one'/'validation'/'other'/'images')   # of `cifar-cam validate`
    refused(tmp_path/'runs'/'one', named)
    (tmp_path/'sweep').mkdir()
    (tmp_path/'sweep'/'sweep.json').write_text('{}')
    refused(tmp_path/'sweep', named)

def test_a_single_image_is_no_data_set(tmp_path): refused(paint(tmp_path/'cat.png'), 'cat.png', 'a single image')


# --- fastai's own words

def test_functions_by_fastais_names(tmp_path):
    for c in 'rose', 'tulip':
        for i in range(10): paint(tmp_path/'all'/'deeper'/f'{c}_{i}.png')
    label = lambda f: f.name.split('_')[0]
    for make in (lambda **kw: cifar_dls(tmp_path/'all', bs=2, **kw), lambda **kw: cifar_block(**kw).dataloaders(tmp_path/'all', bs=2, num_workers=0)):
        assert sizes(make(get_y=label)) == [16, 4] and list(make(get_y=label).vocab) == ['rose', 'tulip']
        assert sizes(make(get_y=label, valid_pct=.3)) == [14, 6]
        assert sizes(make(get_items=get_image_files, get_y=label, splitter=RandomSplitter(.5, seed=1))) == [10, 10]
        assert sizes(make(get_items=lambda p: get_image_files(p).sorted()[::2], get_y=label)) == [8, 2]
    dls = cifar_dls(tmp_path/'all', bs=2, get_y=label)
    assert all(label(f) == dls.vocab[y] for f,y in zip(dls.train.items, dls.train.targets)) and dls.train.memory is dls.valid.memory
    refused(tmp_path/'all', 'tulip', get_y=label, splitter=lambda items: ([i for i,f in enumerate(items) if 'rose' in f.name], [i for i,f in enumerate(items) if 'tulip' in f.name]))
    for bad in 0, 1, -1, 2.5: refused(tmp_path/'all', f'valid_pct={bad}', get_y=label, valid_pct=bad)
    refused(tmp_path/'all', 'hold_out=0.1', get_y=label, valid_pct=.2, hold_out=.1)

def test_a_splitter_and_labels_in_place_of_those_of_the_folders(tmp_path):
    drawn(tmp_path, ('train', 'valid', 'test'))
    dls = cifar_dls(tmp_path, bs=2, splitter=GrandparentSplitter())
    assert [{f.parent.parent.name for f in dl.items} for dl in dls.loaders] == [{'train'}, {'valid'}]
    dls = cifar_dls(tmp_path, bs=2, get_y=lambda f: int(f.stem[-1]) % 2)
    assert sizes(dls) == [8, 8, 8] and list(dls.vocab) == ['0', '1'] if isinstance(dls.vocab[0], str) else list(dls.vocab) == [0, 1]

def test_a_method_of_an_object_stays_its_own(tmp_path):
    class Mine:
        first = 'r'
        def label(self, f): return f.name[0] == self.first
        def split(self, items): return [*range(0, len(items), 2)], [*range(1, len(items), 2)]
    drawn(tmp_path)
    dls = cifar_block(get_y=Mine().label, splitter=Mine().split).dataloaders(tmp_path, bs=2, num_workers=0)
    assert sizes(dls) == [8, 8] and list(dls.vocab) == [False, True]

def test_a_resize_of_ones_own_sees_the_image_as_it_is(tmp_path):
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255   # squeezed to 32 pixels, they are grey
    for p in 'train', 'test':
        for c in 'ab':
            (tmp_path/p/c).mkdir(parents=True)
            for i in range(3): Image.fromarray(stripes).save(tmp_path/p/c/f'{i}.png')
    for dls in (cifar_dls(tmp_path, Resize(128), bs=2, in_memory=False, num_workers=0), cifar_block(Resize(128)).dataloaders(tmp_path, bs=2, num_workers=0)):
        for dl in dls.loaders:
            x = dl.one_batch()[0]
            assert x.shape[-2:] == (128, 128) and (x[..., ::2] - x[..., 1::2]).abs().min() > 1

def test_a_normalize_of_ones_own_is_the_only_one(tmp_path):
    drawn(tmp_path)
    mine = Normalize.from_stats(*imagenet_stats)
    for dls in (cifar_dls(tmp_path, bs=2, batch_tfms=mine), cifar_dls(tmp_path, bs=2, in_memory=False, num_workers=0, batch_tfms=[mine]), cifar_block(batch_tfms=mine).dataloaders(tmp_path, bs=2, num_workers=0)):
        norms = [t for t in dls.after_batch.fs if isinstance(t, Normalize)]
        assert len(norms) == 1 and torch.allclose(norms[0].mean.flatten().cpu(), torch.tensor(imagenet_stats[0]))

def test_two_transforms_of_one_kind_are_both_at_work(tmp_path):
    drawn(tmp_path)
    seen = []
    def first(x:TensorImage): seen.append('first'); return x
    def second(x:TensorImage): seen.append('second'); return x
    cifar_dls(tmp_path, [first, second], bs=2).train.one_batch()
    assert set(seen) == {'first', 'second'}


# --- the same everywhere: checksum, cache, loaders, moved data

def test_the_checksum_of_a_folder_is_the_one_it_has_always_been(tmp_path):
    for f,content in ('train/a/1.png', b'one'), ('train/b/2.png', b'two'), ('test/a/3.png', b'three'), ('test/b/4.png', b'four'), ('train/a/notes.txt', b'none'), ('labels.txt', b'a b'):
        (tmp_path/f).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/f).write_bytes(content)
    assert data_checksum(tmp_path) == OLD
    (tmp_path/'test').rename(tmp_path/'valid')
    assert data_checksum(tmp_path) == OLD_VALID

# sha256 over '<path below the folder>\n<content>' of each image, in order
OLD = '6b51e305d06a16a20774e18c31ec3d4063c11836d42bca7ca5c669cb140c368e'
OLD_VALID = '406c0fca5cca51d4f655a242ea1308b42e5007f8caac5b8bd8761c745679d29d'

def test_the_checksum_of_a_table_covers_images_labels_and_parts_and_not_its_place(tmp_path):
    df = listed(tmp_path/'here')
    df['split'] = (['train', 'train', 'test']*8)
    df['label'] = [f'{i//3%2}' for i in range(24)]
    def checksum(t, at=tmp_path/'here'):
        t.to_csv(at/'list.csv', index=False)
        return data_checksum(data_path(at/'list.csv'))
    before = checksum(df)
    assert checksum(df[::-1]) == before and checksum(df.rename(columns=dict(file='image'))) == before
    assert data_checksum(data_path(df.assign(file=[tmp_path/'here'/f for f in df.file]))) == before
    other = Path(shutil.copytree(tmp_path/'here', tmp_path/'there'))
    assert checksum(df, other) == before
    assert checksum(df.assign(label=df.label.replace('0', '2'))) != before and checksum(df.assign(split=['train', 'test', 'train']*8)) != before and checksum(df[:-1]) != before
    paint(tmp_path/'here'/'pictures'/'0.jpg')
    assert checksum(df) != before

FORMS = dict(batches=lambda p: ten(p, 10), kaggle=kaggle, classes=lambda p: drawn(p, ('',), n=10), parquet=hub, zip=lambda p: Path(shutil.make_archive(p.parent/'z', 'zip', drawn(p))),
             three=lambda p: drawn(p, ('train', 'val', 'test')))

@pytest.mark.parametrize('form', FORMS)
def test_every_form_in_memory_item_by_item_and_cached(tmp_path, form):
    (tmp_path/'d').mkdir()
    data = FORMS[form](tmp_path/'d')
    memory,items = (cifar_dls(data, bs=4, in_memory=m, num_workers=0, hold_out=0 if form == 'three' else .3) for m in (True, False))
    assert sizes(memory) == sizes(items) and len(memory.loaders) == 3 and list(memory.vocab) == list(items.vocab) and memory.test_note == items.test_note
    for a,b in zip(memory.loaders[1:], items.loaders[1:]):
        assert a.items == b.items
        for (x,y),(u,v) in zip(a, b):
            assert torch.equal(y, v)
            torch.testing.assert_close(x, u)
    path = data_path(data)
    assert data_path(path) == path and data_checksum(path) == data_checksum(data_path(data))
    cached = cached_images(path)
    assert torch.equal(cached, MemoryImages.from_folder(path).images) and torch.equal(cached, cached_images(path)) and len(cached) == len(image_files(path)) == sum(sizes(memory))
    assert image_stats(path) == image_stats(path) and memory.path.is_dir()
    test = memory.test_dl([*items.loaders[-1].items][:3], with_labels=True)
    assert torch.equal(test.one_batch()[1].cpu(), torch.cat([y for _,y in items.loaders[-1]])[:3])

def test_item_loaders_of_a_table_work_in_worker_processes(tmp_path):
    dls = cifar_dls(kaggle(tmp_path), bs=4, in_memory=False, num_workers=2)
    assert torch.cat([y for _,y in dls.valid]).tolist() == [int(y) for _,y in dls.valid_ds]

def test_a_learner_of_a_table_is_exported(tmp_path):
    from cifar_cam.learner import cifar_learner
    dls = cifar_dls(kaggle(tmp_path), bs=4)
    learn = cifar_learner(dls, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 4)))
    learn.path = tmp_path
    learn.export('e.pkl')
    loaded = load_learner(tmp_path/'e.pkl')
    assert list(loaded.dls.vocab) == list(dls.vocab) and loaded.predict(tmp_path/'test'/'1.png')[0] in dls.vocab

def test_a_changed_source_is_converted_again_and_a_whole_one_once(tmp_path):
    d = ten(tmp_path, 10)
    root = data_path(d)
    times = {f: f.stat().st_mtime_ns for f in image_files(root)}
    assert data_path(d) == root and {f: f.stat().st_mtime_ns for f in image_files(root)} == times
    assert data_path(Path(shutil.copytree(d, tmp_path/'copy'/d.name))) == root
    change(d/'data_batch_1', labels=[1]*10)
    assert data_path(d) != root


def test_the_variable_takes_every_form_of_the_whole_set(tmp_path, monkeypatch):
    monkeypatch.setenv('CIFAR_CAM_DATA', str(ten(tmp_path, 10)))
    with pytest.raises(InputError, match='5 images instead of 5,000'): cifar_path()   # found and read; but CIFAR-10 has more


# --- on a GPU

def test_images_that_a_gpu_has_no_room_for_stay_in_memory_and_that_is_said(tmp_path, monkeypatch):
    drawn(tmp_path)
    plain = [x.clone() for x,_ in cifar_dls(tmp_path, bs=2).valid]
    monkeypatch.setattr(loaders, 'free_memory', lambda device: 1000)
    with pytest.warns(UserWarning, match='stay in the main memory: cpu'):
        dls = cifar_dls(tmp_path, bs=2)
        first = [x for x,_ in dls.valid]
    assert dls.valid.memory.stays and all(map(torch.equal, plain, first))

def test_the_order_goes_to_the_device_once_an_epoch(tmp_path, monkeypatch):
    drawn(tmp_path, n=10)
    dls = cifar_dls(tmp_path, bs=2)
    made = []
    real = torch.tensor
    monkeypatch.setattr(torch, 'tensor', lambda *a, **k: made.append(a) or real(*a, **k))
    n = sum(1 for _ in dls.train)
    assert n == 10 and len(made) == 1

def test_a_loader_without_end_shows_one_image(tmp_path):
    drawn(tmp_path)
    dls = cifar_dls(tmp_path, bs=2)
    dls.train.get_idxs = lambda: (0 for _ in iter(int, 1))
    x = dls.train.one_batch()[0]
    assert torch.equal(x[0], x[1])


def test_a_run_on_a_table_in_python_is_looked_at_again(colours, narrow, tmp_path, monkeypatch, undrawn):
    monkeypatch.setitem(MODELS, 'davidnet', narrow)
    rows = pd.DataFrame([(f, f.parent.name, f.parent.parent.name) for f in image_files(colours)], columns=['file', 'label', 'split'])
    short = dict(epochs=1, bs=20, lr=.05, lr_min=.005)
    run = run_recipe('davidnet', rows, tmp_path/'one', **short)
    for again in load_run(run.path), load_run(run.path, rows): assert [len(dl.dataset) for dl in again.dls.loaders] == [160, 40]
    assert run_or_resume('davidnet', rows, run.path, **short).metrics == run.metrics
    seeds = run_seeds('davidnet', rows, tmp_path/'two', runs=2, **short)
    assert len(json.loads((seeds/'summary.json').read_text())['runs']) == 2
    with pytest.raises(InputError, match='not the images'): load_run(run.path, rows.iloc[1:]).dls


@pytest.mark.slow
@pytest.mark.parametrize('form', ['table', 'classes alone', 'zip', 'valid'])
def test_runs_reports_triage_and_moved_data_take_every_form(colours, narrow, tmp_path, monkeypatch, form):
    monkeypatch.setitem(MODELS, 'davidnet', narrow)
    data,moved = tmp_path/'data',tmp_path/'moved'
    if form=='table':
        rows = [(f, f.parent.name, f.parent.parent.name) for f in image_files(colours)]
        data,moved = tmp_path/'data.csv',tmp_path/'moved.csv'
        pd.DataFrame(rows, columns=['file', 'label', 'split']).to_csv(data, index=False)
    elif form=='classes alone': shutil.copytree(colours/'train', data)
    elif form=='valid':
        shutil.copytree(colours, data)
        shutil.copytree(data/'test', data/'valid')
    else: data,moved = Path(shutil.make_archive(tmp_path/'data', 'zip', colours)),tmp_path/'moved.zip'
    run = run_recipe('davidnet', data, tmp_path/'runs', epochs=1, bs=20, lr=.05, lr_min=.005)
    assert (run.path/'report.html').exists() and (run.metrics.get('test_note') is not None)==(form=='classes alone')
    triage_runs([run.path])
    assert len(pd.read_csv(run.path/'triage.csv')) == run.metrics['images']
    data.rename(moved)
    assert load_run(run.path, moved).interp.preds.shape == (run.metrics['images'],)
