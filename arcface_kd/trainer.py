"""The compact trainer: arcface_torch's loop and files on a CPU, one GPU or many, with the same drop-ins.

It holds no loss and no head: student, loader and head come from :mod:`arcface_kd.hook`, as in the host.
"""

import contextlib
import errno
import inspect
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor, distributed, nn
from tqdm import tqdm

from arcface_kd.bar_size import bar_size
from arcface_kd.checkpoint_files import checkpoint_file, finish_saving, save_checkpoint
from arcface_kd.config import BASE, RUN_KEYS
from arcface_kd.data.verification_bin import VerificationSet
from arcface_kd.device import narrow_format, training_device
from arcface_kd.distiller import Distiller
from arcface_kd.errors import (
    ArcfaceKDError,
    CheckpointError,
    ConfigError,
    DataError,
    NumberError,
    ResourceError,
)
from arcface_kd.evaluation.verification import VerificationResult, evaluate, read_pairs
from arcface_kd.hook import DropIns, drop_ins
from arcface_kd.losses.margin import Margin
from arcface_kd.near_names import suggestion
from arcface_kd.process_group import process_group
from arcface_kd.resharding import open_shards
from arcface_kd.run_lock import run_lock
from arcface_kd.run_settings import changes, require_agreement, require_same_run
from arcface_kd.schedule import linear_with_warmup
from arcface_kd.sharding import RankGroup, on_first_rank_first
from arcface_kd.shortages import named_shortages, shortage
from arcface_kd.standard_streams import stop_printing
from arcface_kd.teachers.base import first_line
from arcface_kd.tensor_file import save_tensors

_LOG = "training.log"
LOGIT_SCALE = 64.0  # the host's, which no key of its configs changes
CLIP_NORM = 5.0  # on the backbone's gradients, as the host
_LEAST_LOSS_SCALE = 2.0**-10
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM)
# Of files that the run itself has made: somebody has taken their folder away.
_IS_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)

# Each rank's batch norms keep their own statistics while it trains, as in the host. torch 2.13 gave the argument a new
# name and warns about the old one.
_RENAMED = "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel).parameters
_KEEP_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}

_AT_LEAST_ONE = (
    *("num_classes", "num_image", "num_epoch", "batch_size"),
    *("embedding_size", "gradient_acc", "frequent", "verbose"),
)
# What seeds are multiplied by, to make one of each step and rank, must leave them in 64 bits.
_LARGEST_SEED = 2**31 - 1

# What the state of an optimiser and of a schedule brings along, whatever the config says by then.
_KEPT = ("lr", "momentum", "weight_decay")
# What may change on the way; the log says so.
_TOLD = ("batch_size", "gradient_acc", "fp16", "num_image", "num_epoch", "warmup_epoch")
# What may differ from rank to rank, as the machines do, if all of them have it or none has.
_OF_MACHINES = ("rec", "num_workers", "kd_teacher", "kd_classifier", "kd_cache")

