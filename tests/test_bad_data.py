"""Broken, odd or hostile files, and full disks: what can be read is read the same way everywhere, the rest is named in
one line, and what was whole stays whole"""
import io, os, random, shutil, subprocess, sys, tarfile, zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.external import fastai_cfg
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from cifar_cam.cli import main
from cifar_cam.core import InputError
from cifar_cam.photos import NamedImage, open_photo
from cifar_cam.formats import unpack_images
from cifar_cam.images import check_folder, data_checksum, data_path, image_files
from cifar_cam.loaders import cached_images, cifar_dls
from cifar_cam.photo import explain_image
from cifar_cam.evaluate import save_weights
from cifar_cam.run import fit_run, load_run
from cifar_cam.experiment import run_recipe, train_run
from cifar_cam.shapes import shapes_path
import cifar_cam.learner as train
from cifar_cam.core import save_atomically

ROOT = Path(__file__).parents[1]
WITH = dict(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, database=None, derandomize=True)


@pytest.fixture
def data(few, tmp_path): return Path(shutil.copytree(few, tmp_path/'data'))


def picture(mode='RGB', kind='png', size=(48, 40), **options):
    f = io.BytesIO()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    noise.convert(mode).save(f, kind, **options)
    return f.getvalue()

def chunk(kind, body): return len(body).to_bytes(4, 'big') + kind + body + zlib.crc32(kind + body).to_bytes(4, 'big')

def bomb(side=60_000):
    "A PNG of a few bytes that says that it is `side`×`side`"
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', side.to_bytes(4, 'big')*2 + b'\x08\x02\0\0\0') + chunk(b'IDAT', zlib.compress(b'\0'*1000)) + chunk(b'IEND', b'')

def text_bomb():
    "A small PNG with a comment that unpacks to 100 MB"
    whole = picture()
    return whole[:33] + chunk(b'zTXt', b'Comment\0\0' + zlib.compress(b'\0'*10**8)) + whole[33:]


BROKEN = dict(empty=b'', zero_bytes=b'\0'*5000, text=b'not an image', html=b'<html>', wrong_magic=b'\xff\xd8\xff' + picture()[3:], png_header_only=picture()[:8], half=picture()[:2500],
              half_a_jpeg=picture(kind='jpeg', size=(400, 400))[:9000], bomb=bomb(), text_bomb=text_bomb(), broken_header=picture()[:16] + b'\xff'*10 + picture()[26:], tar=b'x'*257 + b'ustar' + b'\0'*300)

@pytest.mark.parametrize('case', BROKEN)
def test_a_file_that_is_no_image_is_named_in_training_and_in_explaining(data, run, case):
    "Training and `explain_image` refuse a broken image or a decompression bomb in one line that names the file"
    bad = data/'train'/'star'/'star_0003.png'
    bad.write_bytes(BROKEN[case])
    for read in lambda: open_photo(bad), lambda: NamedImage.create(bad), lambda: cifar_dls(data, bs=10), lambda: explained(run, bad):
        with pytest.raises(InputError) as e: read()
        assert str(bad) in str(e.value) and str(e.value).isprintable() and len(str(e.value)) < 500


def explained(run, photo):
    o = load_run(run)
    return explain_image(o.model, photo, vocab=list(o.metrics['class_accuracy']), stats=(o.metrics['mean'], o.metrics['std']))[1]


ODD = dict(cmyk=('CMYK', 'jpeg', {}), palette=('P', 'png', {}), one_bit=('1', 'png', {}), grey=('L', 'jpeg', {}), grey_alpha=('LA', 'png', {}), alpha=('RGBA', 'png', {}), gif=('P', 'gif', {}),
           sixteen_bit=('I;16', 'png', {}), float=('F', 'tiff', {}), transparent=('P', 'png', dict(transparency=0)), animated=('P', 'gif', dict(save_all=True, append_images=[Image.new('P', (48, 40))]*3)),
           animated_png=('RGB', 'png', dict(save_all=True, append_images=[Image.new('RGB', (48, 40))]*3)), webp=('RGB', 'webp', {}), bmp=('RGB', 'bmp', {}), tiff=('RGB', 'tiff', {}), ycbcr=('YCbCr', 'jpeg', {}))

