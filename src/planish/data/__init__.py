"""Images: the embedded default, folders, tables, tar shards, data sets, loaders with a reproducible order."""

from planish.data.arrays import BatchedTensorDataset
from planish.data.encoded import EncodedImages
from planish.data.load import EMBEDDED, ImageData, load_data
from planish.data.loader import calibration_subset, collate, make_loader, set_epoch
from planish.data.unlabelled import load_unlabelled

__all__ = [
    "EMBEDDED",
    "BatchedTensorDataset",
    "EncodedImages",
    "ImageData",
    "calibration_subset",
    "collate",
    "load_data",
    "load_unlabelled",
    "make_loader",
    "set_epoch",
]
