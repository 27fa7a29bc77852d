"""Configs: arcface_torch's keys, the ``kd*`` keys, options and flags."""