# Keys that only the host's own surroundings can honour, with the values at which they ask for nothing.
_HOST_ONLY = {"dali": (False,), "dali_aug": (False,), "using_wandb": (False,)}
_WANDB = ("wandb_key", "suffix_run_name", "wandb_entity", "wandb_project", "wandb_log_all", "wandb_resume", "notes")
_IGNORED_WITHOUT_WANDB = (*_WANDB, "save_artifacts")


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        output: its folder.
        steps: micro-steps of the whole run, resumed ones included.
        images_per_second: over this process's training steps on all ranks, without verification and saving.
        verification: the last result on each verification set; empty on ranks other than 0.
        student: the trained backbone, in eval mode.
    """

    output: Path
    steps: int
    images_per_second: float
    verification: Mapping[str, VerificationResult]
    student: nn.Module


def check_keys(config: Mapping[str, Any]) -> None:
    """Refuse a config that cannot be honoured to the letter.

    Args:
        config: a merged arcface_torch config.

    Raises:
        ConfigError: a key that nobody knows, one that only the host can honour, a missing one, a value out of range.
    """
    known = [*BASE, *RUN_KEYS, *_HOST_ONLY, *_IGNORED_WITHOUT_WANDB]
    for key in config:
        if key not in known and not key.startswith("kd"):
            raise ConfigError(f"the compact trainer does not know the key {key!r}{suggestion(key, known)}")
    for key, allowed in _HOST_ONLY.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ConfigError(f"{key}={config[key]!r} needs the host: run train_v2.py, or set {key}={allowed[0]!r}")
    wanted = ("rec", "num_classes", "num_image", "num_epoch", "warmup_epoch", "val_targets")
    missing = [key for key in wanted if config.get(key) is None]
    if missing:
        raise ConfigError(f"the config sets no {', '.join(missing)}; a run needs {', '.join(wanted)}")
    for key in _AT_LEAST_ONE:
        if not (isinstance(config[key], int) and config[key] >= 1):
            raise ConfigError(f"{key} is {config[key]!r}; it must be a whole number, at least 1")
    if not (isinstance(config["warmup_epoch"], int) and config["warmup_epoch"] >= 0):
        raise ConfigError(f"warmup_epoch is {config['warmup_epoch']!r}; it must be a whole number, at least 0")
    if not (isinstance(config["seed"], int) and 0 <= config["seed"] <= _LARGEST_SEED):
        raise ConfigError(f"seed is {config['seed']!r}; it must be a whole number from 0 to {_LARGEST_SEED}")
    for key in ("lr", "momentum", "weight_decay"):
        if not (isinstance(config[key], int | float) and 0 <= config[key] < float("inf")):
            raise ConfigError(f"{key} is {config[key]!r}; it must be a finite number, at least 0")
    if not isinstance(config["val_targets"], list | tuple):
        raise ConfigError(f"val_targets is {config['val_targets']!r}; it must be a list of names, such as ['lfw']")
    if not str(config["output"] or ""):
        raise ConfigError(f"output is {config['output']!r}; it must name a folder for the run's files")
    if config["optimizer"] not in ("sgd", "adamw"):
        raise ConfigError(f"optimizer is {config['optimizer']!r}; it must be sgd or adamw")
    if not 0 < config["sample_rate"] <= 1:
        raise ConfigError(f"sample_rate is {config['sample_rate']!r}; it must be in (0, 1]")
    margin_of_config(config)


def margin_of_config(config: Mapping[str, Any]) -> Margin:
    """The margin that ``margin_list`` and ``interclass_filtering_threshold`` ask for, at the host's logit scale.

    Raises:
        ConfigError: other than three numbers, or one out of range.
    """
    try:
        m1, m2, m3 = config["margin_list"]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"margin_list is {config['margin_list']!r}; it must be m1, m2 and m3: {error}") from error
    try:
        return Margin(LOGIT_SCALE, m1, m2, m3, config["interclass_filtering_threshold"])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"margin_list or interclass_filtering_threshold: {error}") from error


@contextlib.contextmanager
def _shortages(folder: Path, step: Callable[[], int]) -> Iterator[None]:
    """Say in one line what the machine did not give, and what to do about it."""
    try:
        with named_shortages(lambda: f"step {step()}", "lower batch_size or use more ranks"):
            yield
    except ArcfaceKDError:
        raise
    except OSError as error:
        gone = error.errno in _IS_GONE and os.fsdecode(error.filename or "").startswith(str(folder))
        if not gone and error.errno not in _CANNOT_WRITE:
            raise
        raise ResourceError(
            f"step {step()}: cannot write to {folder}: {error.strerror}; what was saved before is untouched"
        ) from error


class _LogFile(logging.FileHandler):
    """A log whose disk may be full: the run ends then, as for any other of its files."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise what ``logging`` would print and pass over."""
        raise


# Before Python 3.11 a handler takes no type in brackets.
class _Screen(logging.StreamHandler):
    """What the log repeats for somebody who may be gone: the run does not end with him."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Print nothing more, where ``logging`` would add a traceback for each line."""
        if isinstance(sys.exc_info()[1], OSError):
            stop_printing()
        else:
            super().handleError(record)


@contextlib.contextmanager
def _log_files(folder: Path, rank: int) -> Iterator[None]:
    """Send what the package logs to ``training.log`` in the host's format, and to stdout where nobody watches a bar.

    Warnings of other ranks, and those of a run that somebody watches, go to stderr.
    """
    logger = logging.getLogger("arcface_kd")
    before = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    form = "Training: %(asctime)s-%(message)s"
    handlers: list[logging.Handler] = []
    if rank == 0:
        handlers.append(_LogFile(folder / _LOG))
    if rank == 0 and not sys.stderr.isatty():
        handlers.append(_Screen(sys.stdout))
        handlers[-1].setLevel(logging.INFO)
    else:
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[-1].setLevel(logging.WARNING)
        form = form if rank == 0 else f"Rank {rank}: %(asctime)s-%(message)s"
    for handler in handlers:
        handler.setFormatter(logging.Formatter(form))
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(before[0])
        logger.propagate = before[1]


@contextlib.contextmanager
def _quiet_writers() -> Iterator[None]:
    """Leave out the traceback of TensorBoard's thread that cannot write: the step that hands it more ends with it."""
    before = threading.excepthook

    def hook(ended: Any) -> None:
        if not (isinstance(ended.exc_value, OSError) and type(ended.thread).__module__.startswith("tensorboard.")):
            before(ended)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


@contextlib.contextmanager
def _named_damage(path: Path) -> Iterator[None]:
    """Name a checkpoint whose entries are not what a run can be set to."""
    try:
        yield
    except (ArcfaceKDError, torch.OutOfMemoryError):
        raise
    # Whatever torch's optimisers, schedules and generators stumble over.
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if shortage(error, "") is not None:
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


