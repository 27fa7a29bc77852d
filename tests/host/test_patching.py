"""The patches and what puts them in: on miniatures that stand in for the checkout, and on the real one when given."""

import configparser
import itertools
import os
import re
import shutil
import stat
import subprocess
from contextlib import AbstractContextManager
from difflib import unified_diff
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unidiff import PatchSet

from arcface_kd.errors import ConfigError
from arcface_kd.host import checkout as checkout_module
from arcface_kd.host import patching
from arcface_kd.host.checkout import find_checkout
from arcface_kd.host.patching import PatchOutcome, available_patches, patch_checkout, patches_folder
from arcface_kd.system.files import atomic_write

NAMES = ("cpu_gloo", "current_stack", "kd_flag")
ORDERS = list(itertools.permutations(NAMES))
REPOSITORY = Path(__file__).parents[2]


def shipped(name: str) -> PatchSet:
    return PatchSet((patches_folder() / f"{name}.patch").read_text(encoding="utf-8"))


def original_lines() -> dict[str, dict[int, str]]:
    """What the patches say of the host: file -> line number -> line, complaining where two of them disagree."""
    files: dict[str, dict[int, str]] = {}
    for name in NAMES:
        for file in shipped(name):
            known = files.setdefault(file.path, {})
            for hunk in file:
                lines = list(hunk)
                for line, following in zip(lines, [*lines[1:], None], strict=True):
                    if line.source_line_no is None:
                        continue
                    value = line.value
                    if following is not None and following.line_type == "\\":
                        value = value.removesuffix("\n")
                    assert known.setdefault(line.source_line_no, value) == value, (name, file.path, line)
    return files


def write_miniature(folder: Path) -> None:
    """A checkout in which only the lines that the patches name are the host's; every other one is a number."""
    for path, known in original_lines().items():
        last = max(known)
        lines = [known.get(number, f"# line {number}\n") for number in range(1, last + 1)]
        if lines[-1].endswith("\n"):
            lines += [f"# line {number}\n" for number in range(last + 1, last + 8)]
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes("".join(lines).encode())


