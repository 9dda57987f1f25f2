"""The harness notices what it is there to notice."""

from pathlib import Path

import pytest
from campaign import fuzz
from formats import NAMES, find
from planted_formats import READERS


def test_everything_that_no_reader_may_do_is_a_failure_of_its_kind(tmp_path: Path) -> None:
    tally = fuzz("planted", 1, stop=len(READERS), keep=tmp_path)
    names = list(READERS)
    found = {names[failure.number]: failure.what for failure in tally.failures}
    # Beside others the kernel may take longer than the limit to find so much memory.
    assert found.pop("takes memory") in ("caught", "took too long (processor)")
    expected = {name: what for name, (_, what) in READERS.items() if what}
    expected.pop("takes memory")
    assert found == expected
    assert tally.outcomes == {"accepted": 2, "failed": len(found) + 1}
    for failure in tally.failures:
        place = tmp_path / f"planted-1-{failure.number}"
        assert (place / "in" / "data").read_text() == names[failure.number]
        assert (
            f"--format planted --seed 1 --only {failure.number}"
            in (place / "report.txt").read_text()
        )


def test_a_failure_says_where() -> None:
    number = list(READERS).index("spins")
    (failure,) = fuzz("planted", 1, start=number, stop=number + 1).failures
    assert "_spins" in failure.detail
    assert "planted_formats.py" in failure.kind


@pytest.mark.parametrize("name", NAMES)
def test_an_input_is_a_function_of_its_numbers(name: str) -> None:
    form = find(name)
    seeds = form.seeds()
    # HDF5, in what the program itself writes, and MATLAB's format note the second of their making.
    again = seeds if name in ("resume", "svhn") else form.seeds()
    for number in (len(seeds), len(seeds) + 1, len(seeds) + 7):
        one, other = form.draw(seeds, 3, number), form.draw(again, 3, number)
        assert one == other
    assert form.draw(seeds, 3, 100) != form.draw(seeds, 4, 100)
