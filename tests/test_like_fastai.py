"""What works with a fastai `Learner` works with the one of `cifar_learner`: every callback of fastai's, every public method of `Learner`
and every metric of one label an image, once with a plain `Learner` and once with ours, on the same images in the same order.
`python tests/test_like_fastai.py` writes the tables to docs/like-fastai.md."""
import ast, csv, math, sys
from collections import namedtuple
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import fastai, numpy as np, pytest, torch
import fastai.callback.all as fc
import fastai.metrics as fm
from fastai.callback.core import FetchPredsCallback, GatherPredsCallback
from fastai.learner import SkipToEpoch
from fastai.vision.all import (Adam, AvgMetric, Callback, CastToTensor, CrossEntropyLossFlat, L, Learner, load_learner, OptimWrapper, params,
                               ProgressCallback, Recorder, set_seed, SGD, TrainEvalCallback, accuracy, error_rate)
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import matplotlib; matplotlib.use('Agg')

from cifar_cam.loaders import cifar_dls
from cifar_cam.learner import cifar_learner, SeedEpochs
from cifar_cam.shapes import shapes_path

Row = namedtuple('Row', 'name does differs', defaults=('',))   # `differs`: the reason of a difference on purpose, or of not being tried

# ---- what is tried

def same(name, does): return Row(name, does)

RANDOM = 'Its random numbers come from the seed of `cifar_learner`, also where `set_seed` was called before `fit`. The test gives the plain `Learner` the same seeds.'
TEXT = 'For language models; not tried.'
NO_PACKAGE = 'Needs a service and its package; not tried.'
GPU = 'Needs a GPU; not tried.'

CALLBACKS = [
    Row('Callback', 'any callback of your own'), Row('TrainEvalCallback', 'counts steps, switches modes'),
    Row('Recorder', 'losses, rates, the table', 'Behind fastai\'s columns stand `lr` and, with the default metric, `train_accuracy`. A monitor may also be called `valid_accuracy`.'),
    Row('CastToTensor', 'plain tensors'), Row('SkipToEpoch', '`start_epoch`'),
    Row('GatherPredsCallback', '`get_preds`'), Row('FetchPredsCallback', 'predictions after each epoch'),
    Row('CollectDataCallback', 'keeps all batches'),
    Row('MixedPrecision', 'half precision on a GPU', GPU), Row('ModelToHalf', 'float16 weights', GPU), Row('NonNativeMixedPrecision', 'float16 by hand', GPU),
    Row('HookCallback', 'hooks on layers'), Row('ActivationStats', 'means and deviations of activations'),
    Row('MixHandler', 'what MixUp and CutMix share; not used by itself'), Row('MixUp', 'blended images', RANDOM), Row('CutMix', 'pasted images', RANDOM),
    Row('ProgressCallback', 'the bar and the table', 'Where there is neither a notebook nor a terminal, plain lines in place of a bar.'),
    Row('ShowGraphCallback', 'losses drawn while training'), Row('CSVLogger', 'the table in a file'),
    Row('ParamScheduler', 'schedules'), Row('LRFinder', '`lr_find`'),
    Row('TerminateOnNaNCallback', 'ends the training at NaN', 'Ours ends it by itself, with an error that names step and rate.'),
    Row('TrackerCallback', 'remembers the best value'), Row('EarlyStoppingCallback', 'ends a training that no longer improves'),
    Row('SaveModelCallback', 'saves the best weights, loads them at the end'),
    Row('ReduceLROnPlateau', 'lowers the rate', 'The same with fastai\'s optimizers. With PyTorch\'s in `OptimWrapper`, a plain `Learner` lowers nothing; ours does.'),
    Row('ModelResetter', 'resets a network', TEXT), Row('RNNCallback', 'takes a tuple apart', TEXT), Row('RNNRegularizer', 'a penalty on activations', TEXT),
    Row('ShortEpochCallback', 'a part of each epoch', 'The same training. A plain `Learner` leaves the training loss of such an epoch out of its row, and the other columns move to its place; ours stay in theirs.'),
    Row('GradientAccumulation', 'several batches a step'), Row('GradientClip', 'short gradients'),
    Row('BnFreeze', 'frozen statistics'), Row('MCDropoutCallback', 'dropout while predicting'), Row('ChannelsLast', 'another memory layout'),
    Row('TensorBoardBaseCallback', 'what the two below share; not used by itself'), Row('TensorBoardCallback', 'logs for TensorBoard'),
    Row('TensorBoardProjectorCallback', 'features for TensorBoard\'s projector'), Row('WandbCallback', 'logs for Weights & Biases, tried offline'),
    Row('CometCallback', 'logs for Comet', NO_PACKAGE), Row('AzureMLCallback', 'logs for Azure', NO_PACKAGE)]

