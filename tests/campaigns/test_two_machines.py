"""Two machines, as far as one can play them: ranks in two network namespaces, joined by one link.

Needs root and ``ip``; says so elsewhere.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from arcface_kd.distributed.process_group import TIMEOUT
from tests.forked import free_port, ranks_environment
from tests.host.trainer.faces import draw_faces

pytestmark = pytest.mark.slow

_SPACES, _LINKS, _ADDRESSES = ("akd_a", "akd_b"), ("akd_va", "akd_vb"), ("10.99.0.1", "10.99.0.2")
_EXCHANGE = """
from arcface_kd.distributed.process_group import process_group
from arcface_kd.distributed.ranks import RankGroup
with process_group() as (rank, _, _):
    print(RankGroup().sizes(rank + 3))
"""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[None]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    try:
        try:
            for space in _SPACES:
                _ip("netns", "add", space)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        _ip("link", "add", _LINKS[0], "type", "veth", "peer", "name", _LINKS[1])
        for space, link, address in zip(_SPACES, _LINKS, _ADDRESSES, strict=True):
            _ip("link", "set", link, "netns", space)
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", link)
            _ip("-n", space, "link", "set", link, "up")
            _ip("-n", space, "link", "set", "lo", "up")
        yield
    finally:
        for space in _SPACES:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def _start(words: list[str], folder: Path, *, seconds: int) -> list["subprocess.Popen[bytes]"]:
    """A command on both machines; its output goes to ``rank0.log`` and ``rank1.log``."""
    port, ranks = free_port(), []
    for rank, (space, link) in enumerate(zip(_SPACES, _LINKS, strict=True)):
        # gloo would go by the host's name, which may stand for 127.0.0.1 on both.
        own = {"MASTER_ADDR": _ADDRESSES[0], "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": link}
        patience = {TIMEOUT: str(seconds), "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **ranks_environment(2, port, rank, **{**own, **patience})}
        command = ["ip", "netns", "exec", space, sys.executable, *words]
        with (folder / f"rank{rank}.log").open("wb") as log:
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return ranks


def _ended(ranks: list["subprocess.Popen[bytes]"], seconds: float) -> list[int]:
    try:
        until = time.monotonic() + seconds
        return [rank.wait(max(0.0, until - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_ranks_meet_over_the_interface_that_is_named(machines: None, tmp_path: Path) -> None:
    codes = _ended(_start(["-c", _EXCHANGE], tmp_path, seconds=60), 120)
    said = [(tmp_path / f"rank{rank}.log").read_text() for rank in (0, 1)]
    assert codes == [0, 0], said
    assert all("[3, 4]" in each for each in said)


def test_a_link_that_is_cut_ends_the_job(machines: None, tmp_path: Path) -> None:
    folder = tmp_path / "faces"
    folder.mkdir()
    faces = draw_faces(folder, identities=6, images=8)
    keys = {
        **{"network": "thin_r18", "rec": str(faces.folder), "num_classes": 6, "num_image": 48, "num_epoch": 500},
        **{"warmup_epoch": 0, "val_targets": [], "embedding_size": 16, "batch_size": 4, "num_workers": 0},
        **{"frequent": 1, "output": str(tmp_path / "run")},
    }
    config = tmp_path / "small.py"
    config.write_text(f"from easydict import EasyDict\nconfig = EasyDict({keys!r})\n")
    ranks = _start(["-m", "arcface_kd", "train", str(config)], tmp_path, seconds=8)
    log = tmp_path / "rank0.log"
    for _ in range(1200):
        if "Global Step: 6 " in log.read_text() or ranks[0].poll() is not None:
            break
        time.sleep(0.1)
    _ip("-n", _SPACES[1], "link", "set", _LINKS[1], "down")
    cut = time.monotonic()
    assert _ended(ranks, 120) == [2, 2], log.read_text()[-2000:]
    # The time-out, the search for a cause in a store that does not answer, and what is left is a busy machine's.
    assert time.monotonic() - cut < 90
    for rank in (0, 1):
        assert f"because rank {1 - rank} did not answer in time" in (tmp_path / f"rank{rank}.log").read_text()