@pytest.mark.parametrize('case', ODD)
def test_images_of_any_kind_are_read_alike_in_training_and_in_explaining(data, run, case):
    "CMYK, palette, 16-bit, transparent, animated and other images load as RGB in training and in `explain_image`"
    mode,kind,options = ODD[case]
    odd = data/'train'/'star'/f'odd.{kind}'
    if mode=='I;16': Image.fromarray(np.full((40, 48), 3000, np.uint16)).save(odd)   # dark, not white
    else: odd.write_bytes(picture(mode, kind, **options))
    im = open_photo(odd)
    assert im.mode=='RGB' and im.size==(48, 40)
    if mode=='I;16': assert np.asarray(im).max() < 20
    dls = cifar_dls(data, bs=10)
    at = dls.train.items.index(odd)
    assert np.array_equal(dls.train.memory.images[dls.train.rows[at]].permute(1, 2, 0).numpy(), np.asarray(im.resize((32, 32), Image.Resampling.BICUBIC)))
    assert sum(explained(run, odd).values())==pytest.approx(1, abs=1e-4)


SEEDS = [picture(m, k) for m,k in (('RGB', 'png'), ('P', 'png'), ('P', 'gif'), ('CMYK', 'jpeg'), ('RGB', 'webp'), ('RGB', 'bmp'), ('F', 'tiff'), ('RGB', 'tga'), ('1', 'ppm'), ('RGB', 'ico'))]

@settings(max_examples=100, **WITH)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), min_size=1, max_size=6), st.floats(.05, 1), st.booleans())
def test_a_changed_image_is_read_or_refused(tmp_path, monkeypatch, whole, changes, keep, early):
    "An image with changed or missing bytes either loads as RGB or raises an `InputError` that names the file"
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10**6)   # a header may ask for gigabytes
    b = bytearray(whole)
    for place,new in changes:
        at = int(place*(min(len(b), 80) if early else len(b)))
        b[at:at + len(new)] = new
    path = tmp_path/'x.png'
    path.write_bytes(b[:int(keep*len(b))])
    try: assert open_photo(path).mode=='RGB'
    except InputError as e: assert str(path) in str(e) and str(e).isprintable()


# --- folders

def test_what_systems_leave_in_folders_is_not_an_image(data):
    "`.DS_Store`, `Thumbs.db`, `.ipynb_checkpoints` and the like in a data folder are ignored"
    before = image_files(data)
    for d in data, data/'train', data/'train'/'star':
        for name in '.DS_Store', 'Thumbs.db', 'desktop.ini', '._star_0001.png', '.hidden.png', 'notes.txt': (d/name).write_bytes(b'no image')
    for d in data/'.git', data/'train'/'.ipynb_checkpoints', data/'train'/'star'/'.thumbnails', data/'__MACOSX'/'train':
        d.mkdir(parents=True)
        (d/'x.png').write_bytes(b'no image')
    assert image_files(data)==before and data_path(data)==data and len(cifar_dls(data, bs=10).vocab)==10


def test_which_files_are_images_does_not_depend_on_the_machine(few, tmp_path):
    "A folder is the same data set on a machine without a table of file types, where Python knows few suffixes"
    suffixes = 'webp JPG jfif mpo jp2 tga bmp avif'.split()
    for i,f in enumerate(image_files(few)):
        to = tmp_path/'data'/f.relative_to(few).with_suffix(f'.{suffixes[i % 8]}')
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, to)
    here = [str(f) for f in image_files(tmp_path/'data')]
    code = f"""import mimetypes
mimetypes.knownfiles = []
mimetypes.init([])
for table in mimetypes.types_map, mimetypes.common_types: table.pop('.webp', None)
from cifar_cam.images import image_files, Path
print(*image_files(Path({str(tmp_path/'data')!r})), sep='\\n')"""
    there = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert there.stdout.splitlines() == here and len(here) == 120, there.stderr


@pytest.mark.parametrize('parts', [('train', 'test'), ('',)])
def test_a_class_whose_files_do_not_end_like_images_is_named(few, tmp_path, parts):
    "A class whose files all have an unknown suffix is named, with one of them; it is not left out without a word"
    root = tmp_path/'data'
    for part in parts: shutil.copytree(few/'train', root/part, dirs_exist_ok=True)
    for f in (root/parts[-1]/'star').iterdir(): f.rename(f.with_suffix('.image'))
    with pytest.raises(InputError, match=r"star: no images in this class: star_\d+.image does not end like one"): cifar_dls(root, bs=8)
    for f in root.rglob('*.png'): f.rename(f.with_suffix(''))
    with pytest.raises(InputError, match=r"(arrow/|arrow: no images in this class: )arrow_\d+ does not end like"): cifar_dls(root, bs=8)


