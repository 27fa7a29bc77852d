"""What stands in ``training.log``: also what was logged before it could be opened."""

import logging
from pathlib import Path

import pytest

from arcface_kd.training.log_files import early_messages, log_files

logger = logging.getLogger("arcface_kd.somewhere")


def test_early_messages_come_first_and_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with early_messages() as early:
        logger.info("teacher: a network")
        logger.debug("nobody asked")
    with log_files(tmp_path, 0, early):
        logger.info("step 1")
    said = [line.partition("-")[2].rpartition("-")[2] for line in (tmp_path / "training.log").read_text().splitlines()]
    assert said == ["teacher: a network", "step 1"]
    assert capsys.readouterr().out.count("teacher: a network") == 1
    logger.info("after the run")
    assert "after" not in (tmp_path / "training.log").read_text()


def test_other_ranks_tell_their_early_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with early_messages() as early:
        logger.info("teacher: a network")
        logger.warning("kd_cache is off")
    with log_files(tmp_path, 1, early):
        pass
    said = capsys.readouterr()
    assert said.out == ""
    assert "Rank 1" in said.err
    assert "kd_cache is off" in said.err
    assert "teacher" not in said.err
    assert list(tmp_path.iterdir()) == []


def test_warnings_of_a_run_that_never_begins_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def begin() -> None:
        with early_messages():
            logger.info("nobody asked")
            logger.warning("num_image is 7")
            raise ValueError("no run")

    with pytest.raises(ValueError, match="no run"):
        begin()
    assert capsys.readouterr().err == "num_image is 7\n"
