"""SH-KD: a teacher trained for its student, in three runs."""