KINDS = dict(mpo=('RGB', 'MPO', dict(save_all=True, append_images=[Image.new('RGB', (48, 40))])), jp2=('RGB', 'JPEG2000', {}), jpeg=('RGB', 'JPEG', {}), webp=('RGB', 'WEBP', {}),
             tiff=('RGB', 'TIFF', {}), gif=('P', 'GIF', {}), tga=('RGB', 'TGA', {}), ppm=('RGB', 'PPM', {}), ico=('RGB', 'ICO', {}), pcx=('RGB', 'PCX', {}))

def rows_of(root, raw, name='x.jpg'):
    pq = pytest.importorskip('pyarrow.parquet')
    import pyarrow as pa
    images = [picture()]*6 + [raw]*2
    root.mkdir()
    pq.write_table(pa.table(dict(image=[dict(bytes=b, path=name) for b in images], label=['cat', 'dog']*4)), root/'train.parquet')
    return root

@pytest.mark.parametrize('kind', KINDS)
def test_every_row_of_a_parquet_file_is_an_image_of_the_set(tmp_path, kind):
    "No row of a parquet file is lost, whatever the format of its image: a phone's MPO and JPEG 2000 too"
    mode,pillow,options = KINDS[kind]
    raw = picture(mode, pillow, **options)
    dls = cifar_dls(rows_of(tmp_path/'p', raw), bs=2)
    items = [f for dl in dls.loaders for f in dl.items]
    assert len(items) == len(set(items)) == 8 and sum(f.read_bytes() == raw for f in items) == 2


def test_a_row_that_cannot_be_kept_as_a_file_is_named(tmp_path, monkeypatch):
    "A parquet row whose image format has no known suffix is an error, and so is a set that would lose images on disk"
    f = io.BytesIO()
    Image.new('F', (40, 40)).save(f, 'SPIDER')
    with pytest.raises(InputError, match='row 6: holds an image of the kind SPIDER'): data_path(rows_of(tmp_path/'a', f.getvalue()))
    monkeypatch.setattr('cifar_cam.batches.image_counts', lambda part: dict(cat=4, dog=3))
    with pytest.raises(InputError, match='has 8 images, but as files in class folders they are 7'): data_path(rows_of(tmp_path/'b', picture('RGB', 'BMP')))


def decided(root, tmp_path, text, encoding='utf-8'):
    (tmp_path/'d.csv').write_text(text, encoding=encoding)
    return len(cifar_dls(root, bs=8, decisions=tmp_path/'d.csv', device='cpu').train_ds)

def test_two_decisions_about_one_image_must_agree(few, tmp_path):
    "Two rows of a decisions table that contradict each other are an error with both lines; equal ones are one decision"
    name = 'train/star/star_0001.png'
    for a,b in ('drop,', 'relabel,moon'), ('keep,', 'drop,'), ('relabel,moon', 'relabel,ring'), ('relabel,moon', 'keep,'):
        with pytest.raises(InputError, match=rf'd.csv: lines 2 and 4 .*{name}'): decided(few, tmp_path, f'file,decision,label\n{name},{a}\n\n{name},{b}\n')
    assert decided(few, tmp_path, f'file,decision,label\n{name},drop,\n{name},drop,moon\n') == 99


def test_decisions_are_read_as_spreadsheets_save_them(few, tmp_path):
    "A decisions table may have semicolons, tabs or a byte-order mark; without its header, the error names the column that is missing"
    rows = [['file', 'decision', 'label'], ['train/star/star_0001.png', 'drop', ''], ['train/star/star_0002.png', 'relabel', 'moon']]
    for sep in ',;\t':
        for encoding in 'utf-8', 'utf-8-sig': assert decided(few, tmp_path, '\r\n'.join(map(sep.join, rows)), encoding) == 99
    with pytest.raises(InputError, match="d.csv: has no column 'file'.*first line must be file,decision,label"): decided(few, tmp_path, '\n'.join(map(','.join, rows[1:])))
    for text,words in ('a line\n', 'no table of decisions'), ('', 'no table of decisions'), ('file;label\na;b\n', "no column 'decision'"):
        with pytest.raises(InputError, match=words): decided(few, tmp_path, text)
    with pytest.raises(InputError, match='decisions='): cifar_dls(few, bs=8, decisions=pd.DataFrame(dict(file=['x'])))


