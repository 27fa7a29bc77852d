"""Losses as pure tensor functions: no configuration, no module, no process group that is not passed in."""