METHODS = {
    'fit': 'trains', 'fit_one_cycle': 'trains', 'fit_flat_cos': 'trains', 'fit_sgdr': 'trains', 'fine_tune': 'trains the head, then all', 'lr_find': 'finds a rate',
    'fit_triangle': 'trains; this package gives it to every `Learner`',
    'validate': 'loss and metrics', 'get_preds': 'predictions', 'predict': 'one image', 'tta': 'predictions of augmented views', 'show_results': 'draws predictions',
    'save': 'weights to a file', 'load': 'weights from a file', 'export': 'the learner to a file', 'summary': 'layers and parameters',
    'freeze': 'trains the head alone', 'freeze_to': 'trains from a group on', 'unfreeze': 'trains all', 'create_opt': 'a new optimizer',
    'add_cb': 'callbacks come', 'add_cbs': 'callbacks come', 'remove_cb': 'callbacks go', 'remove_cbs': 'callbacks go', 'added_cbs': 'callbacks for a while',
    'removed_cbs': 'none for a while', 'ordered_cbs': 'who waits for an event', 'one_batch': 'one step', 'all_batches': 'the steps of an epoch',
    'no_bar': 'no progress bar', 'no_logging': 'no table', 'no_mbar': 'no outer bar', 'loss_not_reduced': 'a loss for each image', 'validation_context': 'what `validate` works in',
    'show_training_loop': 'lists callbacks by event', 'to_detach': 'a batch on the host', 'metrics': 'its measures', 'x': 'inputs of the batch', 'y': 'targets of the batch',
    'to_fp16': '', 'to_bf16': '', 'to_fp32': '', 'to_non_native_fp16': '', 'to_non_native_fp32': '', 'to_channelslast': 'another memory layout', 'to_contiguous': 'the usual memory layout',
    'gather_args': 'settings for Weights & Biases', 'to_distributed': '', 'detach_distributed': '', 'distrib_ctx': '', 'to_parallel': '', 'detach_parallel': '', 'parallel_ctx': '',
    'to_distributed_ctx': ''}
METHODS_DIFFER = {k: 'Half precision is a setting of `cifar_learner` here; fastai\'s needs a GPU and is not tried.' for k in
                  ('to_fp16', 'to_bf16', 'to_fp32', 'to_non_native_fp16', 'to_non_native_fp32')} | \
                 {k: 'Several processes have [their own way](several-gpus.md) here.' for k in
                  ('to_distributed', 'detach_distributed', 'distrib_ctx', 'to_parallel', 'detach_parallel', 'parallel_ctx', 'to_distributed_ctx')} | {
    'fit': 'The epochs of all fits count on, so `fit(1)` three times shows the images of `fit(3)`. The seed is that of `cifar_learner`; `set_seed` before `fit` steers a plain `Learner` only.',
    'no_bar': 'Puts the bar back that was there; fastai\'s puts a new one of its own.'}

MANY = dict(accuracy=accuracy, error_rate=error_rate, top_k_accuracy=partial(fm.top_k_accuracy, k=3), BalancedAccuracy=fm.BalancedAccuracy(), CohenKappa=fm.CohenKappa(),
            F1Score=fm.F1Score(average='macro'), FBeta=fm.FBeta(2, average='macro'), HammingLoss=fm.HammingLoss(), Jaccard=fm.Jaccard(average='macro'),
            Precision=fm.Precision(average='macro'), Recall=fm.Recall(average='macro'), RocAuc=fm.RocAuc(), MatthewsCorrCoef=fm.MatthewsCorrCoef(), Perplexity=fm.Perplexity())
