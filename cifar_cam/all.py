"Everything at once, in fastai's manner: `from cifar_cam.all import *`"
from fastai.vision.all import *

from cifar_cam.core import *
from cifar_cam.shapes import *
from cifar_cam.images import *
from cifar_cam.augment import *
from cifar_cam.loaders import *
from cifar_cam.models import *
from cifar_cam.optimizers import *
from cifar_cam.schedule import *
from cifar_cam.precision import *
from cifar_cam.parallel import *
from cifar_cam.learner import *
from cifar_cam.cam import *
from cifar_cam.panels import *
from cifar_cam.heads import *
from cifar_cam.predictions import *
from cifar_cam.interpret import *
from cifar_cam.photo import *
from cifar_cam.measures import *
from cifar_cam.scorecard import *
from cifar_cam.recipe import *
from cifar_cam.run import *
from cifar_cam.report import *
from cifar_cam.experiment import *
from cifar_cam.share import *
