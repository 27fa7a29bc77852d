"""The name that was probably meant."""

from arcface_kd.errors import suggestion


def test_a_near_name_is_offered() -> None:
    assert suggestion("adadistil", ["gkd", "adadistill"]) == "; did you mean 'adadistill'?"
    assert suggestion("stdd", {"mean": 0, "std": 1}, "teacher.") == "; did you mean 'teacher.std'?"


def test_no_name_is_offered_where_none_is_near() -> None:
    assert suggestion("adadistill", ["tcs"]) == ""
    assert suggestion("adadistill", []) == ""
