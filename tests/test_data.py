import gc, hashlib, io, os, shutil, subprocess, sys, tarfile, weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.data.external import fastai_path
from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, PILImage, RandomResizedCrop, Resize, Rotate, TensorImage, Transform
from PIL import Image
from sklearn.model_selection import train_test_split

import cifar_cam.images as data
from cifar_cam.augment import albumentations_augment, cifar_augment, Cutout, HorizontalFlip
from cifar_cam.cli import main
from cifar_cam.core import InputError
from cifar_cam.formats import unpack_images
from cifar_cam.images import check_cifar, CIFAR10, cifar_path, data_checksum, data_path, hold_out_splitter, image_files
from cifar_cam.loaders import cached_images, cifar_dls, _looked_up, loader_norm, MemoryDL
from cifar_cam.shapes import shapes_path
from cifar_cam.tables import split_off


def fake_cifar(root, train=50, test=10):
    "A folder like CIFAR-10's with fewer images"
    for split,n in ('train', train), ('test', test):
        for c in CIFAR10:
            (root/split/c).mkdir(parents=True)
            for i in range(n//10): Image.new('RGB', (32, 32), (i, 0, 0)).save(root/split/c/f'{i}.png')
    (root/'labels.txt').write_text('\n'.join(CIFAR10))
    return root


@pytest.fixture
def small_counts(monkeypatch):
    "`check_cifar` as for a data set of 5 + 1 images a class"
    source = data.check_cifar
    def check(path):
        counts = lambda d: {k: {5: 5000, 1: 1000}.get(n, n) for k,n in image_counts(d).items()}
        image_counts = data.image_counts
        with monkeypatch.context() as m:
            m.setattr(data, 'image_counts', counts)
            return source(path)
    monkeypatch.setattr(data, 'check_cifar', check)
    return check


def archive(folder, path, members=()):
    with tarfile.open(path, 'w:gz') as tar:
        if folder: tar.add(folder, 'cifar10')
        for info in members: tar.addfile(info, io.BytesIO(b'x'*info.size))
    return path


def test_a_whole_folder_passes(tmp_path, small_counts):
    assert small_counts(fake_cifar(tmp_path/'c')) == tmp_path/'c'


@pytest.mark.parametrize('spoil, word', [
    (lambda r: shutil.rmtree(r/'test'), 'test/'),
    (lambda r: shutil.rmtree(r/'train'/'bird'), 'bird/'),
    (lambda r: (r/'train'/'cat'/'0.png').unlink(), 'train/cat: 4 images instead of 5,000'),
    (lambda r: (r/'test'/'catt').mkdir(), 'catt/'),
])
def test_what_is_missing_is_named_in_one_line(tmp_path, small_counts, spoil, word):
    spoil(fake_cifar(tmp_path/'c'))
    with pytest.raises(InputError) as e: small_counts(tmp_path/'c')
    assert word in str(e.value) and '\n' not in str(e.value)


def test_an_argument_comes_before_the_variable(tmp_path, small_counts, monkeypatch):
    a,b = fake_cifar(tmp_path/'a'),fake_cifar(tmp_path/'b')
    monkeypatch.setattr(data, '_folder_or_archive', lambda path, check: Path(path))
    monkeypatch.setenv('CIFAR_CAM_DATA', str(a))
    assert cifar_path() == a and cifar_path(b) == b


def test_a_part_of_cifar_is_a_data_set_unless_it_claims_to_be_whole(shapes, tmp_path):
    for split in 'train', 'test':
        for ours,name in zip(sorted((shapes/split).iterdir()), CIFAR10): shutil.copytree(ours, tmp_path/split/name)
    assert len(cifar_dls(tmp_path, bs=10).train_ds) == 300
    (tmp_path/'labels.txt').write_text('\n'.join(CIFAR10))
    with pytest.raises(InputError, match='5,000'): cifar_dls(tmp_path, bs=10)


def test_a_path_that_is_not_there_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match='no such file or folder.*--data shapes'): cifar_path(tmp_path/'nothing')


def test_without_data_and_network_the_message_says_what_to_do(monkeypatch):
    def fail(url): raise OSError('no network')
    monkeypatch.setattr(data, 'untar_data', fail)
    with pytest.raises(InputError, match='--data or CIFAR_CAM_DATA.*--data shapes') as e: cifar_path()
    assert '\n' not in str(e.value)


