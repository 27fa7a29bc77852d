"""arcface_torch itself: attach to it, patch it, run it."""
