"""Export of the student to ONNX, its variants, and inference with them without torch."""
