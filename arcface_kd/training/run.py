"""One run of the compact trainer: its objects and the loop over them."""

import inspect
import logging
import time
import warnings
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from arcface_kd.data.formats.verification_bin import VerificationSet
from arcface_kd.data.joined import verification_folder
from arcface_kd.distillation.drop_ins import DropIns
from arcface_kd.errors import ConfigError, DataError, NumberError, first_line
from arcface_kd.evaluation.verification import VerificationResult, evaluate, read_pairs
from arcface_kd.system.device import autocast_dtype, default_device, synchronize
from arcface_kd.training.config_check import margin_of_config
from arcface_kd.training.schedule import decay_with_warmup

CLIP_NORM = 5.0  # on the backbone's gradients, as the host

_LEAST_LOSS_SCALE = 2.0**-10

# Each rank's batch norms keep their own statistics while it trains, as in the host. torch 2.13 gave the argument a new
# name and warns about the old one.
_RENAMED = "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel).parameters
_KEEP_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


def fused_sgd(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.SGD:
    """SGD in torch's fused kernels, which see the loss scaler's finding of an overflow without making the host wait.

    Args:
        groups: of parameters.
        settings: of ``torch.optim.SGD``.
    """
    optimizer = torch.optim.SGD(groups, fused=True, **settings)
    # In the first step the kernel takes over memory that nobody has written, and where that step is passed over, as
    # with fp16 it often is, the second one takes what lies there for momentum (torch 2.11 on a GPU, 2.13 on a CPU).
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["momentum"] and parameter.requires_grad:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def check_loss_scale(scaler: torch.amp.GradScaler, step: int) -> None:
    """Stop when the gradients overflow at every loss scale; a scale that falls now and then is normal."""
    if scaler.is_enabled() and scaler.get_scale() < _LEAST_LOSS_SCALE:
        raise NumberError(
            f"step {step}: the gradients overflow in fp16 at every loss scale down to {scaler.get_scale():.1g}, and no "
            "step is taken: lower lr, or switch fp16 off to look closer"
        )


class MovingAverage(AveragedModel):
    """The moving average of a student's weights and of its batch norms' statistics.

    Counts, and weights that are not trained, are the student's own. torch's own update sends the number of steps to the
    device, for which the host waits in each step.

    Args:
        student: the module; a copy of it is ``module``.
        decay: what stays of the average in a step, in (0, 1).
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        super().__init__(student, use_buffers=True)
        self._decay = decay
        self.eval()

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take one step towards a student; the first one takes over its numbers."""
        own = [*self.module.parameters(), *self.module.buffers()]
        met = [*model.parameters(), *model.buffers()]
        has_begun = bool(self.n_averaged > 0)
        # Such as a scale that a method sets: axes that it has dropped are dropped at once.
        fixed = {id(each) for each in model.parameters() if not each.requires_grad}
        moves = [has_begun and each.is_floating_point() and id(each) not in fixed for each in met]
        stays = [not each for each in moves]
        if any(moves):
            torch._foreach_lerp_([*compress(own, moves)], [*compress(met, moves)], 1 - self._decay)
        if any(stays):
            torch._foreach_copy_([*compress(own, stays)], [*compress(met, stays)])
        self.n_averaged += 1


class Run:
    """One run's objects and the loop over them.

    Args:
        config: a checked arcface_torch config.
        made: the drop-ins.
        rank: of this process.
        local_rank: its number on its machine.
        world_size: number of ranks.

    Attributes:
        epoch: epochs done.
        step: micro-steps done, those before a resume included.
        images_a_step: ``batch_size`` times the number of ranks.
        steps_per_epoch: of the schedule, from ``num_image`` as in the host; the loop follows the data.
        writer: the TensorBoard writer; None on ranks other than 0.

    Raises:
        ConfigError: a key that cannot be honoured with this data or network.
        DataError: records or verification sets that cannot be read.
    """

    def __init__(self, config: EasyDict, made: DropIns, rank: int, local_rank: int, world_size: int) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        self.methods = "+".join(made.distiller.kd.methods)
        self.logger = logging.getLogger("arcface_kd.run")
        self.device = default_device(local_rank)
        self.folder = Path(config.output)
        self.images_a_step = config.batch_size * world_size
        self.loader = made.get_dataloader(
            config.rec, local_rank, config.batch_size, config.dali, config.dali_aug, config.seed, config.num_workers
        )
        if len(self.loader) == 0:
            raise DataError(
                f"{config.rec} has less than one batch of {config.batch_size} on {world_size} ranks: lower batch_size"
            )
        narrow = bool(config.fp16) and autocast_dtype(self.device) is not None
        if config.fp16 and not narrow:
            self.logger.info("fp16 is on but this processor has no bf16 units: training in fp32")
        self.student = self._student(made, narrow)
        decay = config.get("ema", 0.0)
        self.average = MovingAverage(self.student, decay) if decay else None
        self.backbone: nn.Module = self.student
        if world_size > 1:
            ids = [local_rank] if self.device.type == "cuda" else None
            self.backbone = nn.parallel.DistributedDataParallel(self.student, device_ids=ids, **_KEEP_BUFFERS)
        self.head = made.PartialFC_V2(
            margin_of_config(config), config.embedding_size, config.num_classes, config.sample_rate, False
        )
        self.head.train().to(self.device)
        self.ranks = self.head.ranks
        self.optimizer = self._optimizer()
        self.steps_per_epoch = config.num_image // self.images_a_step
        self.schedule = decay_with_warmup(
            self.optimizer,
            self.steps_per_epoch * config.warmup_epoch,
            max(1, self.steps_per_epoch * config.num_epoch),
            config.get("lr_decay", "linear"),
        )
        self.scaler = torch.amp.GradScaler(
            self.device.type, growth_interval=100, enabled=narrow and self.device.type == "cuda"
        )
        self.sets = self._verification_sets()
        self.results: dict[str, VerificationResult] = {}
        self.best: dict[str, float] = {}
        self.epoch = self.step = self.first_step = 0
        self.seconds, self.images = 0.0, 0
        self.writer: Any = None

    def _student(self, made: DropIns, narrow: bool) -> nn.Module:
        config = self.config
        student = made.get_model(config.network, dropout=0.0, fp16=narrow, num_features=config.embedding_size)
        if config.batch_size == 1 and any(isinstance(part, nn.BatchNorm1d) for part in student.modules()):
            raise ConfigError(
                f"batch_size is 1, and {config.network} normalises its embeddings over the batch: set at least 2"
            )
        # Convolutions run several times faster on a CPU with the channels innermost; on a GPU with fp16 as well.
        student.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return student

    def _optimizer(self) -> torch.optim.Optimizer:
        # The head's group comes last, as the host has it.
        groups = [{"params": list(self.backbone.parameters())}, {"params": list(self.head.parameters())}]
        config = self.config
        if config.optimizer == "sgd":
            settings: dict[str, Any] = {
                "lr": config.lr,
                "momentum": config.momentum,
                "weight_decay": config.weight_decay,
            }
            return fused_sgd(groups, **settings) if self.device.type == "cuda" else torch.optim.SGD(groups, **settings)
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)

    def _verification_sets(self) -> list[VerificationSet]:
        """The verification sets beside the first records; a missing one is logged, since few people have all."""
        if self.rank != 0:
            return []
        sets = []
        for name in self.config.val_targets:
            path = Path(verification_folder(self.config.rec)) / f"{name}.bin"
            if path.is_file():
                sets.append(read_pairs(path))
            else:
                self.logger.info("no verification set %s", path)
        return sets

    @property
    def judged(self) -> nn.Module:
        """The student that is verified and written: with ``ema`` the average of its weights."""
        return self.student if self.average is None else self.average.module

    @property
    def last_step(self) -> int:
        """The step that the run ends with."""
        return int(self.step + len(self.loader) * (self.config.num_epoch - self.epoch))

    def train_epoch(self, bar: "tqdm[Any]") -> None:
        """One pass over the loader."""
        last_step = self.last_step
        self.loader.sampler.set_epoch(self.epoch)
        began = time.perf_counter()
        for images, labels in self.loader:
            loss = self._train_step(images, labels)
            bar.update()
            if self.step % self.config.frequent == 0:
                synchronize(self.device)
                self.seconds += time.perf_counter() - began
                self._log(float(loss), last_step, bar)
                began = time.perf_counter()
            if self.step % self.config.verbose == 0:
                synchronize(self.device)
                self.seconds += time.perf_counter() - began
                self.verify()
                began = time.perf_counter()
        synchronize(self.device)
        self.seconds += time.perf_counter() - began
        self.epoch += 1

    def _train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        self.step += 1
        embeddings = self.backbone(images.contiguous(memory_format=torch.channels_last))
        loss: Tensor = self.head(embeddings, labels)
        self.scaler.scale(loss).backward()
        if self.step % self.config.gradient_acc == 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.backbone.parameters(), CLIP_NORM)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            if self.average is not None:
                self.average.update_parameters(self.student)
        with warnings.catch_warnings():
            # As in the host, the schedule goes on every micro-step, the first ones before the optimizer has stepped.
            warnings.filterwarnings("ignore", "Detected call of", UserWarning)
            self.schedule.step()
        self.images += images.shape[0] * self.world_size
        return loss.detach()

    @property
    def rate(self) -> float:
        """Images a second on all ranks so far."""
        return self.images / self.seconds if self.seconds else 0.0

    def _log(self, loss: float, last_step: int, bar: "tqdm[Any]") -> None:
        self.head.monitor.settle()
        check_loss_scale(self.scaler, self.step)
        rate = self.schedule.get_last_lr()[0]
        terms = [f"{name} {float(term):.3f}" for name, term in self.head.last_terms.items()]
        bar.set_postfix_str(f"{self.rate:.0f} images/s, loss {loss:.3f} = {' + '.join(terms)}")
        remaining = (last_step - self.step) * self.seconds / (self.step - self.first_step)
        self.logger.info(
            "Speed %.2f samples/sec   Loss %.4f   LearningRate %.6f   Epoch: %d   Global Step: %d   Left: %d s",
            *(self.rate, loss, rate, self.epoch, self.step, remaining),
        )
        if self.writer is not None:
            self.writer.add_scalar("learning_rate", rate, self.step)
            self.writer.add_scalar("loss", loss, self.step)
            self.writer.add_scalar("images_per_second", self.rate, self.step)

    def verify(self) -> None:
        """Run the verification sets on rank 0, as the host does; one that fails is passed over."""
        for verification_set in self.sets:
            name = verification_set.name
            try:
                result = evaluate(self.judged, verification_set, device=self.device)
            # NaN, memory or anything else: the epoch's checkpoint is worth more than this number.
            except Exception as error:
                self.logger.warning("[%s][%d] not verified: %s", name, self.step, first_line(error))
                continue
            self.results[name] = result
            self.best[name] = max(self.best.get(name, 0.0), result.accuracy)
            where = f"[{name}][{self.step}]"
            self.logger.info("%sAccuracy-Flip: %1.5f+-%1.5f", where, result.accuracy, result.accuracy_std)
            self.logger.info("%sAccuracy-Highest: %1.5f", where, self.best[name])
            if self.writer is not None:
                self.writer.add_scalar(name, result.accuracy, self.step)
