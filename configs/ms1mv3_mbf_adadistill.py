# MobileFaceNet on MS1MV3 with AdaDistill: AdaDistill's published margin and epochs.
# Copy into arcface_torch/configs/ and run the trainer on it; only keys that differ from configs/base.py.
from easydict import EasyDict as edict

import arcface_kd

config = edict()
config.margin_list = (1.0, 0.45, 0.0)
config.network = "mbf"
config.fp16 = True
config.save_all_states = True
config.output = None

config.rec = "/train_tmp/ms1m-retinaface-t1"
config.num_classes = 93431
config.num_image = 5179510
config.num_epoch = 26
config.warmup_epoch = 0
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]

config.kd = "adadistill"
config.kd_teacher = "/train_tmp/teachers/r50.pt"

arcface_kd.attach(config)
