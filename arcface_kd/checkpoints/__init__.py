"""Checkpoints: whole files, shards of a head, and a run's settings."""
