import numpy as np
import pytest
from build_file import Spec, build
from layout import check_layout
from matplotlib import rc_context

import analysis
from analysis.figures import STYLE
from analysis.matrix import matrix_figures
from analysis.table import summarise

ATTACKS = ["random", "llg", "llg_plus", *(f"attack_{index}" for index in range(7)), "idle"]
ERRORS = {f"attack_{index}": 0.1 + index / 10 for index in range(7)}
BASELINES = ["random guess", "uniform guess", "oracle"]


def specs(sizes=(1, 4, 16), distributions=("balanced", "unbalanced"), steps=(0, 1000), **options):
    return [
        Spec(
            {
                "labels.distribution": distribution,
                "federation.batch_size": size,
                "pretraining.steps": step,
            },
            rounds=3,
            clients=1,
            attacks=ATTACKS,
            errors=ERRORS,
            idle={"idle": "no bias"},
            broken={"attack_0": {"one label per update": "many"}} if size > 1 else {},
            **options,
        )
        for distribution in distributions
        for size in sizes
        for step in steps
    ]


def draw(path, title="A title"):
    summary = summarise(analysis.load(path))
    with rc_context(STYLE):
        return matrix_figures(summary, title), summary


def cells(axes):
    """Return the texts of the cells by row, in the order of the columns."""
    rows = {}
    for text in axes.texts:
        x, y = text.get_position()
        if text.get_ha() == "center" and text.get_va() == "center":
            rows.setdefault(y, {})[x] = text
    return [[row[x] for x in sorted(row)] for _, row in sorted(rows.items())]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    figures, summary = draw(build(tmp_path_factory.mktemp("m") / "run.h5", specs()))
    (figure,) = figures
    return figure.axes[0], summary


def test_rows_are_sorted_by_their_mean_with_the_baselines_beneath(drawn):
    axes, summary = drawn
    means = summary.groupby("attack")["mean"].mean().dropna().sort_values(ascending=False)
    titles = summary.drop_duplicates("attack").set_index("attack")["title"]
    shown = [label.get_text().partition("  (")[0] for label in axes.get_yticklabels()]
    assert shown == [*titles[means.index], "idle", *BASELINES]
    assert shown[0] == "LLG+"
    assert axes.get_yticklabels()[0].get_text() == "LLG+  (auxiliary)"


def test_cells_hold_means_marks_and_dashes(drawn):
    axes, summary = drawn
    table = summary.set_index(["attack", "scenario"])
    rows = cells(axes)
    assert [len(row) for row in rows] == [12] * (len(ATTACKS) + 3)
    labels = {label.get_text().partition("  (")[0]: number
              for number, label in enumerate(axes.get_yticklabels())}  # fmt: skip
    for label, name in [("llg_plus", "LLG+"), ("attack_3", "attack_3")]:
        expected = [f"{table.loc[(label, column), 'mean']:.2f}" for column in range(12)]
        assert [text.get_text() for text in rows[labels[name]]] == expected
    marked = [text.get_text().endswith("†") for text in rows[labels["attack_0"]]]
    assert marked == [False, False, True, True, True, True] * 2
    assert {text.get_text() for text in rows[labels["idle"]]} == {"\N{EN DASH}"}
    uniform = [f"{table.loc[('llg', column), 'uniform']:.2f}" for column in range(12)]
    assert [text.get_text() for text in rows[-2]] == uniform


def test_colours_are_the_advantage_over_the_uniform_guess(drawn):
    axes, summary = drawn
    upper, lower = (mesh.get_array() for mesh in axes.collections[:2])
    best = summary[summary["attack"] == "llg_plus"]
    assert upper[0].tolist() == pytest.approx(best["advantage"].tolist())
    assert np.ma.getmaskarray(upper)[len(ATTACKS) - 1].all()
    assert lower[1].tolist() == pytest.approx([0] * 12)
    assert lower[2].tolist() == pytest.approx([1] * 12)
    assert (lower[0] <= 0.05).all()
    low, high = axes.collections[0].get_clim()
    assert low == -high


def test_columns_are_labelled_by_level(drawn):
    axes, _ = drawn
    texts = [(text.get_text(), text.xy[0]) for text in axes.texts if hasattr(text, "xy")]
    centres = np.arange(12) + 0.5
    assert [x for text, x in texts if text in ("0", "1000")] == centres.tolist()
    assert [(text, x) for text, x in texts if text.endswith("balanced")] == [
        ("balanced", 3.0),
        ("unbalanced", 9.0),
    ]
    assert [x for text, x in texts if text in ("1", "4", "16")] == [1, 3, 5, 7, 9, 11]
    names = [text for text, x in texts if x == 0]
    assert names == ["steps", "batch size", "distribution"]
    assert axes.get_title() == "digits, cnn"


