# MobileFaceNet on MS1MV2 with AdaDistill and embedding distillation; AdaDistill's published data, margin and epochs.
# Copy into arcface_torch/configs/ and run the trainer on it; only keys that differ from configs/base.py.
# Another student: network = "r18". Other data: the lines from rec to val_targets (for WebFace42M also sample_rate,
# batch_size and lr) of DATA_mbf_adadistill.py.
from easydict import EasyDict as edict

import arcface_kd

config = edict()
config.margin_list = (1.0, 0.45, 0.0)
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

# AdaDistill's centers take the place of the classifier, the distance pulls each row besides.
config.kd = "adadistill+embedding"
config.kd_teacher = "/train_tmp/teachers/r50.pt"
# For cameras add "student.augment": "quality" (docs/cameras.md).
config.kd_option = {"embedding.weight": 64.0}

arcface_kd.attach(config)
