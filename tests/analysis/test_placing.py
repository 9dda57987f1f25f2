import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis.placing import place_labels

NONE = np.zeros((0, 2))


def panel():
    figure = Figure(figsize=(5, 4))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return axes


def boxes(axes):
    """Return the boxes of the texts alone, without the lines that lead to them."""
    found = []
    for text in axes.texts:
        text.get_window_extent()  # moves the text to where it is drawn
        found.append(Text.get_window_extent(text))
    return found


POINTS = st.lists(st.tuples(*[st.floats(0, 1)] * 2), min_size=1, max_size=8)


@settings(max_examples=30)
@given(POINTS)
def test_labels_lie_inside_and_keep_clear_of_points_and_of_each_other(points):
    axes, at = panel(), np.array(points)
    labels = [f"label {number}" for number in range(len(at))]
    if not place_labels(axes, at, labels, ["red"] * len(at), NONE, 8):
        assert not axes.texts
        return
    assert [text.get_text() for text in axes.texts] == labels
    assert [text.xy for text in axes.texts] == points
    found, frame = boxes(axes), axes.get_window_extent()
    for one, other in itertools.combinations(found, 2):
        assert not one.padded(-1).overlaps(other.padded(-1))
    for box, (x, y) in itertools.product(found, axes.transData.transform(at)):
        assert not box.padded(-1).contains(x, y)
    for box in found:
        assert frame.padded(1).contains(box.x0, box.y0)
        assert frame.padded(1).contains(box.x1, box.y1)


def test_a_lone_label_stands_right_of_its_point_without_a_line():
    axes = panel()
    assert place_labels(axes, np.array([[0.5, 0.5]]), ["one"], ["red"], NONE, 8)
    (text,) = axes.texts
    assert text.arrow_patch is None
    (box,) = boxes(axes)
    x, y = axes.transData.transform((0.5, 0.5))
    assert 0 < box.x0 - x < 15
    assert box.y0 < y < box.y1


def test_what_else_is_there_is_kept_clear_of():
    axes = panel()
    grid = np.stack(np.meshgrid(np.linspace(0.5, 1, 30), np.linspace(0.3, 0.7, 30)), -1)
    others = grid.reshape(-1, 2)
    assert place_labels(axes, np.array([[0.5, 0.5]]), ["one"], ["red"], others, 8)
    (box,) = boxes(axes)
    for x, y in axes.transData.transform(others):
        assert not box.contains(x, y)
    assert box.x1 < axes.transData.transform((0.5, 0.5))[0]


def test_without_room_nothing_is_written_unless_it_has_to_be():
    axes, points = panel(), np.full((60, 2), 0.5)
    labels = ["a label that is long"] * 60
    assert not place_labels(axes, points, labels, ["red"] * 60, NONE, 8)
    assert not axes.texts
    assert place_labels(axes, points, labels, ["red"] * 60, NONE, 8, anyway=True)
    assert len(axes.texts) == 60


def test_far_labels_have_a_line_to_their_point():
    axes, points = panel(), np.full((12, 2), 0.5)
    assert place_labels(axes, points, list("123456789abc"), ["red"] * 12, NONE, 8, anyway=True)
    led = [text.arrow_patch is not None for text in axes.texts]
    assert not led[0]
    assert any(led)


def test_lines_may_cross_where_there_is_no_other_way():
    axes, points = panel(), np.full((12, 2), 0.5)
    labels = ["a label"] * 12
    assert not place_labels(axes, points, labels, ["red"] * 12, NONE, 8)
    assert place_labels(axes, points, labels, ["red"] * 12, NONE, 8, anyway=True)
    for one, other in itertools.combinations(boxes(axes), 2):
        assert not one.padded(-1).overlaps(other.padded(-1))
