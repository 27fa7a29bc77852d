"""Knowledge distillation for face recognition, as a plugin of InsightFace arcface_torch."""
