"""Teachers in MXNet's checkpoint format."""
