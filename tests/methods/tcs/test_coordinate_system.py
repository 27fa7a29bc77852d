"""Coordinate systems: which axes, and the layer of a student that speaks in them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import Tensor, nn

from arcface_kd.backbones import get_backbone
from arcface_kd.errors import ConfigError
from arcface_kd.methods.tcs.coordinate_system import choose_axes, embedding_norm, set_scale
from tests.teachers.cache.test_principal_components import components_of, spread_rows

DIMENSION = 12
ROWS = spread_rows(400, DIMENSION)
COMPONENTS = components_of([ROWS], DIMENSION)


class TestAxes:
    @settings(max_examples=25, deadline=None)
    @given(variance=st.floats(0.05, 0.999), largest=st.integers(1, 20))
    def test_as_many_as_hold_the_variance_and_have_room(self, variance: float, largest: int) -> None:
        system = choose_axes(COMPONENTS, largest, variance=variance)
        wanted = PCA(n_components=variance, svd_solver="full").fit(ROWS.numpy())
        assert len(system.axes) == min(largest, wanted.n_components_)
        held = wanted.explained_variance_ratio_[: len(system.axes)].sum()
        assert system.explained == pytest.approx(held, abs=1e-6)

    def test_coordinates_are_sklearns(self) -> None:
        system = choose_axes(COMPONENTS, 64, dimension=5)
        coordinates = (ROWS.float() - system.mean) @ system.axes.T
        wanted = PCA(5, svd_solver="full").fit(ROWS.numpy()).transform(ROWS.numpy())
        np.testing.assert_allclose(coordinates.abs().numpy(), np.abs(wanted), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(system.deviations, coordinates.std(0), rtol=1e-4, atol=1e-5)

    def test_random_directions_have_the_same_origin_and_number(self) -> None:
        pca = choose_axes(COMPONENTS, 64, variance=0.8)
        drawn = choose_axes(COMPONENTS, 64, variance=0.8, basis="random", seed=3)
        count = len(pca.axes)
        assert drawn.axes.shape == pca.axes.shape
        torch.testing.assert_close(drawn.axes @ drawn.axes.T, torch.eye(count), atol=1e-5, rtol=0)
        torch.testing.assert_close(drawn.mean, pca.mean)
        along = (ROWS.float() - drawn.mean) @ drawn.axes.T
        torch.testing.assert_close(drawn.deviations, along.std(0), rtol=1e-4, atol=1e-5)
        assert drawn.explained < pca.explained
        assert not torch.equal(choose_axes(COMPONENTS, 64, variance=0.8, basis="random", seed=4).axes, drawn.axes)

    def test_more_axes_than_there_can_be(self) -> None:
        with pytest.raises(ConfigError, match=r"dimension is 9; .* 8, the student's embedding_size"):
            choose_axes(COMPONENTS, 8, dimension=9)
        with pytest.raises(ConfigError, match="at most 12, the number of axes"):
            choose_axes(COMPONENTS, 64, dimension=13)


class TestLayer:
    @pytest.mark.parametrize("name", ["thin_r18", "r18", "mbf"])
    def test_is_found_in_the_networks_and_nothing_is_touched(self, name: str) -> None:
        student = get_backbone(name, num_features=16)
        student.get_submodule("features").eval()
        before = {key: value.clone() for key, value in student.state_dict().items()}
        random = torch.get_rng_state()
        norm = embedding_norm(student)
        assert norm.num_features == 16
        assert student.training
        assert not student.get_submodule("features").training
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())

    def test_scale_and_offset_are_the_outputs(self) -> None:
        torch.manual_seed(0)
        student = get_backbone("thin_r18", num_features=6)
        norm = embedding_norm(student)
        norm.bias.data.fill_(1.0)
        deviations = torch.tensor([0.5, 0.25, 0.1, 0.0, 0.0, 0.0])
        set_scale(norm, deviations)
        embeddings = student(torch.rand(64, 3, 112, 112))
        torch.testing.assert_close(embeddings.std(0, correction=0), deviations, rtol=1e-3, atol=1e-6)
        assert embeddings.mean(0).abs().max() < 1e-6
        assert torch.equal(embeddings[:, 3:], torch.zeros(64, 3))
        assert norm.bias.count_nonzero() == 0

    def test_what_has_no_such_layer_is_refused(self) -> None:
        class Doubled(nn.Sequential):
            def forward(self, images: Tensor) -> Tensor:
                return 2 * super().forward(images)

        layers = nn.AvgPool2d(14), nn.Flatten(), nn.Linear(192, 6)
        for student in (nn.Sequential(*layers), Doubled(*layers, nn.BatchNorm1d(6))):
            with pytest.raises(ConfigError, match=r"does not end in a batch norm.* such as r18 or mbf"):
                embedding_norm(student)
        with pytest.raises(ConfigError, match="that ends the student NarrowMobileFaceNet has no scale"):
            embedding_norm(get_backbone("mobilefacenet", num_features=16))
