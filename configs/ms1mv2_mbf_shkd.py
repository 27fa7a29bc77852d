# MobileFaceNet on MS1MV2 with SH-KD: temporary student, teacher against its frozen classes, final student; schedule and
# loss of the face experiments were never published and are chosen here.
# Copy into arcface_torch/configs/, then `arcface-kd recipe PATH/TO/arcface_torch configs/ms1mv2_mbf_shkd --nproc 8`,
# or run the trainer on it three times: each makes the run that is next.
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

# The teacher is trained further from here, at a tenth of the learning rate; without kd_teacher, from scratch:
# config.kd_option = {"shkd.teacher_network": "r50"}.
config.kd = "shkd"
config.kd_teacher = "/train_tmp/teachers/r50.pt"
config.kd_option = {"shkd.distil": "kd", "shkd.teacher_epochs": 10}

arcface_kd.attach(config)
