"""Random kills at random moments, bounded: `tests/chaos.py` is the long form."""

import random

import chaos
import pytest
from launching import assert_same_results, has_ulfm

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("name", chaos.ASKED)
def test_a_run_that_is_struck_at_random_ends_with_the_results_of_one_that_was_not(name, tmp_path):
    span = chaos.undisturbed(tmp_path, name)
    faults = chaos.FAULTS if has_ulfm() else ("root", "job", "signal")
    # Fixed beforehand, as far as the moments of a busy machine can be.
    rng = random.Random(f"{name} 2026")
    chaos.disturb(tmp_path / f"{name}.yaml", tmp_path / "struck.h5", rng, span=span, faults=faults)
    assert_same_results(tmp_path / f"{name}.h5", tmp_path / "struck.h5")