class _Run:
    """One run's objects and the loop over them."""

    def __init__(self, config: EasyDict, made: DropIns, rank: int, local_rank: int, world_size: int) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        self.methods = "+".join(made.distiller.kd.methods)
        self.logger = logging.getLogger("arcface_kd.run")
        self.notes: list[str] = []
        self.device = training_device(local_rank)
        self.folder = Path(config.output)
        self.loader = made.get_dataloader(
            config.rec, local_rank, config.batch_size, config.dali, config.dali_aug, config.seed, config.num_workers
        )
        if len(self.loader) == 0:
            raise DataError(
                f"{config.rec} has less than one batch of {config.batch_size} on {world_size} ranks: lower batch_size"
            )
        narrow = bool(config.fp16) and narrow_format(self.device) is not None
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
        """Run the verification sets on rank 0, as the host does."""
        for verification_set in self.sets:
            name = verification_set.name
            result = evaluate(self.student, verification_set, device=self.device)
            self.results[name] = result
            self.best[name] = max(self.best.get(name, 0.0), result.accuracy)
            where = f"[{name}][{self.step}]"
            self.logger.info("%sAccuracy-Flip: %1.5f+-%1.5f", where, result.accuracy, result.accuracy_std)
            self.logger.info("%sAccuracy-Highest: %1.5f", where, self.best[name])
            if self.writer is not None:
                self.writer.add_scalar(name, result.accuracy, self.step)


def train(
    config: EasyDict,
    *,
    distiller: Distiller | None = None,
    title: str | None = None,
    on_epoch: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train a student, with or without distillation.

    Args:
        config: a merged arcface_torch config, as :func:`arcface_kd.config.load_config` gives it.
        distiller: the wiring to use; None makes it from the config's ``kd*`` keys.
        title: of the progress bar.
        on_epoch: called on every rank with the number of epochs done, after their files are written.

    Returns:
        The result; the host's files are in ``config.output``.

    Raises:
        CheckpointError: a run to go on with that has left no whole state, or was one of other settings.
        ConfigError: a key that cannot be honoured.
        DataError: records that cannot be read.
        NumberError: NaN or inf in embeddings, loss terms or gradients.
        RankError: another rank has failed.
        ResourceError: out of memory, or the output folder cannot be written.
        TeacherError: a teacher that is missing or does not fit.
    """
    check_keys(config)
    with process_group() as (rank, local_rank, world_size):
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank)
        torch.manual_seed(config.seed)
        shared = {key: value is not None if key in _OF_MACHINES else value for key, value in config.items()}
        require_agreement({**shared, "torch": torch.__version__}, RankGroup())
        # Whatever can be wrong is found before the first file is written.
        run = _Run(config, drop_ins(lambda: config, distiller=distiller), rank, local_rank, world_size)
        with _claimed(run.folder, rank, config.resume):
            if config.resume:
                run.resume()
            elif rank == 0:
                finish_saving(run.folder, keep=False)
            with _log_files(run.folder, rank), _quiet_writers(), _shortages(run.folder, lambda: run.step):
                return _train(run, title or run.folder.name, on_epoch)


@contextlib.contextmanager
def _claimed(folder: Path, rank: int, resume: bool) -> Iterator[None]:
    """Make the output folder this run's own."""
    if resume and not folder.is_dir():
        # What there is to say of it the run itself says.
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"the folder output={str(folder)!r} cannot be made: {error.strerror}; name another"
        ) from error
    with contextlib.ExitStack() as stack:
        if rank == 0:
            try:
                stack.enter_context(run_lock(folder / _LOG))
            except OSError as error:
                raise ResourceError(f"cannot write to {folder}: {error.strerror}") from error
        yield


def _train(run: _Run, title: str, on_epoch: Callable[[int], None] | None) -> TrainResult:
    from torch.utils.tensorboard import SummaryWriter

    config = run.config
    # A distiller that was handed over is not in the config, and `arcface-kd compare` reads the log.
    shown = {**config, "kd": run.methods} if run.methods else config
    for key, value in shown.items():
        run.logger.debug(": %s%s", key.ljust(25), value)
    for note in run.notes:
        run.logger.info(note)
    with contextlib.ExitStack() as stack:
        if run.rank == 0:
            run.writer = SummaryWriter(log_dir=str(run.folder / "tensorboard"), purge_step=run.step)
            stack.callback(run.writer.close)
        hidden = run.rank != 0 or not sys.stderr.isatty()
        bar = stack.enter_context(
            tqdm(total=run.last_step, initial=run.step, desc=title, unit="step", disable=hidden, **bar_size())
        )
        run.backbone.train()
        while run.epoch < config.num_epoch:
            run.train_epoch(bar)
            run.save()
            if on_epoch is not None:
                on_epoch(run.epoch)
        run.verify()
    if run.world_size > 1:
        distributed.barrier()
    return TrainResult(run.folder, run.step, run.rate, run.results, run.student.eval())
