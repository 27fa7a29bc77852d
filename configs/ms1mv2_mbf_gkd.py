# MobileFaceNet on MS1MV2 with GKD: grouped logits, primary and binary; CosFace's margin and the epochs as published.
# Copy into arcface_torch/configs/ and run the trainer on it; only keys that differ from configs/base.py.
# Another student: network = "r18". Other data: the lines from rec to val_targets (for WebFace42M also sample_rate,
# batch_size and lr) of DATA_mbf_adadistill.py.
from easydict import EasyDict as edict

import arcface_kd

config = edict()
config.margin_list = (1.0, 0.0, 0.4)
config.network = "mbf"
config.fp16 = True
config.save_all_states = True
config.output = None

config.rec = "/train_tmp/faces_emore"
config.num_classes = 85742
config.num_image = 5822653
config.num_epoch = 20
config.warmup_epoch = 4
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]

# The classifier: the folder of the teacher's run, with checkpoint_gpu_*.pt, or a file.
config.kd = "gkd"
config.kd_teacher = "/train_tmp/teachers/r50.pt"
config.kd_classifier = "/train_tmp/teachers/r50"

arcface_kd.attach(config)
