"""Images: the embedded default, folders of class folders, loaders with a reproducible order."""

from planish.data.arrays import BatchedTensorDataset
from planish.data.folder import FolderImages
from planish.data.load import EMBEDDED, ImageData, load_data
from planish.data.loader import calibration_subset, collate, make_loader, set_epoch
from planish.data.unlabelled import load_unlabelled

__all__ = [
    "EMBEDDED",
    "BatchedTensorDataset",
    "FolderImages",
    "ImageData",
    "calibration_subset",
    "collate",
    "load_data",
    "load_unlabelled",
    "make_loader",
    "set_epoch",
]