ARGUMENTS = [('data', None), ('data', ['few']), ('data', 3), ('data', b'few'), ('bs', '8'), ('bs', 8.), ('bs', None), ('bs', True), ('hold_out', '0.2'), ('hold_out', [.2]), ('valid_pct', '0.2'),
             ('size', (3, 32, 32)), ('size', (64,)), ('size', '64'), ('size', 64.), ('size', None), ('seed', '1'), ('labels', None)]

@pytest.mark.parametrize('name, value', ARGUMENTS)
def test_a_wrong_argument_of_the_loaders_is_named(few, name, value):
    "An argument of `cifar_dls` of the wrong kind, such as text for a number, is one line with its name and value"
    args = dict(data=few, bs=8) | {name: value}
    with pytest.raises(InputError, match=rf'^{name}[ =]') as e: cifar_dls(args.pop('data'), **args)
    assert str(value).strip('"b[]\'') in str(e.value)


def test_only_images_in_class_folders_count_and_none_moves_to_another_set(data):
    "Only images directly in a class folder count; a stray image adds no class and changes no split"
    before = image_files(data)
    deeper = data/'train'/'star'/'more'
    deeper.mkdir()
    for d in deeper, data/'train': shutil.copy(before[0], d/'stray.png')   # the first would have been an image to test on, of a class `more`
    dls = cifar_dls(data, bs=10)
    assert image_files(data)==before and list(dls.vocab)==sorted({f.parent.name for f in before}) and (len(dls.train_ds), len(dls.valid_ds))==(100, 20)


def test_links_to_images_and_classes_are_followed_and_loops_end(data, tmp_path):
    "Links to images and class folders are followed; loops, dangling links and pipes are skipped or refused"
    checksum,n = data_checksum(data),len(image_files(data))
    (data/'train'/'star').rename(tmp_path/'elsewhere')
    (data/'train'/'star').symlink_to(tmp_path/'elsewhere')
    f = data/'train'/'moon'/'moon_0000.png'
    f.rename(tmp_path/'moon.png')
    f.symlink_to(tmp_path/'moon.png')
    (data/'train'/'moon'/'loop').symlink_to(data/'train'/'moon')
    (data/'train'/'moon'/'dangling.png').symlink_to(tmp_path/'nothing.png')
    (data/'train'/'moon'/'endless.png').symlink_to('/dev/zero')
    os.mkfifo(data/'train'/'moon'/'pipe.png')
    assert len(image_files(data))==n and data_checksum(data)==checksum and len(cifar_dls(data, bs=10).train_ds)==100
    with pytest.raises(InputError, match='pipe.png'): open_photo(data/'train'/'moon'/'pipe.png')
    (data/'train'/'moon'/'self.png').symlink_to('self.png')
    with pytest.raises(InputError, match='self.png.*symbolic links'): data_path(data)


def deeper(path):
    (path/'images').mkdir()
    for f in path.glob('*.png'): f.rename(path/'images'/f.name)

FOLDERS = dict(
    no_image_in_a_class=(lambda d: [f.unlink() for f in (d/'train'/'star').iterdir()], 'star'), no_train=(lambda d: shutil.rmtree(d/'train'), 'train/'),
    train_is_a_file=(lambda d: (shutil.rmtree(d/'train'), (d/'train').touch()), 'train/'), class_is_a_file=(lambda d: (shutil.rmtree(d/'test'/'star'), (d/'test'/'star').touch()), 'star'),
    one_class_more=(lambda d: shutil.copytree(d/'train'/'star', d/'train'/'stars'), 'stars'), images_too_deep=(lambda d: deeper(d/'train'/'star'), 'star'),
    no_class_at_all=(lambda d: [shutil.rmtree(c) for c in (d/'train').iterdir()], 'train/'))

@pytest.mark.parametrize('case', FOLDERS)
def test_what_is_wrong_with_a_folder_is_named(data, case):
    "A data folder with missing, extra or misplaced classes or images is refused in one line that names the fault"
    spoil,word = FOLDERS[case]
    spoil(data)
    with pytest.raises(InputError, match=word) as e: data_path(data)
    assert str(data) in str(e.value) and str(e.value).isprintable()


def test_labels_that_are_no_text_do_no_harm(data):
    "A data folder loads even if its `labels.txt` is not text"
    (data/'labels.txt').write_bytes(b'\xff\xfe\0')
    assert check_folder(data)==data


