"Sets, tables, arrays and folders that once gave wrong images, or cost a user his files."
import io
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cifar_cam.cli import _changes, main
from cifar_cam.core import InputError
from cifar_cam.formats import find_form
from cifar_cam.images import data_path, image_table
from cifar_cam.inputs import find_images
from cifar_cam.photos import NamedImage, open_photo
from cifar_cam.predict import GrowingTable
from cifar_cam.recipe import find_recipe
from cifar_cam.share import pretrained_run, ship_run
from cifar_cam.space import parse_space
from cifar_cam.tables import part_name, read_table
from cifar_cam.validate import validate_run


def png(path, value=0, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (value, 99, 7)).save(path)

@pytest.fixture
def pets(tmp_path):
    "Class folders of ten images"
    for c in ('cat', 'dog', 'owl'):
        for i in range(10): png(tmp_path/'pets'/c/f'{i}.png', i)
    return tmp_path/'pets'


def test_a_table_of_a_few_images_of_one_class_is_not_the_set(pets):
    rows = [f'{c}/{i}.png,{c}' for c in ('cat',) for i in range(6)]
    (pets/'doubtful.csv').write_text('\n'.join(['file,label', *rows]))
    assert find_form(pets) == ('classes', pets)
    (pets/'doubtful.csv').rename(pets.parent/'doubtful.csv')  # beside the wrapper
    (pets.parent/'doubtful.csv').write_text('\n'.join(['file,label', *('pets/' + r for r in rows)]))
    assert find_form(pets.parent) == ('classes', pets)


def test_a_table_of_images_beside_masks_is_the_set(tmp_path):
    for i in range(6):
        for d in ('images', 'masks'): png(tmp_path/d/f'{i}.png', i)
    (tmp_path/'labels.csv').write_text('\n'.join(['file,label', *(f'images/{i}.png,{"ab"[i%2]}' for i in range(6))]))
    assert find_form(tmp_path)[0]=='table' and len(image_table(data_path(tmp_path))) == 6


def test_what_a_network_said_is_not_the_labels(pets):
    said = [f'{c}/{i}.png,owl,.9,cat,.1,' for c in ('cat', 'dog', 'owl') for i in range(10)]
    (pets/'predictions.csv').write_text('\n'.join(['file,class,probability,class_2,probability_2,reason', *said]))
    assert find_form(pets) == ('classes', pets)


def test_parquet_with_masks_gives_the_images(tmp_path):
    pytest.importorskip('pyarrow')
    def raw(value):
        out = io.BytesIO()
        Image.new('RGB', (32, 32), (value,)*3).save(out, 'png')
        return out.getvalue()
    def write(a, b):
        rows = [{a: dict(bytes=raw(i), path=None), b: dict(bytes=raw(200 + i), path=None), 'label': 'ab'[i%2]} for i in range(20)]
        pd.DataFrame(rows).to_parquet(tmp_path/'x.parquet')
    write('annotation', 'image')
    assert min(Image.open(f).getpixel((0, 0))[0] for f in image_table(data_path(tmp_path/'x.parquet')).file) == 200
    write('before', 'after')
    with pytest.raises(InputError, match="'before' and 'after' are both columns of images"): image_table(data_path(tmp_path/'x.parquet'))


def test_arrays_of_any_kind_of_number_are_the_same_picture():
    grey = np.random.default_rng(0).integers(0, 256, (32, 40, 3))
    wanted = np.asarray(NamedImage.create(grey.astype(np.uint8)))
    for a in (grey, grey.astype(np.int32), grey.astype(np.uint16)*257, grey/255, torch.tensor(grey/255).float().permute(2, 0, 1),
              torch.tensor(grey).permute(2, 0, 1).byte(), grey.astype(np.float32)):
        assert (np.asarray(NamedImage.create(a))==wanted).all()
    assert (np.asarray(NamedImage.create(grey[..., 0]))[..., 1]==grey[..., 0]).all()
    for bad in (grey/255 - .5, np.zeros((3, 3, 3, 3)), np.full((8, 8), np.nan), np.zeros((0, 8)), grey*300):
        with pytest.raises(InputError, match='is no image'): NamedImage.create(bad)


def test_a_tiff_of_32_bits_is_not_black(tmp_path):
    Image.fromarray(np.full((8, 8), 200, np.int32)).save(tmp_path/'grey.tif')
    assert open_photo(tmp_path/'grey.tif').getpixel((0, 0)) == (200,)*3


