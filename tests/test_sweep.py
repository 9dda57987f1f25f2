"""Dotted keys, overrides and sweeps, apart from what an experiment is."""

import copy
import itertools
import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import UserError
from testbed.sweep import apply_overrides, describe, expand, parse_yaml, set_keys

KEYS = st.text("abc", min_size=1, max_size=3)
LISTS = st.lists(st.integers(), min_size=1, max_size=4)


def refusal(sweep: object) -> str:
    with pytest.raises(UserError) as caught:
        expand(sweep, "my.yaml", run_keys={"title"})
    return str(caught.value)


@given(st.dictionaries(KEYS, LISTS, max_size=4))
def test_product_varies_the_last_key_fastest(sweep: dict[str, list[int]]) -> None:
    expected = [
        dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())
    ]
    assert expand(sweep, "my.yaml") == expected


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_zip_groups_count_as_one_key_each(first: int, second: int, alone: int) -> None:
    sweep = {
        "zip": [
            {"a": list(range(first)), "b": list(range(10, 10 + first))},
            {"c": list(range(second))},
        ],
        "d": list(range(alone)),
    }
    points = expand(sweep, "my.yaml")
    # Keys of their own come before the zips, wherever they stand.
    order = itertools.product(range(alone), range(first), range(second))
    assert points == [{"d": d, "a": a, "b": 10 + a, "c": c} for d, a, c in order]


def test_zip_may_be_one_mapping() -> None:
    points = expand({"zip": {"a": [1, 2], "b": [3, 4]}}, "my.yaml")
    assert points == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]


def test_no_sweep_is_one_point() -> None:
    assert expand({}, "my.yaml") == [{}]


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        (3, "my.yaml: sweep: expected a mapping of keys to lists"),
        ([1], "my.yaml: sweep: expected a mapping of keys to lists"),
        ({"a": 3}, "my.yaml: sweep.a: found 3, expected a list of values"),
        ({"a": "xy"}, "my.yaml: sweep.a: found 'xy', expected a list of values"),
        ({"a": {"b": [1]}}, "my.yaml: sweep.a: found {'b': [1]}, expected a list of values"),
        ({"a": []}, "my.yaml: sweep.a: found [], expected a list of values"),
        ({"zip": 3}, "my.yaml: sweep.zip: expected a mapping of keys to lists"),
        ({"zip": [{}]}, "my.yaml: sweep.zip: expected a mapping of keys to lists"),
        ({"zip": {"a": 3}}, "my.yaml: sweep.a: found 3, expected a list of values"),
        (
            {"zip": {"a": [1], "b": [1, 2]}},
            "my.yaml: sweep.zip: the lists differ in length: {'a': 1, 'b': 2}",
        ),
        ({"a": [1], "zip": {"a": [2]}}, "my.yaml: sweep.a: this key is swept twice"),
        ({"zip": [{"a": [1]}, {"a": [2]}]}, "my.yaml: sweep.a: this key is swept twice"),
        ({"title": ["x"]}, "my.yaml: sweep.title: this key belongs to the run as a whole"),
        ({"zip": {"title.x": ["x"]}}, "my.yaml: sweep.title.x: this key belongs to the run as a"),
        ({"a.b": [1], "a": [{}]}, "my.yaml: sweep.a.b: this key is part of 'a', which is swept"),
        ({"a": [{}], "zip": {"a.b": [1]}}, "my.yaml: sweep.a.b: this key is part of 'a', which"),
    ],
)
def test_refused_sweeps(sweep: object, expected: str) -> None:
    assert refusal(sweep).startswith(expected)


def test_keys_with_a_common_beginning_are_not_parts_of_each_other() -> None:
    assert len(expand({"a.b": [1, 2], "a.bc": [1, 2]}, "my.yaml")) == 4


def test_too_many_points_are_refused_before_they_are_made() -> None:
    sweep = {"a": list(range(1000)), "b": list(range(1000)), "c": list(range(1000))}
    assert refusal(sweep) == "my.yaml: sweep: 1000000000 scenarios, at most 100000 are allowed"


NESTED = st.dictionaries(KEYS, st.integers() | st.dictionaries(KEYS, st.integers(), max_size=3))


@given(NESTED, KEYS, KEYS, st.integers())
def test_set_keys_changes_one_value(
    content: dict[str, Any], outer: str, inner: str, value: int
) -> None:
    before = copy.deepcopy(content)
    if isinstance(content.get(outer, {}), dict):
        result = set_keys(content, {f"{outer}.{inner}": value}, "x")
        assert result.pop(outer) == {**content.get(outer, {}), inner: value}
        assert result == {key: item for key, item in content.items() if key != outer}
    else:
        with pytest.raises(UserError, match=f"^x: {outer}.{inner}: '{outer}' holds "):
            set_keys(content, {f"{outer}.{inner}": value}, "x")
    assert content == before


def test_set_keys_copies_what_it_sets() -> None:
    value = [1]
    result = set_keys({}, {"a": value}, "x")
    result["a"].append(2)
    assert value == [1]


def test_overrides_leave_the_content_alone() -> None:
    content = {"a": {"b": 1}, "sweep": {"a.b": [1, 2], "zip": {"c": [3], "d": [4]}}}
    before = copy.deepcopy(content)
    result = apply_overrides(content, ["a.b=5", "c=6", "sweep.e=[7]"])
    assert result == {"a": {"b": 5}, "c": 6, "sweep": {"zip": [{"d": [4]}], "e": [7]}}
    assert content == before


def test_override_leaves_keys_with_the_same_beginning_swept() -> None:
    result = apply_overrides({"sweep": {"ab": [1], "a": [2]}}, ["a=3"])
    assert result["sweep"] == {"ab": [1]}


def test_a_missing_or_empty_sweep_can_be_added_to() -> None:
    assert apply_overrides({}, ["sweep.a=[1]"]) == {"sweep": {"a": [1]}}
    assert apply_overrides({"sweep": None}, ["sweep.a=[1]"]) == {"sweep": {"a": [1]}}


def test_describe_is_one_line() -> None:
    assert describe({"a.b": 1, "c": "x"}) == "a.b=1, c=x"
    assert describe({}) == ""


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text("ab c", max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
        max_leaves=10,
    )
)
def test_plain_yaml_is_parsed_as_it_is_meant(value: Any) -> None:
    assert parse_yaml(yaml.safe_dump(value), "x") == value


def test_infinite_and_undefined_numbers() -> None:
    assert parse_yaml(".inf", "x") == math.inf
    assert math.isnan(parse_yaml(".nan", "x"))
