"""Copies the datasets of an HDF5 file, chunks as they are: still compressed, with checksums."""

import math

import h5py

from testbed.results.schema import STRUCTURE_BYTES, chunk_room


def datasets(group: h5py.Group) -> list[h5py.Dataset]:
    """Return all datasets below a group."""
    found: list[h5py.Dataset] = []

    def visit(_: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            found.append(item)

    group.visititems(visit)
    return found


def unpacked_bytes(found: list[h5py.Dataset]) -> int:
    """Return what datasets would take in a file without compression."""
    size = STRUCTURE_BYTES * len(found)
    for dataset in found:
        if dataset.chunks is None:
            size += dataset.nbytes
        else:
            chunk = dataset.dtype.itemsize * math.prod(dataset.chunks)
            size += dataset.id.get_num_chunks() * chunk_room(chunk)
    return size


def copy_all(source: h5py.File, target: h5py.File) -> None:
    """Copy all values and attributes to a file with the same groups and datasets."""
    target.attrs.update(source.attrs)
    groups: list[h5py.Group] = []
    source.visititems(lambda _, item: groups.append(item) if isinstance(item, h5py.Group) else None)
    for group in groups:
        target[group.name].attrs.update(group.attrs)
    for dataset in datasets(source):
        copy = target[dataset.name]
        if dataset.chunks is None:
            copy[...] = dataset[...]
            copy.flush()
            continue
        if dataset.shape != copy.shape:  # a table that grew
            copy.resize(dataset.shape)
        copy_chunks(dataset, copy)


def copy_chunks(source: h5py.Dataset, target: h5py.Dataset, rows: int | None = None) -> None:
    """Copy the chunks of a dataset to one of the same shape: those of its first rows, if given."""
    offsets: list[tuple[int, ...]] = []

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        offsets.append(chunk.chunk_offset)

    source.id.chunk_iter(note)
    for offset in offsets:
        if rows is None or offset[0] < rows:
            mask, chunk = source.id.read_direct_chunk(offset)
            target.id.write_direct_chunk(offset, chunk, mask)