def test_too_many_columns_go_on_pages_of_the_outermost_key(tmp_path):
    path = build(tmp_path / "run.h5", specs(sizes=(1, 2, 3, 4, 5, 6, 7), steps=(0, 1)))
    figures, _ = draw(path)
    assert [figure.axes[0].get_title() for figure in figures] == [
        "digits, balanced, cnn",
        "digits, unbalanced, cnn",
    ]
    assert [len(cells(figure.axes[0])[0]) for figure in figures] == [14, 14]
    check_layout(figures[1])


DEFENCES = [
    [],
    [{"name": "clip", "bound": 1.0}],
    [{"name": "top_k", "theta": 0.9, "scope": "tensor"}, {"name": "float16"}],
    [{"name": "dp_sgd", "bound": 1.0, "noise_multiplier": 0.5}, {"name": "random_k", "theta": 0.5}],
]
ADAPTED = {"llg+adapted": "llg", "llg_plus+adapted": "llg_plus", "llg_plus+rounds": "llg_plus"}


def defended(models=("cnn",)):
    """Return scenarios with defences, of which attacks know from the second one on."""
    return [
        Spec(
            {"model.name": model, "defenses": defenses},
            rounds=4,
            attacks=["llg", "llg_plus", *(ADAPTED if defenses else {})],
            adapted=ADAPTED,
            accumulated=["llg_plus+rounds"] if defenses else [],
            errors={"llg+adapted": 0.1, "llg_plus+adapted": 0.2, "llg_plus": 0.4, "llg": 0.6},
        )
        for model in models
        for defenses in DEFENCES
    ]


def test_adapted_attacks_stand_beneath_the_plain_ones_against_upright_defences(tmp_path):
    (figure,), summary = draw(build(tmp_path / "run.h5", defended()))
    axes = figure.axes[0]
    rows = [label.get_text().partition("  (")[0] for label in axes.get_yticklabels()]
    assert rows == [
        *("LLG+", "LLG+, adapted", "LLG+, accumulated", "LLG", "LLG, adapted"),
        *(*BASELINES, "uniform guess, accumulated"),
    ]
    labels = {text.get_text(): text for text in axes.texts if hasattr(text, "xy")}
    assert list(labels) == [
        *("none", "clip(1)", "top_k(0.9, tensor) + float16"),
        "dp_sgd(bound=1,\nnoise_multiplier=0.5) +\nrandom_k(0.5)",
        "defenses",
    ]
    assert [text.get_rotation() for text in labels.values()] == [90, 90, 90, 90, 0]
    table = summary.set_index(["attack", "scenario"])
    texts = [[text.get_text() for text in row] for row in cells(axes)]
    assert texts[1] == [
        "\N{EN DASH}",
        *(f"{table.loc[('llg_plus+adapted', index), 'mean']:.2f}" for index in (1, 2, 3)),
    ]
    single = table.loc[("llg", 1), "uniform"]
    assert texts[6][1] == f"{single:.2f}"
    summed = table.loc[("llg_plus+rounds", 1)]
    assert texts[8] == [
        "\N{EN DASH}",
        *(f"{table.loc[('llg_plus+rounds', index), 'uniform']:.2f}" for index in (1, 2, 3)),
    ]
    upper, lower = (mesh.get_array() for mesh in axes.collections[:2])
    assert upper[2, 1] == pytest.approx(
        (summed["mean"] - summed["uniform"]) / (1 - summed["uniform"])
    )
    assert lower[3, 1:].tolist() == [0, 0, 0]
    assert summed["uniform"] > single + 0.05


CASES = {
    "levels": specs(),
    "defences": defended(),
    "defences of models": defended(models=("cnn", "resnet20")),
    "one scenario": specs(sizes=(8,), distributions=("balanced",), steps=(0,)),
    "long values": [
        Spec({"model.name": name, "data.name": data}, rounds=2, clients=1, attacks=ATTACKS)
        for data in ("digits", "a data set")
        for name in ("cnn", "a_package.module:a_model_of_my_own", "resnet20")
    ],
    "wide": specs(sizes=(1, 2, 4, 8, 16, 32), steps=(0, 10_000)),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_overlaps_or_is_cut_off(tmp_path, case):
    title = "A title with $dollars_ and & that is far longer than the figure is wide " * 2
    figures, _ = draw(build(tmp_path / "run.h5", CASES[case]), title)
    for figure in figures:
        check_layout(figure)


def test_where_the_guess_is_always_right_there_is_no_advantage(tmp_path):
    spec = Spec(rounds=3, classes=1, attacks=ATTACKS)
    (figure,), _ = draw(build(tmp_path / "run.h5", [spec]))
    assert "the guess is always right" in figure.get_supxlabel()
    assert np.ma.getmaskarray(figure.axes[0].collections[0].get_array()).all()
