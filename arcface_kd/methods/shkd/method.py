r"""SH-KD: a teacher that is trained for its student (Ben-Baruch et al., 2022, arXiv 2201.06945).

Three runs, one after the other, see :mod:`arcface_kd.methods.shkd.stages`:

    1  a temporary student, by the margin softmax alone
    2  the teacher, by the margin softmax against that student's classifier, frozen: it learns to stand where a network
       of the student's capacity can follow
    3  the final student, distilled from that teacher, whose classifier is the shared one

Code, loss, weights, schedule and where the teacher of the second run starts were not published for faces. Chosen here:
the second run is ProxylessKD with the student's classes in the teacher's place, under the trainer's own margin. It
starts from the teacher that is given (an ONNX teacher becomes a network that can be trained), at a tenth of the
learning rate, or from scratch at the whole of it. The third run is logit KD (``distil=kd``): the student has a
classifier of its own and learns, beside its labels, the probabilities of the teacher under the shared frozen
classifier. ``distil=thkd`` puts that classifier on the student as well, the other reading of "the shared head".
"""

from collections.abc import Mapping
from typing import Any

from arcface_kd.methods.recipe import Recipe, Stage
from arcface_kd.methods.shkd.options import SHKDConfig
from arcface_kd.methods.shkd.stages import RUNS, next_stage


class SHKD(Recipe):
    """A teacher trained for its student, in three runs: temporary student, teacher, final student."""

    Config = SHKDConfig
    runs = RUNS

    @classmethod
    def next_run(cls, config: Mapping[str, Any]) -> Stage | None:
        """The run to start next, or to resume; None when all three are done."""
        return next_stage(config)