TWO = dict(APScoreBinary=fm.APScoreBinary(), RocAucBinary=fm.RocAucBinary(), BrierScore=fm.BrierScore(), F1Score=fm.F1Score(), Precision=fm.Precision())
OTHER_METRICS = {'rmse', 'exp_rmspe', 'mse', 'mae', 'msle', 'ExplainedVariance', 'R2Score', 'PearsonCorrCoef', 'SpearmanCorrCoef',   # of numbers
                 'foreground_acc', 'Dice', 'DiceMulti', 'JaccardCoeff', 'JaccardCoeffMulti',   # of pixels
                 'CorpusBLEUMetric', 'perplexity', 'AccumMetric', 'skm_to_fastai', 'optim_metric', 'LossMetric', 'LossMetrics'}   # of texts, and tools


# ---- two learners on the same images

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return shapes_path(tmp_path_factory.mktemp('shapes'), n_train=200, n_test=60)


def in_order(dls):
    dls.loaders[0] = dls.train.new(shuffle=False)
    return dls


def net(n=10, dropout=0.):
    torch.manual_seed(3)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    return nn.Sequential(body, nn.Sequential(nn.Dropout(dropout), nn.Linear(128, n)))


def split(m): return L(m[0], m[1]).map(params)


class Steps(Callback):
    "What reached the optimizer"
    order = 95
    def __init__(self): self.seen = []
    def after_step(self): self.seen.append((self.train_iter, float(self.loss), [h['lr'] for h in self.opt.hypers]))


def plain_and_ours(folder, tmp_path, cbs=lambda: [], seeds=False, dropout=0., metrics=accuracy, opt_func=SGD, n=10, dls=None):
    "A plain `Learner` and ours: the same network, loss, metrics, optimizer"
    made = []
    for name in 'plain', 'ours':
        path = tmp_path/name
        path.mkdir(exist_ok=True)
        own = in_order(dls() if dls else cifar_dls(folder, bs=50, device='cpu'))
        kwargs = dict(loss_func=CrossEntropyLossFlat(), opt_func=opt_func, metrics=metrics, path=path, splitter=split, wd=1e-3)
        extra = [*cbs(), Steps()]
        if name=='plain': made.append(Learner(own, net(n, dropout), cbs=[*[SeedEpochs(0)]*seeds, *extra], **kwargs))
        else: made.append(cifar_learner(own, net(n, dropout), bf16=False, cbs=extra, **kwargs))
    return made


def number(v): return v.item() if isinstance(v, torch.Tensor) and v.numel()==1 else v


def done(learn):
    "What a training did: steps, fastai's columns by name, files, best values"
    rec = learn.recorder
    names = [n for n in rec.metric_names[1:] if n!='time']
    # of an epoch that is cut short fastai leaves the first columns out
    rows = [dict(zip(names, [*[float('nan')]*(len(names) - len(v)), *map(number, v)])) for v in rec.values]
    return dict(steps=learn.steps.seen, rows=[{k: v for k,v in r.items() if k not in ('train_accuracy', 'lr')} for r in rows],
                losses=[float(o) for o in rec.losses], lrs=rec.lrs, iters=rec.iters, best={cb.name: number(cb.best) for cb in learn.cbs if hasattr(cb, 'best')},
                files=sorted(p.relative_to(learn.path).as_posix() for p in learn.path.rglob('*') if p.is_file() and 'tfevents' not in p.name))


def alike(a, b, where=''):
    "Equal, numbers to five digits"
    if isinstance(a, torch.Tensor): return torch.testing.assert_close(a.float(), b.float(), rtol=1e-4, atol=1e-5)
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for k in a: alike(a[k], b[k], f'{where}.{k}')
    elif isinstance(a, (list, tuple, L)):
        assert len(a) == len(b), f'{where}: {a} {b}'
        for i,(p,q) in enumerate(zip(a, b)): alike(p, q, f'{where}[{i}]')
    elif isinstance(a, (float, np.floating)): assert a == pytest.approx(b, rel=1e-4, abs=1e-6, nan_ok=True), where
    else: assert a == b, where


