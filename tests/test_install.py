"Installing the wheel where PyTorch is already installed, as on Colab, leaves PyTorch as it is"
import json, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp('dist')
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', out, ROOT], check=True, capture_output=True)
    return next(out.glob('*.whl'))


def pretend_installed(site, **versions):
    for name,v in versions.items():
        info = site/f'{name}-{v}.dist-info'
        info.mkdir(parents=True)
        (info/'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {v}\n')
        (info/'INSTALLER').write_text('pip\n')
        (info/'RECORD').write_text('')


@pytest.mark.slow
def test_installing_the_wheel_changes_neither_torch_nor_torchvision(wheel, tmp_path):
    "`pip install` of the wheel changes neither torch nor torchvision"
    subprocess.run([sys.executable, '-m', 'venv', tmp_path/'venv'], check=True)
    python = tmp_path/'venv'/'bin'/'python'
    site = subprocess.run([python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'], check=True, capture_output=True, text=True).stdout.strip()
    pretend_installed(Path(site), torch='2.6.0+cu124', torchvision='0.21.0+cu124')
    done = subprocess.run([python, '-m', 'pip', 'install', '-q', '--dry-run', '--report', tmp_path/'report.json', wheel], capture_output=True, text=True)
    if 'No matching distribution' in done.stderr and 'fastai' in done.stderr: pytest.skip('needs the package index')
    assert done.returncode==0, done.stderr[-2000:]
    names = {o['metadata']['name'].lower() for o in json.loads((tmp_path/'report.json').read_text())['install']}
    assert {'fastai', 'grad-cam', 'albumentations', 'cifar-cam'} <= {n.replace('_', '-') for n in names}
    assert not names & {'torch', 'torchvision'}
