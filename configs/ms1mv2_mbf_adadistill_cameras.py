# MobileFaceNet on MS1MV2 with AdaDistill for cameras: degraded views and AdaFace's margin, AdaDistill's published data
# and epochs; see docs/cameras.md.
# Copy into arcface_torch/configs/ and run the trainer on it; only keys that differ from configs/base.py.
# Another student: network = "r18". Other data: the lines from rec to val_targets (for WebFace42M also sample_rate,
# batch_size and lr) of DATA_mbf_adadistill.py.
from easydict import EasyDict as edict

import arcface_kd

config = edict()
config.network = "mbf"
config.fp16 = True
config.save_all_states = True
config.output = None

config.rec = "/train_tmp/faces_emore"
config.num_classes = 85742
config.num_image = 5822653
config.num_epoch = 26
config.warmup_epoch = 0
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]

# The teacher sees clean faces and runs once, before: arcface-kd cache configs/ms1mv2_mbf_adadistill_cameras.py.
config.kd = "adadistill"
config.kd_teacher = "/train_tmp/teachers/r50.pt"
config.kd_cache = "/train_tmp/teachers/r50.cache"
config.kd_option = {"student.augment": "quality", "head.margin": "adaface", "adadistill.geometry": 3.0}

arcface_kd.attach(config)
