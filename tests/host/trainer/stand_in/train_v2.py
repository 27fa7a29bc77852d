"""A trainer of our own that asks for the same things, in the same order and with the same arguments, as arcface_torch.

The real one cannot be had everywhere; this one runs in seconds without a GPU. ``test_stand_in.py`` holds the two
together, call by call, wherever there is a checkout.
"""

import argparse
import json
import os

import torch
from head import CombinedMarginLoss, PartialFC_V2  # type: ignore[import-not-found]
from loader import get_dataloader  # type: ignore[import-not-found]
from network import get_model  # type: ignore[import-not-found]
from schedule import PolynomialLRWarmup  # type: ignore[import-not-found]
from settings import get_config  # type: ignore[import-not-found]
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

rank = int(os.environ["RANK"])
local_rank = int(os.environ["LOCAL_RANK"])
world_size = int(os.environ["WORLD_SIZE"])
distributed.init_process_group("gloo")


def main(args: argparse.Namespace) -> None:
    cfg = get_config(args.config)
    torch.manual_seed(cfg.seed)
    os.makedirs(cfg.output, exist_ok=True)

    train_loader = get_dataloader(
        cfg.rec, local_rank, cfg.batch_size, cfg.dali, cfg.dali_aug, cfg.seed, cfg.num_workers
    )

    student = get_model(cfg.network, dropout=0.0, fp16=cfg.fp16, num_features=cfg.embedding_size).to("cpu")
    backbone = torch.nn.parallel.DistributedDataParallel(
        module=student, broadcast_buffers=False, device_ids=None, bucket_cap_mb=16, find_unused_parameters=True
    )
    backbone.register_comm_hook(None, fp16_compress_hook)
    backbone.train()
    backbone._set_static_graph()

    margin_loss = CombinedMarginLoss(64, *cfg.margin_list, cfg.interclass_filtering_threshold)
    head = PartialFC_V2(margin_loss, cfg.embedding_size, cfg.num_classes, cfg.sample_rate, False)
    head.train().to("cpu")
    groups = [{"params": backbone.parameters()}, {"params": head.parameters()}]
    if cfg.optimizer == "sgd":
        opt: torch.optim.Optimizer = torch.optim.SGD(
            params=groups, lr=cfg.lr, momentum=0.9, weight_decay=cfg.weight_decay
        )
    else:
        opt = torch.optim.AdamW(params=groups, lr=cfg.lr, weight_decay=cfg.weight_decay)

    steps_per_epoch = cfg.num_image // (cfg.batch_size * world_size)
    lr_scheduler = PolynomialLRWarmup(
        optimizer=opt, warmup_iters=steps_per_epoch * cfg.warmup_epoch, total_iters=steps_per_epoch * cfg.num_epoch
    )

    start_epoch = 0
    global_step = 0
    own_state = os.path.join(cfg.output, f"checkpoint_gpu_{rank}.pt")
    if cfg.resume:
        state = torch.load(own_state)
        start_epoch, global_step = state["epoch"], state["global_step"]
        backbone.module.load_state_dict(state["state_dict_backbone"])
        head.load_state_dict(state["state_dict_softmax_fc"])
        opt.load_state_dict(state["state_optimizer"])
        lr_scheduler.load_state_dict(state["state_lr_scheduler"])

    losses = []
    for epoch in range(start_epoch, cfg.num_epoch):
        if isinstance(train_loader, torch.utils.data.DataLoader):
            train_loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for _, (img, local_labels) in enumerate(train_loader):
            global_step += 1
            loss: torch.Tensor = head(backbone(img), local_labels)
            loss.backward()
            if global_step % cfg.gradient_acc == 0:
                torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)
                opt.step()
                opt.zero_grad()
            lr_scheduler.step()
            losses.append(loss.item())
            if global_step % cfg.verbose == 0 and rank == 0:
                # The host evaluates on one rank, in evaluation mode, between two steps.
                backbone.eval()
                with torch.no_grad():
                    backbone(img)
                backbone.train()

        if cfg.save_all_states:
            state = {
                "epoch": epoch + 1,
                "global_step": global_step,
                "state_dict_backbone": backbone.module.state_dict(),
                "state_dict_softmax_fc": head.state_dict(),
                "state_optimizer": opt.state_dict(),
                "state_lr_scheduler": lr_scheduler.state_dict(),
            }
            torch.save(state, own_state)
        if rank == 0:
            torch.save(backbone.module.state_dict(), os.path.join(cfg.output, "model.pt"))

    with open(os.path.join(cfg.output, f"losses_{rank}.json"), "w", encoding="utf-8") as file:
        json.dump(losses, file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=str, help="py config file")
    main(parser.parse_args())
