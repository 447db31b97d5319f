__version__ = "0.2.0"

import sys, warnings
from importlib.abc import MetaPathFinder

# fastai decorates a few functions with torch.jit.script; newer versions of PyTorch warn about it at every import.
warnings.filterwarnings('ignore', message='.*torch.jit.script.* is deprecated', category=FutureWarning)

RETIRED_MODULES = {'data': 'core, images, loaders', 'train': 'learner, precision, parallel, optimizers',
                   'score': 'measures, scorecard', 'recipes': 'recipe, evaluate, history, run, experiment, share'}
RETIRED_NAMES = {'Flip': 'HorizontalFlip', 'moved': 'shifted_views', 'mirrored': 'mirrored_views', 'change': 'change_recipe',
                 'predict': 'predict_loader', 'shard': 'shard_loader', 'lr_min': 'suggest_lr_min', 'lr_max': 'suggest_lr_max',
                 'evaluate': 'evaluate_learner', 'impute': 'impute_pixels', 'orthogonalize': 'newton_schulz',
                 'unpack': 'unpack_images', 'check_recipe': 'Recipe'}


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
