"Images without labels become a table, whatever they lie in and however often it is stopped; a run is tested on another labelled set"
import csv, io, json, os, shutil, sys, tarfile, tracemalloc, zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cifar_cam.core import InputError
from cifar_cam.inputs import find_images, zip_parts
from cifar_cam.predict import GrowingTable, PixelNetwork, count_predictions, predict_command, predict_images, whole_rows
from cifar_cam.validate import accuracy_difference, labelled_images, validate_command, validate_run
from cifar_cam.run import load_run


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos(tmp_path):
    "Twelve images in folders, one of them no image, and what is none of them"
    rng = np.random.default_rng(0)
    for i in range(11):
        (tmp_path/'photos'/'ab'[i%2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path/'photos'/'ab'[i%2]/f'{i}.png')
    (tmp_path/'photos'/'b'/'broken.jpg').write_bytes(b'\xff\xd8\xff\xe0 cut off')
    for name in 'a/notes.txt', '.hidden.png', '__MACOSX/1.png':
        (tmp_path/'photos'/name).parent.mkdir(exist_ok=True)
        (tmp_path/'photos'/name).write_text('x')
    return Path('photos')


def rows(path): return list(csv.reader(open(path, newline='')))
def names(*args, **kwargs): return [name for name,_ in find_images(*args, **kwargs)]


def test_a_line_an_image_as_the_runs_own_evaluation_sees_it(run, few):
    o,path = load_run(run),predict_images(few/'test', run, top=2)
    table = pd.read_csv(path)
    assert list(table) == ['file', 'class', 'probability', 'class_2', 'probability_2', 'reason'] and len(table) == 20
    assert np.mean([Path(f).parent.name==c for f,c in zip(table.file, table['class'])]) == o.metrics['accuracy']
    assert (table.probability >= table.probability_2).all() and table.reason.isna().all()
    at = {str(f): i for i,f in enumerate(o.interp.dl.items)}
    assert np.allclose([o.interp.probs[at[f]].max() for f in table.file], table.probability, atol=2e-5)


def test_tta_is_that_of_the_metrics(run, few):
    table = pd.read_csv(predict_images(few/'test', run, tta=True))
    assert np.mean([Path(f).parent.name==c for f,c in zip(table.file, table['class'])]) == load_run(run).metrics['accuracy_tta']


def test_a_broken_image_is_a_line_with_a_reason_and_what_is_no_image_is_none(photos, run):
    table = pd.read_csv(predict_images(photos, run, bs=5), keep_default_na=False)
    assert len(table) == 12 and list(table.file) == sorted(table.file)
    broken = table[table['class']==''].iloc[0]
    assert broken.file.endswith('broken.jpg') and broken.probability == '' and len(broken.reason) > 5
    assert '\n' not in broken.reason and (table.reason != '').sum() == 1 and count_predictions('predictions.csv')[''] == 1


def test_the_same_images_in_every_form(photos, run, monkeypatch):
    shutil.make_archive('all', 'zip', '.', 'photos')
    shutil.make_archive('all', 'gztar', '.', 'photos')
    files = names(photos)
    Path('list.txt').write_text('\n'.join(files) + '\n')
    pd.DataFrame(dict(weight=range(12), Image_Path=[f.removeprefix('photos/') for f in files])).to_csv(photos/'table.csv', index=False)
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO('\0'.join(files).encode())))
    answers = []
    for i,source in enumerate((photos, 'all.zip', 'all.tar.gz', 'list.txt', photos/'table.csv', '-')):
        table = pd.read_csv(predict_images(source, run, f'{i}.csv'), keep_default_na=False)
        table['file'] = ['/'.join(f.split('/')[-2:]) for f in table.file]
        answers.append(table.sort_values('file').drop(columns='reason').reset_index(drop=True))
    assert len(answers[0]) == 12 and all(a.equals(answers[0]) for a in answers)


