__version__ = "0.1.0"

import warnings

# fastai decorates a few functions with torch.jit.script; newer versions of PyTorch warn about it at every import.
warnings.filterwarnings('ignore', message='.*torch.jit.script.* is deprecated', category=FutureWarning)
