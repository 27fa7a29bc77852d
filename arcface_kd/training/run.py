"""One run of the compact trainer: its objects and the loop over them."""

import contextlib
import inspect
import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor, nn
from tqdm import tqdm

from arcface_kd.checkpoints.files import checkpoint_file, finish_saving, save_checkpoint
from arcface_kd.checkpoints.run_settings import changes, require_same_run
from arcface_kd.checkpoints.shards import open_shards
from arcface_kd.checkpoints.tensor_file import save_tensors
from arcface_kd.data.formats.verification_bin import VerificationSet
from arcface_kd.distillation.drop_ins import DropIns
from arcface_kd.distributed.ranks import on_first_rank_first
from arcface_kd.errors import ArcfaceKDError, CheckpointError, ConfigError, DataError, NumberError, first_line
from arcface_kd.evaluation.verification import VerificationResult, evaluate, read_pairs
from arcface_kd.system.device import autocast_dtype, default_device
from arcface_kd.system.memory import out_of_memory_message
from arcface_kd.training.config_check import margin_of_config
from arcface_kd.training.schedule import linear_with_warmup

CLIP_NORM = 5.0  # on the backbone's gradients, as the host


_LEAST_LOSS_SCALE = 2.0**-10


# Each rank's batch norms keep their own statistics while it trains, as in the host. torch 2.13 gave the argument a new
# name and warns about the old one.
_RENAMED = "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel).parameters


_KEEP_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


# What the state of an optimiser and of a schedule brings along, whatever the config says by then.
_KEPT = ("lr", "momentum", "weight_decay")


# What may change on the way; the log says so.
_TOLD = ("batch_size", "gradient_acc", "fp16", "num_image", "num_epoch", "warmup_epoch")


@contextlib.contextmanager
def _named_damage(path: Path) -> Iterator[None]:
    """Name a checkpoint whose entries are not what a run can be set to."""
    try:
        yield
    except (ArcfaceKDError, torch.OutOfMemoryError):
        raise
    # Whatever torch's optimisers, schedules and generators stumble over.
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if out_of_memory_message(error, "") is not None:
            raise
        raise CheckpointError(
            f"{path} is no checkpoint to go on from: {type(error).__name__} {first_line(error)}; it is damaged, or of "
            "another trainer"
        ) from error


def check_loss_scale(scaler: torch.amp.GradScaler, step: int) -> None:
    """Refuse to go on when no loss scale keeps the gradients from overflowing; one that falls now and then is in order.

    Args:
        scaler: of the run.
        step: for the message.

    Raises:
        NumberError: the scale has fallen below ``2**-10``: every step is passed over.
    """
    if scaler.is_enabled() and scaler.get_scale() < _LEAST_LOSS_SCALE:
        raise NumberError(
            f"step {step}: the gradients overflow in fp16 at every loss scale down to {scaler.get_scale():.1g}, and no "
            "step is taken: lower lr, or switch fp16 off to look closer"
        )


