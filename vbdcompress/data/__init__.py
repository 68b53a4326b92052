"""Data sets as tensors on the device, and the user's own loaders."""

from vbdcompress.data.batches import TensorBatches
from vbdcompress.data.dataset import DataSet, load_data
from vbdcompress.data.loaders import Unpack, Unpacked, count_examples, on_device
from vbdcompress.data.split import share_examples, split_loader

__all__ = [
    "DataSet",
    "TensorBatches",
    "Unpack",
    "Unpacked",
    "count_examples",
    "load_data",
    "on_device",
    "share_examples",
    "split_loader",
]
