"Everything at once, in fastai's manner: `from cifar_cam.all import *`"
from fastai.vision.all import *

from cifar_cam.shapes import *
from cifar_cam.data import *
from cifar_cam.augment import *
from cifar_cam.models import *
from cifar_cam.schedule import *
from cifar_cam.train import *
from cifar_cam.cam import *
from cifar_cam.interpret import *
from cifar_cam.score import *
from cifar_cam.recipes import *
from cifar_cam.report import *
