"""TCS: the student in the coordinates of the teacher's principal components."""
