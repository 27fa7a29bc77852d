import math
from typing import Any

import pytest

from arcface_kd.errors import ConfigError
from arcface_kd.teachers import Preprocessing, TeacherOptions


def test_text_and_numbers_mean_the_same() -> None:
    text = {"channels": "BGR", "mean": "127", "std": "(1, 2.5,3)", "size": "112", "precision": "bf16"}
    assert TeacherOptions.of(text) == TeacherOptions("bgr", (127.0,) * 3, (1.0, 2.5, 3.0), 112, "bf16")


def test_given_options_replace_the_sources_one_by_one() -> None:
    known = Preprocessing("bgr", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), 96)
    assert TeacherOptions.of(None).preprocessing(known) == known
    said = TeacherOptions.of({"mean": "0", "size": 224})
    assert said.preprocessing(known) == Preprocessing("bgr", (0.0, 0.0, 0.0), (4.0, 5.0, 6.0), 224)


def test_an_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.chanels.*teacher\.mean.*mean 'teacher\.channels'\?"):
        TeacherOptions.of({"chanels": "bgr"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("channels", value) for value in ("grb", 3)),
        *(("mean", value) for value in ("a", "1,2", math.nan, [1, 2, 3, 4], True, [None, 1, 2])),
        *(("std", value) for value in (0, "-1", "1,1,0", "0.5", math.inf)),
        *(("size", value) for value in (0, "112.5", 10**9, True, "9" * 5000)),
        *(("precision", "int8"), ("network", ["r50"]), ("embedding_size", 0), ("embedding_size", -512)),
    ],
)
def test_a_value_out_of_range_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^teacher\.{key} is ") as caught:
        TeacherOptions.of({key: value})
    assert "\n" not in str(caught.value)


def test_a_preprocessing_reads_as_it_is_given() -> None:
    plain = Preprocessing("bgr", (127.0,) * 3, (128.0,) * 3, 112)
    assert str(plain) == "bgr, (x - 127) / 128, 112x112"
    assert plain.as_options() == "teacher.channels=bgr teacher.mean=127 teacher.std=128"
    uneven = Preprocessing("rgb", (1.0, 1.0, 2.0), (3.0, 4.0, 5.5), 224)
    assert str(uneven) == "rgb, (x - (1, 1, 2)) / (3, 4, 5.5), 224x224"
    options = dict(word.removeprefix("teacher.").split("=") for word in uneven.as_options().split())
    assert TeacherOptions.of(options).preprocessing(Preprocessing(size=224)) == uneven
