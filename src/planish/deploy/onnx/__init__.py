"""A quantized model as an ONNX file. Importing this package imports nothing."""
