"""The 8x8 digits that ship with scikit-learn: a data set that needs no download."""

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
    try:
        from sklearn import datasets
    except ImportError as error:
        raise UserError(
            f"data set 'digits' comes with scikit-learn, which cannot be imported ({error}); "
            "install it with: pip install .[run]"
        ) from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    return Dataset(
        name="digits",
        images=pixels.astype(np.uint8).reshape(-1, 1, 8, 8),
        labels=labels.astype(np.int64),
        classes=10,
        scale=1 / 16,
        test_start=None,
    )
