"""What is checked on a GPU before a release: ``make gpu``, see ``docs/gpu.md``."""
