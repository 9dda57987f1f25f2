"""What is fuzzed: for each format valid inputs, a way to damage them, and who reads them.

A format is an instance of `Format`, found by its name in `FORMATS`. To add one: write a function
that returns valid small files, one that reads a folder with such files through the program's public
entry point, and choose a mutator.
"""

import importlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mutate import damage

Files = Mapping[str, bytes]
"""Content by path within a folder."""


@dataclass(frozen=True)
class Input:
    """A damaged input.

    Attributes
    ----------
    files
        What is written into an empty folder.
    arguments
        What the reader gets beside the folder.
    refused
        Whether it must be refused: it asks for what no input may have.
    """

    files: Files
    arguments: Sequence[str] = ()
    refused: bool = False


Mutator = Callable[[Files, random.Random], Files | Input]


def any_file(files: Files, rng: random.Random) -> Files:
    """Damage the bytes of one of the files."""
    name = rng.choice(sorted(files))
    return {**files, name: damage(files[name], rng)}


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes
    ----------
    name
        For the command line.
    seeds
        Returns valid inputs; all are read without a refusal.
    read
        Reads the files in a folder, given `Input.arguments`; raises `UserError` for a refusal.
    mutate
        Returns a damaged copy of a valid input.
    seconds
        Processor time that reading one input may take: a multiple of what it does take, the imports
        of the first one among it, on the slowest machine.
    patience
        Wall time that it may take, per second of processor time: others want the processor too.
    share
        How many inputs in continuous integration, in multiples of those of other formats.
    lines
        Whether a refusal may have several lines.
    """

    name: str
    seeds: Callable[[], Sequence[Files]]
    read: Callable[[Path, Sequence[str]], None]
    mutate: Mutator = any_file
    seconds: float = 30.0
    patience: float = 6.0
    share: float = 1.0
    lines: bool = False

    def draw(self, seeds: Sequence[Files], seed: int, number: int) -> Input:
        """Return an input; valid ones come first, damaged ones are a function of the numbers."""
        if number < len(seeds):
            return Input(seeds[number])
        rng = random.Random(f"{self.name} {seed} {number}")
        found = self.mutate(rng.choice(seeds), rng)
        return found if isinstance(found, Input) else Input(found)


# By name, and the module that has it: a child imports no more than it needs.
_MODULES = {
    "data_formats": ("idx", "idx-gz", "emnist", "cifar10", "cifar100", "svhn", "femnist"),
    "picture_formats": ("celeba", "images"),
    "archive_formats": ("npz", "array"),
    "hdf5_formats": ("packed", "packed-bytes", "results", "results-bytes", "resume"),
    "checkpoint_formats": ("checkpoint",),
    "experiment_formats": ("experiment", "experiment-text", "overrides"),
}
NAMES = tuple(name for names in _MODULES.values() for name in names)
# What the harness itself is tested by.
_PLANTED = {"planted_formats": ("planted",)}


def find(name: str) -> Format:
    """Return a format by its name."""
    module = next(module for module, names in (_MODULES | _PLANTED).items() if name in names)
    found: Mapping[str, Format] = importlib.import_module(module).FORMATS
    return found[name]
