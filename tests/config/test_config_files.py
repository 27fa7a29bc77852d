"""The files of configs/: each stands alone in the host's folder and says nothing over its base that it need not say."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import arcface_kd
from arcface_kd import registry
from arcface_kd.config.arcface_torch import BASE, load_config
from arcface_kd.config.kd import KDConfig
from arcface_kd.config.options import build
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.methods.recipe import recipe_of
from arcface_kd.teachers.base import load_teacher
from arcface_kd.teachers.options import TeacherOptions
from arcface_kd.training.config_check import check_keys

FOLDER = Path(__file__).parents[2] / "configs"
# Of published data sets; the other one is of nobody's data but the user's.
CONFIGS = sorted(set(FOLDER.glob("*.py")) - {FOLDER / "own_faces.py"})
STUDENTS = ("mbf", "r18")
# Data sets, and the host's own config of each with the smallest student.
DATA = {
    "ms1mv2": "ms1mv2_mbf",
    "ms1mv3": "ms1mv3_mbf",
    "glint360k": "glint360k_mbf",
    "wf42m": "wf42m_pfc02_16gpus_mbf_bs8k",
}
# What a data set decides, the same in all of its files.
OF_THE_DATA = ("rec", "num_classes", "num_image", "val_targets", "sample_rate", "batch_size", "lr")
# What a method's authors have published for it, or it cannot do without.
OF_THE_METHOD = (
    "margin_list",
    "num_epoch",
    "warmup_epoch",
    "kd",
    "kd_teacher",
    "kd_cache",
    "kd_classifier",
    "kd_option",
)
# Resuming needs the checkpoints; the host's base names one folder for all configs that do not.
OF_EVERY_RUN = {"save_all_states": True, "output": None}
# `arcdistill` and `cosdistill` are `proxylesskd` with a margin of their own.
SAME_AS_ANOTHER = {"arcdistill", "cosdistill"}


def parts(path: Path) -> tuple[str, str, str]:
    """Data set, student and method of a file's name."""
    data, student, method = path.stem.split("_", 2)
    return data, student, method


def own_keys(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the file itself says."""
    with monkeypatch.context() as patch:
        patch.setattr(arcface_kd, "attach", lambda config: None)
        return dict(runpy.run_path(str(path))["config"])


class Network(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :4]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
class TestEveryConfig:
    def test_its_name_says_what_it_is(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data, student, method = parts(path)
        keys = own_keys(path, monkeypatch)
        assert data in DATA
        assert student in STUDENTS
        assert keys["network"] == student
        assert method.startswith("_".join(keys["kd"].split("+")))

    def test_it_attaches_in_its_last_line(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[-1] == "arcface_kd.attach(config)"
        assert lines.count(lines[-1]) == 1
        assert "import arcface_kd" in lines

    def test_it_says_only_what_differs_from_the_base(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = own_keys(path, monkeypatch)
        assert {key: keys.pop(key, "unset") for key in OF_EVERY_RUN} == OF_EVERY_RUN
        assert not {key for key, value in keys.items() if key in BASE and BASE[key] == value}
        assert not set(keys) - {*OF_THE_DATA, *OF_THE_METHOD, "network", "fp16"}

    def test_what_the_data_decide_is_the_same_in_all_their_files(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        twin = own_keys(path.with_name(f"{parts(path)[0]}_mbf_adadistill.py"), monkeypatch)
        keys = own_keys(path, monkeypatch)
        for key in (*OF_THE_DATA, "fp16"):
            assert keys.get(key) == twin.get(key), key

    def test_it_loads_and_its_method_takes_its_options(self, path: Path) -> None:
        config = load_config(str(path))
        check_keys(config)
        kd = KDConfig.from_config(config)
        assert kd.methods
        assert config.output == f"work_dirs/{path.stem}"
        if (recipe := recipe_of(config)) is not None:
            assert build(recipe.Config, kd.options[config.kd], config.kd)
            return
        distiller = Distiller(kd, load_teacher(Network(), TeacherOptions(size=8)))
        assert set(distiller.methods.types) == set(kd.methods)

    def test_beside_the_host_s_own_it_differs_where_it_must(
        self, path: Path, arcface_torch: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Against the host's config of the same data, over the host's base."""
        ours = load_config(str(arcface_torch / "configs" / "base.py"))
        ours.update(own_keys(path, monkeypatch))
        theirs = load_config(str(arcface_torch / "configs" / f"{DATA[parts(path)[0]]}.py"))
        differing = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
        # The host gives its smallest student less weight decay; it looks at nothing of WebFace42M before the end.
        known = {*OF_THE_METHOD, *OF_EVERY_RUN, "network", "weight_decay"}
        if parts(path)[0] == "wf42m":
            known |= {"verbose", "val_targets"}
        assert not differing - known
        assert theirs["val_targets"] in ([], ours["val_targets"])


def test_every_method_has_a_config() -> None:
    own = {
        name for name, entry in registry.entry_points(registry.METHODS).items() if entry.value.startswith("arcface_kd.")
    }
    assert own - SAME_AS_ANOTHER <= {parts(path)[2] for path in CONFIGS}


def test_adadistill_has_a_config_for_every_data_set_and_the_other_methods_one_each() -> None:
    own = {path.stem for path in CONFIGS if parts(path)[2] == "adadistill"}
    assert {f"{data}_mbf_adadistill" for data in DATA} <= own
    others = {path.stem for path in CONFIGS} - own
    assert {name.split("_", 2)[:2] == ["ms1mv2", "mbf"] for name in others} == {True}
    assert len(list(FOLDER.glob("*.py"))) <= 20


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_other_data_are_the_lines_that_it_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the comment tells to copy is all that data sets differ in."""
    if parts(path)[2] == "adadistill":
        reference = own_keys(path.with_name("ms1mv2_mbf_adadistill.py"), monkeypatch)
        keys = own_keys(path, monkeypatch)
        differing = {key for key in {*keys, *reference} if keys.get(key) != reference.get(key)}
        assert not differing - {*OF_THE_DATA, "network", "num_epoch", "warmup_epoch"}
    else:
        assert "DATA_mbf_adadistill.py" in path.read_text(encoding="utf-8")


def test_the_config_of_own_faces_needs_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(str(FOLDER / "own_faces.py"))
    check_keys(config)
    assert not {
        key for key, value in own_keys(FOLDER / "own_faces.py", monkeypatch).items() if BASE.get(key) == value
    } - {"output"}
    distiller = Distiller(KDConfig.from_config(config), load_teacher(Network(), TeacherOptions(size=8)))
    distiller.methods.refuse_without_labels()
