import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.defenses.described import defense_key, defense_label, defense_labels


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (None, "none"),
        ([], "none"),
        ([{"name": "float16"}], "float16"),
        ([{"name": "clip", "bound": 1.0}], "clip(1)"),
        ([{"name": "noise", "sigma": 1e-05}], "noise(1e-05)"),
        (
            [{"name": "top_k", "theta": 0.9, "scope": "tensor"}, {"name": "float16"}],
            "top_k(0.9, tensor) + float16",
        ),
        ([{"name": "top_k", "theta": 0.9, "error_feedback": True}], "top_k(0.9, error_feedback)"),
        ([{"name": "drop", "p": 0.5, "rescale": False}], "drop(0.5, no rescale)"),
        (
            [{"name": "dp_sgd", "bound": 1, "noise_multiplier": 0.8}],
            "dp_sgd(bound=1, noise_multiplier=0.8)",
        ),
        ([{"name": "secure", "fraction_bits": None}], "secure(fraction_bits=null)"),
        ([{"name": "mine.defences:Own", "x": [1, 2]}], "Own(x=[1, 2])"),
        (["float16", 3], "float16 + 3"),
        ("odd", '"odd"'),
    ],
)
def test_names_and_given_options(value, label):
    assert defense_label(value) == label


def test_options_are_named_where_two_lists_would_share_a_label():
    lists = [
        [{"name": "a", "x": 1}],
        [{"name": "a", "y": 1}],
        [{"name": "m:B", "z": "text"}],
        [{"name": "n:B", "z": "text"}],
        [{"name": "c", "x": 1}],
    ]
    assert list(defense_labels(lists).values()) == [
        *("a(x=1)", "a(y=1)", "m:B(z=text)", "n:B(z=text)", "c(1)")
    ]


OPTIONS = st.dictionaries(
    st.sampled_from("xyz"),
    st.one_of(st.booleans(), st.none(), st.integers(0, 2), st.sampled_from(["x", "no x", "1", ""])),
)
LISTS = st.lists(
    st.builds(lambda name, options: {"name": name, **options}, st.sampled_from("ab"), OPTIONS),
    max_size=2,
)


@given(st.lists(LISTS, max_size=5))
def test_different_lists_have_different_labels(lists):
    labels = defense_labels(lists)
    assert labels.keys() == {defense_key(value) for value in lists}
    assert len(set(labels.values())) == len({json.dumps(value) for value in lists})
