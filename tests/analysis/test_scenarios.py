import numpy as np
import pandas as pd
import pytest
from build_file import Spec, build
from hypothesis import given
from hypothesis import strategies as st

import analysis
from analysis.scenarios import choose_attacks, merge_seeds, outermost_first, pages, seeds_note
from testbed.errors import UserError


def sweep(**values):
    """Return a row per scenario of a sweep, the last key changing fastest."""
    index = pd.MultiIndex.from_product(values.values(), names=values)
    return index.to_frame(index=False)


def test_chosen_attacks(tmp_path):
    frame = analysis.load(build(tmp_path / "run.h5", [Spec(rounds=2)]))
    assert choose_attacks(frame, []) is frame
    chosen = choose_attacks(frame, ["llg_plus", "llg"])
    assert chosen["attack"].unique().tolist() == ["llg", "llg_plus"]
    with pytest.raises(UserError, match=r"unknown attack 'llg_pluss'.*'llg_plus'"):
        choose_attacks(frame, ["llg", "llg_pluss"])


def test_seeds_become_further_rounds_of_one_scenario(tmp_path):
    specs = [
        Spec({"federation.batch_size": size, "seed": seed}, rounds=3)
        for size in (2, 4)
        for seed in (7, 9)
    ]
    frame = analysis.load(build(tmp_path / "run.h5", specs))
    merged = merge_seeds(frame)
    assert merged["scenario"].unique().tolist() == [0, 2]
    assert "seed" not in merged
    assert len(merged) == len(frame)
    rounds = merged.groupby("scenario")["round"].unique()
    assert [each.tolist() for each in rounds] == [[0, 1, 2, 3, 4, 5]] * 2
    assert not merged.duplicated(["scenario", "round", "client", "attack"]).any()
    assert merged["asr"].tolist() == frame["asr"].tolist()
    assert merge_seeds(merged) is merged


def test_a_single_seed_and_several_files_stay_as_they_are(tmp_path):
    one = build(tmp_path / "one.h5", [Spec({"seed": 1}, rounds=2)])
    frame = analysis.load(one)
    assert merge_seeds(frame) is frame
    two = build(tmp_path / "two.h5", [Spec({"seed": 2}, rounds=2)])
    frame = analysis.load(one, two)
    assert merge_seeds(frame) is frame
    assert seeds_note(frame, merge_seeds(frame)) == []


def test_how_many_seeds_were_averaged(tmp_path):
    def note(seeds, other=()):
        specs = [Spec({"seed": seed}, rounds=1) for seed in seeds]
        specs += [Spec({"seed": seed, "federation.batch_size": 4}, rounds=1) for seed in other]
        frame = analysis.load(build(tmp_path / "run.h5", specs))
        return seeds_note(frame, merge_seeds(frame))

    assert note([1, 2, 3], [1, 2, 3]) == ["averaged over 3 seeds"]
    assert note([1, 2, 3], [1]) == ["averaged over 1 to 3 seeds"]
    assert note([1], [2]) == []


def test_the_outermost_key_comes_first():
    scenarios = sweep(distribution=["a", "b"], model=["c"], batch_size=[1, 2, 4], steps=[0, 9])
    assert outermost_first(scenarios) == ["distribution", "batch_size", "steps"]


def test_pages_keep_the_values_of_outer_keys_together():
    scenarios = sweep(distribution=["a", "b"], batch_size=[1, 2], steps=[0, 1, 2, 3])
    assert [len(page) for page in pages(scenarios, 16)] == [16]
    for most, sizes in [(15, [8, 8]), (8, [8, 8]), (7, [4] * 4), (3, [3, 1] * 4)]:
        divided = pages(scenarios, most)
        assert [len(page) for page in divided] == sizes
        for page in divided:
            assert page["distribution"].nunique() == 1


@given(
    st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=40),
    st.integers(1, 12),
)
def test_pages_hold_every_scenario_once(rows, most):
    scenarios = pd.DataFrame(rows, columns=["distribution", "batch_size", "steps"])
    divided = pages(scenarios, most)
    assert max(map(len, divided)) <= most
    numbers = np.concatenate([page.index for page in divided])
    assert sorted(numbers.tolist()) == list(range(len(rows)))
