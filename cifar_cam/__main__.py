import sys

from cifar_cam.cli import main

sys.exit(main())
