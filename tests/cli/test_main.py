"""The command line: exit codes, one-line errors, nothing half-written."""

import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, version
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import arcface_kd
from arcface_kd import registry
from arcface_kd.backbones import get_backbone
from arcface_kd.cli.main import build_parser, main
from arcface_kd.data import write_bin
from tests.host.trainer.faces import Faces, draw_faces
from tests.training.runs import config_file


@pytest.fixture
def faces(tmp_path: Path) -> Faces:
    folder = tmp_path / "faces"
    folder.mkdir()
    return draw_faces(folder, identities=4, images=4)


@pytest.fixture
def config(faces: Faces, tmp_path: Path) -> Path:
    return config_file(faces, tmp_path / "run", network="thin_r10", embedding_size=16, num_epoch=1, batch_size=8)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "teacher.pt"
    torch.save(get_backbone("thin_r10", num_features=16).state_dict(), path)
    return path


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def pointing_past_the_end(path: Path) -> None:
    lines = path.read_text().splitlines()
    lines[3] = lines[3].split("\t")[0] + "\t999999999"
    path.write_text("\n".join(lines) + "\n")


def not_a_pickle(path: Path) -> None:
    path.write_bytes(b"these are no pairs")


def test_trains_from_a_config(config: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config), "--kd", "adadistill", "--kd-teacher", str(teacher)]) == 0
    assert (tmp_path / "run" / "model.pt").is_file()
    assert "pairs: accuracy" in capsys.readouterr().out


