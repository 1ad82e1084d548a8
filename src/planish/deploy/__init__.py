"""Ship it: packed checkpoints, integers, ONNX files. Nothing is imported here, so what needs no torch runs without it."""
