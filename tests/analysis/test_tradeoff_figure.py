import dataclasses
import itertools

import numpy as np
import pytest
from build_file import build
from layout import check_layout
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from test_tradeoff import CLIP, DP, PLAIN, defended

import analysis
from analysis.figures import STYLE
from analysis.tradeoff import tradeoff
from analysis.tradeoff_figure import save_tradeoff, tradeoff_figure
from testbed.errors import UserError

TOP_K = [{"name": "top_k", "theta": 0.9, "scope": "tensor"}, {"name": "float16"}]


def spread(defenses, accuracy, error, **options):
    errors = dict.fromkeys(["llg", "llg_plus"], error)
    errors |= {f"{label}+adapted": error / 2 for label in errors}
    spec = defended(defenses, rounds=6, errors=errors, **options)
    return dataclasses.replace(spec, accuracy=accuracy)


APART = [
    spread([], 0.95, 0.1),
    spread(CLIP, 0.8, 0.3),
    spread(DP, 0.5, 0.9, privacy={"epsilon": 3.25, "delta": 1e-5}),
    spread(TOP_K, 0.7, 0.5, bytes_on_wire=4),
]


def draw(path, title="A title", **options):
    frame = analysis.load(path)
    with rc_context(STYLE):
        return tradeoff_figure(frame, title, **options), frame


def named(axes):
    """Return the texts beside points, by text the point."""
    return {text.get_text(): text.xy for text in axes.texts if hasattr(text, "xy")}


def test_accuracy_over_leakage_with_the_bytes_beside(tmp_path):
    figure, frame = draw(build(tmp_path / "run.h5", APART, title="Defences"))
    left, right = figure.axes
    table = tradeoff(frame).set_index(["defenses", "kind"])
    labels = named(left)
    assert list(labels) == [
        "no defence",
        "clip(1)",
        "dp_sgd(bound=1, noise_multiplier=0.5)",
        "top_k(0.9, tensor) + float16",
    ]
    # A label stands at the attacker who knows more.
    assert labels["no defence"] == pytest.approx((table.loc[("none", "plain"), "mean"], 0.95))
    assert labels["clip(1)"] == pytest.approx((table.loc[("clip(1)", "adapted"), "mean"], 0.8))
    places = {(round(x, 9), round(y, 9)) for line in left.get_lines()
              for x, y in zip(*line.get_data(), strict=True)}  # fmt: skip
    for (_, kind), row in table.iterrows():
        drawn = (round(row["mean"], 9), round(row["accuracy"], 9)) in places
        assert drawn == (kind != "accumulated")
    guesses = [line.get_xdata()[0] for line in left.get_lines() if line.get_linestyle() == ":"]
    uniform = table.xs("plain", level="kind")["uniform"]
    assert guesses[0] == pytest.approx(uniform.median())
    ticks = [label.get_text() for label in right.get_yticklabels()]
    assert ticks == list(labels)
    assert [patch.get_width() for patch in right.patches] == [400, 400, 400, 4]
    assert right.get_xscale() == "log"
    assert [text.get_text() for text in right.texts] == [
        *("400 B", "400 B", "400 B, \N{GREEK SMALL LETTER EPSILON} 3.25", "4 B")
    ]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:2] == ["strongest attack", "strongest attack that knows the defences"]


def test_crowded_points_have_numbers_with_the_names_beside_the_bars(tmp_path):
    specs = [spread([{"name": "clip", "bound": bound}], 0.9, 0.3) for bound in range(12)]
    figure, _ = draw(build(tmp_path / "run.h5", specs))
    left, right = figure.axes
    assert list(named(left)) == [str(number) for number in range(1, 13)]
    assert right.get_yticklabels()[3].get_text() == "clip(3)  4"
    check_layout(figure)


def test_a_row_for_each_setting_of_what_else_was_swept(tmp_path):
    specs = [
        spread(defenses, accuracy, 0.3, swept={"model.name": model})
        for model, (defenses, accuracy) in itertools.product(
            ("cnn", "resnet20"), (([], 0.9), (CLIP, 0.8))
        )
    ]
    figure, _ = draw(build(tmp_path / "run.h5", specs))
    assert [axes.get_title() for axes in figure.axes[::2]] == ["cnn", "resnet20"]
    assert [list(named(axes)) for axes in figure.axes[::2]] == [["no defence", "clip(1)"]] * 2


def test_other_keys_name_the_points_where_defences_were_not_swept(tmp_path):
    specs = [
        dataclasses.replace(
            spread(CLIP, accuracy, 0.3),
            swept={"federation.local_steps": steps},
            other={"defenses": CLIP},
        )
        for steps, accuracy in ((1, 0.5), (10, 0.9))
    ]
    figure, _ = draw(build(tmp_path / "run.h5", specs))
    assert list(named(figure.axes[0])) == ["local steps 1", "local steps 10"]


