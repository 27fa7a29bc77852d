"""``arcface-kd compare``: several runs on one page, with confidence intervals."""
