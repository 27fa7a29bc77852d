"""What a head's step asks of a GPU, on a make-believe one: no mixing of devices, no wait, and few launches.

A step is the head's forward and backward pass on one rank, its NaN monitor with it. One chunk of classes; a further
chunk costs a frozen head five launches more.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distillation.tensorboard_log import TensorBoardLog
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.base import Batch
from arcface_kd.registry import METHODS, entry_points
from arcface_kd.teachers.base import load_teacher
from arcface_kd.teachers.options import TeacherOptions
from tests.make_believe_gpu import Record, make_believe_gpu, on_device
from tests.methods.tcs.test_method import batch as tcs_batch
from tests.methods.tcs.test_method import method_of as tcs_method
from tests.teachers.cache.test_principal_components import filled_cache

BATCH, DIMENSION, CLASSES = 32, 16, 600
MARGIN = Margin(64.0, 1.0, 0.5, 0.0)

# Launches of a step that no change may pass.
BUDGETS = {
    "classifier": 200,
    "adadistill": 60,
    "arcdistill": 60,
    "bank": 70,
    "cosdistill": 60,
    "proxylesskd": 60,
    "margindistillation": 200,
    "embedding": 200,
    "rkd": 200,
    "ekd": 200,
    "kd": 200,
    "thkd": 200,
    "crosskd": 200,
    "gkd": 250,
}
OPTIONS: dict[str, list[dict[str, object]]] = {
    "adadistill": [{}, {"alpha": "plain", "repeated": "last"}],
    "bank": [{}, {"of": "classes", "mined": 1.0}],
    "embedding": [{}, {"labels": "none"}],
    "gkd": [{}, {"group": "sample", "secondary_weight": 1.0}, {"group": "fixed", "size": 10}],
    "crosskd": [{"mimic": "both"}],
}
# shkd is three runs of other methods, tcs has a test of its own.
CASES = [(name, options) for name in BUDGETS for options in OPTIONS.get(name, [{}])]


class _Teacher(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.new_ones(len(images), DIMENSION)


def _tail(feature_map: Tensor) -> Tensor:
    mixed = torch.linspace(-1, 1, 8 * DIMENSION, device=feature_map.device).sin()
    return feature_map.mean((2, 3)) @ mixed.view(8, DIMENSION)


def head_of(name: str, options: dict[str, object], folder: Path, **keys: Any) -> DistillationHead:
    """A head whose teacher says what the batch is given, so that the step is the head's alone."""
    torch.save(torch.randn(CLASSES, DIMENSION), folder / "head.pt")
    methods = () if name == "classifier" else (name,)
    kd = KDConfig(
        methods,
        cache=str(folder / "rows") if name == "bank" else None,
        classifier=str(folder / "head.pt"),
        options={name: options} if options else {},
    )
    distiller = Distiller(kd, load_teacher(_Teacher(), TeacherOptions(size=8)) if methods else None)
    if name == "bank":
        distiller.cache, _ = filled_cache(folder / "rows", 40, DIMENSION)
    if name == "crosskd":
        distiller.maps = SimpleNamespace(  # type: ignore[assignment]
            teacher=SimpleNamespace(tail=_tail, map_shape=(8, 7, 7)), student_shape=(6, 7, 7)
        )
    log = TensorBoardLog(folder, 1000, writes=True)
    return DistillationHead(
        distiller, MARGIN, DIMENSION, CLASSES, ranks=RankGroup(alone=True), log=log, total_steps=100, **keys
    )


def _step(head: DistillationHead, patch: pytest.MonkeyPatch, record: Record) -> None:
    embeddings = torch.randn(BATCH, DIMENSION, device="cuda").requires_grad_()
    teacher = normalize(torch.randn(BATCH, DIMENSION, device="cuda"))
    labels = torch.randint(0, CLASSES, (BATCH,), device="cuda")
    maps = torch.randn(BATCH, 6, 7, 7, device="cuda").requires_grad_(), torch.randn(BATCH, 8, 7, 7, device="cuda")
    distiller = head._distiller
    patch.setattr(distiller, "take_teacher_embeddings", lambda rows: teacher)
    if distiller.maps is not None:
        patch.setattr(distiller.maps, "take", lambda rows: maps, raising=False)
    record.clear()
    head(embeddings, labels).backward()
    assert embeddings.grad is not None


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize("product_dtype", [None, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_step_is_within_its_budget(
    name: str,
    options: dict[str, object],
    product_dtype: torch.dtype | None,
    sample_rate: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = head_of(name, options, tmp_path, sample_rate=sample_rate, product_dtype=product_dtype)
    with make_believe_gpu() as record:
        head.to("cuda")
        for _ in range(2):
            _step(head, monkeypatch, record)
    assert not record.mixes
    assert not record.syncs
    assert all(on_device(value) for value in [*head.parameters(), *head.buffers()])
    assert 5 < record.launches.total() <= BUDGETS[name], record.launches


def test_every_method_has_a_budget() -> None:
    assert set(entry_points(METHODS)) - {"shkd", "tcs"} == set(BUDGETS) - {"classifier"}


def test_tcs_is_within_its_budget(tmp_path: Path) -> None:
    method = tcs_method(tmp_path)
    with make_believe_gpu() as record:
        method.to("cuda")
        for step in range(2):
            given = tcs_batch(step)
            assert given.teacher is not None
            student = given.embeddings.detach().to("cuda").requires_grad_()
            labels, teacher = given.labels.to("cuda"), given.teacher.to("cuda")
            given = Batch(student, student, labels, teacher, given.sizes, step)
            record.clear()
            torch.stack(list(method(given).values())).sum().backward()
    assert not record.mixes
    assert not record.syncs
    assert 5 < record.launches.total() <= 190, record.launches


def test_the_make_believe_gpu_tells_what_a_real_one_would_suffer() -> None:
    with make_believe_gpu() as record:
        there = torch.ones(3, device="cuda")
        (there + torch.ones(3)).sum().item()
        there[there > 0].tolist()
        assert there.device.type == "cuda"
    assert sum(record.mixes.values()) == 1
    found = [name.split(" ")[0] for name in record.syncs]
    assert found == ["item", "_local_scalar_dense.default", "index.Tensor", "tolist"]
    assert record.launches["add.Tensor"] == 1
