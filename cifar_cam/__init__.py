__version__ = "0.2.0"

import re, sys, warnings
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, requires, version

# fastai decorates a few functions with torch.jit.script; newer versions of PyTorch warn about it at every import.
warnings.filterwarnings('ignore', message='.*torch.jit.script.* is deprecated', category=FutureWarning)


def _numbers(text):
    return tuple(int(n) for n in re.match(r'\d+(?:\.\d+)*', text)[0].split('.'))


def _lowest(package, user):
    "The lowest version of `package` that the installed `user` takes; None where its metadata name none"
    found = [re.match(rf'{package}\s*\(?(?:[<>=!~][^;]*)?>=\s*([\d.]+)', line) for line in requires(user) or []]
    return next((m[1] for m in found if m), None)


def _check(package, user):
    "ImportError where `package` is too old for `user`: as it is installed, or as it was imported before pip raised it"
    try:
        lowest, installed = _lowest(package, user), version(package)
    except PackageNotFoundError: # a checkout on the path, with no metadata; or no such package, which the import will say
        return
    imported = getattr(sys.modules.get(package), '__version__', installed)
    if lowest is None or min(_numbers(installed), _numbers(imported)) >= _numbers(lowest):
        return
    if _numbers(installed) < _numbers(lowest):
        raise ImportError(f"{user} needs {package}>={lowest}, and {installed} is installed: pip install '{package}>={lowest}'")
    raise ImportError(f"{package} {installed} is installed, but this session imported {imported} before, "
                      f"which is too old for {user}: restart it, and run again from the top")


# Colab has both, too old. Without the check a training fails at the first step of its optimizer, and does not say why.
_check('fastai', 'cifar_cam')
_check('fastcore', 'fastai')


RETIRED_MODULES = {'data': 'core, images, loaders', 'train': 'learner, precision, parallel, optimizers',
                   'score': 'measures, scorecard', 'recipes': 'recipe, evaluate, history, run, experiment, share'}
RETIRED_NAMES = {'Flip': 'HorizontalFlip', 'moved': 'shifted_views', 'mirrored': 'mirrored_views', 'change': 'change_recipe',
                 'predict': 'predict_loader', 'shard': 'shard_loader', 'lr_min': 'suggest_lr_min', 'lr_max': 'suggest_lr_max',
                 'evaluate': 'evaluate_learner', 'impute': 'impute_pixels', 'orthogonalize': 'newton_schulz',
                 'unpack': 'unpack_images', 'tested_on': 'image_table', 'check_recipe': 'Recipe', 'Bf16': 'HalfPrecision'}


class _RetiredModules(MetaPathFinder):
    "An import of a module that was split names the modules that took its place"
    def find_spec(self, name, path=None, target=None):
        package,_,module = name.partition('.')
        if package==__name__ and module in RETIRED_MODULES:
            new = RETIRED_MODULES[module]
            raise ModuleNotFoundError(f'{name} was split: its names are in cifar_cam.all, or in {new} of cifar_cam', name=name)

sys.meta_path.insert(0, _RetiredModules())


def retired_name(
    name:str, # that a module was asked for
) -> Exception: # to be raised
    "What took the place of a name that is no more"
    # an ImportError, since `from cifar_cam.all import x` would swallow the words of an AttributeError
    if name in RETIRED_NAMES: return ImportError(f'{name!r} is called {RETIRED_NAMES[name]} now')
    return AttributeError(f"module 'cifar_cam.all' has no attribute {name!r}")
