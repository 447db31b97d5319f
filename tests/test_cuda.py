"""What a user of a GPU relies on, on a GPU: these tests skip where there is none. Their images are drawn; the numbers of the real ones are measured by `tests/gpu`."""
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from cifar_cam.all import (CamInterpretation, Compiled, InputError, METHODS, RECIPES, cam_maps, cifar_dls, cifar_learner, deterministic_algorithms,
                           evaluate_learner, explain_image, find_recipe, load_run, run_recipe, score_cams, ship_run)

sys.path.insert(0, str(Path(__file__).parent/'gpu'))

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]
CUDA = torch.device('cuda')


def bits(model): return torch.cat([o.detach().float().flatten().cpu() for o in model.state_dict().values()])


def train(shapes, precision='auto', epochs=2, cbs=(), **kwargs):
    learn = cifar_learner(cifar_dls(shapes, bs=50, device=CUDA), precision=precision, cbs=list(cbs), **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, .02)
    return learn


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_step_of_every_recipe_waits_for_nothing(shapes, recipe):
    from no_waits import Strict
    from shared import StopAt, learner
    learn = learner(recipe, shapes, CUDA, [Strict('cuda'), StopAt(6)], bs=30)
    try:
        with learn.no_logging(): learn.fit(1, .01)
    finally: torch.cuda.set_sync_debug_mode('default')


def test_a_run_its_report_its_scorecard_and_the_shipped_weights(shapes, tmp_path):
    run = run_recipe(find_recipe('speedrun', epochs=2, bs=50, lr=.1), shapes, tmp_path/'runs')
    assert run.env['device'].startswith('cuda') and (run.path/'report.html').exists()
    again = load_run(run.path)
    assert evaluate_learner(again.learn, again.dls[-1])['accuracy'] == pytest.approx(run.metrics['accuracy'], abs=.011)
    assert len(score_cams(again.learn, ['gradcam', 'hirescam'], n=8, montages=0, min_prob=.1, progress=False).text())
    shipped = ship_run(run, tmp_path/'shipped')
    assert shipped.metrics['images'] == run.metrics['images']


def test_the_finder_and_a_plateau_run_whole(shapes, tmp_path):
    run = run_recipe(find_recipe('resnet18-plateau', epochs=2, bs=50, lr='find', hold_out=.2), shapes, tmp_path/'runs')
    assert len(run.history) == 2 and run.lrs[1] > 0


@pytest.mark.parametrize('method', [m for m in METHODS if m != 'randomcam'])  # a GPU draws other random numbers
def test_every_cam_method_gives_the_map_of_the_cpu(trained, method):
    learn = trained
    x = learn.dls.valid.one_batch()[0][:2]
    here = cam_maps(learn.model, x, method).maps
    try: there = cam_maps(learn.model.cpu(), x.cpu(), method).maps
    finally: learn.model.cuda()
    assert torch.as_tensor(here).cpu().numpy() == pytest.approx(torch.as_tensor(there).numpy(), abs=2e-3)


@pytest.fixture(scope='module')
def trained(shapes): return train(shapes, 'float32')


def test_galleries_and_a_photo(trained, tmp_path):
    interp = CamInterpretation.from_learner(trained)
    interp.plot_top_losses(4)
    interp.plot_cams(2, 'top_losses')
    explain_image(trained, Image.new('RGB', (50, 40), 'red'))
    assert len(interp.preds) == 100


def test_float32_predictions_are_those_of_the_cpu(trained):
    here,_ = trained.get_preds()
    dls = trained.dls
    x = torch.cat([b[0].cpu() for b in dls.valid])
    try:
        with torch.no_grad(): there = trained.model.cpu().eval()(x.as_subclass(torch.Tensor)).softmax(1)
    finally: trained.model.cuda()
    assert torch.allclose(here.as_subclass(torch.Tensor), there, atol=1e-4)


def test_losses_of_half_precision_are_near_those_of_float32(shapes):
    loss = {p: float(train(shapes, p, opt='muon').recorder.values[-1][0]) for p in ('float32', 'bfloat16', 'float16')}
    for half in 'bfloat16', 'float16': assert loss[half] == pytest.approx(loss['float32'], rel=.1), loss


def test_one_seed_gives_the_same_bits_where_that_is_asked_for(shapes):
    with deterministic_algorithms(): first,second = (bits(train(shapes).model) for _ in range(2))
    assert torch.equal(first, second)


def test_a_float16_run_resumes_with_its_scaler_bit_for_bit(shapes, tmp_path):
    from cifar_cam.all import Checkpoint
    from fastai.vision.all import Callback
    class Break(Callback):
        order = 99
        def after_epoch(self):
            if self.epoch == 0: raise KeyboardInterrupt
    def some(*cbs): return cifar_learner(cifar_dls(shapes, bs=50, device=CUDA), precision='float16', cbs=[*cbs])
    def fit(learn):
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, .05)
    with deterministic_algorithms():
        whole = some()
        fit(whole)
        cut = some(Checkpoint(tmp_path/'c.pth'), Break())
        with pytest.raises(KeyboardInterrupt): fit(cut)
        resumed = some(Checkpoint(tmp_path/'c.pth'))
        fit(resumed)
    assert torch.equal(bits(whole.model), bits(resumed.model))


def test_a_compiled_training_keeps_the_names_and_comes_near_the_eager_one(shapes):
    plain,compiled = train(shapes, opt='nesterov'),train(shapes, cbs=[Compiled()], opt='nesterov')
    assert list(plain.model.state_dict()) == list(compiled.model.state_dict())
    a,b = (float(o.recorder.values[-1][0]) for o in (plain, compiled))
    assert b == pytest.approx(a, rel=.1)


def test_after_a_batch_too_large_half_of_it_works(shapes):
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(.7*2**30/total)  # of any card: 700 MB
    try:
        with pytest.raises(InputError, match='try half'): step(shapes, 300)
        step(shapes, 30)
    finally: torch.cuda.set_per_process_memory_fraction(1.)


def step(shapes, bs):
    from shared import StopAt
    learn = cifar_learner(cifar_dls(shapes, bs=bs, device=CUDA), 'resnet18', precision='float32', cbs=[StopAt(1)])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)


def test_images_that_fill_the_gpu_stay_in_pinned_memory(shapes, monkeypatch):
    monkeypatch.setattr('cifar_cam.loaders.free_memory', lambda device: 1000)
    with pytest.warns(UserWarning, match='stay in the main memory'): dls = cifar_dls(shapes, bs=50, device=CUDA); dls.one_batch()
    assert dls.train.memory.images.device.type == 'cpu' and dls.one_batch()[0].device.type == 'cuda'