def quietly(learn): return learn.no_logging()


def fit_alike(both, fit=lambda l: l.fit(2, .05)):
    for learn in both:
        with quietly(learn): fit(learn)
    alike(*map(done, both))
    if not hasattr(both[0], 'fetch_preds'): alike(*(learn.get_preds() for learn in both))   # fetching predictions while predicting waits for itself, in both
    return both


# ---- callbacks

class Hooked(fc.HookCallback):
    def hook(self, m, i, o): return float(o.detach().mean())


def graph(): return [fc.ShowGraphCallback()]


MAKE = dict(
    Callback=lambda: [Callback(after_epoch=lambda *_: None)], TrainEvalCallback=list, Recorder=list, CastToTensor=list, FetchPredsCallback=lambda: [FetchPredsCallback()],
    CollectDataCallback=lambda: [fc.CollectDataCallback()], HookCallback=lambda: [Hooked()], ActivationStats=lambda: [fc.ActivationStats(with_hist=True)],
    MixUp=lambda: [fc.MixUp()], CutMix=lambda: [fc.CutMix()], ProgressCallback=list, ShowGraphCallback=graph, CSVLogger=lambda: [fc.CSVLogger()],
    ParamScheduler=lambda: [fc.ParamScheduler({'lr': fc.SchedLin(.1, .01)})], TrackerCallback=lambda: [fc.TrackerCallback(monitor='accuracy')],
    TerminateOnNaNCallback=lambda: [fc.TerminateOnNaNCallback()],
    EarlyStoppingCallback=lambda: [fc.EarlyStoppingCallback(monitor='accuracy', min_delta=2)], SaveModelCallback=lambda: [fc.SaveModelCallback(monitor='accuracy', with_opt=True)],
    ReduceLROnPlateau=lambda: [fc.ReduceLROnPlateau(monitor='valid_loss', min_delta=100)], ShortEpochCallback=lambda: [fc.ShortEpochCallback(.4)],
    GradientAccumulation=lambda: [fc.GradientAccumulation(100)], GradientClip=lambda: [fc.GradientClip(.1)], BnFreeze=lambda: [fc.BnFreeze()], ChannelsLast=lambda: [fc.ChannelsLast()])
ELSEWHERE = {'GatherPredsCallback', 'LRFinder', 'SkipToEpoch', 'MCDropoutCallback', 'TensorBoardCallback', 'TensorBoardProjectorCallback', 'WandbCallback'}   # tests of their own below
BASES = {'MixHandler', 'TensorBoardBaseCallback'}


def callbacks_of_fastai():
    "Names of all callbacks in fastai/callback/*.py and fastai/learner.py, read without importing them: some need packages"
    root = Path(fastai.__file__).parent
    bases = {}
    for f in [*(root/'callback').glob('*.py'), root/'learner.py']:
        for o in ast.parse(f.read_text()).body:
            if isinstance(o, ast.ClassDef): bases[o.name] = [b.id for b in o.bases if isinstance(b, ast.Name)]
    found = {'Callback'}
    while more := {k for k,v in bases.items() if found & set(v)} - found: found |= more
    return found


def test_the_table_knows_every_callback_of_fastai():
    names = [r.name for r in CALLBACKS]
    assert len(set(names)) == len(names) and set(names) == callbacks_of_fastai()
    untried = {r.name for r in CALLBACKS if r.differs in (TEXT, NO_PACKAGE, GPU)} | BASES
    assert set(MAKE) | ELSEWHERE == set(names) - untried


