"""Teachers in ONNX files and packs."""
