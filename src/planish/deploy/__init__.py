"""Ship a quantized model: integers, files, other runtimes. Importing this package imports nothing."""