def test_equal_names_of_several_files(tmp_path):
    paths = [build(tmp_path / f"{name}.h5", [APART[0], APART[1]]) for name in ("one", "two")]
    with rc_context(STYLE):
        figure = tradeoff_figure(analysis.load(*paths), "")
    assert [label.get_text().rpartition("  ")[0] or label.get_text()
            for label in figure.axes[1].get_yticklabels()] == [
        *("no defence, one", "clip(1), one", "no defence, two", "clip(1), two")
    ]  # fmt: skip


def test_a_scenario_to_which_no_attack_applies_stands_at_the_guess(tmp_path):
    idle = dict.fromkeys(PLAIN, "withheld")
    specs = [APART[1], dataclasses.replace(APART[0], idle=idle)]
    figure, frame = draw(build(tmp_path / "run.h5", specs))
    crosses = [line for line in figure.axes[0].get_lines() if line.get_marker() == "x"]
    uniform = frame[frame["scenario"] == 1]["uniform"].mean()
    assert crosses[0].get_xdata()[0] == pytest.approx(uniform)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "no attack applies" in legend


def test_a_guess_of_its_own_is_marked_at_its_scenario(tmp_path):
    specs = [APART[0], APART[1], spread([{"name": "secure_aggregation"}], 0.6, 0.2, cohort=8)]
    figure, frame = draw(build(tmp_path / "run.h5", specs))
    dotted = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == ":"]
    own = frame[(frame["scenario"] == 2) & (frame["attack"] == "llg")]["uniform"].mean()
    assert len(dotted) == 2
    assert dotted[1].get_xdata() == pytest.approx([own, own])
    assert np.mean(dotted[1].get_ydata()) == pytest.approx(0.6)


def test_what_cannot_be_drawn(tmp_path):
    path = build(tmp_path / "run.h5", [dataclasses.replace(APART[0], accuracy=None)])
    with pytest.raises(UserError, match=r"no model was evaluated.*federation\.evaluate_every"):
        draw(path)
    frame = analysis.load(build(tmp_path / "more.h5", APART[:1]))
    with pytest.raises(UserError, match="cannot write the figure"):
        save_tradeoff(frame, path / "t.png")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture_files(tmp_path, suffix):
    frame = analysis.load(build(tmp_path / "run.h5", APART))
    assert save_tradeoff(frame, tmp_path / "new" / f"t.{suffix}").stat().st_size > 5000


CASES = {
    "apart": APART,
    "one": APART[:1],
    "long names": [
        spread([{"name": f"a_defence_of_my_own_{index}", "option": 0.5}] * 3, 0.5 + index / 20, 0.3)
        for index in range(8)
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_overlaps_or_is_cut_off(tmp_path, case):
    title = "A title with $dollars_ and & that is far longer than the figure is wide " * 2
    figure, _ = draw(build(tmp_path / "run.h5", CASES[case], title=title), title=title)
    check_layout(figure)
    renderer = FigureCanvasAgg(figure).get_renderer()
    for axes in figure.axes[::2]:
        frame = axes.get_window_extent(renderer)
        for text in axes.texts:
            box = Text.get_window_extent(text, renderer).padded(-2)
            assert frame.contains(box.x0, box.y0)
            assert frame.contains(box.x1, box.y1)


def test_scenarios_that_have_no_place_are_counted(tmp_path):
    idle = dict.fromkeys(PLAIN, "withheld")
    specs = [
        *(APART[0], APART[1]),
        dataclasses.replace(APART[0], idle=idle),
        dataclasses.replace(APART[0], accuracy=None, swept={"defenses": TOP_K}),
        dataclasses.replace(APART[0], dropout=1.0),
    ]
    frame = analysis.load(build(tmp_path / "run.h5", specs))
    frame.loc[frame["scenario"] == 2, ["uniform", "random"]] = np.nan
    with rc_context(STYLE):
        figure = tradeoff_figure(frame, "A title")
        some = tradeoff_figure(frame[frame["scenario"] == 2], "A title")
    assert figure.legends[0].get_title().get_text().endswith("; 3 scenarios not drawn")
    assert some.legends[0].get_title().get_text().endswith("; 2 scenarios not drawn")
    for one in (figure, some):
        assert not [line for line in one.axes[0].get_lines() if line.get_marker() == "x"]
        assert "no attack applies" not in [text.get_text() for text in one.legends[0].get_texts()]
    check_layout(figure)
    whole, _ = draw(build(tmp_path / "whole.h5", APART))
    assert "not drawn" not in whole.legends[0].get_title().get_text()
