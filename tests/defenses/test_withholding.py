"""Defences that keep the last layer's gradient, or columns of it, from the server."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from testbed.defenses import Stage, Tensors, make_defense
from testbed.defenses.withholding import Soteria, WithholdLastLayer
from testbed.errors import UserError


@st.composite
def tensor_lists(draw: st.DrawFn) -> Tensors:
    """Return tensors of any sizes, among them a last layer in any place, with or without a bias."""
    classes, features = draw(st.integers(2, 5)), draw(st.integers(1, 5))
    sizes = {f"t{i}": size for i, size in enumerate(draw(st.lists(st.integers(1, 9), max_size=4)))}
    sizes["head.weight"] = classes * features
    if draw(st.booleans()):
        sizes["head.bias"] = classes
    names = draw(st.permutations(list(sizes)))
    offsets = np.cumsum([0, *(sizes[name] for name in names)])
    places = {
        name: slice(int(start), int(start) + sizes[name])
        for name, start in zip(names, offsets, strict=False)
    }
    return Tensors(tuple(names), offsets, places["head.weight"], places.get("head.bias"), classes)


@given(tensor_lists())
def test_all_but_the_last_layer_is_sent(tensors):
    kept = WithholdLastLayer().kept(tensors)
    assert kept.dtype == np.int64
    assert (np.diff(kept) > 0).all()
    expected = [
        position
        for name, start, stop in zip(
            tensors.names, tensors.offsets, tensors.offsets[1:], strict=False
        )
        if not name.startswith("head.")
        for position in range(start, stop)
    ]
    assert kept.tolist() == expected


def test_clients_keep_a_head_of_their_own_unless_told_otherwise() -> None:
    assert WithholdLastLayer().head == "personal"
    assert WithholdLastLayer(head="frozen").stage is Stage.WITHHOLD
    assert not WithholdLastLayer().accumulates


def test_features_below_the_percentile_are_not_kept() -> None:
    scores = np.array([5.0, 1.0, 4.0, 2.0, 3.0])
    # Interpolated between the ordered scores: 40 % of the way is 2.6.
    np.testing.assert_array_equal(
        Soteria(percentile=40.0).mask(scores), [True, False, True, False, True]
    )
    assert Soteria(percentile=0.0).mask(scores).all()
    np.testing.assert_array_equal(np.flatnonzero(Soteria(percentile=100.0).mask(scores)), [0])
    assert Soteria(percentile=90.0).mask(np.ones(6)).all()


@given(
    arrays(np.float32, st.integers(1, 30), elements=st.floats(0, 100, width=32), unique=True),
    st.floats(0, 100),
)
def test_the_share_of_features_left_out_is_the_percentile(scores, percentile):
    kept = Soteria(percentile=percentile).mask(scores)
    left_out = percentile / 100 * (len(scores) - 1)
    assert abs((~kept).sum() - left_out) < 1 + 1e-6
    if not kept.all():
        assert scores[~kept].max() < scores[kept].min()


@given(tensor_lists(), st.data())
def test_columns_are_zeroed_in_the_weight_alone(tensors, data):
    features = (tensors.weight.stop - tensors.weight.start) // tensors.classes
    keep = data.draw(arrays(np.bool_, features))
    vector = np.arange(1, tensors.size + 1, dtype=np.float32)
    expected = vector.copy()
    for c in range(tensors.classes):
        for f in range(features):
            if not keep[f]:
                expected[tensors.weight.start + c * features + f] = 0
    Soteria(percentile=10.0).apply_columns(vector, tensors, keep)
    np.testing.assert_array_equal(vector, expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("withhold_last_layer", {"head": "shared"}, "option 'head': found 'shared'"),
        ("withhold_last_layer", {"heads": "frozen"}, "did you mean 'head'"),
        ("soteria", {"percentile": 101.0}, "option 'percentile': found 101.0"),
        ("soteria", {"percentile": -1.0}, "option 'percentile': found -1.0"),
        ("soteria", {}, "option 'percentile' is missing"),
        ("soteria", {"percentile": 1.0, "at": "update"}, "option 'at': found 'update'"),
    ],
)
def test_knobs_out_of_range_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_defense(name, options)