def test_a_validation_never_writes_over_its_run(tmp_path, monkeypatch):
    run = tmp_path/'run'
    shutil.copytree(pretrained_run().path, run)
    for c in pretrained_run().metrics['class_accuracy']: png(tmp_path/'data'/'test'/c/'0.png')
    (tmp_path/'data'/'below').mkdir()
    monkeypatch.chdir(tmp_path/'data'/'below')
    before = (run/'metrics.json').read_bytes()
    assert validate_run(run, '..', device='cpu') == run/'validation'/'data'
    with pytest.raises(InputError, match='no folder of a validation'):
        validate_run(run, '..', out=run/'validation'/'x'/'..'/'..', device='cpu')
    assert (run/'metrics.json').read_bytes() == before


@pytest.mark.parametrize('make', [lambda p: p.write_text('x'), lambda p: (p.mkdir(), (p/'README.md').write_text('mine')),
                                  lambda p: shutil.copytree(pretrained_run().path, p) and (p/'checkpoint.pt').write_text('x')])
def test_ship_run_writes_over_nothing_else(make, tmp_path):
    make(tmp_path/'to')
    with pytest.raises(InputError, match='is a file|so it is no run'): ship_run(pretrained_run(), tmp_path/'to')


@pytest.mark.parametrize('head, said', [('file,label,label', "two columns 'label'"), ('file,label,Label', "two columns for the label")])
def test_two_columns_of_one_name_in_a_file(head, said, tmp_path):
    for i in range(4): png(tmp_path/f'{i}.png')
    (tmp_path/'t.csv').write_text('\n'.join([head, *(f'{i}.png,{"ab"[i%2]},{"cd"[i%2]}' for i in range(4))]))
    with pytest.raises(InputError, match=said): read_table(tmp_path/'t.csv')
    if 'Label' in head: assert set(read_table(tmp_path/'t.csv', chosen=dict(label='Label')).label) == {'c', 'd'}


def test_parts_by_yes_and_no():
    assert [part_name(c, 'is valid') for c in ('1.0', '0.0', 'TRUE', 'perhaps')] == ['valid', 'train', 'valid', '']
    assert [part_name(c, 'is_test') for c in (True, 0)] == ['test', 'train'] and part_name('val', 'split') == 'valid'


@pytest.mark.parametrize('text', ['file,label\n0.png,a,\n1.png,b,\n', 'file\n0.png\na,1.png\n2.png\n'])
def test_rows_with_more_cells_than_the_header_are_refused(text, tmp_path):
    (tmp_path/'t.csv').write_text(text)
    with pytest.raises(InputError, match='quote names with commas'): list(find_images(tmp_path/'t.csv'))


def test_explain_does_not_write_over_a_photo(tmp_path, capsys):
    for name in ('cat.png', 'cat-hirescam.png'): png(tmp_path/name, 50)
    before = (tmp_path/'cat-hirescam.png').read_bytes()
    assert main(['explain', str(tmp_path/'cat.png'), '--out', str(tmp_path)]) == 2
    assert 'was not drawn by this command' in capsys.readouterr().err and (tmp_path/'cat-hirescam.png').read_bytes() == before
    for _ in range(2): assert main(['explain', str(tmp_path/'cat.png'), '--out', str(tmp_path/'out')]) == 0


def test_a_row_whose_picture_is_gone_is_made_again(tmp_path):
    table = GrowingTable(tmp_path/'t.csv', ['file', 'class'], {})
    table.resume([], str)
    table.append([[str(i), 'a'] for i in range(3)])
    table.close()
    kept,left = GrowingTable(tmp_path/'t.csv', ['file', 'class'], {}).resume(range(4), str, lambda item, row: item != 1)
    assert kept == 1 and list(left) == [1, 2, 3]


def test_settings_given_twice_are_refused():
    for settings,given in ((['lr=.1', 'lr=.2'], {}), (['epochs=9'], dict(epochs=2))):
        with pytest.raises(InputError, match='is set twice'): _changes(settings, **given)


@pytest.mark.parametrize('space, said', [('bs=10..20:50', 'fits'), ('lr=.1..1:inf', 'fits'), ('lr=.1..0.35:.1', 'nearest end')])
def test_steps_of_a_sweep_reach_the_end(space, said):
    pytest.importorskip('optuna')
    with pytest.raises(InputError, match=said): parse_space(find_recipe('davidnet'), [space])
    assert parse_space(find_recipe('davidnet'), ['lr=.1..0.7:.2'])[0]['lr'].high == .7


@pytest.mark.skipif(not hasattr(os, 'seteuid') or os.geteuid() != 0, reason='needs a folder that may not be read')
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    png(tmp_path/'a'/'0.png')
    png(tmp_path/'b'/'1.png')
    for d in (tmp_path, *tmp_path.parents):
        if not os.stat(d).st_mode & 1: pytest.skip('the temporary folder is closed to others')
    (tmp_path/'b').chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises(InputError, match='b: cannot be read'): list(find_images(tmp_path))
    finally:
        os.seteuid(0)
        (tmp_path/'b').chmod(0o755)
