"""The 8x8 digits that ship with scikit-learn: a data set that needs no download."""

import importlib.util
from pathlib import Path

import numpy as np

from testbed.data.dataset import Dataset
from testbed.errors import UserError


def load_digits(root: Path | None = None) -> Dataset:  # noqa: ARG001 (all loaders are alike)
    """Return the 1797 digits, uint8 ``[1797, 1, 8, 8]`` with values 0..16.

    Parameters
    ----------
    root
        Ignored: the data come with the package.

    Raises
    ------
    UserError
        If scikit-learn is not installed.

    Notes
    -----
    Source: UCI "Optical Recognition of Handwritten Digits", its test set. scikit-learn does not
    split it further, so there is no official test split.
    """
    # Found and not imported, which would take as long as the rest of a small run's set-up.
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise UserError(
            "data set 'digits' comes with scikit-learn, which is not installed; "
            "install it with: pip install .[run]"
        )
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(file, np.uint8, delimiter=",")
    return Dataset(
        name="digits",
        images=table[:, :-1].reshape(-1, 1, 8, 8),
        labels=table[:, -1].astype(np.int64),
        classes=10,
        scale=1 / 16,
        test_start=None,
    )