@pytest.mark.parametrize('name', MAKE)
def test_a_callback_of_fastai_does_the_same(folder, tmp_path, name):
    both = fit_alike(plain_and_ours(folder, tmp_path, MAKE[name], seeds=name in ('MixUp', 'CutMix')), lambda l: l.fit(3, .05))
    cbs = [next((cb for cb in learn.cbs if type(cb).__name__ in (name, 'Hooked')), None) for learn in both]
    if name=='FetchPredsCallback': alike(*(cb.preds for cb in cbs))
    if name=='CollectDataCallback': alike(*([len(cb.data), float(cb.data[0][0][0].float().sum()), cb.data[-1][3]] for cb in cbs))
    if name=='ActivationStats': alike(*(list(cb.layer_stats(0)[0]) for cb in cbs))
    if name=='CSVLogger': alike(*([{k: v for k,v in row.items() if k in ('epoch', 'train_loss', 'valid_loss', 'accuracy')}
                                   for row in csv.DictReader((learn.path/'history.csv').open())] for learn in both[:1]*2))
    if name=='ShortEpochCallback': assert len(both[1].steps.seen) < 12
    if name=='EarlyStoppingCallback': assert len(both[1].steps.seen) == 8   # two epochs
    if name=='ReduceLROnPlateau': assert len({lrs[0] for _,_,lrs in both[1].steps.seen}) > 1


def test_columns_in_a_csv_are_named_alike(folder, tmp_path):
    both = plain_and_ours(folder, tmp_path, lambda: [fc.CSVLogger()])
    for learn in both:
        with quietly(learn): learn.fit(2, .05)
    a,b = (list(csv.DictReader((learn.path/'history.csv').open())) for learn in both)
    assert list(a[0])[:4] == list(b[0])[:4] == ['epoch', 'train_loss', 'valid_loss', 'accuracy'] and list(a[0])[-1] == list(b[0])[-1] == 'time'
    for k in 'train_loss', 'valid_loss', 'accuracy': assert [float(r[k]) for r in a] == pytest.approx([float(r[k]) for r in b], rel=1e-4)


@pytest.mark.parametrize('short, long', [('accuracy', 'valid_accuracy'), ('valid_loss', 'valid_loss')])
def test_a_monitor_takes_both_names(folder, tmp_path, short, long):
    found = []
    for name in short, long:
        learn = cifar_learner(in_order(cifar_dls(folder, bs=50, device='cpu')), net(), bf16=False, path=tmp_path, cbs=fc.SaveModelCallback(monitor=name))
        with learn.no_bar(), quietly(learn): learn.fit(2, .05)
        found.append(learn.save_model.best)
    assert found[0] == found[1]


def test_the_graph_gets_the_validation_loss(folder, tmp_path, monkeypatch):
    drawn = []
    both = plain_and_ours(folder, tmp_path, graph)
    for learn in both:
        calls = []
        def keep(self, graphs, x_bounds=None, y_bounds=None): calls.append(([float(o) for o in graphs[1][1]], x_bounds))
        for cls in 'fastprogress.fastprogress.ConsoleMasterBar', 'cifar_cam.recorder._Lines': monkeypatch.setattr(f'{cls}.update_graph', keep)
        with quietly(learn): learn.fit(2, .05)
        drawn.append(calls[-1])
    alike(*drawn)
    assert drawn[1][0] == pytest.approx([r['valid_loss'] for r in done(both[1])['rows']], rel=1e-5)


