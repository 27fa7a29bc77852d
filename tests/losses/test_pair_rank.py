"""Soft ranks and thresholds of pairs."""

import torch

from arcface_kd.losses.embedding_losses import impostor_thresholds, rank_loss, soft_rank

RATES = (10, 100, 1000)


def test_a_pair_passes_the_thresholds_below_it() -> None:
    thresholds = torch.tensor([0.1, 0.3, 0.5])
    ranks = soft_rank(torch.tensor([-1.0, 0.2, 0.4, 1.0]), thresholds, 1e-3)
    torch.testing.assert_close(ranks, torch.tensor([0.0, 1.0, 2.0, 3.0]))
    # At a threshold it is half past it.
    torch.testing.assert_close(soft_rank(torch.tensor(0.3), thresholds, 1e-3), torch.tensor(1.5))


def test_soft_ranks_are_finite_at_any_distance() -> None:
    cosine = torch.tensor([-1e4, 1e4, -torch.inf], requires_grad=True)
    ranks = soft_rank(cosine, torch.zeros(2), 1e-4)
    ranks.sum().backward()
    assert ranks.tolist() == [0.0, 2.0, 0.0]
    assert cosine.grad is not None
    assert (cosine.grad == 0).all()


def test_thresholds_are_exceeded_by_their_share_of_impostors() -> None:
    generator = torch.Generator().manual_seed(0)
    cosine = torch.rand(3000, generator=generator)
    impostor = torch.rand(3000, generator=generator) < 0.9
    thresholds = impostor_thresholds(cosine, impostor, RATES)
    for rate, threshold in zip(RATES, thresholds, strict=True):
        assert int((cosine[impostor] > threshold).sum()) == int(impostor.sum()) // rate


def test_rates_beyond_the_number_of_pairs_have_the_largest_cosine() -> None:
    cosine, impostor = torch.tensor([0.9, 0.1, 0.2]), torch.tensor([False, True, True])
    assert impostor_thresholds(cosine, impostor, RATES).tolist() == [cosine[2]] * 3


def test_without_an_impostor_there_is_no_threshold() -> None:
    met = impostor_thresholds(torch.tensor([0.9, 0.1]), torch.zeros(2, dtype=torch.bool), RATES)
    assert met.tolist() == [-torch.inf] * 3


def test_the_mean_is_over_the_chosen_pairs() -> None:
    student, teacher = torch.tensor([1.0, 2.0, 5.0], requires_grad=True), torch.tensor([0.0, 4.0, 0.0])
    assert rank_loss(student, teacher, torch.tensor([True, True, False])) == 2.5
    none = rank_loss(student, teacher, torch.zeros(3, dtype=torch.bool))
    none.backward()
    assert none == 0
    assert student.grad is not None
    assert (student.grad == 0).all()
