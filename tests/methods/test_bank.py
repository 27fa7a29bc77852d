"""The bank: which rows it holds, its terms against the naive twin, and that it asks for no labels."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.method_set import MethodSet
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.methods.bank import Bank, BankConfig
from arcface_kd.methods.base import Batch, RunContext
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache
from tests.reference.bank import bank_divergence, nearest_difference
from tests.reference.compare import assert_same_terms
from tests.reference.problems import ARCFACE
from tests.teachers.cache.test_principal_components import filled_cache, identity

IMAGES, CLASSES, DIMENSION, ROWS = 20, 9, 6, 5


def _context(folder: Path, **keys: Any) -> RunContext:
    cache, _ = filled_cache(folder / "rows", IMAGES, DIMENSION)
    classifier = torch.randn(CLASSES, DIMENSION, generator=torch.Generator().manual_seed(3))
    given = {"teacher_embedding_size": DIMENSION, "cache": cache, "teacher_classifier": classifier, "seed": 7}
    return RunContext(CLASSES, DIMENSION, ARCFACE, RankGroup(alone=True), **{**given, **keys})


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(ROWS, DIMENSION, generator=generator, dtype=torch.float64) for _ in range(2))
    return Batch(student.requires_grad_(), student, torch.full((ROWS,), -1), normalize(teacher), [ROWS], 0)


@pytest.mark.parametrize("of", ["images", "classes"])
def test_terms_and_gradients_equal_the_twin(of: Any, tmp_path: Path) -> None:
    method = Bank(BankConfig(of=of, weight=2.0, mined=3.0, nearest=4, temperature=0.2), _context(tmp_path)).double()
    given = _batch()
    assert given.teacher is not None
    met = method(given)
    wanted = {
        "bank": 2 * bank_divergence(given.projected, given.teacher, method.bank, 0.2),
        "mined": 3 * nearest_difference(given.projected, given.teacher, method.bank, 4),
    }
    assert_same_terms(met, wanted, given.projected)


def _members(bank: Tensor, of: Tensor) -> list[int]:
    """Which rows of a matrix the bank's rows are."""
    return [int(place) for place in (bank @ normalize(of).T - 1).abs().argmin(1)]


def test_the_bank_is_drawn_from_the_cache_by_the_seed(tmp_path: Path) -> None:
    context = _context(tmp_path)
    assert context.cache is not None
    plain, _ = context.cache.look_up(torch.arange(IMAGES), torch.zeros(IMAGES, dtype=torch.bool))
    few = Bank(BankConfig(rows=8), context)
    members = _members(few.bank, plain)
    assert len(set(members)) == 8
    assert torch.equal(few.bank, plain[members])
    assert torch.equal(Bank(BankConfig(rows=8), context).bank, few.bank)
    assert _members(Bank(BankConfig(rows=8), _context(tmp_path, seed=8)).bank, plain) != members
    assert torch.equal(Bank(BankConfig(), context).bank, plain)
    # The seed draws it again.
    assert few.state_dict() == {}


def test_rows_of_skipped_records_are_left_out_and_an_empty_cache_is_refused(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path / "holes", identity(IMAGES, DIMENSION))
    with pytest.raises(TeacherError, match="holes"):
        Bank(BankConfig(), _context(tmp_path, cache=cache))
    cache.store(torch.arange(3), torch.zeros(3, dtype=torch.bool), torch.randn(3, DIMENSION))
    assert Bank(BankConfig(), _context(tmp_path, cache=cache)).bank.shape == (3, DIMENSION)


def test_a_softmax_over_one_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bank\.rows"):
        Bank(BankConfig(rows=1), _context(tmp_path))
    assert len(Bank(BankConfig(rows=1, weight=0, mined=1), _context(tmp_path)).bank) == 1


def test_a_weight_of_0_takes_a_term_out(tmp_path: Path) -> None:
    assert list(Bank(BankConfig(), _context(tmp_path))(_batch())) == ["bank"]
    assert list(Bank(BankConfig(weight=0, mined=1), _context(tmp_path))(_batch())) == ["mined"]
    with pytest.raises(ConfigError, match="mined"):
        BankConfig(weight=0)


def _set(kd: str, *options: str) -> MethodSet:
    config = KDConfig.from_config({"kd": kd, "kd_option": options})
    return MethodSet(config.methods, config.options)


def test_labels_are_left_out_until_they_are_asked_for() -> None:
    assert _set("bank").replacing == "bank"
    assert _set("bank+embedding+rkd", "embedding.labels=none").replacing
    assert _set("bank", "bank.labels=classify").replacing is None
    assert _set("adadistill+bank", "bank.labels=classify").replacing == "adadistill"
    with pytest.raises(ConfigError, match=r"bank\.labels=classify"):
        _set("adadistill+bank")


def test_a_method_that_needs_the_teacher_s_network_is_refused() -> None:
    with pytest.raises(ConfigError, match="crosskd"):
        _set("crosskd+bank")


def test_classes_need_the_teacher_s_classifier() -> None:
    assert _set("bank", "bank.of=classes").needed > _set("bank").needed
