"""What every config of the stand-in starts from: the keys of arcface_torch's base that its trainer reads."""

from easydict import EasyDict

config = EasyDict(
    margin_list=(1.0, 0.5, 0.0),
    network="tiny",
    resume=False,
    save_all_states=True,
    output="the_base_s_own",
    embedding_size=64,
    sample_rate=1,
    interclass_filtering_threshold=0,
    fp16=False,
    batch_size=8,
    optimizer="sgd",
    lr=0.05,
    weight_decay=5e-4,
    verbose=3,
    frequent=1,
    dali=False,
    dali_aug=False,
    gradient_acc=1,
    seed=2048,
    num_workers=0,
    warmup_epoch=0,
    val_targets=[],
)