def test_a_class_of_one_image_can_be_trained_on_and_held_out_is_a_line(data):
    "A class with one image loads for training; with `hold_out` it raises an `InputError` that names the class"
    for f in sorted((data/'train'/'star').iterdir())[1:]: f.unlink()
    assert len(cifar_dls(data, bs=10).train_ds)==91
    with pytest.raises(InputError, match='star'): cifar_dls(data, bs=10, hold_out=.3)


# --- archives

def packed(path, members=(), folder=None, mode='w:gz'):
    with tarfile.open(path, mode) as tar:
        if folder: tar.add(folder, 'set')
        for name,kw in members:
            info = tarfile.TarInfo(name)
            for k,v in dict(dict(size=1), **kw).items(): setattr(info, k, v)
            tar.addfile(info, io.BytesIO(b'x'*info.size))
    return path

LINK,HARD,DEVICE,PIPE = (dict(type=t, size=0) for t in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE))
EVIL = dict(
    up=[('../out', {})], up_from_within=[('set/../../out', {})], absolute=[('/tmp/cifar-cam-absolute-out', {})], device=[('set/null', DEVICE)], pipe=[('set/pipe', PIPE)],
    link_out=[('set/link', dict(LINK, linkname='/etc/passwd'))], link_up=[('set/link', dict(LINK, linkname='../../out'))], hard_link=[('set/hard', dict(HARD, linkname='/etc/passwd'))],
    through_a_link=[('set/train', dict(LINK, linkname='/tmp')), ('set/train/cifar-cam-link-out', {})], file_then_folder=[('set', {}), ('set/x', {})], long_name=[('set/' + 'x'*300, {})],
    two_folders=[('a/x', {}), ('b/x', {})], no_folder=[('x', {})], nothing=[])

@pytest.mark.parametrize('case', EVIL)
def test_an_archive_that_reaches_out_or_is_odd_is_refused_and_leaves_nothing(tmp_path, fastai_home, case):
    "An archive that would write outside its folder or has an odd structure is refused and leaves no files"
    tgz = packed(tmp_path/'evil.tgz', EVIL[case])
    there,here = set(fastai_home.rglob('*')),set(tmp_path.rglob('*'))
    with pytest.raises(InputError, match='evil.tgz') as e: data_path(tgz)
    assert str(e.value).isprintable() and '.unpacking' not in str(e.value)
    assert set(fastai_home.rglob('*'))==there and set(tmp_path.rglob('*'))==here
    assert not [p for p in Path('/tmp').glob('cifar-cam-*-out')]


