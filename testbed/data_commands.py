"""The command line's part about data sets: ``testbed data pack | info``."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import UserError

if TYPE_CHECKING:
    from testbed.data.lazy import LazyDataset

# What the loaders' messages call by its key in the experiment file.
_NAMES = {
    "data.root": "ROOT",
    "data.name": "NAME",
    "data.variant": "--variant",
    "data.limit": "--limit",
}
# Not within a path.
_KEY = re.compile(rf"(?<![\w./])({'|'.join(map(re.escape, _NAMES))})(?![\w./])")
_EPILOG = """\
examples:
  testbed data info mnist DIR
  testbed data info celeba DIR --variant gender
  testbed data pack celeba DIR -o hair.h5
  testbed data info packed hair.h5
"""


# argparse names the type of what `add_subparsers` returns with an underscore only.
def add_data_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``data pack`` and ``data info`` to a command line.

    Each sets ``command``, which takes the options, prints, returns the exit status, and raises
    `UserError`. Neither needs torch or MPI.
    """
    data = commands.add_parser(
        "data",
        help="describe a data set, or pack it into one HDF5 file",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = data.add_subparsers(required=True, metavar="ACTION")

    pack = actions.add_parser("pack", help="write a data set into one HDF5 file")
    _add_dataset(pack)
    pack.add_argument("-o", "--output", type=Path, required=True, help="the file (HDF5)")
    pack.add_argument("--overwrite", action="store_true", help="replace an existing file")
    pack.set_defaults(command=_pack)

    info = actions.add_parser("info", help="print what a data set holds")
    _add_dataset(info)
    info.set_defaults(command=_info)


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="data set, as `testbed list datasets` has it")
    parser.add_argument(
        "root",
        metavar="ROOT",
        type=Path,
        nargs="?",
        help="its folder or file; none for a data set that reads no files",
    )
    parser.add_argument("--variant", help="which variant of the data set (default: its first)")
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="at most N training samples, of all classes, and as small a share of the test samples",
    )


def _pack(options: argparse.Namespace) -> int:
    from testbed.data.packing import pack

    data = _open(options)
    source = str(options.root) if options.root is not None else options.name
    pack(data, options.output, source=source, overwrite=options.overwrite)
    print(
        f"{options.output}: {len(data.labels)} samples of {data.classes} classes, "
        f"{options.output.stat().st_size / 1e6:.3g} MB; use it with data.name: packed, "
        f"data.root: {options.output}"
    )
    return 0


def _info(options: argparse.Namespace) -> int:
    from testbed.data.summary import summarize

    print(summarize(_open(options)))
    return 0


def _open(options: argparse.Namespace) -> "LazyDataset":
    from testbed.data import open_dataset

    try:
        data = open_dataset(options.name, options.root, options.variant)
        return data.limited(options.limit)
    except UserError as error:
        raise UserError(_KEY.sub(lambda key: _NAMES[key[0]], str(error))) from error
