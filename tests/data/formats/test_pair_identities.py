"""Who is on the images of pairs: named in a file, found by shared images, or unknown."""

from pathlib import Path

import numpy as np
import pytest

from arcface_kd.data.formats.pair_identities import identities_file, pair_identities, write_pair_identities
from arcface_kd.data.formats.verification_bin import VerificationSet
from arcface_kd.errors import DataError


def pairs(images: str, same: str) -> VerificationSet:
    """Pairs of images that are letters, and a plus for each genuine pair."""
    return VerificationSet("set", [letter.encode() for letter in images], np.array([sign == "+" for sign in same]))


def grouped(numbers: np.ndarray) -> list[set[int]]:
    """Places of the images of each person, in order of their first."""
    flat = numbers.reshape(-1).tolist()
    return [{at for at, other in enumerate(flat) if other == number} for number in dict.fromkeys(flat)]


def test_names_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "lfw.bin"
    write_pair_identities(file, ["Ann Lee", "Ann Lee", "Bo", "Ann Lee"])
    assert identities_file(file) == tmp_path / "lfw.identities.txt"
    found = pair_identities(file, pairs("abcd", "+-"))
    assert found.source == "stated"
    assert grouped(found.numbers) == [{0, 1, 3}, {2}]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["A", "A", "B"], "names 3 persons; wanted one line for each of 4 images"),
        (["A", "B", "B", "A"], "pair 0 is of one person in the .bin file, but its lines are 'A' and 'B'"),
        (["A", "A", "B", "B"], "pair 1 is of two persons"),
    ],
)
def test_a_file_of_other_pairs_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    write_pair_identities(tmp_path / "lfw.bin", names)
    with pytest.raises(DataError, match=message):
        pair_identities(tmp_path / "lfw.bin", pairs("abcd", "+-"))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    identities_file(tmp_path / "lfw.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as text"):
        pair_identities(tmp_path / "lfw.bin", pairs("ab", "+"))


def test_images_that_occur_again_tie_pairs_together(tmp_path: Path) -> None:
    # ab and bc are one person; d is compared with a; ef another; g and h nobody knows.
    found = pair_identities(tmp_path / "set.bin", pairs("abbcdaefgh", "++-+-"))
    assert found.source == "shared images"
    assert grouped(found.numbers) == [{0, 1, 2, 3, 5}, {4}, {6, 7}, {8}, {9}]
    genuine = found.numbers[:, 0] == found.numbers[:, 1]
    assert genuine.tolist() == [True, True, False, True, False]


def test_images_that_occur_once_tell_nothing(tmp_path: Path) -> None:
    found = pair_identities(tmp_path / "set.bin", pairs("abcdef", "+-+"))
    assert found.source == "unknown"
    assert grouped(found.numbers) == [{0, 1}, {2}, {3}, {4, 5}]


def test_a_long_chain_of_images_is_one_person(tmp_path: Path) -> None:
    count = 3000
    images = [str(number + side).encode() for number in range(count) for side in (0, 1)]
    chain = VerificationSet("chain", images, np.ones(count, dtype=bool))
    assert len(np.unique(pair_identities(tmp_path / "set.bin", chain).numbers)) == 1


@pytest.mark.real
def test_lfw_repeats_its_images(real_data: Path) -> None:
    from arcface_kd.data.formats.verification_bin import read_bin

    path = real_data / "faces_real" / "lfw_dev.bin"
    verification_set = read_bin(path)
    found = pair_identities(path, verification_set)
    assert found.source == "shared images"
    same = found.numbers[:, 0] == found.numbers[:, 1]
    assert np.array_equal(same, verification_set.is_same)
    assert 600 < len(np.unique(found.numbers)) < len(set(verification_set.images))
