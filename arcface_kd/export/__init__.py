"""Export students to ONNX, float32 and int8."""
