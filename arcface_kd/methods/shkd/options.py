"""SH-KD's options."""

from dataclasses import dataclass

from arcface_kd.config.options import Count, Options, Positive
from arcface_kd.errors import ConfigError


@dataclass(frozen=True)
class SHKDConfig(Options):
    """SH-KD's knobs.

    Attributes:
        distil: the method of the third run, ``kd`` (default), ``thkd`` or any other; its options stand beside these.
        teacher_network: the teacher's architecture where it is trained from scratch; a teacher that is given says it.
        student_epochs: of the first run; None takes ``num_epoch``.
        teacher_epochs: of the second run; None takes ``num_epoch``.
        teacher_lr: of the second run; None takes a tenth of ``lr`` from a given teacher, ``lr`` from scratch.
        teacher_batch_size: of the second run on each rank; None takes ``batch_size``.

    Raises:
        ConfigError: ``distil`` names no method of one run.
    """

    distil: str = "kd"
    teacher_network: str | None = None
    student_epochs: Count | None = None
    teacher_epochs: Count | None = None
    teacher_lr: Positive | None = None
    teacher_batch_size: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.distil or "shkd" in self.distil.split("+"):
            raise ConfigError(f"distil is {self.distil!r}; it must be a method of one run, such as kd or thkd")
