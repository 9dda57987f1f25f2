"""Checks of how a figure is laid out."""

import itertools

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis.figures import STYLE


def check_layout(figure: Figure) -> None:
    """Fail where parts of a figure overlap, are cut off, or are too small to read."""
    with rc_context(STYLE):
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
    boxes = {f"axes {i}": axes.get_tightbbox(renderer) for i, axes in enumerate(figure.axes)}
    boxes["title"] = figure._suptitle.get_window_extent(renderer)
    for name, text in (("x", figure._supxlabel), ("y", figure._supylabel)):
        if text is not None:
            boxes[name] = text.get_window_extent(renderer)
    for number, legend in enumerate(figure.legends):
        boxes[f"legend {number}"] = legend.get_window_extent(renderer)
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        assert not a.padded(-1).overlaps(b.padded(-1)), (one, other)
    for name, box in boxes.items():
        assert figure.bbox.padded(2).contains(box.x0, box.y0), name
        assert figure.bbox.padded(2).contains(box.x1, box.y1), name
    for axes in figure.axes:
        labels = [*axes.texts, *axes.get_xticklabels(), axes.title]
        shown = [text for text in labels if text.get_text() and text.get_visible()]
        slanted = any(text.get_rotation() for text in shown)
        # Of annotations the text alone, without the line that leads to it.
        extents = [(text, Text.get_window_extent(text, renderer)) for text in shown]
        for (one, a), (other, b) in itertools.combinations(extents, 2):
            assert slanted or not a.padded(-1).overlaps(b.padded(-1)), (one, other)
    assert all(text.get_fontsize() >= 8 for text in figure.findobj(Text) if text.get_text())