class Run:
    """One run's objects and the loop over them."""

    def __init__(self, config: EasyDict, made: DropIns, rank: int, local_rank: int, world_size: int) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        self.methods = "+".join(made.distiller.kd.methods)
        self.logger = logging.getLogger("arcface_kd.run")
        self.notes: list[str] = []
        self.device = default_device(local_rank)
        self.folder = Path(config.output)
        self.loader = made.get_dataloader(
            config.rec, local_rank, config.batch_size, config.dali, config.dali_aug, config.seed, config.num_workers
        )
        if len(self.loader) == 0:
            raise DataError(
                f"{config.rec} has less than one batch of {config.batch_size} on {world_size} ranks: lower batch_size"
            )
        narrow = bool(config.fp16) and autocast_dtype(self.device) is not None
        if config.fp16 and not narrow:
            self.notes.append("fp16 is on but this processor has no bf16 units: training in fp32")
        student = made.get_model(config.network, dropout=0.0, fp16=narrow, num_features=config.embedding_size)
        if config.batch_size == 1 and any(isinstance(part, nn.BatchNorm1d) for part in student.modules()):
            raise ConfigError(
                f"batch_size is 1, and {config.network} normalises its embeddings over the batch: set at least 2"
            )
        # Convolutions run several times faster on a CPU with the channels innermost; on a GPU with fp16 as well.
        self.student = student.to(self.device)
        self.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
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
        steps = config.num_image // (config.batch_size * world_size)
        # The schedule counts the images that the config states, as the host does; the loop those that are there.
        self.schedule = linear_with_warmup(
            self.optimizer, steps * config.warmup_epoch, max(1, steps * config.num_epoch)
        )
        self.last_step = len(self.loader) * config.num_epoch
        self.scaler = torch.amp.GradScaler(
            self.device.type, growth_interval=100, enabled=narrow and self.device.type == "cuda"
        )
        self.sets = self._verification_sets()
        self.results: dict[str, VerificationResult] = {}
        self.best: dict[str, float] = {}
        self.epoch = self.step = self.first_step = 0
        self.seconds, self.images = 0.0, 0
        self.writer: Any = None

    def _optimizer(self) -> torch.optim.Optimizer:
        # The head's group comes last, as the host has it.
        groups = [{"params": list(self.backbone.parameters())}, {"params": list(self.head.parameters())}]
        config = self.config
        if config.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)

    def _verification_sets(self) -> list[VerificationSet]:
        """The verification sets that lie beside the records; a name without a file is noted, as nobody has all."""
        if self.rank != 0:
            return []
        sets = []
        for name in self.config.val_targets:
            path = Path(self.config.rec) / f"{name}.bin"
            if path.is_file():
                sets.append(read_pairs(path))
            else:
                self.notes.append(f"no verification set {path}")
        return sets

    def resume(self) -> None:
        """Go on from the last epoch that was saved, by as many ranks or others."""
        # First of all: rank 0's own may be what a kill has left waiting.
        on_first_rank_first(lambda: finish_saving(self.folder), self.ranks)
        path = checkpoint_file(self.folder, 0)
        if not path.is_file():
            raise ConfigError(f"resume is on but there is no {path}; set resume=False, or save_all_states=True before")
        # What is not split over ranks is in any file; a rank that the run did not have takes the first one's.
        saved_by = open_shards(self.folder).world_size
        if self.rank < saved_by:
            path = checkpoint_file(self.folder, self.rank)
        state = torch.load(path, map_location=self.device, weights_only=True)
        with _named_damage(path):
            self._check_state(path, state)
            began = state.get("settings", {})
            require_same_run(began, self._kept())
            self.epoch, self.step = state["epoch"], state["global_step"]
            self.student.load_state_dict(state["state_dict_backbone"])
            self.head.load_state_dict(state["state_dict_softmax_fc"])
            self.optimizer.load_state_dict(state["state_optimizer"])
            self.schedule.load_state_dict(state["state_lr_scheduler"])
            # One that was off, as on a CPU, has left nothing.
            if state.get("state_scaler"):
                self.scaler.load_state_dict(state["state_scaler"])
            if "state_random" in state:
                torch.set_rng_state(state["state_random"].cpu())
            if saved_by == self.world_size:
                parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
                for parameter, gradient in zip(parameters, state.get("state_gradients", ()), strict=False):
                    parameter.grad = gradient
        self.first_step = self.step
        self.notes.append(f"resumed after epoch {self.epoch}, step {self.step}")
        now = {key: self.config[key] for key in _TOLD}
        self.notes += changes({**began, "ranks": saved_by}, {**now, "ranks": self.world_size})

    def _kept(self) -> dict[str, Any]:
        """What the run goes on with as it began."""
        # Steps, and with them the schedule's, are of so many images.
        batch = {"batch_size x ranks": self.config.batch_size * self.world_size}
        return {**{key: self.config[key] for key in _KEPT}, **batch}

    def _check_state(self, path: Path, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint that another network or optimiser has left, before anything of it is loaded."""
        parts = ("epoch", "global_step", "state_dict_backbone", "state_optimizer", "state_lr_scheduler")
        missing = [name for name in parts if name not in state]
        if missing:
            raise CheckpointError(f"{path} holds no {', '.join(missing)}: it is not a checkpoint to go on from")
        met, own = state["state_dict_backbone"], self.student.state_dict()
        other = [
            name for name in {**met, **own} if name not in met or name not in own or met[name].shape != own[name].shape
        ]
        if other:
            raise CheckpointError(
                f"{path} is of another student than {self.config.network} of {self.config.embedding_size} dimensions, "
                f"see {other[0]}: set network and embedding_size as the run began, or another output"
            )
        if ("momentum" in state["state_optimizer"]["param_groups"][0]) != (self.config.optimizer == "sgd"):
            raise CheckpointError(
                f"{path} was left by another optimizer than {self.config.optimizer}: set optimizer as the run began, "
                "or another output"
            )

    def save(self) -> None:
        """Write the host's files: this rank's checkpoint where the config wants it, and the student on rank 0."""
        self.head.numbers.settle()
        if self.writer is not None:
            # A resumed run begins after the last saved step: what came before must be in the log.
            self.writer.flush()
        if self.rank == 0:
            # Before the checkpoints: where they say that an epoch is done, its student is there.
            save_tensors(self.folder / "model.pt", self.student.state_dict())
        if self.config.save_all_states:
            save_checkpoint(self.folder, self._state(), self.ranks)

    def _state(self) -> dict[str, Any]:
        state = {
            "epoch": self.epoch,
            "global_step": self.step,
            "state_dict_backbone": self.student.state_dict(),
            "state_dict_softmax_fc": self.head.state_dict(),
            "state_optimizer": self.optimizer.state_dict(),
            "state_lr_scheduler": self.schedule.state_dict(),
            "state_scaler": self.scaler.state_dict(),
            "state_random": torch.get_rng_state(),
            "settings": {**self._kept(), **{key: self.config[key] for key in _TOLD}},
        }
        if self.step % self.config.gradient_acc:
            # An epoch may end between two steps of the optimizer.
            state["state_gradients"] = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
        return state

    def train_epoch(self, bar: "tqdm[Any]") -> None:
        """One pass over the loader."""
        self.loader.sampler.set_epoch(self.epoch)
        began = time.perf_counter()
        for images, labels in self.loader:
            loss = self._train_step(images, labels)
            bar.update()
            if self.step % self.config.frequent == 0:
                self._sync()
                self.seconds += time.perf_counter() - began
                self._log(float(loss), bar)
                began = time.perf_counter()
            if self.step % self.config.verbose == 0:
                self._sync()
                self.seconds += time.perf_counter() - began
                self.verify()
                began = time.perf_counter()
        self._sync()
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
        with warnings.catch_warnings():
            # As in the host, the schedule goes on every micro-step, the first ones before the optimizer has stepped.
            warnings.filterwarnings("ignore", "Detected call of", UserWarning)
            self.schedule.step()
        self.images += images.shape[0] * self.world_size
        return loss.detach()

    def _sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def rate(self) -> float:
        """Images a second on all ranks so far."""
        return self.images / self.seconds if self.seconds else 0.0

    def _log(self, loss: float, bar: "tqdm[Any]") -> None:
        self.head.numbers.settle()
        check_loss_scale(self.scaler, self.step)
        rate = self.schedule.get_last_lr()[0]
        terms = [f"{name} {float(term):.3f}" for name, term in self.head.last_terms.items()]
        bar.set_postfix_str(f"{self.rate:.0f} images/s, loss {loss:.3f} = {' + '.join(terms)}")
        remaining = (self.last_step - self.step) * self.seconds / (self.step - self.first_step)
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
                result = evaluate(self.student, verification_set, device=self.device)
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