def test_the_command_that_fills_a_cache_is_printed_with_the_run_s_own_options(
    config: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Typed as it stands there, it makes the cache that the run wants."""
    options = ["teacher.channels=bgr", "teacher.mean=100,110,120", "tcs.variance=0.5"]
    flags = ["--kd", "tcs", "--kd-teacher", str(teacher), "--kd-option", *options]
    assert main(["train", str(config), *flags]) == 2
    assert "--kd-option teacher.channels=bgr teacher.mean=100,110,120 tcs.variance=0.5" in capsys.readouterr().err
    flags += ["--kd-cache", str(tmp_path / "a cache")]
    assert main(["train", str(config), *flags]) == 2
    found = re.search(r"`arcface-kd cache CONFIG (.*)`", capsys.readouterr().err)
    assert found
    assert main(["cache", str(config), *shlex.split(found[1])]) == 0
    assert main(["train", str(config), *flags]) == 0
    assert main(["train", str(config), *flags, "--kd-option", "teacher.channels=rgb"]) == 2
    assert "another" in capsys.readouterr().err


def test_settings_win_over_the_config(config: Path, tmp_path: Path) -> None:
    assert main(["train", str(config), "--set", f"output={tmp_path / 'other'}", "margin_list=1.0,0.0,0.4"]) == 0
    assert (tmp_path / "other" / "model.pt").is_file()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kd", "adadistill"], "--kd-teacher FILE"),
        (["--kd", "adadistil", "--kd-teacher", "{teacher}"], "did you mean 'adadistill'"),
        (
            ["--kd", "adadistill", "--kd-teacher", "{teacher}", "--kd-option", "adadistill.alfa=plain"],
            "adadistill.alfa",
        ),
        (["--kd-teacher", "{teacher}"], "--kd-teacher without a method has no effect: add --kd METHOD"),
        (["--kd-cache", "c", "--kd-option", "teacher.std=128"], "--kd-cache and --kd-option without a method"),
        (["--set", "num_classes=2"], "num_classes"),
        (["--set", "output="], "output is ''; it must name a folder"),
        (["--set", "nosuchkey=2"], "nosuchkey"),
        (["--set", "batch_size"], "has no value"),
        (["--set", "resume=True"], "resume is on"),
    ],
)
def test_bad_words_end_in_one_line_and_code_2(
    config: Path,
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    filled = [word.format(folder=tmp_path, teacher=teacher) for word in words]
    assert main(["train", str(config), *filled]) == 2
    error = capsys.readouterr().err
    assert error.startswith("arcface-kd: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("train.rec", emptied),
        ("train.rec", truncated),
        ("train.idx", emptied),
        ("train.idx", pointing_past_the_end),
        ("pairs.bin", not_a_pickle),
        ("pairs.bin", emptied),
        ("property", Path.unlink),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_damaged_data_end_in_one_line_and_code_2(
    config: Path,
    faces: Faces,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    damage: Callable[[Path], None],
) -> None:
    damage(faces.folder / file)
    code = main(["train", str(config)])
    error = capsys.readouterr().err
    if file == "property":
        # The config states the classes; the file only repeats them.
        assert code == 0
        return
    assert code == 2
    assert error.startswith("arcface-kd: ")
    assert error.count("\n") == 1
    assert file in error
    assert not (tmp_path / "run").exists()


def test_names_of_files_do_not_write_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    person = tmp_path / "faces" / "a\x1b[31m\udcff\nb"
    person.mkdir(parents=True)
    (person / "1.jpg").write_bytes(b"no image")
    assert main(["data", "pack", str(tmp_path / "faces"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/faces/a\\x1b[31m\\udcff b/1.jpg: no image" in said
    assert said.removesuffix("\n").isprintable()
    assert main(["compare", "x" * 200 + "/y" * 100_000, "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err) < 5000


@pytest.mark.parametrize("words", [("check",), ("compare", "run")])
def test_only_options_of_a_teacher_are_taken_where_there_is_no_run(
    teacher: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert main([*words, "--kd-teacher", str(teacher), "--kd-option", "student.projection=linear"]) == 2
    assert capsys.readouterr().err == (
        "arcface-kd: option student.projection has no meaning here; options start with teacher.\n"
    )


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"arcface-kd {version('arcface_kd')}\n"
    assert arcface_kd.__version__ == version("arcface_kd")


def commands_of(
    parser: ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], ArgumentParser]]:
    """The parser, and those of all commands below it."""
    yield words, parser
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for name, below in action.choices.items():
                yield from commands_of(below, (*words, name))


COMMANDS = dict(commands_of(build_parser()))


def test_all_commands_are_walked_over() -> None:
    wanted = {"train", "cache", "demo", "patch", "check", "eval", "compare", "export", "merge-head", "data", "methods"}
    assert wanted <= {words[0] for words in COMMANDS if words}
    assert {("data", "pack"), ("data", "subset")} <= set(COMMANDS)


def test_a_verification_set_of_one_kind_of_pair_ends_a_run_before_its_first_step(
    config: Path, faces: Faces, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [cv2.imencode(".png", np.full((112, 112, 3), shade, np.uint8))[1].tobytes() for shade in range(24)]
    write_bin(faces.folder / "pairs.bin", images, [True] * 12)
    assert main(["train", str(config)]) == 2
    said = capsys.readouterr()
    assert "pairs.bin: all 12 pairs are of the same identity" in said.err
    assert "Global Step" not in said.out + said.err


@pytest.mark.parametrize("words", ["FOLDER kd_flag --check", "FOLDER --check kd_flag", "--check FOLDER kd_flag"])
def test_flags_may_stand_anywhere(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", *words.replace("FOLDER", str(tmp_path)).split()]) == 2
    assert f"arcface-kd: {tmp_path} is no checkout of arcface_torch" in capsys.readouterr().err


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_is_complete_and_has_an_example(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    parser = COMMANDS[words]
    assert parser.description
    assert parser.description.split()[0] in printed
    for action in parser._actions:
        assert action.help or isinstance(action, _SubParsersAction), f"{action.dest} of {words} has no help"
        for below in getattr(action, "_choices_actions", ()):
            assert below.help, f"{below.dest} has no help"
    found = re.search(r"^example: arcface-kd (.*)", " ".join((parser.epilog or "").split()))
    assert found, f"{words} has no example"
    assert "example: arcface-kd " + " ".join(words) in printed
    example = shlex.split(found[1].partition(";")[0])
    assert " ".join(example).startswith(" ".join(words))
    assert build_parser().parse_args(example).run is not None


def test_methods_are_listed_in_a_line_each_with_what_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == set(registry.entry_points(registry.METHODS))
    assert lines["adadistill"].endswith("Needs: teacher embeddings.")
    assert lines["proxylesskd"].endswith("Needs: teacher classifier.")
    for line in lines.values():
        assert re.fullmatch(r"\S+ +[A-Z].*[.] Needs: [a-z, ]+[.]", line), line


@pytest.mark.parametrize(
    ("value", "reason"),
    [("arcface_kd.no_such_module:Method", "no_such_module"), ("os:getcwd", "must be a subclass of Method")],
)
def test_a_method_that_cannot_be_loaded_is_listed_with_the_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: str, reason: str
) -> None:
    broken = EntryPoint("broken", value, registry.METHODS)
    known = registry.entry_points(registry.METHODS)
    monkeypatch.setattr(registry, "entry_points", lambda group: {"adadistill": known["adadistill"], "broken": broken})
    assert main(["methods"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("adadistill ")
    assert second.startswith("broken ")
    assert reason in second


def test_the_module_is_the_command(config: Path, tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "arcface_kd", "train", str(config), "--set", "network=r7"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith("arcface-kd: ")
    assert finished.stderr.count("\n") == 1


@pytest.mark.parametrize("out", ["head.pt", "no_such_folder/head.pt"])
def test_merge_head_of_a_run_that_saved_none_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    assert main(["merge-head", str(tmp_path), str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert "checkpoint_gpu_0.pt is missing" in error
    assert error.count("\n") == 1
    assert not (tmp_path / out).exists()
