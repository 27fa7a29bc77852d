r"""SH-KD: a teacher that is trained for its student (Ben-Baruch et al., 2022, arXiv 2201.06945).

Three runs, one after the other:

    1  a temporary student, by the margin softmax alone
    2  the teacher, by the margin softmax against that student's classifier, frozen: it learns to stand where a network
       of the student's capacity can follow
    3  the final student, distilled from that teacher, whose classifier is the shared one

Published: the three steps, and that they beat TH-KD and embedding distillation for R100 to MobileFaceNet on MS1MV3
(IJB-C TAR at FAR 1e-6 / 1e-5 / 1e-4: 90.24 / 93.73 / 95.64 against 88.72 / 92.75 / 95.42 of the student alone). Not
published for faces: code, loss, weights, schedule, and where the teacher of step 2 starts.

Chosen here: the second run is ProxylessKD with the student's classes in the teacher's place, under the trainer's own
margin. It starts from the teacher that is given (an ONNX teacher becomes a network that can be trained), at a tenth of
the learning rate, or from scratch at the whole of it, and says which. The third run is logit KD (``distil=kd``): the
student has a classifier of its own and learns, beside its labels, the probabilities T^2 KL(p_t || p_s) of the teacher
under the shared frozen classifier. ``distil=thkd`` puts that classifier on the student as well, the other reading of
"the shared head"; any method that takes a teacher and its classifier will do.

There is nothing to do here in a step; :mod:`arcface_kd.methods.shkd.stages` says what each run is.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from arcface_kd.config.options import Count, Options, Positive
from arcface_kd.errors import ConfigError
from arcface_kd.methods.base import Method, RunContext


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


class SHKD(Method):
    """A teacher trained for its student, in three runs: temporary student, teacher, final student.

    Args:
        config: the knobs.
        context: the run.

    Raises:
        ConfigError: always: three runs are no method of one.
    """

    Config = SHKDConfig
    combines: ClassVar[bool] = False

    def __init__(self, config: Any, context: RunContext) -> None:
        raise ConfigError(
            "shkd is three runs: start them with `arcface-kd train CONFIG --kd shkd`, or in arcface_torch with "
            "`arcface-kd recipe`"
        )
