"""Checkpoints: whole files, shards of a head, and what a run was started with."""
