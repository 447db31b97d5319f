"""What a GPU would refuse or wait for, checked without a GPU: on a simulated device (see `second_device.py`), in a
process of its own"""
import json, os, subprocess, sys
from pathlib import Path

import pytest

from cifar_cam.recipe import RECIPES

HERE = Path(__file__).parent


@pytest.fixture(scope='module')
def found(tmp_path_factory, once):
    "name → what each check of `second_device_checks.py` found"
    try: from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # noqa: F401
    except ImportError: pytest.skip('this PyTorch lacks the private interface for devices in Python (2.14 has it)')
    return once('second-device', lambda: _found(tmp_path_factory.mktemp('second-device')))


def _found(folder):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(HERE), os.environ.get('PYTHONPATH', '')]), OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, HERE/'second_device_checks.py', folder], env=env, text=True, capture_output=True)
    lines = [l.partition('CHECK ')[2] for l in done.stdout.splitlines() if 'CHECK ' in l]
    assert lines, done.stderr[-3000:]
    return {k: v for l in lines for k,v in json.loads(l).items()}


def ok(found, name):
    assert name in found, 'the process ended before this check'
    result = found[name]
    assert not (isinstance(result, dict) and 'error' in result), f"{result['error']}, at {' < '.join(reversed(result['where']))}"
    return result


def named(waits): return '\n'.join(sorted({f'{where}: {what}' for *_,what,where in waits}))


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_step_of_every_recipe_waits_for_nothing(found, recipe):
    "After the first, no training step of any recipe makes the host wait for the device"
    result = ok(found, f'step {recipe}')
    assert result['steps'] >= 3 and not result['waits'], named(result['waits'])


@pytest.mark.parametrize('how', ['davidnet float16', 'speedrun float16', 'davidnet bfloat16'])
def test_half_precision_and_its_scaler_wait_for_nothing(found, how):
    "The same holds in bfloat16, and in float16 with its gradient scaler: no training step makes the host wait"
    result = ok(found, f'step {how}')
    assert not result['waits'], named(result['waits'])


def test_speedrun_and_davidnet_take_few_launches(found):
    "The median training step of `speedrun` and of `davidnet` takes at most 200 kernel launches"
    assert ok(found, 'step speedrun')['launches'] <= 200
    assert ok(found, 'step davidnet')['launches'] <= 200


def test_losses_are_near_those_of_float32_in_every_precision(found):
    "The training loss in bfloat16 and float16 is within 5 % of that in float32"
    result = ok(found, 'losses')
    assert result['float32'] == pytest.approx(result['cpu'], rel=.02)
    for half in 'bfloat16', 'float16': assert result[half] == pytest.approx(result['float32'], rel=.05), half


@pytest.mark.parametrize('what', ['evaluation', 'gallery', 'scorecard', 'whole run', 'benchmark'])
def test_what_follows_the_training_stays_on_one_device(found, what):
    "Evaluation, figures, CAM scores, whole runs and the benchmark never mix tensors of two devices"
    ok(found, what)


def test_every_cam_method_works_there(found):
    "Every CAM method works on the device"
    assert not ok(found, 'all methods')