def test_an_archive_is_unpacked_once(tmp_path, fastai_home):
    tgz = archive(fake_cifar(tmp_path/'src'), tmp_path/'mine.tgz')
    path = unpack_images(tgz, check=lambda p: p)
    assert path.parent == fastai_home and len(image_files(path)) == 60
    before = (path/'labels.txt').stat().st_mtime_ns
    assert unpack_images(tgz, check=lambda p: p) == path and (path/'labels.txt').stat().st_mtime_ns == before
    assert not list(fastai_home.glob('.unpacking*'))


def _info(name, **kw):
    info = tarfile.TarInfo(name)
    for k,v in {"size": 1, **kw}.items(): setattr(info, k, v)
    return info


@pytest.mark.parametrize('member', [_info('../outside.txt'), _info('/tmp/absolute-outside.txt'), _info('cifar10/../../up.txt'),
                                    _info('cifar10/link', type=tarfile.SYMTYPE, linkname='/etc/passwd', size=0),
                                    _info('cifar10/dev', type=tarfile.CHRTYPE, size=0)])
def test_an_archive_that_reaches_out_is_refused_and_leaves_nothing(tmp_path, fastai_home, member):
    tgz = archive(fake_cifar(tmp_path/'src'), tmp_path/'evil.tgz', [member])
    there = set(fastai_home.rglob('*')) if fastai_home.exists() else set()
    if member.name.startswith('/'):  # tarfile's filter makes an absolute name relative: it must not land outside
        unpack_error = None
        try: unpack_images(tgz, check=lambda p: p)
        except InputError as e: unpack_error = e
        assert unpack_error and not Path('/tmp/absolute-outside.txt').exists()
    else:
        with pytest.raises(InputError, match='evil.tgz'): unpack_images(tgz, check=lambda p: p)
    assert set(fastai_home.rglob('*')) == there
    assert not (fastai_home.parent/'outside.txt').exists()


@pytest.mark.parametrize('keep', [0, 1, 100, -200])
def test_a_truncated_archive_leaves_nothing(tmp_path, fastai_home, keep):
    tgz = archive(fake_cifar(tmp_path/'src'), tmp_path/'cut.tgz')
    tgz.write_bytes(tgz.read_bytes()[:keep])
    there = set(fastai_home.rglob('*')) if fastai_home.exists() else set()
    with pytest.raises(InputError, match='cut.tgz') as e: unpack_images(tgz, check=lambda p: p)
    assert '\n' not in str(e.value)
    assert set(fastai_home.rglob('*')) == there


def test_a_kill_in_the_middle_leaves_nothing_that_passes_for_the_data(tmp_path, fastai_home):
    tgz = archive(fake_cifar(tmp_path/'src'), tmp_path/'killed.tgz')
    class Killed(BaseException): pass
    def check(path): raise Killed
    with pytest.raises(Killed): unpack_images(tgz, check=check)
    assert not list(fastai_home.glob('killed-*'))


def test_an_unreadable_image_is_named(tmp_path, shapes):
    root = Path(shutil.copytree(shapes, tmp_path/'s'))
    bad = image_files(root)[-7]
    bad.write_bytes(bad.read_bytes()[:60])
    for in_memory in True, False:
        with pytest.raises(InputError, match=bad.name):
            for b in cifar_dls(root, in_memory=in_memory, num_workers=0).train: pass
    bad.write_bytes(b'')
    with pytest.raises(InputError, match=bad.name): cifar_dls(root)


