"""Writes files of runs that share an experiment, as ``testbed run --share i/n`` does."""

import zlib

import h5py
from build_file import build


def share(folder, specs, name, part, committed=None, experiment="A title"):
    """Write one of n shares of a sweep; rounds of an unfinished one, where they are given."""
    place, count = part
    numbers = range(place, len(specs), count)
    path = folder / (f"{name}.h5" if committed is None else f"{name}.h5.partial")
    build(path, [specs[number] for number in numbers], committed)
    with h5py.File(path, "a") as file:
        file.attrs["share"] = f"{place}/{count}"
        sweep = f"sweep: {{a.b: {list(range(len(specs)))}}}"
        seed = zlib.crc32(experiment.encode())  # titles alone make no other run
        file.attrs["experiment"] = f"title: {experiment}\nseed: {seed}\n{sweep}\n"
        for index, number in enumerate(numbers):
            file[f"scenarios/{index:04d}"].attrs["number"] = number
    return path


def shares(folder, specs, count, stem="run"):
    """Write all shares of a sweep, under the names that a job array gives them."""
    return [share(folder, specs, f"{stem}_{i}of{count}", (i, count)) for i in range(count)]
