"Everything at once, in fastai's manner: `from cifar_cam.all import *`"
from fastai.vision.all import *

from cifar_cam.core import *
from cifar_cam.shapes import *
from cifar_cam.photos import *
from cifar_cam.tables import *
from cifar_cam.batches import *
from cifar_cam.formats import *
from cifar_cam.images import *
from cifar_cam.augment import *
from cifar_cam.loaders import *
from cifar_cam.library import *
from cifar_cam.models import *
from cifar_cam.optimizers import *
from cifar_cam.schedule import *
from cifar_cam.precision import *
from cifar_cam.parallel import *
from cifar_cam.callbacks import *
from cifar_cam.recorder import *
from cifar_cam.learner import *
from cifar_cam.ablation import *
from cifar_cam.forward import *
from cifar_cam.layers import *
from cifar_cam.maps import *
from cifar_cam.targets import *
from cifar_cam.attention import *
from cifar_cam.cam import *
from cifar_cam.panels import *
from cifar_cam.heads import *
from cifar_cam.predictions import *
from cifar_cam.interpret import *
from cifar_cam.photo import *
from cifar_cam.measures import *
from cifar_cam.scorecard import *
from cifar_cam.evidence import *
from cifar_cam.copies import *
from cifar_cam.triage import *
from cifar_cam.truth import *
from cifar_cam.recipe import *
from cifar_cam.comparison import *
from cifar_cam.evaluate import *
from cifar_cam.history import *
from cifar_cam.run import *
from cifar_cam.summary import *
from cifar_cam.charts import *
from cifar_cam.network import *
from cifar_cam.report import *
from cifar_cam.experiment import *
from cifar_cam.share import *
from cifar_cam.crossfit import *
from cifar_cam.inputs import *
from cifar_cam.page import *
from cifar_cam.predict import *
from cifar_cam.validate import *
from cifar_cam.export import *
from cifar_cam.space import *
from cifar_cam.search import *
from cifar_cam.sweep import *
from cifar_cam.checks import *


def __getattr__(name):
    from cifar_cam import retired_name
    raise retired_name(name)
