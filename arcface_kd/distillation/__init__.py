"""One run's distillation: methods, the teacher's signal, the head and the drop-ins."""
