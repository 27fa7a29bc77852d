"""The name that was probably meant; other packages' messages on one line."""

from arcface_kd.errors import first_line, suggestion


def test_a_near_name_is_offered() -> None:
    assert suggestion("adadistil", ["gkd", "adadistill"]) == "; did you mean 'adadistill'?"
    assert suggestion("stdd", {"mean": 0, "std": 1}, "teacher.") == "; did you mean 'teacher.std'?"


def test_no_name_is_offered_where_none_is_near() -> None:
    assert suggestion("adadistill", ["tcs"]) == ""
    assert suggestion("adadistill", []) == ""


def test_a_foreign_message_is_cut_to_whole_sentences_without_a_terminal_s_codes() -> None:
    assert first_line(ValueError("\x1b[1mbad\x1b[0m\n  value")) == "bad value"
    assert first_line(ValueError()) == "ValueError"
    sentence = "Words of a package about a file."
    assert first_line(ValueError(" ".join([sentence] * 20))) == " ".join([sentence] * 7)
    cut = first_line(ValueError("word " * 100))
    assert cut.endswith("word...")
    assert len(cut) <= 240
    assert len(first_line(ValueError("x" * 1000))) == 240
