"""A moment of each campaign, so that what `make campaigns` runs at length is known to work."""

import random
from pathlib import Path

import pytest

from tests.campaigns.kill_campaign import Packing
from tests.campaigns.kill_campaign import campaign as kill
from tests.campaigns.parser_fuzz import Format, attempt
from tests.campaigns.parser_fuzz import campaign as fuzz
from tests.forked import start, wait
from tests.host.trainer.faces import draw_faces


def test_killed_once_packing_comes_to_the_same_bytes(tmp_path: Path) -> None:
    faces = draw_faces(tmp_path, identities=4, images=4)
    job = Packing(tmp_path / "work", faces, tmp_path / "no teacher")
    killed, finished = kill(job, 1, random.Random(0))
    assert killed == 1
    assert finished >= 1


@pytest.mark.parametrize("kind", ["cache", "records"])
def test_a_few_mutated_files_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    assert wait([start(fuzz, kind, str(tmp_path / "work"), 0, 20, log=tmp_path / "log")], 300) == [0]
    assert 0 < int((tmp_path / "work" / "refused").read_text()) <= 20


def test_what_a_parser_takes_wrongly_is_a_fault(tmp_path: Path) -> None:
    form = Format(lambda folder: ["file"], lambda folder: (folder / "file").read_bytes(), lambda *of: of[0] == of[1])
    assert attempt(form, tmp_path, b"good", "file", b"good", b"good") == (None, True)
    fault, accepted = attempt(form, tmp_path, b"good", "file", b"good", b"bad")
    assert accepted
    assert fault is not None
