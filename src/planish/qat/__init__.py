"""Quantization-aware training: the quantized network itself is trained. One file a method."""

from planish.qat.method import Context, Method
from planish.qat.methods import METHODS, get_method
from planish.qat.recipe import QATSettings, train_quantized

train = train_quantized  # as `planish.train`

__all__ = ["METHODS", "Context", "Method", "QATSettings", "get_method", "train", "train_quantized"]
