"""Ship it: packed checkpoints, integers, ONNX files. Nothing is imported here, so classify runs without torch."""
