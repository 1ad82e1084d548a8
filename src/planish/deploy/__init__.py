"""Shipping a quantized network, and using what was shipped. Importing this package imports nothing."""
