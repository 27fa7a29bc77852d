"""The compact trainer: arcface_torch's loop and files on a CPU, one GPU or many, with the same drop-ins.

It holds no loss and no head: student, loader and head are those of :mod:`arcface_kd.distillation.drop_ins`, as in the
host.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from easydict import EasyDict
from torch import distributed, nn
from tqdm import tqdm

from arcface_kd.checkpoints.files import finish_saving
from arcface_kd.checkpoints.run_settings import require_agreement
from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.drop_ins import drop_ins
from arcface_kd.distributed.process_group import process_group
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import ArcfaceKDError, ResourceError
from arcface_kd.evaluation.verification import VerificationResult
from arcface_kd.system.files import run_lock
from arcface_kd.system.memory import named_shortages
from arcface_kd.training.config_check import check_keys
from arcface_kd.training.log_files import early_messages, log_files
from arcface_kd.training.resume import resume, save
from arcface_kd.training.run import Run

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM)
# The run has made its folder itself: if it is missing, somebody has removed it.
_IS_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)

# Values may differ between machines; all ranks set these keys, or none does.
_OF_MACHINES = ("rec", "rec_identities", "num_workers")


@dataclass(frozen=True)
class TrainResult:
    """Result of a run.

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


@contextlib.contextmanager
def _shortages(folder: Path, step: Callable[[], int]) -> Iterator[None]:
    """Turn out-of-memory errors and full disks into one line that says what to do."""
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


def train(
    config: EasyDict,
    *,
    distiller: Distiller | None = None,
    title: str | None = None,
    on_epoch: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train a student, with or without distillation.

    Args:
        config: a merged arcface_torch config, as :func:`arcface_kd.config.arcface_torch.load_config` gives it.
        distiller: the wiring to use; None makes it from the config's ``kd*`` keys.
        title: of the progress bar.
        on_epoch: called on every rank with the number of epochs done, after their files are written.

    Returns:
        The result; the host's files are in ``config.output``.

    Raises:
        CheckpointError: the run cannot be resumed: its state is incomplete, or its settings have changed.
        ConfigError: a key that cannot be honoured.
        DataError: records that cannot be read.
        NumberError: NaN or inf in embeddings, loss terms or gradients.
        RankError: another rank has failed.
        ResourceError: out of memory, or the output folder cannot be written.
        TeacherError: a teacher that is missing or does not fit.
    """
    check_keys(config)
    with process_group() as place:
        # A function of its own: when the group ends, the run is gone.
        return _train(config, distiller, title, on_epoch, place)


def _train(
    config: EasyDict,
    distiller: Distiller | None,
    title: str | None,
    on_epoch: Callable[[int], None] | None,
    place: tuple[int, int, int],
) -> TrainResult:
    rank, local_rank, world_size = place
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        # All batches are of one size, for which the fastest convolutions are looked for once.
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(config.seed)
    plain = {key: value for key, value in config.items() if not key.startswith("kd")}
    shared = {key: value is not None if key in _OF_MACHINES else value for key, value in plain.items()}
    kd = KDConfig.from_config(config)
    require_agreement({**shared, **kd.shared(), "torch": torch.__version__}, RankGroup())
    with contextlib.ExitStack() as stack:
        with early_messages() as early:
            # Whatever can be wrong is found before the first file is written.
            run = Run(config, drop_ins(lambda: config, distiller=distiller), rank, local_rank, world_size)
            stack.enter_context(_claimed(run.folder, rank, config.resume))
            if config.resume:
                resume(run)
            elif rank == 0:
                finish_saving(run.folder, keep=False)
        stack.enter_context(log_files(run.folder, rank, early))
        stack.enter_context(_shortages(run.folder, lambda: run.step))
        return _train_epochs(run, title or run.folder.name, on_epoch)


@contextlib.contextmanager
def _claimed(folder: Path, rank: int, resumed: bool) -> Iterator[None]:
    """Make the output folder, and lock it on rank 0."""
    if resumed and not folder.is_dir():
        # `resume` says what there is to say.
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
                stack.enter_context(run_lock(folder))
            except OSError as error:
                raise ResourceError(f"cannot write to {folder}: {error.strerror}") from error
        yield


def _train_epochs(run: Run, title: str, on_epoch: Callable[[int], None] | None) -> TrainResult:
    from torch.utils.tensorboard import SummaryWriter

    config = run.config
    # A distiller that was handed over is not in the config, and `arcface-kd compare` reads the log.
    shown = {**config, "kd": run.methods} if run.methods else config
    for key, value in shown.items():
        run.logger.debug(": %s%s", key.ljust(25), value)
    with contextlib.ExitStack() as stack:
        if run.rank == 0:
            run.writer = SummaryWriter(log_dir=str(run.folder / "tensorboard"), purge_step=run.step)
            stack.callback(run.writer.close)
        hidden = run.rank != 0 or not sys.stderr.isatty()
        bar = stack.enter_context(
            tqdm(total=run.last_step, initial=run.step, desc=title, unit="step", disable=hidden, dynamic_ncols=True)
        )
        run.backbone.train()
        while run.epoch < config.num_epoch:
            run.train_epoch(bar)
            save(run)
            if on_epoch is not None:
                on_epoch(run.epoch)
        run.verify()
    if run.world_size > 1:
        distributed.barrier()
    return TrainResult(run.folder, run.step, run.rate, run.results, run.judged.eval())
