"""``python -m arcface_kd`` is ``arcface-kd``."""

import sys

from arcface_kd.cli.main import main

sys.exit(main())
