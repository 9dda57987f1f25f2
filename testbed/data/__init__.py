"""Data sets, their parts, and how batches are drawn from them. No torch, no MPI."""

from testbed.data.catalog import DATASETS, DatasetInfo, check_variant, describe, load, open_dataset
from testbed.data.dataset import Dataset
from testbed.data.labels import DISTRIBUTIONS, Sampler, draw_labels, draw_skew
from testbed.data.parts import Parts, split

__all__ = [
    "DATASETS",
    "DISTRIBUTIONS",
    "Dataset",
    "DatasetInfo",
    "Parts",
    "Sampler",
    "check_variant",
    "describe",
    "draw_labels",
    "draw_skew",
    "load",
    "open_dataset",
    "split",
]
