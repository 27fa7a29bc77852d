"""Ranks, their process group and the classes that each holds."""
