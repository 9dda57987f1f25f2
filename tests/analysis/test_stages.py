import itertools

import pytest
from build_file import Spec, build
from layout import check_layout
from matplotlib import rc_context

import analysis
from analysis.figures import STYLE
from analysis.stages import stage_figures
from analysis.table import summarise

MANY = ["llg", "llg_plus", *(f"attack_{index}" for index in range(9)), "told"]
ERRORS = {"llg": 0.9, "told": 0.0, **{f"attack_{index}": 0.1 + index / 20 for index in range(9)}}


def draw(path, key="steps", title="A title", **options):
    summary = summarise(analysis.load(path))
    summary.loc[summary["attack"] == "told", "knowledge"] = "truth"
    with rc_context(STYLE):
        return stage_figures(summary, key, title, 8, **options), summary


def staged(attacks=("llg", "llg_plus"), steps=(0, 100, 3000), rounds=4, **swept):
    """Return scenarios of every stage and of every combination of what else is swept."""
    return [
        Spec(
            {**dict(zip(swept, values, strict=True)), "pretraining.steps": step},
            rounds=rounds,
            clients=1,
            attacks=attacks,
            errors=ERRORS,
            accuracy=0.1 + 0.4 * stage,
        )
        for values in itertools.product(*swept.values())
        for stage, step in enumerate(steps)
    ]


def test_curves_over_equally_spaced_stages_with_the_accuracy_beneath(tmp_path):
    figures, summary = draw(build(tmp_path / "run.h5", staged()))
    (figure,) = figures.values()
    assert list(figures) == [""]
    (axes,) = figure.axes
    assert axes.get_xticks().tolist() == [0, 1, 2]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["0\n10 %", "100\n50 %", "3000\n90 %"]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == ["LLG", "LLG+", "random guess (expected)", "uniform guess", "oracle"]
    rows = summary[summary["attack"] == "llg"]
    assert lines["LLG"].get_xdata().tolist() == [0, 1, 2]
    assert lines["LLG"].get_ydata().tolist() == rows["mean"].tolist()
    assert lines["uniform guess"].get_ydata() == pytest.approx(rows["uniform"].to_numpy())
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == rows["low"].min()
    assert band[:, 1].max() == rows["high"].max()


def test_stages_without_a_known_accuracy_and_without_training(tmp_path):
    specs = [Spec({"pretraining.steps": step}, rounds=3) for step in (None, 0, 50)]
    figures, _ = draw(build(tmp_path / "run.h5", specs))
    (axes,) = figures[""].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["none", "0", "50"]


def test_panels_are_distributions_by_batch_sizes_and_figures_the_rest(tmp_path):
    swept = {
        "model.activation": ["relu", "tanh"],
        "labels.distribution": ["balanced", "unbalanced"],
        "federation.batch_size": [1, 8, 64],
    }
    path = build(tmp_path / "run.h5", staged(rounds=2, steps=(0, 10), **swept))
    figures, _ = draw(path)
    assert list(figures) == ["-relu", "-tanh"]
    figure = figures["-tanh"]
    assert figure.get_suptitle() == "A title\nactivation tanh"
    assert [axes.get_title() for axes in figure.axes] == [
        f"{distribution}, batch size {size}"
        for distribution in ("balanced", "unbalanced")
        for size in (1, 8, 64)
    ]
    tops = [round(axes.get_position().y0, 3) for axes in figure.axes]
    assert tops[0] == tops[2] > tops[3] == tops[5]


def test_other_parameters_take_the_place_of_those_that_do_not_vary(tmp_path):
    swept = {"model.activation": ["relu", "tanh"], "federation.batch_size": [1, 8]}
    figures, _ = draw(build(tmp_path / "run.h5", staged(rounds=2, **swept)))
    assert [axes.get_title() for axes in figures[""].axes] == [
        f"activation {activation}, batch size {size}"
        for activation in ("relu", "tanh")
        for size in (1, 8)
    ]


def test_of_many_attacks_the_best_are_drawn_beside_llg_and_llg_plus(tmp_path):
    path = build(tmp_path / "run.h5", staged(MANY))
    figures, summary = draw(path)
    means = summary.groupby("attack")["mean"].mean().sort_values(ascending=False)
    best = [label for label in means.index if label.startswith("attack_")][:6]
    lines = [line.get_label() for line in figures[""].axes[0].get_lines()]
    assert lines[:8] == ["LLG", "LLG+", *best]
    assert lines[8:] == ["random guess (expected)", "uniform guess", "oracle"]
    looks = {(line.get_color(), line.get_marker()) for line in figures[""].axes[0].get_lines()[:8]}
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == 8
    figures, _ = draw(path, chosen=True)
    assert [line.get_label() for line in figures[""].axes[0].get_lines()][:12] == [
        *("LLG", "LLG+"),
        *MANY[2:],
    ]


@pytest.mark.parametrize(
    ("key", "values"),
    [("data.auxiliary_per_class", [50, 1, 5]), ("adversary.batch_size_factor", [0.5, 1.0, 2.0])],
)
def test_other_keys_are_drawn_the_same_way_in_the_order_of_their_values(tmp_path, key, values):
    specs = [Spec({key: value}, rounds=3, accuracy=0.5) for value in values]
    column = key.rpartition(".")[2]
    figures, summary = draw(build(tmp_path / "run.h5", specs), column)
    (axes,) = figures[""].axes
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == [f"{value:g}" for value in sorted(values)]
    assert axes.get_xlabel() == column.replace("_", " ")
    rows = summary[summary["attack"] == "llg"].sort_values(column)
    line = next(line for line in axes.get_lines() if line.get_label() == "LLG")
    assert line.get_ydata().tolist() == rows["mean"].tolist()


def test_a_setting_with_a_single_stage_has_no_figure(tmp_path):
    specs = [
        *staged(rounds=2, **{"model.name": ["cnn"], "a.b": list("12345")}),
        Spec({"model.name": "mlp", "a.b": "1", "pretraining.steps": 0}, rounds=2),
    ]
    figures, _ = draw(build(tmp_path / "run.h5", specs))
    assert list(figures) == [f"-{value}" for value in "12345"]


CASES = {
    "one panel": staged(MANY),
    "panels": staged(
        MANY,
        rounds=2,
        **{
            "labels.distribution": ["balanced", "unbalanced"],
            "federation.batch_size": [1, 8, 64, 128],
        },
    ),
    "many stages": staged(steps=(0, 10, 30, 100, 300, 1000, 3000, 10_000)),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_overlaps_or_is_cut_off(tmp_path, case):
    title = "A title with $dollars_ and & that is far longer than the figure is wide " * 2
    figures, _ = draw(build(tmp_path / "run.h5", CASES[case]), title=title)
    for figure in figures.values():
        check_layout(figure)