def test_tensorboard_logs_the_same(folder, tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    logs = []
    for learn,log in zip(plain_and_ours(folder, tmp_path), ('a', 'b')):
        learn.add_cb(TensorBoardCallback(tmp_path/log, trace_model=True))
        with quietly(learn): learn.fit(2, .05)
        events = EventAccumulator(str(tmp_path/log)).Reload()
        assert events.Tags()['graph'] and 'Sample results' in events.Tags()['images']
        logs.append({tag: [(o.step, o.value) for o in events.Scalars(tag)] for tag in events.Tags()['scalars']})
    assert set(logs[1]) - set(logs[0]) == {'lr'} and {'train_loss', 'lr_0', 'valid_loss', 'accuracy'} <= set(logs[0])
    for tag in logs[0]: alike(logs[0][tag], logs[1][tag], tag)


@pytest.mark.parametrize('opt', ['adam', 'nesterov', 'muon'])
def test_tensorboard_logs_the_settings_of_pytorchs_optimizers(folder, tmp_path, opt):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    learn = cifar_learner(cifar_dls(folder, bs=50, device='cpu'), net(), opt=opt, bf16=False, path=tmp_path, cbs=TensorBoardCallback(tmp_path/'log', trace_model=False))
    with quietly(learn): learn.fit(1, .01)
    assert list((tmp_path/'log').iterdir())


def test_the_projector_gets_the_same_features(folder, tmp_path):
    "fastai's own learner gives it plain tensors since `CastToTensor`, which it cannot take: both are tried without that callback"
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardProjectorCallback
    found = []
    for learn,log in zip(plain_and_ours(folder, tmp_path), ('a', 'b')):
        learn.remove_cb(CastToTensor)
        with quietly(learn):
            learn.fit(1, .05)
            learn.get_preds(cbs=TensorBoardProjectorCallback(tmp_path/log, layer=learn.model[0]))
        found.append((next((tmp_path/log).rglob('tensors.tsv')).read_text(), next((tmp_path/log).rglob('metadata.tsv')).read_text()))
    assert found[0][1] == found[1][1]
    alike(*([float(v) for v in tsv.split()] for tsv,_ in found))


def test_weights_and_biases_logs_the_same(folder, tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    from fastai.callback.wandb import WandbCallback
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_DIR', str(tmp_path))
    monkeypatch.setenv('WANDB_SILENT', 'true')
    monkeypatch.setenv('WANDB_CONSOLE', 'off')   # else it takes the terminal, and the system stops a test run in the background
    monkeypatch.setattr(Learner, 'gather_args', lambda self: {})   # fastcore's `init_args` trips over numbers in lists, in both learners
    logs = []
    for learn in plain_and_ours(folder, tmp_path):
        wandb.init(project='like-fastai', dir=str(tmp_path), reinit=True)
        log,calls = wandb.log,[]
        def keep(data, **kwargs):
            calls.append({k: float(v) for k,v in data.items() if isinstance(v, (int, float)) or getattr(v, 'numel', lambda: 0)()==1})
            return log(data, **kwargs)
        with monkeypatch.context() as mp:
            mp.setattr(wandb, 'log', keep)
            learn.add_cb(WandbCallback(log_preds=True, log_preds_every_epoch=True))
            with quietly(learn): learn.fit(2, .05)
        wandb.finish()
        logs.append([{k: v for k,v in c.items() if k not in ('train_samples_per_sec', 'train_accuracy', 'lr')} for c in calls])
        assert learn.wandb.log_preds   # it switches this off where predictions cannot be fetched
    alike(*logs)


def test_dropout_while_predicting_draws_and_draws_again(folder, tmp_path):
    both = plain_and_ours(folder, tmp_path, dropout=.5)
    found = []
    for learn in both:
        set_seed(1)
        with quietly(learn): found.append([learn.get_preds(cbs=fc.MCDropoutCallback())[0] for _ in range(2)])
    alike(*found)
    assert not torch.equal(*found[1])


# ---- methods

def grouped(learn):
    "Two groups, of which the first is frozen"
    learn.freeze()
    return [p.requires_grad for p in learn.model.parameters()]


def one_step(learn):
    with quietly(learn), learn.no_bar():
        learn.create_opt()
        for event in 'before_fit', 'before_epoch', 'before_train': learn(event)
        learn.dl = learn.dls.train
        learn.n_iter = len(learn.dl)
        learn.one_batch(0, learn.dl.one_batch())
        shapes = learn.x.shape,learn.y.shape
        learn.all_batches()
        learn('after_fit')
    return [float(learn.loss), *map(list, shapes), learn.to_detach(learn.loss).item()]


def exported(learn):
    learn.export('e.pkl')
    return load_learner(learn.path/'e.pkl').predict(next(iter((learn.dls.path/'test').rglob('*.png'))))[2]


def saved(learn):
    before = learn.get_preds()[0]
    file = learn.save('w')
    with torch.no_grad(): learn.model[1][1].bias.fill_(5.)
    learn.load('w')
    alike(learn.get_preds()[0], before)
    return file.relative_to(learn.path).as_posix()


def events(learn): return [[type(cb).__name__ for cb in learn.ordered_cbs(e) if isinstance(cb, Steps)] for e in ('after_step', 'after_fit')]


def come_and_go(learn):
    a,b,n = Callback(before_fit=lambda *_: None),TestCb(),len(learn.cbs)
    learn.add_cb(a).add_cbs([b])
    learn.remove_cb(a).remove_cbs([TestCb])
    with learn.added_cbs(TestCb()): inside = hasattr(learn, 'test_cb')
    with learn.removed_cbs(learn.steps): without = hasattr(learn, 'steps')
    return [len(learn.cbs) - n, inside, without, hasattr(learn, 'steps'), hasattr(learn, 'test_cb')]


class TestCb(Callback): __test__,name = False,'test_cb'


def losses(learn):
    with learn.loss_not_reduced(): return learn.loss_func(torch.zeros(4, 10), torch.arange(4))


def after_fit(learn, f):
    with quietly(learn): learn.fit(1, .05)
    return f(learn)


def trained(fit):
    def f(learn):
        with quietly(learn): fit(learn)
        return done(learn)
    return f


def found(learn):
    with learn.no_bar(): lrs = learn.lr_find(num_it=20, show_plot=False, suggest_funcs=(fc.valley, fc.steep))
    return [*lrs, [float(o) for o in learn.recorder.losses], learn.get_preds()[0]]


def layout(learn):
    learn.to_channelslast(use_amp=False)
    with quietly(learn): learn.fit(1, .05)
    learn.to_contiguous()
    return done(learn)


def context(learn):
    with learn.validation_context(), torch.no_grad(): return [learn.training, float(learn.loss_func(learn.model(learn.dls.valid.one_batch()[0]), learn.dls.valid.one_batch()[1]))]


def first_image(learn): return next(iter(sorted((learn.dls.path/'test').rglob('*.png'))))


DO = {
    'fit': trained(lambda l: l.fit(2, .05)), 'fit_one_cycle': trained(lambda l: l.fit_one_cycle(2, slice(.01, .1))), 'fit_flat_cos': trained(lambda l: l.fit_flat_cos(2, .05)),
    'fit_sgdr': trained(lambda l: l.fit_sgdr(2, 1, .05)), 'fine_tune': trained(lambda l: l.fine_tune(1, .05)), 'fit_triangle': trained(lambda l: l.fit_triangle(2, .01, .1, peak=1)),
    'start_epoch': trained(lambda l: l.fit(3, .05, start_epoch=1)), 'lr_find': found,
    'validate': lambda l: after_fit(l, lambda l: list(l.validate())), 'get_preds': lambda l: after_fit(l, lambda l: l.get_preds(with_input=True, with_decoded=True, with_loss=True)),
    'predict': lambda l: after_fit(l, lambda l: [str(l.predict(first_image(l))[0]), *l.predict(first_image(l))[1:]]), 'tta': lambda l: after_fit(l, lambda l: l.tta(n=2)),
    'show_results': lambda l: after_fit(l, lambda l: l.show_results(max_n=4, shuffle=False)), 'save': saved, 'load': saved, 'export': lambda l: after_fit(l, exported),
    'summary': lambda l: [line for line in l.summary().splitlines() if line.startswith(('Total', 'Loss'))],
    'freeze': grouped, 'freeze_to': lambda l: [l.freeze_to(1), [p.requires_grad for p in l.model.parameters()]], 'unfreeze': lambda l: [grouped(l), l.unfreeze(), [p.requires_grad for p in l.model.parameters()]],
    'create_opt': lambda l: [l.create_opt(), len(l.opt.hypers), sorted(l.opt.hypers[0])],
    **dict.fromkeys(('add_cb', 'add_cbs', 'remove_cb', 'remove_cbs', 'added_cbs', 'removed_cbs'), come_and_go), 'ordered_cbs': events,
    **dict.fromkeys(('one_batch', 'all_batches', 'to_detach', 'x', 'y'), one_step), 'loss_not_reduced': losses, 'validation_context': context,
    'no_logging': trained(lambda l: l.fit(1, .05)), 'no_mbar': lambda l: [l.no_mbar().__enter__(), l.create_mbar], 'metrics': lambda l: [m.name for m in l.metrics],
    'to_channelslast': layout, 'to_contiguous': layout}
SHOWN = {'no_bar', 'show_training_loop', 'gather_args'}   # tests of their own


def test_the_table_knows_every_method_of_a_learner():
    public = {n for n in dir(Learner) if not n.startswith('_')}
    assert public <= set(METHODS)
    assert {m for m in public if m not in METHODS_DIFFER or m in ('fit', 'no_bar')} <= set(DO) | SHOWN


@pytest.mark.parametrize('name', DO)
def test_a_method_does_the_same(folder, tmp_path, name): alike(*(DO[name](learn) for learn in plain_and_ours(folder, tmp_path)))


def test_no_bar_puts_back_what_was_there(folder, tmp_path):
    plain,ours = plain_and_ours(folder, tmp_path)
    for learn in plain, ours:
        kind = type(learn.progress)
        with learn.no_bar(): assert not hasattr(learn, 'progress')
        assert type(learn.progress) is kind


def test_the_loop_lists_the_callbacks_of_both(folder, tmp_path, capsys):
    for learn in plain_and_ours(folder, tmp_path):
        learn.show_training_loop()
        assert '- after_step     : [Steps]' in capsys.readouterr().out
        with pytest.raises(Exception, match='missing after_lunch'): learn('after_lunch')


def test_set_seed_steers_a_plain_learner_and_the_seed_ours(folder, tmp_path):
    "The difference on purpose: with dropout, a plain Learner repeats itself only after `set_seed`"
    def train(i, seed):
        learn = plain_and_ours(folder, tmp_path, dropout=.5)[i]
        set_seed(seed)
        with quietly(learn): learn.fit(1, .05)
        return learn.steps.seen
    assert train(0, 1) == train(0, 1) != train(0, 2)
    assert train(1, 1) == train(1, 2)


# ---- metrics

def test_the_table_knows_every_metric_of_fastai():
    multi = {n for n in fm.__all__ if n.endswith(('Multi', '_multi'))}
    assert set(fm.__all__) - multi - OTHER_METRICS == set(MANY) | set(TWO)


@pytest.mark.filterwarnings('ignore')
def test_metrics_of_many_classes_are_the_same(folder, tmp_path):
    both = fit_alike(plain_and_ours(folder, tmp_path, metrics=list(MANY.values())))
    assert len(both[0].recorder.metric_names) == 4 + len(MANY)


@pytest.mark.filterwarnings('ignore')
def test_metrics_of_two_classes_are_the_same(folder, tmp_path):
    from fastai.vision.all import get_image_files, ImageDataLoaders
    files = get_image_files(folder/'train')
    def dls(): return ImageDataLoaders.from_path_func('.', sorted(files), lambda f: f.parent.name < 'heart', valid_pct=.3, seed=1, bs=32, num_workers=0)
    both = fit_alike(plain_and_ours(folder, tmp_path, metrics=list(TWO.values()), n=2, dls=dls))
    assert len(both[0].recorder.metric_names) == 4 + len(TWO)


# ---- the page

def page():
    lines = ['# The same as fastai', '',
             'What works with a fastai `Learner` works with the one of `cifar_learner`. A test trains both on the same images in the same order, without augmentation and half precision,',
             'and compares steps, columns, files, best values and predictions. These are its tables; `python tests/test_like_fastai.py` writes this page.', '',
             '## Callbacks', '', '| callback | what it does | difference |', '|---|---|---|',
             *(f'| `{r.name}` | {r.does} | {r.differs or "none"} |' for r in CALLBACKS), '',
             '## Methods of `Learner`', '', '| method | what it does | difference |', '|---|---|---|',
             *(f'| `{k}` | {v or "—"} | {METHODS_DIFFER.get(k, "none")} |' for k,v in METHODS.items()), '',
             '## Metrics', '', 'All metrics of one label an image give the same values: ' + ', '.join(f'`{n}`' for n in dict.fromkeys([*MANY, *TWO])) + '.', '']
    return '\n'.join(lines)


def test_the_page_is_that_of_these_tables(): assert (Path(__file__).parents[1]/'docs'/'like-fastai.md').read_text() == page()


if __name__=='__main__': (Path(__file__).parents[1]/'docs'/'like-fastai.md').write_text(page())