@pytest.mark.parametrize('method', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize('before', [b'', b'#!/bin/sh\nunpacks itself\n'])
def test_a_zip_in_parts_is_the_zip(tmp_path, method, before):
    with zipfile.ZipFile('x.zip', 'w', method) as z:
        for i in range(23): z.writestr(f'd{i}/é{i}.png', os.urandom(40)*3)
        z.comment = b'a comment with PK\1\2 in it'
    Path('x.zip').write_bytes(before + Path('x.zip').read_bytes())
    with zipfile.ZipFile('x.zip') as z: whole = [(m.filename, m.CRC, z.read(m)) for m in z.infolist()]
    for n in 1, 5, 23, 100:
        parts = [[(m.filename, m.CRC, z.read(m)) for m in z.infolist()] for z in zip_parts('x.zip', n)]
        assert sum(parts, []) == whole and (before or all(len(p) <= n for p in parts))

@pytest.mark.slow
def test_a_zip_of_more_members_than_the_first_format_could_count(tmp_path):
    with zipfile.ZipFile('x.zip', 'w') as z:
        for i in range(66_000): z.writestr(f'{i}.png', b'x')
    counts = [len(z.infolist()) for z in zip_parts('x.zip', 30_000)]
    assert counts == [30_000, 30_000, 6000] and names('x.zip')[-1].endswith('65999.png')

def test_a_changed_zip_is_read_or_named(tmp_path):
    with zipfile.ZipFile('x.zip', 'w') as z:
        for i in range(9): z.writestr(f'd{i}/é{i}.png', b'x'*30)
    whole,rng = Path('x.zip').read_bytes(),np.random.default_rng(0)
    for i in range(60):
        changed = bytearray(whole)
        for at in rng.integers(len(whole)//2, len(whole), 3): changed[at] = rng.integers(256)
        Path('y.zip').write_bytes(changed[:len(whole) - i%3])
        try: assert len(names('y.zip')) <= 9
        except InputError as e: assert 'y.zip' in str(e) and str(e).isprintable()

def test_one_image_on_standard_input(photos, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO((photos/'a'/'0.png').read_bytes())))
    assert [row[0] for row in rows(predict_images('-'))] == ['file', '-']


def test_names_that_csv_and_terminals_stumble_over(run):
    Path('odd').mkdir()
    odd = ['new\nline.png', 'quo"te.png', 'comma, here.png', os.fsdecode(b'latin-\xe9.png'), 'ü.png']
    for name in odd: Image.new('RGB', (32, 32)).save(Path('odd')/name, format='png')
    path = predict_images('odd', run)
    with open(path, newline='', encoding='utf-8', errors='surrogateescape') as f:
        assert sorted(row[0] for row in list(csv.reader(f))[1:]) == sorted(f'odd/{n}' for n in odd)
    with pytest.raises(InputError): predict_images('odd', run)
    assert predict_images('odd', run, force=True) == path


def test_a_link_in_a_circle_and_a_pipe_end(photos, run):
    (photos/'a'/'back').symlink_to(photos.absolute())
    os.mkfifo(photos/'pipe.png')
    assert len(names(photos)) == 13
    assert [r[-1] for r in rows(predict_images(photos, run)) if r[0].endswith('pipe.png')] == ['no such file']


def test_an_image_named_twice_comes_once(photos): assert len(names([photos, photos/'a', photos/'a'/'0.png'])) == 12


@pytest.mark.parametrize('bs', [1, 4])
def test_stopped_anywhere_it_goes_on_without_a_line_twice_or_missing(photos, run, bs, monkeypatch):
    whole = predict_images(photos, run, 'whole.csv', bs=bs).read_bytes()
    lengths = sorted({0, 3, len(whole)//3, len(whole)//2, len(whole) - 1, len(whole)})
    for length in lengths:
        def die(*args, **kwargs): raise KeyboardInterrupt
        with monkeypatch.context() as m:
            m.setattr(GrowingTable, 'finish', die)
            with pytest.raises(KeyboardInterrupt): predict_images(photos, run, 'cut.csv', bs=bs)
        part, = Path('.').glob('cut.csv.*.part')
        part.write_bytes(whole[:length])  # as a killed process or a full disk leaves it
        assert predict_images(photos, run, 'cut.csv', bs=bs).read_bytes() == whole
        assert not list(Path('.').glob('*.part'))
        Path('cut.csv').unlink()


def test_what_is_done_is_not_done_again(photos, run, monkeypatch):
    def die(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(GrowingTable, 'finish', die)
        with pytest.raises(KeyboardInterrupt) as kept: predict_images(photos, run)   # a notebook keeps the traceback, and what it holds
    with monkeypatch.context() as m:
        m.setattr(PixelNetwork, 'forward', die)
        assert len(rows(predict_images(photos, run))) == 13


def test_lines_of_another_network_or_of_other_images_are_not_taken_over(photos, run, monkeypatch):
    def die(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(GrowingTable, 'finish', die)
        with pytest.raises(KeyboardInterrupt): predict_images(photos, None)
    (photos/'a'/'0.png').rename(photos/'a'/'00.png')
    assert {r[1] for r in rows(predict_images(photos, run))} != set()
    assert set(count_predictions('predictions.csv')) - {''} <= set(load_run(run).metrics['class_accuracy'])
    Path('predictions.csv').unlink()
    assert 'photos/a/00.png' in [r[0] for r in rows(predict_images(photos, None))]


def test_two_processes_do_not_write_one_file(tmp_path):
    pytest.importorskip('fcntl')
    first = GrowingTable('a.csv', ['file'], {})
    first.resume([], key=str)
    with pytest.raises(InputError, match='another process'): GrowingTable('a.csv', ['file'], {}).resume([], key=str)


def test_rows_up_to_the_first_that_is_not_whole():
    text = b'a,b\n"x\ny",1\n"z'
    Path('t.csv').write_bytes(text)
    assert [end for _,end in whole_rows('t.csv', 2)] == [4, 12]
    for n in range(len(text)):
        Path('t.csv').write_bytes(text[:n])
        for row,end in whole_rows('t.csv', 2): assert text[:end].endswith(b'\n') and len(row) == 2
    Path('t.csv').write_bytes(b'a,b\n1\n2,3\n')
    assert len(list(whole_rows('t.csv', 2))) == 1


def test_kaggle(photos, run):
    with pytest.raises(InputError, match='id'): predict_images([photos, 'copy/0.png'] if Path('copy').mkdir() or shutil.copy(photos/'a'/'0.png', 'copy') else 0, run, kaggle=True)
    table = rows(predict_images(photos, run, kaggle=True))
    assert table[0] == ['id', 'label'] and ['broken', ''] in table and {r[0] for r in table[1:]} == {*map(str, range(11)), 'broken'}


def test_overlays(photos, run):
    predict_images(photos, run, cams='looked')
    drawn = sorted(p.relative_to('looked').as_posix() for p in Path('looked').rglob('*.png'))
    assert len(drawn) == 11 and drawn[0] == 'photos/a/0.png.png' and Image.open(Path('looked')/drawn[0]).width >= 50
    with pytest.raises(InputError, match='not empty'): predict_images(photos, run, 'b.csv', cams='looked')
    predict_images(str(photos.absolute()/'..'/'photos'/'a'), run, 'c.csv', cams='else')
    assert all('..' not in p.parts for p in Path('else').rglob('*')) and len(list(Path('else').rglob('*.png'))) == 6


def test_an_archive_that_is_cut_or_writes_elsewhere_or_is_a_bomb(photos, run, monkeypatch):
    with zipfile.ZipFile('odd.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        z.write(photos/'a'/'0.png', '../../out.png')
        z.writestr('big.png', bytes(5_000_000))
    monkeypatch.setattr('cifar_cam.inputs._LARGEST', 1_000_000)
    table = rows(predict_images('odd.zip', run))
    assert table[1][-1] == '' and 'MB' in table[2][-1] and not Path('../../out.png').exists()
    shutil.make_archive('all', 'gztar', '.', 'photos')
    Path('cut.tar.gz').write_bytes(Path('all.tar.gz').read_bytes()[:-400])
    with pytest.raises(InputError, match='cut.tar.gz'): predict_images('cut.tar.gz', run, 'x.csv')
    assert not list(Path('.').glob('x.csv*'))


@pytest.mark.parametrize('words,told', [
    (dict(paths='nowhere'), 'nowhere'), (dict(paths=[]), 'no images'), (dict(paths='empty'), 'no images'), (dict(paths='photos', top=0), 'top'),
    (dict(paths='photos', out='photos'), 'folder'), (dict(paths='photos', device='tpu9'), 'tpu9'), (dict(paths='t.csv'), 'column'),
    (dict(paths='t.csv', column='nope'), 'nope'), (dict(paths='photos', run='photos'), 'run folder'), (dict(paths='photos', cams='made', method='nope'), 'nope')])
def test_wrong_input_is_one_line_and_leaves_no_table(photos, run, words, told):
    Path('empty').mkdir()
    Path('t.csv').write_text('a,b\n1,2\n')
    with pytest.raises(InputError, match=told) as e: predict_images(**{'run': run, **words})
    assert '\n' not in str(e.value) and not Path('predictions.csv').exists()


def picture(path, seed=0):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


@pytest.mark.parametrize('text, file', [('weight;image;note\n1;photos/a/0.png;"a, b, c, d"\n2;photos/b/1.png;\n', 't.csv'), ('n\tfile\n1\tphotos/a/0.png\n2\tphotos/b/1.png\n', 't.tsv'),
                                        ('\ufefffile,class\nphotos/a/0.png,cat\nphotos/b/1.png,dog\n', 't.csv')])
def test_tables_of_any_separator_are_predicted(photos, run, text, file):
    Path(file).write_text(text, encoding='utf-8')
    table = pd.read_csv(predict_images(file, run), keep_default_na=False)
    assert list(table.file) == ['photos/a/0.png', 'photos/b/1.png'] and (table['class'] != '').all()


def test_kaggles_ids_are_found_in_the_folders_beside_the_table(run):
    "Without an ending, as its sample submission names them"
    for i in range(4): picture(f'data/test/{i}.png', i)
    Path('data/submission.csv').write_text('id,label\n' + ''.join(f'{i},cat\n' for i in (3, 0, 2)))
    table = pd.read_csv(predict_images('data/submission.csv', run), dtype=str, keep_default_na=False)
    assert list(table.file) == ['3', '0', '2'] and (table['class'] != '').all()
    by_name = {r[0]: r[1] for r in rows(predict_images('data/test', run, 'by-name.csv'))}
    assert [by_name[f'data/test/{i}.png'] for i in (3, 0, 2)] == list(table['class'])
    assert rows(predict_images('data/submission.csv', run, 'kaggle.csv', kaggle=True))[1:] == [[i, by_name[f'data/test/{i}.png']] for i in '302']


def test_a_name_in_two_folders_is_a_row_that_says_so(run):
    for part in 'train', 'test': picture(f'data/{part}/1.png')
    picture('data/test/2.png')
    Path('data/t.csv').write_text('id\n1\n2\n7\n')
    both,clear,none = rows(predict_images('data/t.csv', run))[1:]
    assert both[0] == '1' and set(both[1:-1]) == {''} and 'could be' in both[-1] and 'data/test/1.png' in both[-1] and 'data/train/1.png' in both[-1]
    assert clear[1] and not clear[-1] and none == ['7', *['']*6, 'no such file']


def test_blank_lines_and_marks_of_a_list_name_no_image(photos, run):
    Path('list.txt').write_text('\ufeff\nphotos/a/0.png\n\n  \nphotos/b/1.png\n\n', encoding='utf-8')
    assert names('list.txt') == ['photos/a/0.png', 'photos/b/1.png']
    Path('t.csv').write_text('file,x\nphotos/a/0.png,1\n,2\n')   # a table's row stays, and says why
    assert [(r[0], r[-1]) for r in rows(predict_images('t.csv', run))[1:]] == [('photos/a/0.png', ''), ('', 'a row without a name')]


@pytest.mark.parametrize('text', ['', 'file,label\n', 'file\n', '\n'])
def test_an_empty_table_is_one_line(run, text):
    Path('t.csv').write_text(text)
    for call in lambda: predict_images('t.csv', run), lambda: validate_run(run, 't.csv', 'out'):
        with pytest.raises(InputError, match='t.csv') as e: call()
        assert '\n' not in str(e.value)
    assert sorted(p.name for p in Path('.').iterdir()) == ['run', 't.csv']


@pytest.mark.parametrize('words, told', [(dict(cams='made', method='nope'), 'no CAM method'), (dict(device='tpu9'), 'tpu9')])
def test_what_is_wrong_is_said_before_a_row_is_written(photos, run, words, told):
    with pytest.raises(InputError, match=told): predict_images(photos, run, **words)
    assert sorted(p.name for p in Path('.').iterdir()) == ['photos', 'run']


@pytest.mark.parametrize('out', ['run/recipe.json', 'run/weights.safetensors', 'run/history.csv', 'run/metrics.json', 'images.csv', '/dev/null'])
def test_force_writes_over_predictions_and_nothing_else(photos, run, out):
    Path('images.csv').write_text('name,file\n1,photos/a/0.png\n')
    before = Path(out).read_bytes()
    with pytest.raises(InputError, match='name another file|name a file'): predict_images('images.csv', run, out, force=True)
    assert Path(out).read_bytes() == before and load_run(run).finished
    for kaggle in False, True: predict_images('images.csv', run, 'o.csv', force=True, kaggle=kaggle)


def test_a_picture_with_its_map_is_not_written_over_the_image(run):
    "A table names images without their ending; with the folder of the images, a picture would get an image's name"
    for i in range(3): picture(f'data/test/{i}.png', i)
    Path('data/t.csv').write_text('id\n0\n2\n')
    before = Path('data/test/2.png').read_bytes()
    with pytest.raises(InputError, match='its picture of 0 would be written over that image'): predict_images('data/t.csv', run, cams='data/test', force=True)
    assert Path('data/test/2.png').read_bytes() == before and not list(Path('.').glob('*.part')) and not Path('predictions.csv').exists()


def test_an_unfinished_run_is_refused(photos, run):
    (run/'metrics.json').unlink()
    for f in (lambda: predict_images(photos, run), lambda: validate_run(run, 'photos')):
        with pytest.raises(InputError, match='not finished'): f()


def test_a_diverged_network_gives_a_reason_and_no_class(photos, run):
    o = load_run(run)
    with torch.no_grad(): o.model.fc.bias.fill_(float('nan'))
    assert all(r[1]=='' and r[-1] for r in rows(predict_images(photos, o))[1:])


def test_memory_does_not_grow_with_the_number_of_images(run):
    one = io.BytesIO()
    Image.new('RGB', (8, 8), 'red').save(one, format='png')
    def peak(n):
        with zipfile.ZipFile(f'{n}.zip', 'w') as z:
            for i in range(n): z.writestr(f'{i}.png', one.getvalue())
        Image.init()
        tracemalloc.start()
        try:
            predict_images(f'{n}.zip', run, f'{n}.csv', bs=32)
            return tracemalloc.get_traced_memory()[1]
        finally: tracemalloc.stop()
    peak(40)
    assert peak(1000) - peak(200) < 800*50e6/90_000*2   # zipfile's own directory is a part of it


def test_the_shell_prints_the_table_last(photos, run, capsys):
    predict_command([str(photos)], str(run), Out='o.csv')
    out = capsys.readouterr().out.strip().splitlines()
    assert out[-1] == 'o.csv' and '12 images' in out[-3] and '1 could not be read' in out[-2]


# --- validate ---

def test_a_run_on_its_own_test_images_has_its_own_numbers(run, few):
    out = validate_run(run, few)
    m,own = json.loads((out/'metrics.json').read_text()),load_run(run).metrics
    for k in 'accuracy', 'accuracy_interval', 'accuracy_tta', 'loss', 'calibration_error', 'class_accuracy', 'images': assert m[k] == own[k] == m['own'][k]
    assert m['difference'][0] == 0 > m['difference'][1]
    assert out.parent == run/'validation' and (out/'report.html').stat().st_size > 10_000
    assert load_run(run).finished   # the run's folder is still one


def test_every_form_of_a_labelled_set(few, run):
    shutil.copytree(few/'test', 'flat')
    shutil.make_archive('set', 'gztar', few.parent, few.name)
    files = labelled_images('flat')
    pd.DataFrame(dict(file=[f.name for f,_ in files], label=[y for _,y in files])).to_csv('t.csv', index=False)
    for f,_ in files: shutil.copy(f, '.')
    sets = [[y for _,y in labelled_images(o)] for o in (few, few/'test', 'flat', 'set.tar.gz', 't.csv')]
    assert len(sets[0]) == 20 and all(s == sets[0] for s in sets)
    numbers = [json.loads((validate_run(run, o, f'out{i}')/'metrics.json').read_text())['accuracy'] for i,o in enumerate(('flat', 't.csv'))]
    assert numbers[0] == numbers[1] == load_run(run).metrics['accuracy']


def test_images_are_normalised_as_the_run_does_and_not_by_themselves(few, run):
    for f,y in labelled_images(few):
        Path('dark', y).mkdir(parents=True, exist_ok=True)
        Image.open(f).point(lambda v: v//4).save(Path('dark', y, f.name))
    out = validate_run(run, 'dark', 'out')
    table = pd.read_csv(predict_images('dark', run))
    right = np.mean([Path(f).parent.name==c for f,c in zip(table.file, table['class'])])
    assert json.loads((out/'metrics.json').read_text())['accuracy'] == right


def test_other_classes_are_refused_and_a_missing_class_is_said(few, run, capsys):
    shutil.copytree(few/'test', 'flat')
    shutil.rmtree('flat/star')
    out = validate_run(run, 'flat', 'out')
    assert json.loads((out/'metrics.json').read_text())['class_accuracy']['star'] is None and 'no images of star' in (out/'report.html').read_text()
    Path('flat/circle').rename('flat/disc')
    with pytest.raises(InputError, match="'disc'.*circle"): validate_run(run, 'flat', 'out2')
    assert not Path('out2').exists()


@pytest.mark.parametrize('data,told', [('nowhere', 'nowhere'), ('empty', 'no images'), ('t.csv', "no column 'label'")])
def test_no_labelled_set_is_one_line(run, data, told):
    Path('empty').mkdir()
    Path('t.csv').write_text('file,x\na.png,2\n')
    with pytest.raises(InputError, match=told): validate_run(run, data, 'out')
    assert not Path('out').exists()


def test_a_validation_is_not_written_over_unless_asked(few, run, capsys):
    validate_command(str(run), str(few), Out='out')
    assert capsys.readouterr().out.strip().splitlines()[-1] == 'out'
    with pytest.raises(InputError, match='--force'): validate_command(str(run), str(few), Out='out')
    validate_command(str(run), str(few), Out='out', force=True)
    for wrong in dict(run=str(run)), dict(data='shapes'):
        with pytest.raises(InputError, match='--data|--out'): validate_command(**wrong)


@pytest.mark.parametrize('there', ['a run', 'another run', 'notes', 'figures of others', 'a file'])
def test_force_does_not_write_a_validation_over_anything_else(few, run, there):
    out = run if there=='a run' else Path('out')
    if there=='another run': shutil.copytree(run, out)
    if there in ('notes', 'figures of others'): (out/'figures').mkdir(parents=True)
    if there=='notes': (out/'notes.txt').write_text('x')
    if there=='figures of others': (out/'figures'/'curves.png').write_text('x')
    if there=='a file': out.write_text('x')
    before = {p: p.read_bytes() for p in [*out.rglob('*'), out] if p.is_file()}
    for force in False, True:
        with pytest.raises(InputError, match='name another one|name a folder') as e: validate_run(run, few, out, force=force)
        assert '--force' not in str(e.value)
    assert {p: p.read_bytes() for p in [*out.rglob('*'), out] if p.is_file()} == before and load_run(run).finished


def test_a_validation_that_was_cut_off_is_begun_again(few, run):
    (Path('out')/'figures').mkdir(parents=True)
    for name in 'figures/classes.png', 'report.html', '.metrics.json.0f.1.tmp': (Path('out')/name).write_text('x')
    assert json.loads((validate_run(run, few, 'out')/'metrics.json').read_text())['images'] == 20


def test_of_a_table_with_parts_the_test_rows_are_tested(few, run):
    "Those of valid where none says test; a table without parts is tested whole. Columns may be chosen"
    files = [f for f in sorted(few.glob('*/*/*.png')) if f.parent.parent.name in ('train', 'test')]
    table = pd.DataFrame(dict(path=[str(f) for f in files], kind_of=[f.parent.name for f in files], split=[f.parent.parent.name for f in files]))
    table['label'] = 'circle'
    table.to_csv('t.csv', index=False, sep=';')
    assert {y for _,y in labelled_images('t.csv')} == {'circle'}
    found = labelled_images('t.csv', label='kind_of')
    assert [f for f,_ in found] == [f for f in files if f.parent.parent.name=='test'] and all(f.parent.name==y for f,y in found)
    out = validate_run(run, 't.csv', 'out', label='kind_of', column='path')
    m = json.loads((out/'metrics.json').read_text())
    assert (m['accuracy'], m['images']) == (load_run(run).metrics['accuracy'], 20)
    for words in dict(label='nope'), dict(column='nope'):
        with pytest.raises(InputError, match="t.csv: has no column 'nope'"): labelled_images('t.csv', **words)
    table.assign(split=table.split.replace('test', 'valid')).to_csv('v.csv', index=False)
    assert [f for f,_ in labelled_images('v.csv')] == [f for f,_ in found]
    table.drop(columns='split').to_csv('w.csv', index=False)
    assert len(labelled_images('w.csv')) == len(files)


def test_newcombes_interval_is_not_symmetric_and_holds_the_difference():
    d,low,high = accuracy_difference((.9, [.87, .92]), (.8, [.76, .83]))
    assert low < d < high and abs(d + .1) < 1e-12 and abs((d - low) - (high - d)) > 1e-3
