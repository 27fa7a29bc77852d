"""Several teachers as one: on the fly and by their caches, against a twin; the same teacher either way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from arcface_kd.backbones import get_backbone
from arcface_kd.cli.main import main
from arcface_kd.config.kd import KDConfig
from arcface_kd.data.dataset import RecordDataset
from arcface_kd.data.fingerprint import fingerprint
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.teachers import Preprocessing, Teacher, checkpoint, load_teacher
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache, header_of, identity_of
from arcface_kd.teachers.cache.fill import fill_cache
from arcface_kd.teachers.cache.merge import merge_caches
from arcface_kd.teachers.merged import Merge, MergedNetwork
from tests.host.trainer.faces import Faces, draw_faces
from tests.make_believe_gpu import make_believe_gpu
from tests.reference.merged import merged_rows
from tests.teachers.cache.test_principal_components import filled_cache


def network(dimension: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, dimension))


def images() -> Tensor:
    return torch.rand((5, 3, 112, 112), generator=torch.Generator().manual_seed(1)) * 2 - 1


def units(teacher: Teacher) -> np.ndarray:
    rows: np.ndarray = nn.functional.normalize(teacher(images())).double().numpy()
    return rows


def test_teachers_side_by_side_with_options_of_their_own() -> None:
    parts = [network(4, 0), network(6, 1)]
    merged = load_teacher(parts, {"std": 128, "2.channels": "bgr", "2.std": "100", "embedding_size": 10})
    alone = [load_teacher(parts[0], {"std": 128}), load_teacher(parts[1], {"std": 100, "channels": "bgr"})]
    np.testing.assert_allclose(units(merged), merged_rows([units(each) for each in alone], "concat"), atol=1e-6)
    cosines = [units(each) @ units(each).T for each in alone]
    np.testing.assert_allclose(units(merged) @ units(merged).T, sum(cosines) / 2, atol=1e-6)
    assert merged.preprocessing == Preprocessing()
    assert merged.parameter_count == sum(each.parameter_count or 0 for each in alone)
    assert len({load_teacher(each).fingerprint for each in (parts, parts[::-1])} | {merged.fingerprint}) == 3
    assert load_teacher(parts[:1]).network is parts[0]
    # Of one alone, what is said of several is refused, and its dimension is looked at.
    for options in ({"merge": "mean"}, {"2.channels": "bgr"}, {"embedding_size": 5}):
        with pytest.raises((ConfigError, TeacherError), match=r"merge|2\.channels|wanted 5"):
            load_teacher(parts[:1], options)


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    one, other = network(4, 0), network(6, 1)
    filled_cache(tmp_path / "plain.cache", 3, 4)
    for sources, options, said in (
        ([one, one], {}, "each once"),
        ([one, other], {"merge": "mean"}, "4 and 6 dimensions"),
        ([one, other], {"embedding_size": 4}, "wanted 4"),
        ([one, other], {"1.chanels": "bgr"}, r"teacher\.chanels"),
        ([one, other], {"0.channels": "bgr"}, r"teacher\.0\.channels"),
        ([one, other], {"3.channels": "bgr"}, r"teacher\.3\.channels"),
        ([one, other], {"merge": str(tmp_path / "nowhere.cache")}, r"nowhere\.cache"),
        ([one, other], {"merge": str(tmp_path / "plain.cache")}, r"plain\.cache was not made by"),
    ):
        with pytest.raises(ConfigError if "channels" in said or "chanels" in said else TeacherError, match=said):
            load_teacher(sources, options)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=3, images=4)


@pytest.fixture(scope="module")
def caches(faces: Faces, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, nn.Module]]:
    """Full caches of two teachers of 6 dimensions and one of 4."""
    folder, found = tmp_path_factory.mktemp("caches"), []
    for name, dimension in (("a", 6), ("b", 4), ("c", 6)):
        module = network(dimension, ord(name))
        config = {"rec": str(faces.folder), "kd": "embedding", "kd_cache": str(folder / name), "num_workers": 0}
        fill_cache(config, teacher=load_teacher(module))
        found.append((folder / name, module))
    return found


def all_rows(cache: EmbeddingCache) -> np.ndarray:
    ((rows, known),) = cache.blocks(0, cache.images)
    assert known.all()
    return rows.double().numpy()


@pytest.mark.parametrize(("how", "chosen"), [("concat", (0, 1)), ("pca", (0, 1)), ("mean", (0, 2))])
def test_a_merged_cache_is_that_of_the_merged_teacher(
    how: str,
    chosen: tuple[int, ...],
    caches: list[tuple[Path, nn.Module]],
    faces: Faces,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths, modules = zip(*(caches[place] for place in chosen), strict=True)
    out = tmp_path / "out.cache"
    assert main(["cache", "merge", *map(str, paths), "--how", how, "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    teacher = load_teacher(modules, {"merge": how if how == "mean" else str(out)})
    dataset = RecordDataset(faces.folder)
    # Opened as the run of that teacher opens it.
    cache = EmbeddingCache(out, identity_of(teacher, fingerprint(dataset), len(dataset)), create=False)
    assert cache.embedding_size == teacher.embedding_size == (10 if how == "concat" else 6)
    parts = [all_rows(EmbeddingCache(path, header_of(path), create=False)) for path in paths]
    wanted = merged_rows(parts, how, 6)
    met = all_rows(cache)
    np.testing.assert_allclose(met @ met.T, wanted @ wanted.T, atol=2e-3)
    shown = torch.stack([sample.image for sample in (dataset[place] for place in range(len(dataset)))])
    own = nn.functional.normalize(teacher(shown.float() / 127.5 - 1)).double().numpy()
    np.testing.assert_allclose(own, met[::2], atol=2e-3)
    # Once more: the same rows in the same file.
    before = out.read_bytes()
    merge_caches(paths, how, out)  # type: ignore[arg-type]
    assert out.read_bytes() == before
    with pytest.raises(TeacherError, match="other teachers"):
        load_teacher(modules[::-1], {"merge": str(out)})


def test_caches_of_other_images_order_or_views_are_refused(
    caches: list[tuple[Path, nn.Module]], tmp_path: Path
) -> None:
    a, b = caches[0][0], caches[1][0]
    wanted = header_of(b)
    for name, value in (("data", "e" * 64), ("images", 11), ("views", "degraded")):
        other = tmp_path / f"{name}.cache"
        EmbeddingCache(other, {**wanted, name: value})
        with pytest.raises(TeacherError, match=rf"{name}\.cache.*{name}: "):
            merge_caches([a, other], "concat", tmp_path / "out.cache")
    for paths, how, said in (
        ([a, a], "concat", "each once"),
        ([a], "concat", "each once"),
        ([a, b], "mean", "6 and 4"),
    ):
        with pytest.raises(TeacherError, match=said):
            merge_caches(paths, how, tmp_path / "out.cache")  # type: ignore[arg-type]
    with pytest.raises(TeacherError, match="another"):
        merge_caches([a, b], "concat", caches[2][0])
    assert not (tmp_path / "out.cache").exists()


def test_rows_that_one_of_them_lacks_are_missing(caches: list[tuple[Path, nn.Module]], tmp_path: Path) -> None:
    header = header_of(caches[0][0])
    holes = EmbeddingCache(tmp_path / "holes.cache", {**header, "teacher": "f" * 64})
    with pytest.raises(TeacherError, match="no rows in common"):
        merge_caches([caches[1][0], holes.path], "pca", tmp_path / "out.cache")
    holes.store(torch.tensor([0, 2]), torch.tensor([False, True]), torch.eye(6)[:2])
    report = merge_caches([caches[1][0], holes.path], "concat", tmp_path / "out.cache")
    assert report.missing == 2 * report.cache.images - 2
    assert report.cache.known(0, report.cache.images).nonzero()[0].tolist() == [0, 2]


def test_damaged_axes_are_refused(caches: list[tuple[Path, nn.Module]], tmp_path: Path) -> None:
    paths, modules = zip(*caches[:2], strict=True)
    out = tmp_path / "out.cache"
    merge_caches(paths, "pca", out)
    Path(f"{out}.axes").write_bytes(b"none")
    with pytest.raises(TeacherError, match=r"out\.cache\.axes"):
        load_teacher(modules, {"merge": str(out)})


def test_check_judges_several_files_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check"]
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = get_backbone("ir:units=1-1-1-1,widths=16-32-48-64,stem=16", num_features=4).state_dict()
        torch.save(state, tmp_path / f"{seed}.pt")
        words += ["--kd-teacher", str(tmp_path / f"{seed}.pt")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "8 dimensions" in printed
    assert f"concat of ir:units=1-1-1-1,widths=16-32-48-64,stem=16 from {tmp_path / '0.pt'} and" in printed
    files = [str(tmp_path / f"{seed}.pt") for seed in (0, 1)]
    keys = {"kd": "embedding", "kd_teacher": files, "kd_option": ["teacher.1.channels=bgr"], "kd_cache": "rows"}
    kd = KDConfig.from_config(keys)
    assert kd.flags()[2:6] == ["--kd-teacher", files[0], "--kd-teacher", files[1]]
    teacher = Distiller(kd).teacher
    assert teacher is not None
    assert teacher.fingerprint == load_teacher(files, {"1.channels": "bgr"}).fingerprint
    assert main(["cache", "merge", str(tmp_path / "0.cache"), str(tmp_path / "1.cache"), "--out", "out.cache"]) == 2
    assert str(tmp_path / "0.cache") in capsys.readouterr().err


def test_several_teachers_take_the_precisions_of_their_cache(
    faces: Faces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that a CPU has filled beside a GPU, whose default is another, and of one that was merged."""
    files = [tmp_path / f"{seed}.pt" for seed in (0, 1)]
    for seed, file in enumerate(files):
        torch.manual_seed(seed)
        torch.save(get_backbone("thin_r10", num_features=4).eval().state_dict(), file)
    config: dict[str, object] = {"rec": str(faces.folder), "kd": "embedding", "num_workers": 0}
    for name, sources in (("0", str(files[0])), ("1", str(files[1])), ("both", [*map(str, files)])):
        fill_cache({**config, "kd_teacher": sources, "kd_cache": str(tmp_path / name)})
    merge_caches([tmp_path / "0", tmp_path / "1"], "concat", tmp_path / "merged")
    monkeypatch.setattr(checkpoint, "default_precision", lambda: "bf16")
    for name in ("both", "merged"):
        assert fill_cache({**config, "kd_teacher": [*map(str, files)], "kd_cache": str(tmp_path / name)}).missing == 0


def test_the_axes_go_to_the_device_once() -> None:
    with make_believe_gpu() as record:
        parts: list[Any] = [nn.Linear(3, 2), nn.Linear(3, 4)]
        merged = MergedNetwork(parts, Merge("pca", torch.eye(6)[:5])).to("cuda")
        images = torch.ones(2, 3, device="cuda")
        record.clear()
        assert merged(images).shape == (2, 5)
    assert not record.syncs
    assert not record.mixes
