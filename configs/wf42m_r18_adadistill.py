# iResNet-18 on WebFace42M with AdaDistill: its published margin, PartialFC sampling, the host's schedule of 16 GPUs.
# Copy into arcface_torch/configs/ and run the trainer on it; only keys that differ from configs/base.py.
from easydict import EasyDict as edict

import arcface_kd

config = edict()
config.margin_list = (1.0, 0.45, 0.0)
config.network = "r18"
config.fp16 = True
config.save_all_states = True
config.output = None
config.sample_rate = 0.2
config.batch_size = 512
config.lr = 0.4

config.rec = "/train_tmp/WebFace42M"
config.num_classes = 2059906
config.num_image = 42474557
config.num_epoch = 20
config.warmup_epoch = 2
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]

config.kd = "adadistill"
config.kd_teacher = "/train_tmp/teachers/r50.pt"

arcface_kd.attach(config)