@pytest.mark.parametrize('mode', ['w', 'w:gz', 'w:bz2', 'w:xz'])
def test_a_changed_archive_is_unpacked_or_refused(tmp_path, fastai_home, few, mode):
    "An archive with changed or missing bytes either unpacks or is refused by name, and leaves no partial folder"
    whole = packed(tmp_path/'x.tgz', folder=few, mode=mode).read_bytes()
    rng = random.Random(mode)
    for _ in range(4):
        b = bytearray(whole)
        for _ in range(rng.randrange(1, 4)): b[rng.randrange(len(b)//2)] ^= rng.randrange(1, 256)
        (tmp_path/'changed.tgz').write_bytes(b[:rng.choice([len(b), len(b)*3//4])])
        there = set(fastai_home.iterdir())
        try: shutil.rmtree(unpack_images(tmp_path/'changed.tgz', check=lambda p: p))
        except InputError as e: assert 'changed.tgz' in str(e) and str(e).isprintable()
        assert set(fastai_home.iterdir())==there


def test_an_unpacked_set_that_lost_files_is_not_taken_for_whole(tmp_path, few):
    "If an unpacked data set loses a class, the next use of its archive raises an error that names the class"
    tgz = packed(tmp_path/'set.tgz', folder=few)
    shutil.rmtree(data_path(tgz)/'test'/'star')
    with pytest.raises(InputError, match='star'): data_path(tgz)


def test_a_name_twice_in_an_archive_is_one_file(tmp_path, few):
    "A file that an archive holds twice counts once"
    with tarfile.open(tmp_path/'twice.tgz', 'w:gz') as tar:
        for _ in range(2): tar.add(few, 'set')
    assert len(image_files(data_path(tmp_path/'twice.tgz')))==120


# --- a full disk

@pytest.fixture
def disk(mounted):
    "A disk of 2 MB, and a function that fills it but for so many bytes"
    path = mounted('disk', 'size=2m')
    def fill(left): (path/'ballast').write_bytes(b'\0'*(shutil.disk_usage(path).free - left))
    return path,fill


def test_a_disk_too_full_for_the_decoded_images_costs_nothing_but_decoding_them_again(disk, few, monkeypatch):
    "If the disk is too full to cache decoded images, they load anyway, with a warning and no partial file"
    path,fill = disk
    monkeypatch.setitem(fastai_cfg().d, 'data', str(path))
    fill(50_000)   # the images have 368,640 bytes
    with pytest.warns(UserWarning, match='disk is full'): images = cached_images(few)
    assert images.shape == (120, 3, 32, 32) and not [f for f in path.rglob('*') if f.is_file() and f.name != 'ballast']


def test_a_disk_that_is_full_while_unpacking_or_drawing_keeps_what_was_there(disk, few, tmp_path, monkeypatch):
    "If the disk is full while unpacking an archive or drawing Shapes10, an error says so and existing data stays"
    path,fill = disk
    monkeypatch.setitem(fastai_cfg().d, 'data', str(path))
    first = data_path(packed(tmp_path/'first.tgz', folder=few))
    checksum = data_checksum(first)
    fill(50_000)
    before = set(path.rglob('*'))
    tgz = packed(tmp_path/'second.tgz', [('other/x', {})], folder=few)
    for write in lambda: unpack_images(tgz, check=lambda p: p), lambda: shapes_path(n_train=200, n_test=100):
        with pytest.raises(InputError, match='the disk is full'): write()
        assert set(path.rglob('*'))==before and data_checksum(first)==checksum


def test_a_disk_that_is_full_before_the_first_checkpoint_leaves_nothing(disk, run, few):
    "If the disk is full before the first checkpoint, training stops with an `InputError` and leaves no folder"
    path,fill = disk
    fill(8000)
    with pytest.raises(InputError, match='the disk is full'): run_recipe('davidnet', few, path/'runs', epochs=1, bs=10, lr=.05, lr_min=.005)
    assert [p.name for p in path.iterdir()]==['ballast']


def test_a_disk_that_is_full_at_a_later_checkpoint_keeps_the_earlier_one_and_the_run_goes_on(disk, run, few, monkeypatch, undrawn):
    "If the disk fills up later, the last checkpoint stays whole, and the run resumes once there is room"
    path,fill = disk
    after = train.Checkpoint.after_epoch
    def then_fill(self):
        after(self)
        if self.epoch==0: fill(8000)
    with monkeypatch.context() as m:
        m.setattr(train.Checkpoint, 'after_epoch', then_fill)
        with pytest.raises(InputError, match='checkpoint.pt: the disk is full'): run_recipe('davidnet', few, path/'runs', epochs=2, bs=10, lr=.05, lr_min=.005)
    [folder] = (path/'runs').iterdir()
    assert torch.load(folder/'checkpoint.pt', weights_only=True)['epochs']==1 and not [f for f in folder.iterdir() if f.name.startswith('.')]
    (path/'ballast').unlink()
    done = fit_run(folder)
    assert done.finished and list(done.history.epoch)==[1, 2]


def test_every_file_of_a_run_is_the_old_one_if_the_disk_is_full(disk, run):
    "A write that fails on a full disk leaves every file of the run unchanged"
    path,fill = disk
    shutil.copytree(run, path/'run')
    o = load_run(path/'run')
    before = {f.name: f.read_bytes() for f in o.path.iterdir()}
    fill(4096)
    big = dict(weights=lambda f: save_weights(o.model, f), checkpoint=lambda f: torch.save(torch.zeros(10**5), f), picture=lambda f: Image.effect_noise((300, 300), 9).save(f, 'png'), page=lambda f: f.write_text('x'*10**5))
    for write in big.values():
        with pytest.raises(InputError, match='the disk is full'): save_atomically(write, o.path/'weights.safetensors')
    assert {f.name: f.read_bytes() for f in o.path.iterdir()}==before


def test_a_full_standard_output_is_said(monkeypatch, capfd):
    "If standard output goes to a full disk, one line says so and the exit code is 2"
    if not Path('/dev/full').exists(): pytest.skip('needs /dev/full')
    monkeypatch.setattr('cifar_cam.cli.recipe_table', lambda: pd.DataFrame(dict(recipe=['x'])))
    monkeypatch.setattr('sys.stdout', open('/dev/full', 'w'))
    assert main(['recipes'])==2 and capfd.readouterr().err=='cifar-cam: the disk is full; make room, and try again\n'