@pytest.fixture(params=["miniature", pytest.param("real", marks=pytest.mark.trainer)])
def checkout(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "arcface_torch"
    if request.param == "real":
        shutil.copytree(request.getfixturevalue("arcface_torch"), folder)
    else:
        write_miniature(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def to_crlf(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


class TestShippedPatches:
    def test_there_are_three(self) -> None:
        assert available_patches() == sorted(NAMES)

    def test_the_flag_adds_at_most_ten_lines_to_the_trainer_and_removes_none(self) -> None:
        (file,) = shipped("kd_flag")
        assert file.path == "train_v2.py"
        assert 0 < file.added <= 10
        assert file.removed == 0

    @pytest.mark.parametrize("name", NAMES)
    def test_hunks_carry_one_line_of_context_and_files_stay(self, name: str) -> None:
        for file in shipped(name):
            assert file.is_modified_file
            assert not file.is_rename
            for hunk in file:
                kinds = [line.line_type for line in hunk if line.line_type != "\\"]
                changed = [at for at, kind in enumerate(kinds) if kind != " "]
                assert changed[0] <= 1, hunk
                assert len(kinds) - 1 - changed[-1] <= 1, hunk

    @pytest.mark.parametrize("crlf", [False, True], ids=["lf", "crlf"])
    def test_every_order_gives_the_same_files_and_reverts_byte_for_byte(self, checkout: Path, crlf: bool) -> None:
        if crlf:
            to_crlf(checkout)
        before = contents(checkout)
        results = []
        for order in ORDERS:
            for name in order:
                (outcome,) = patch_checkout(checkout, [name])
                assert outcome.files
            results.append(contents(checkout))
            for name in order:
                patch_checkout(checkout, [name], revert=True)
            assert contents(checkout) == before
        assert all(result == results[0] for result in results)
        assert results[0] != before
        for back in ORDERS:
            patch_checkout(checkout, NAMES)
            assert contents(checkout) == results[0]
            for name in back:
                (outcome,) = patch_checkout(checkout, [name], revert=True)
                assert outcome.files
            assert contents(checkout) == before
        if crlf:
            assert all(raw.count(b"\n") == raw.count(b"\r\n") for raw in results[0].values())

    def test_each_alone_changes_only_its_own_files(self, checkout: Path) -> None:
        before = contents(checkout)
        for name in NAMES:
            (outcome,) = patch_checkout(checkout, [name])
            after = contents(checkout)
            assert {path for path in after if after[path] != before[path]} == set(outcome.files)
            assert outcome.added == sum(file.added for file in shipped(name))
            assert outcome.removed == sum(file.removed for file in shipped(name))
            patch_checkout(checkout, [name], revert=True)

    @pytest.mark.trainer
    def test_patched_python_compiles(self, arcface_torch: Path, tmp_path: Path) -> None:
        folder = tmp_path / "arcface_torch"
        shutil.copytree(arcface_torch, folder)
        outcomes = patch_checkout(folder, NAMES)
        for path in {path for outcome in outcomes for path in outcome.files if path.endswith(".py")}:
            # Warnings are errors here, so that `x is 0` counts.
            compile((folder / path).read_bytes(), path, "exec")

    @pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
    @pytest.mark.parametrize("order", ORDERS, ids="-".join)
    def test_git_apply_does_the_same(self, checkout: Path, tmp_path: Path, order: tuple[str, ...]) -> None:
        theirs = tmp_path / "git"
        shutil.copytree(checkout, theirs)
        before = contents(theirs)
        patch_checkout(checkout, order)
        command = ["git", "apply", "--whitespace=nowarn"]
        for name in order:
            subprocess.run([*command, patches_folder() / f"{name}.patch"], cwd=theirs, check=True)
        assert contents(theirs) == contents(checkout)
        for name in order:
            subprocess.run([*command, "--reverse", patches_folder() / f"{name}.patch"], cwd=theirs, check=True)
        assert contents(theirs) == before


class TestPatchCheckout:
    @pytest.fixture
    def miniature(self, tmp_path: Path) -> Path:
        folder = tmp_path / "recognition" / "arcface_torch"
        write_miniature(folder)
        return folder

    def test_what_patched_files_import_is_there(self) -> None:
        lines = [
            line[1:].strip()
            for patch in Path(patches_folder()).glob("*.patch")
            for line in patch.read_text(encoding="utf-8").splitlines()
            if re.match(r"\+\s*from arcface_kd\S* import", line)
        ]
        assert len(lines) >= 6
        for line in lines:
            exec(line)
            older = line.replace(".data.formats.", ".data.")
            exec(older.replace("from arcface_kd import", "from arcface_kd.hook import"))

    def test_the_flag_is_the_default(self, miniature: Path) -> None:
        assert [outcome.name for outcome in patch_checkout(miniature)] == ["kd_flag"]
        text = (miniature / "train_v2.py").read_text(encoding="utf-8")
        assert text.index("get_config(args.config)\n") < text.index("attach(cfg, args)") < text.index("add_arguments(")

    def test_twice_changes_nothing(self, miniature: Path) -> None:
        patch_checkout(miniature, NAMES)
        files = {path: path.stat().st_ino for path in miniature.rglob("*") if path.is_file()}
        once = contents(miniature)
        outcomes = patch_checkout(miniature, NAMES)
        assert contents(miniature) == once
        assert {path: path.stat().st_ino for path in files} == files, "a file was written again"
        assert [str(outcome) for outcome in outcomes] == [f"{name}: already applied, nothing to do" for name in NAMES]

    def test_revert_of_what_is_not_there_changes_nothing(self, miniature: Path) -> None:
        before = contents(miniature)
        (outcome,) = patch_checkout(miniature, revert=True)
        assert contents(miniature) == before
        assert str(outcome) == "kd_flag: not applied, nothing to do"

    @pytest.mark.parametrize("revert", [False, True])
    def test_imports_of_an_earlier_version_count_as_todays(self, miniature: Path, revert: bool) -> None:
        fresh = contents(miniature)
        patch_checkout(miniature, NAMES)
        for path in (miniature / name for name in ("train_v2.py", "scripts/shuffle_rec.py", "eval/verification.py")):
            text = path.read_text(encoding="utf-8").replace("arcface_kd.data.formats.", "arcface_kd.data.")
            path.write_text(text.replace("from arcface_kd import", "from arcface_kd.hook import"), encoding="utf-8")
        earlier = contents(miniature)
        patch_checkout(miniature, NAMES, revert=revert)
        assert contents(miniature) == (fresh if revert else earlier)

    def test_a_name_given_twice_counts_once(self, miniature: Path) -> None:
        assert len(patch_checkout(miniature, ["kd_flag", "kd_flag"])) == 1
        assert (miniature / "train_v2.py").read_text(encoding="utf-8").count("attach(cfg, args)") == 1

    @pytest.mark.parametrize("revert", [False, True])
    def test_check_says_what_would_happen_and_writes_nothing(self, miniature: Path, revert: bool) -> None:
        if revert:
            patch_checkout(miniature, NAMES)
        before = contents(miniature)
        said = patch_checkout(miniature, NAMES, check=True, revert=revert)
        assert contents(miniature) == before
        done = patch_checkout(miniature, NAMES, revert=revert)
        assert contents(miniature) != before
        assert [(s.name, s.files, s.added, s.removed) for s in said] == [
            (d.name, d.files, d.added, d.removed) for d in done
        ]
        for outcome in said:
            verb = "revert" if revert else "apply"
            counts = f"+{outcome.added} -{outcome.removed} lines in {', '.join(outcome.files)}"
            assert str(outcome) == f"{outcome.name}: would {verb}, {counts}"

    def test_what_was_done_is_said(self) -> None:
        outcome = PatchOutcome("kd_flag", ("train_v2.py",), 0, 5, check=False, revert=True)
        assert str(outcome) == "kd_flag: reverted, +0 -5 lines in train_v2.py"

    def test_hunks_are_found_where_the_file_has_grown(self, miniature: Path) -> None:
        trainer = miniature / "train_v2.py"
        lines = trainer.read_bytes().splitlines(keepends=True)
        grown = b"".join([b"# new above\n"] * 57 + lines[:100] + [b"# new between\n"] * 31 + lines[100:])
        trainer.write_bytes(grown)
        patch_checkout(miniature, ["kd_flag", "cpu_gloo"])
        assert b"add_arguments(parser)\n" in trainer.read_bytes()
        patch_checkout(miniature, ["cpu_gloo", "kd_flag"], revert=True)
        assert trainer.read_bytes() == grown

    @pytest.mark.parametrize("above", ["", "../..", ".."], ids=["arcface_torch", "insightface", "recognition"])
    def test_the_folder_may_be_a_checkout_of_insightface(self, miniature: Path, above: str) -> None:
        patch_checkout(miniature / above)
        assert "attach(cfg, args)" in (miniature / "train_v2.py").read_text(encoding="utf-8")

    def test_no_checkout(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"no checkout of arcface_torch: train_v2\.py is neither"):
            find_checkout(tmp_path)
        with pytest.raises(ConfigError, match="missing is no checkout"):
            patch_checkout(tmp_path / "missing")

    def test_unknown_name(self, miniature: Path) -> None:
        with pytest.raises(ConfigError, match=r"no patch named 'kd_flags'; there are: .*did you mean 'kd_flag'"):
            patch_checkout(miniature, ["kd_flags"])

    def test_a_file_that_differs_is_named_with_its_hunk_and_nothing_is_written(self, miniature: Path) -> None:
        trainer = miniature / "train_v2.py"
        trainer.write_bytes(trainer.read_bytes().replace(b"parser.parse_args()", b"arguments_of(parser)"))
        before = contents(miniature)
        with pytest.raises(ConfigError, match=r"^train_v2\.py: hunk 2 of kd_flag\.patch does not fit: .*add_arguments"):
            patch_checkout(miniature, ["current_stack", "cpu_gloo", "kd_flag"])
        assert contents(miniature) == before

    def test_lines_of_the_user_s_own_stay_beside_the_flag(self, miniature: Path) -> None:
        trainer = miniature / "train_v2.py"
        own = trainer.read_bytes().replace(
            b"    cfg = get_config(args.config)\n", b"    c = get_config(a.config)  # mine\n    x()\n"
        )
        own = own.replace(b"    main(parser.parse_args())\n", b"    y()\n    a = own.parse_args()\n    main(a)\n")
        trainer.write_bytes(own)
        patch_checkout(miniature)
        text = trainer.read_text(encoding="utf-8")
        assert "# mine\n    from arcface_kd import attach\n    attach(c, a)\n    x()\n" in text
        assert (
            "    y()\n    from arcface_kd import add_arguments\n    add_arguments(own)\n    a = own.parse_args()"
            in text
        )
        assert not patch_checkout(miniature)[0].files
        patch_checkout(miniature, revert=True)
        assert trainer.read_bytes() == own

    def test_a_list_of_packages_of_the_user_s_own_is_left_alone(self, miniature: Path) -> None:
        (miniature / "requirement.txt").write_bytes(b"mxnet==1.9.1\n")
        (outcome,) = patch_checkout(miniature, ["current_stack"])
        assert "dataset.py" in outcome.files
        assert str(outcome).endswith("requirement.txt")
        assert (miniature / "requirement.txt").read_bytes() == b"mxnet==1.9.1\n"

    def test_lines_torn_apart_are_named(self, miniature: Path) -> None:
        sampler = miniature / "utils/utils_distributed_sampler.py"
        sampler.write_bytes(sampler.read_bytes().replace(b'device="cuda"):\n', b'device="cuda"):\n    own()\n'))
        with pytest.raises(ConfigError, match=r"utils_distributed_sampler\.py: hunk 1 of cpu_gloo\.patch does not fit"):
            patch_checkout(miniature, ["cpu_gloo"])

    def test_a_patch_that_never_fitted_keeps_no_other_in(self, miniature: Path) -> None:
        head = miniature / "partial_fc_v2.py"
        head.write_bytes(head.read_bytes().replace(b"perm[positive] = 2.0", b"perm[positive] = 3.0"))
        with pytest.raises(ConfigError, match=rf"partial_fc_v2\.py: hunk .*{patches_folder()}; .*2023-04-08"):
            patch_checkout(miniature, NAMES)
        (miniature / "scripts/shuffle_rec.py").unlink()
        fresh = contents(miniature)
        patch_checkout(miniature)
        outcomes = patch_checkout(miniature, NAMES, revert=True)
        assert contents(miniature) == fresh
        assert [bool(outcome.files) for outcome in outcomes] == [name == "kd_flag" for name in NAMES]

    def test_a_hunk_that_fits_twice_is_refused(self, miniature: Path) -> None:
        trainer = miniature / "train_v2.py"
        raw = trainer.read_bytes()
        trainer.write_bytes(raw + raw)
        before = contents(miniature)
        with pytest.raises(ConfigError, match="hunk 1 of kd_flag"):
            patch_checkout(miniature)
        assert contents(miniature) == before

    def test_a_patch_half_in_place_is_refused(self, miniature: Path) -> None:
        trainer = miniature / "train_v2.py"
        patch_checkout(miniature)
        half = trainer.read_bytes().replace(b"    add_arguments(parser)\n", b"")
        half = half.replace(b"    from arcface_kd import add_arguments\n", b"")
        trainer.write_bytes(half)
        for revert in (False, True):
            with pytest.raises(
                ConfigError, match=r"hunk 2 of kd_flag\.patch is not applied, but train_v2\.py: hunk 1 .* is"
            ):
                patch_checkout(miniature, revert=revert)
            assert trainer.read_bytes() == half

    def test_mixed_line_endings_are_refused_by_name(self, miniature: Path) -> None:
        trainer = miniature / "train_v2.py"
        trainer.write_bytes(trainer.read_bytes().replace(b"\n", b"\r\n", 3))
        before = contents(miniature)
        with pytest.raises(ConfigError, match=r"train_v2\.py has 3 lines that end in CRLF and \d+ that end in LF"):
            patch_checkout(miniature)
        assert contents(miniature) == before

    def test_a_missing_file_is_named(self, miniature: Path) -> None:
        (miniature / "partial_fc_v2.py").unlink()
        before = contents(miniature)
        with pytest.raises(ConfigError, match=r"partial_fc_v2\.py is missing, and cpu_gloo\.patch changes it"):
            patch_checkout(miniature, ["kd_flag", "cpu_gloo"])
        assert contents(miniature) == before

    def test_a_failing_write_takes_back_the_ones_before(self, miniature: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with (miniature / "dataset.py").open("ab") as stream:
            stream.write(b"from arcface_kd.hook import attach\n")
        before = contents(miniature)
        calls = []

        def failing(path: Path) -> AbstractContextManager[IO[bytes]]:
            calls.append(path.name)
            if len(calls) == 3:
                raise OSError(28, "No space left on device")
            return atomic_write(path)

        monkeypatch.setattr(checkout_module, "atomic_write", failing)
        with pytest.raises(ConfigError, match="cannot be written: No space left on device; nothing was changed"):
            patch_checkout(miniature, ["cpu_gloo"])
        assert contents(miniature) == before
        assert len(calls) == 5, "two files were written, the third failed, the two were put back"

    @pytest.mark.skipif(os.name == "nt", reason="POSIX modes and links")
    def test_mode_and_links_stay(self, miniature: Path, tmp_path: Path) -> None:
        trainer, elsewhere = miniature / "train_v2.py", tmp_path / "elsewhere.py"
        trainer.rename(elsewhere)
        trainer.symlink_to(elsewhere)
        elsewhere.chmod(0o750)
        patch_checkout(miniature)
        assert trainer.is_symlink()
        assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o750
        assert b"add_arguments(parser)" in elsewhere.read_bytes()

    def test_the_end_of_a_file_without_a_newline_stays_without(self, miniature: Path) -> None:
        requirements = miniature / "requirement.txt"
        assert not requirements.read_bytes().endswith(b"\n")
        patch_checkout(miniature, ["current_stack"])
        assert not requirements.read_bytes().endswith(b"\n")
        patch_checkout(miniature, ["current_stack"], revert=True)
        assert not requirements.read_bytes().endswith(b"\n")


@st.composite
def edits(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """A file of distinct lines, and the same file with runs of lines taken out and put in."""
    size = draw(st.integers(min_value=2, max_value=30))
    before = [f"old {number}\n" for number in range(size)]
    after: list[str] = []
    for at, line in enumerate(before):
        if at in (0, size - 1) or draw(st.integers(0, 3)):
            after.append(line)
        if at < size - 1:
            after += [f"new {at} {number}\n" for number in range(draw(st.sampled_from([0, 0, 0, 1, 3])))]
    return before, after


@given(edits(), st.booleans(), st.integers(0, 3))
def test_any_diff_goes_in_and_comes_out(
    tmp_path_factory: pytest.TempPathFactory, files: tuple[list[str], list[str]], crlf: bool, above: int
) -> None:
    before, after = files
    folder = tmp_path_factory.mktemp("any")
    diff = "".join(unified_diff(before, after, "a/train_v2.py", "b/train_v2.py", n=1))
    (folder / "kd_flag.patch").write_text(diff, encoding="utf-8", newline="")
    shifted = [f"above {number}\n" for number in range(above)]
    ending = "\r\n" if crlf else "\n"
    raw, wanted = ("".join(shifted + lines).replace("\n", ending).encode() for lines in (before, after))
    (folder / "train_v2.py").write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patching, "patches_folder", lambda: folder)
        (outcome,) = patch_checkout(folder)
        assert (folder / "train_v2.py").read_bytes() == wanted
        assert bool(outcome.files) == (before != after)
        patch_checkout(folder, revert=True)
    assert (folder / "train_v2.py").read_bytes() == raw


class TestShipping:
    def test_setup_lists_every_package(self) -> None:
        settings = configparser.ConfigParser()
        settings.read(REPOSITORY / "setup.cfg", encoding="utf-8")
        found = {
            ".".join(init.parent.relative_to(REPOSITORY).parts)
            for init in (REPOSITORY / "arcface_kd").rglob("__init__.py")
        }
        assert set(settings["options"]["packages"].split()) == found | {"arcface_kd.patches"}

    def test_a_package_without_patches_says_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(patching, "__file__", str(tmp_path / "arcface_kd" / "patching.py"))
        with pytest.raises(ConfigError, match=r"no patches/kd_flag\.patch in .*install arcface_kd again"):
            patches_folder()