@pytest.mark.parametrize('in_memory', [True, False])
def test_images_of_other_sizes_are_squeezed_whole(tmp_path, shapes, in_memory):
    root = Path(shutil.copytree(shapes, tmp_path/'s'))
    halves = Image.new('RGB', (80, 48), (255, 0, 0))
    halves.paste((0, 0, 255), (40, 0, 80, 48))
    for f in image_files(root)[:100]: halves.save(f)   # the test images
    same = cifar_dls(shapes, in_memory=in_memory, num_workers=0).train_ds[0][0]
    assert np.array_equal(np.asarray(same), np.asarray(Image.open(image_files(shapes)[100])))   # 32×32 stay as they are
    for size,shape in (32, (32, 32)), ((40, 64), (40, 64)):
        x = cifar_dls(root, size=size, in_memory=in_memory, num_workers=0, bs=16).valid.one_batch()[0]
        assert x.shape[-2:]==shape
        red = (x[0, 0] > x[0, 2]).float().mean(0)
        assert red[:shape[1]//2 - 2].min()==1 and red[shape[1]//2 + 2:].max()==0   # both halves are there, left and right
    with pytest.raises(InputError, match='size 16'): cifar_dls(root, size=16)


def test_valid_stands_for_test_where_that_is_missing(tmp_path, shapes):
    root = Path(shutil.copytree(shapes, tmp_path/'s'))
    (root/'test').rename(root/'valid')
    a,b = (cifar_dls(r, hold_out=.1, num_workers=0, bs=16) for r in (shapes, root))
    assert [len(dl.dataset) for dl in a.loaders]==[len(dl.dataset) for dl in b.loaders]==[270, 30, 100]
    assert [f.relative_to(root).parts[1:] for f in b.loaders[2].items]==[f.relative_to(shapes).parts[1:] for f in a.loaders[2].items]


def test_targets_are_those_of_the_pipeline(shapes, tmp_path):
    table = tmp_path/'decisions.csv'
    table.write_text('file,decision,label\ntrain/arrow/arrow_0000.png,relabel,house\ntrain/circle/circle_0001.png,drop,\n')
    ways = [{}, dict(hold_out=.1), dict(decisions=table), dict(get_y=lambda f: f.name[0]), dict(get_y=lambda f: len(f.name))]
    made = [cifar_dls(shapes, bs=16, **how) for how in ways] + [cifar_dls(data.image_table(shapes), bs=16)]
    loaders = [dl for dls in made for dl in (*dls.loaders, dls.test_dl(image_files(shapes)[5:8], with_labels=True))]
    assert all(_looked_up(dl.dataset.tls[1]) for dl in loaders)
    def typed(f:Path) -> str: return f.name[:2]
    block = DataBlock((ImageBlock, CategoryBlock), get_items=image_files, get_y=typed, dl_type=MemoryDL)
    dls = block.dataloaders(shapes, bs=16)
    assert not _looked_up(dls.train.dataset.tls[1])
    for dl in loaders + dls.loaders:
        assert dl.targets.dtype == torch.int64 and dl.targets.tolist() == [int(y) for y in dl.dataset.tls[1]]
    unknown = shutil.copytree(shapes/'train'/'star', tmp_path/'comet')
    with pytest.raises(KeyError, match='comet'): cifar_dls(shapes, bs=16).test_dl(sorted(unknown.iterdir())[:2], with_labels=True)


def test_a_batch_larger_than_the_set_is_refused(shapes):
    with pytest.raises(InputError, match='bs=512: there are only 300'): cifar_dls(shapes, bs=512)


def test_train_and_test_must_agree_on_the_classes(tmp_path, shapes):
    root = Path(shutil.copytree(shapes, tmp_path/'s'))
    shutil.rmtree(root/'test'/'star')
    with pytest.raises(InputError, match='star'): data_path(root)


def test_hold_out_is_stratified_seeded_and_disjoint(shapes):
    items = image_files(shapes)
    train,held,test = hold_out_splitter(50, seed=1)(items)
    assert len(train) == 250 and len(held) == 50 and len(test) == 100
    assert not set(train) & set(held) and all(items[i].parent.parent.name == 'train' for i in train + held)
    assert all(items[i].parent.parent.name == 'test' for i in test)
    assert set(np.unique([items[i].parent.name for i in held], return_counts=True)[1]) == {5}
    assert held == hold_out_splitter(50, seed=1)(items)[1] != hold_out_splitter(50, seed=2)(items)[1]
    assert len(hold_out_splitter(0.1)(items)[1]) == 30
    for bad in 5, 295, 300, 1.5: 
        with pytest.raises(InputError, match='hold_out'): hold_out_splitter(bad)(items)


def counted(root, parts=('',), **classes):
    "Class folders with a number of images each"
    for p in parts:
        for c,n in classes.items():
            (root/p/c).mkdir(parents=True)
            for i in range(n): Image.new('RGB', (32, 32), (i, 9*len(c), 0)).save(root/p/c/f'{i}.png')
    return root

def classes_of(dls): return [Counter(dls.vocab[int(y)] for y in dl.targets) for dl in dls.loaders]

def test_a_rare_class_has_an_image_in_each_part(tmp_path):
    root = counted(tmp_path/'parts', ('train', 'test'), cat=60, dog=60, rare=2)
    for seed in range(3):
        train,held,test = classes_of(cifar_dls(root, bs=8, hold_out=.1, seed=seed))
        assert train['rare'] == held['rare'] == 1 and test['rare'] == 2 and sum(held.values()) == 12 and sum(train.values()) == 110
        assert min(held['cat'], held['dog']) >= 5
        assert cifar_dls(root, bs=8, hold_out=.1, seed=seed).loaders[1].items == cifar_dls(root, bs=8, hold_out=.1, seed=seed).loaders[1].items
        train,held,_ = classes_of(cifar_dls(root, bs=8, hold_out=.9, seed=seed))
        assert train['rare'] == held['rare'] == 1 and sum(held.values()) == 110
    train,test = classes_of(cifar_dls(root/'train', bs=8))
    assert train['rare'] == test['rare'] == 1 and sum(test.values()) == 24
    with pytest.raises(InputError, match='rare: one image alone'): cifar_dls(root/'train', bs=8, hold_out=.1)   # three parts of two images

@pytest.mark.parametrize('counts', [{'a': 10, 'b': 10}, {'a': 60, 'b': 60, 'c': 2}, {'a': 2, 'b': 2, 'c': 2, 'd': 50}, {'a': 3, 'b': 500}])
def test_every_class_is_in_both_parts_and_what_sklearn_chose_is_kept(counts):
    labels = [c for c,n in counts.items() for _ in range(n)]
    at = range(100, 100 + len(labels))
    for n in {len(counts), len(labels)//10, len(labels)//2, len(labels) - len(counts)}:
        if n < len(counts): continue
        for seed in range(5):
            rest,held = split_off([*at], labels, n, seed, 'n')
            assert len(held) == n and sorted(rest + held) == [*at] and rest == sorted(rest) and held == sorted(held)
            assert all({labels[i - 100] for i in part} == set(counts) for part in (rest, held))
            known = [sorted(o) for o in train_test_split([*at], test_size=n, stratify=labels, random_state=seed)]
            if all({labels[i - 100] for i in part} == set(counts) for part in known): assert [rest, held] == known

def test_the_images_held_out_of_cifar_are_those_they_have_always_been():
    labels = [c for c in CIFAR10 for _ in range(5000)]
    for n,seed,known in (5000, 0, '6a56208038d0'), (1000, 7, '5bd4c4e5811b'):
        _,held = split_off([*range(50_000)], labels, n, seed, 'n')
        assert hashlib.sha256(repr(held).encode()).hexdigest()[:12] == known

def test_cifars_class_names_alone_are_no_cifar(tmp_path, monkeypatch):
    root = counted(tmp_path, ('train', 'test'), **{c: 4 for c in CIFAR10})
    measured = data.stats_of(sorted((root/'train').glob('*/*')))
    assert data.image_stats(root) == measured and loader_norm(cifar_dls(root, bs=8)).mean.flatten().tolist() == pytest.approx(measured[0])
    whole = [c for c in CIFAR10 for _ in range(6000)]
    for colours,is_cifar in ((data.cifar_stats, True), (([.49, .48, .44], [.24, .24, .26]), True), (([.48]*3, [.24]*3), False), (measured, False)):
        monkeypatch.setattr(data, 'stats_of', lambda *_, **__: colours)
        assert data.is_cifar10([], whole) is is_cifar and data.is_cifar10([], [c for c in CIFAR10 for _ in range(5000)]) is is_cifar
    monkeypatch.setattr(data, 'stats_of', lambda *_, **__: data.cifar_stats)
    assert not data.is_cifar10([], whole[1:]) and not data.is_cifar10([], [c for c in CIFAR10 for _ in range(9000)])
    assert not data.is_cifar10([], [c.upper() for c in whole])

def test_the_real_set_has_its_known_mean(cifar10):
    assert data.image_stats(cifar10) == data.image_stats(cifar10/'train') == data.cifar_stats != data.image_stats(cifar10/'test')

def test_numbers_of_numpy_are_numbers(tmp_path):
    root = counted(tmp_path, ('train', 'test'), cat=10, dog=10)
    dls = cifar_dls(root, bs=np.int64(4), size=np.int64(40), hold_out=np.float32(.2), seed=np.int64(1))
    assert dls.one_batch()[0].shape == (4, 3, 40, 40) and [len(dl.dataset) for dl in dls.loaders] == [16, 4, 20]
    assert cifar_dls(root, bs=4, size=(np.int64(40), 48), in_memory=False, num_workers=0).one_batch()[0].shape[2:] == (40, 48)
    assert cached_images(root, np.int64(40)).shape[2:] == (40, 40)


def test_both_kinds_of_loaders_agree_on_images_they_do_not_change(shapes):
    memory,items = (cifar_dls(shapes, cifar_augment(), bs=32, in_memory=m, num_workers=0) for m in (True, False))
    assert memory.vocab == items.vocab
    for a,b in zip(memory.valid, items.valid):
        assert torch.equal(a[1], b[1]) and type(a[1]) is type(b[1]) and type(a[0]) is type(b[0])
        torch.testing.assert_close(a[0], b[0])


@pytest.mark.parametrize('tfm', [*albumentations_augment(), RandomResizedCrop(32), Resize(40)], ids=lambda t: type(t).__name__)
def test_a_transform_of_single_images_is_not_left_out_in_silence(shapes, tfm):
    with pytest.raises(InputError, match=rf'^{type(tfm).__name__}: .*in_memory=False'): cifar_dls(shapes, [*cifar_augment(), tfm], bs=16)
    cifar_dls(shapes, tfm, bs=16, in_memory=False, num_workers=0).train.one_batch()


def test_a_function_of_single_images_is_not_left_out_either(shapes):
    def darker(x:PILImage): return PILImage.create(x.point(lambda v: v//2))
    with pytest.raises(InputError, match='^darker: .*in_memory=False'): cifar_dls(shapes, darker, bs=16)


def test_transforms_of_batches_in_fastais_words(shapes):
    def first_white(x:TensorImage): return torch.ones_like(x)
    for in_memory in True, False:
        x,_ = cifar_dls(shapes, bs=16, batch_tfms=[Transform(first_white, split_idx=0, order=50)], in_memory=in_memory, num_workers=0).train.one_batch()
        assert x.std((0, 2, 3)).max() < 1e-6


def test_an_open_image_of_any_mode_is_predicted_as_its_file(shapes, tmp_path):
    dls = cifar_dls(shapes, bs=16)
    photo = Image.open(next((shapes/'test').glob('*/*.png'))).convert('RGB').resize((50, 40))
    photo.save(tmp_path/'a.png')
    for mode in 'RGBA', 'RGB', 'P', 'L':
        image = photo.convert(mode)
        image.save(tmp_path/'a.png')
        a,b = (dls.test_dl([o]).one_batch()[0] for o in (image, tmp_path/'a.png'))
        torch.testing.assert_close(a, b)


def test_transforms_of_batches_of_every_kind_are_taken(shapes):
    def darker(x:TensorImage): return x//2
    for tfms in (None, HorizontalFlip(), [darker], [Transform(darker)], [Rotate()]): cifar_dls(shapes, tfms, bs=16).train.one_batch()


def test_loaders_may_move_to_another_device(shapes):
    dl = cifar_dls(shapes, bs=16).train
    dl.to('meta')
    x,y = next(iter(dl.create_batches(range(16))))
    assert x.device.type == y.device.type == x.rows.device.type == 'meta'


def test_a_channel_without_anything_is_no_reason_for_nan(tmp_path):
    for split in 'train', 'test':
        for c in 'ab':
            (tmp_path/split/c).mkdir(parents=True)
            for i in range(4): Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)*np.array([1, 1, 0], dtype=np.uint8)).save(tmp_path/split/c/f'{i}.png')
    x,_ = cifar_dls(tmp_path, bs=4).train.one_batch()
    assert x.isfinite().all() and x[:, :2].std() > .5 and x[:, 2].abs().max() < 1e-3


def test_every_training_image_comes_once_an_epoch(shapes):
    dls = cifar_dls(shapes, bs=64)
    seen = torch.cat([y for _,y in dls.train.new(drop_last=False)])
    assert len(seen) == 300 and (seen.bincount() == 30).all()
    assert len(dls.train) == 300//64


def test_memory_loaders_open_other_items_too(shapes):
    dls = cifar_dls(shapes, bs=32)
    files = [f for f in image_files(shapes) if f.parent.parent.name == 'test'][5:8]
    dl = dls.test_dl(files, with_labels=True)
    assert isinstance(dl, MemoryDL)
    x,y = dl.one_batch()
    torch.testing.assert_close(x, dls.valid_ds and torch.cat([b[0] for b in dls.valid])[5:8])
    assert [dls.vocab[i] for i in y] == [f.parent.name for f in files]
    assert len(dls.test_dl(files).one_batch()) == 1


def test_the_hole_is_filled_with_what_normalisation_turns_to_zero(shapes):
    for in_memory in True, False:
        dls = cifar_dls(shapes, [Cutout(16)], bs=16, in_memory=in_memory, num_workers=0)
        x,_ = dls.train.one_batch()
        assert ((x.abs() < 0.02).all(1).flatten(1).float().mean(1) > 0.06).all()   # a quarter; in a corner, a sixteenth
        x,_ = dls.valid.one_batch()
        assert ((x.abs() < 0.02).all(1).flatten(1).float().mean(1) < 0.05).all()


def test_a_hole_follows_the_data_it_is_in(shapes, tmp_path):
    hole = Cutout(16)
    first = cifar_dls(shapes, [hole], bs=16)
    first.train.one_batch()
    grey = tmp_path/'grey'
    for split,name in (('train', 'a'), ('train', 'b'), ('test', 'a'), ('test', 'b')):
        (grey/split/name).mkdir(parents=True)
        for i in range(2): Image.fromarray(np.random.default_rng(i).integers(0, 100, (32, 32, 3), dtype=np.uint8)).save(grey/split/name/f'{i}.png')
    x,_ = cifar_dls(grey, [hole], bs=4).train.one_batch()
    assert ((x.abs() < 0.02).all(1).flatten(1).float().mean(1) > 0.06).all()


def test_the_checksum_notices_a_changed_pixel_and_a_changed_label(tmp_path, shapes):
    root = Path(shutil.copytree(shapes, tmp_path/'s'))
    before = data_checksum(root)
    assert before == data_checksum(shapes)
    f = image_files(root)[0]
    f.rename(f.parent.parent/'star'/'moved.png')
    shifted_views = data_checksum(root)
    assert shifted_views != before
    Image.new('RGB', (32, 32)).save(image_files(root)[0])
    assert data_checksum(root) not in (before, shifted_views)


# --- the cache of decoded images

@pytest.fixture
def cached(tmp_path, shapes):
    "A copy of the shapes that may be spoilt, its images decoded once, and the file that keeps them"
    root = Path(shutil.copytree(shapes, tmp_path/'s'))
    images = cached_images(root)
    return root,images,one_cache(root)


def one_cache(root): return [f for f in (fastai_path('data')/'cifar_cam-cache').iterdir() if f.name.startswith(hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16])]


def no_decoding(monkeypatch): monkeypatch.setattr('cifar_cam.loaders.read_images', lambda *_: pytest.fail('decoded again'))


def test_images_are_decoded_once_and_in_the_order_of_the_files(cached, monkeypatch):
    root,images,files = cached
    assert images.shape == (400, 3, 32, 32) and images.dtype == torch.uint8 and len(files) == 1
    for i in 0, 123, 399: assert (images[i].permute(1, 2, 0).numpy() == np.asarray(Image.open(image_files(root)[i]))).all()
    no_decoding(monkeypatch)
    assert torch.equal(cached_images(root), images)


@pytest.mark.parametrize('change', ['pixels', 'more', 'moved'])
def test_a_changed_folder_is_noticed(cached, change):
    root,images,files = cached
    f = image_files(root)[0]
    if change == 'pixels': Image.new('RGB', (32, 32), (9, 9, 9)).save(f)
    if change == 'more': shutil.copy(f, f.with_name('again.png'))
    if change == 'moved': f.rename(f.parent.parent/'star'/'moved.png')
    again = cached_images(root)
    assert again.shape != images.shape or not torch.equal(again, images)
    assert one_cache(root) == files and torch.equal(cached_images(root), again)


@pytest.mark.parametrize('damage', [lambda b: b[:-100], lambda b: b'', lambda b: b[:-5000] + b'X' + b[-4999:], lambda b: b'\x80\x04' + b, lambda b: b'not a cache at all'])
def test_a_damaged_cache_is_noticed(cached, damage, monkeypatch):
    root,images,(file,) = cached
    file.write_bytes(damage(file.read_bytes()))
    assert torch.equal(cached_images(root), images)
    no_decoding(monkeypatch)   # a whole one is there again
    assert torch.equal(cached_images(root), images)


def test_a_cache_that_cannot_be_written_is_said_and_nothing_is_lost(shapes, tmp_path, monkeypatch):
    def full(tensors, file, metadata):
        Path(file).write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr('cifar_cam.loaders.save_file', full)
    root = Path(shutil.copytree(shapes, tmp_path/'s'))
    with pytest.warns(UserWarning, match='disk is full'): images = cached_images(root)
    assert images.shape == (400, 3, 32, 32) and not one_cache(root)
    assert not [f for f in (fastai_path('data')/'cifar_cam-cache').iterdir() if f.name.startswith('.')]


@pytest.mark.parametrize('split', ['train', 'valid'])
def test_a_batch_is_freed_before_the_garbage_collector_comes(shapes, split):
    dls,alive = cifar_dls(shapes, cifar_augment(8), bs=32),[]
    dl = dls[split == 'valid']
    list(dl)   # what is made once
    gc.collect(); gc.disable()
    try:
        for batch in dl: alive += [weakref.ref(o) for o in batch]
        del batch
        assert len(alive) == 2*len(dl) and not [o for o in alive if o() is not None]
    finally: gc.enable()


def test_the_loaders_of_a_set_share_one_block_of_memory(shapes):
    dls = cifar_dls(shapes, bs=32, hold_out=50)
    test = dls.test_dl(image_files(shapes)[:7], with_labels=True)
    assert len({dl.memory.images.data_ptr() for dl in (*dls.loaders, test, dls.train.new())}) == 1
    rows = torch.cat([dl.rows for dl in dls.loaders])
    assert sorted(rows.tolist()) == list(range(400))


@pytest.mark.real
def test_the_real_set_is_whole(cifar10):
    assert check_cifar(cifar10) == cifar10
    assert len(image_files(cifar10)) == 60_000


@pytest.mark.real
def test_loaders_and_cache_add_at_most_400_mb_to_the_peak_of_a_training(cifar10):
    done = subprocess.run([sys.executable, '-c', PEAK, str(cifar10)], capture_output=True, text=True)
    before,after = map(int, done.stdout.splitlines()[-1].split())
    assert 100 < after - before < 400, done.stdout


# The first training has batches of the same shape and no data set: what it takes for them is no loader's.
PEAK = """
import sys, torch
from fastai.vision.all import DataLoaders, TfmdDL
from torch import nn
from cifar_cam.all import *

class OneBatch(TfmdDL):
    dataset,vocab = None,list(range(10))
    def __init__(self, bs, steps): self.bs,self.steps,self.n,self.device,self.batch = bs,steps,bs*steps,torch.device('cpu'),(torch.randn(bs, 3, 32, 32), torch.randint(10, (bs,)))
    def __iter__(self): return (tuple(o.clone() for o in self.batch) for _ in range(self.steps))
    def __len__(self): return self.steps

def peak_after_training(dls):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    learn = cifar_learner(dls, net)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
    return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])//1024

without = DataLoaders(OneBatch(512, 20), OneBatch(1024, 10))
without.vocab = OneBatch.vocab
print(peak_after_training(without), peak_after_training(cifar_dls(sys.argv[1], cifar_augment(8), bs=512)))
"""


def test_a_home_that_cannot_be_written_is_one_line_and_data_of_ones_own_needs_none(few, monkeypatch, capsys):
    def nowhere(folder): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr('cifar_cam.core.fastai_path', nowhere)
    for call in (lambda: shapes_path(n_train=100, n_test=20)), (lambda: data_path('cifar10')), (lambda: data_path('shapes')):
        with pytest.raises(InputError, match='cannot be written .Permission denied.; set FASTAI_HOME to a folder that can'): call()
    assert main(['demo']) == 2 and capsys.readouterr().err.count('\n') == 1
    with pytest.warns(UserWarning, match='cannot be kept'): images = cached_images(few)
    assert len(images) == 120
