"""What the claims about speed and memory rest on: ``python -m benchmarks [ONLY]``, or ``make bench``.

Each benchmark runs its providers side by side, prints a table, and appends rows to ``benchmarks/results.csv``, from
which the README's pictures are drawn.
"""
