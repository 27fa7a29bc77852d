"""Face data: RecordIO, data sets, the training loader and verification sets."""

from arcface_kd.data.dataset import (
    FaceDataset,
    FolderDataset,
    RecordDataset,
    Sample,
    SyntheticDataset,
    View,
    open_dataset,
)
from arcface_kd.data.formats.record import RecordHeader
from arcface_kd.data.formats.recordio import RecordReader, RecordWriter
from arcface_kd.data.formats.verification_bin import VerificationSet, decode, read_bin, write_bin
from arcface_kd.data.loader import BatchViews, FaceLoader, get_dataloader
from arcface_kd.data.pack import PackCounts, pack_folder
from arcface_kd.data.sampler import ViewSampler

__all__ = [
    "BatchViews",
    "FaceDataset",
    "FaceLoader",
    "FolderDataset",
    "PackCounts",
    "RecordDataset",
    "RecordHeader",
    "RecordReader",
    "RecordWriter",
    "Sample",
    "SyntheticDataset",
    "VerificationSet",
    "View",
    "ViewSampler",
    "decode",
    "get_dataloader",
    "open_dataset",
    "pack_folder",
    "read_bin",
    "write_bin",
]
