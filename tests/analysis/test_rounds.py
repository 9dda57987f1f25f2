import dataclasses

import h5py
import numpy as np
import pytest
from build_file import Spec, build
from layout import check_layout
from matplotlib import rc_context

import analysis
from analysis.bootstrap import bootstrap_interval
from analysis.figures import STYLE, figures
from analysis.rounds import rounds_figure
from testbed.results.reader import open_results

GUESSES = ["random guess (expected)", "uniform guess", "oracle"]


def trained(swept=None, rounds=100, every=1, **options):
    """Return a scenario in which attacks get worse and the model better."""
    return Spec(
        swept or {},
        rounds=rounds,
        clients=2,
        attack_every=every,
        errors={
            "llg": np.linspace(0, 0.9, rounds).tolist(),
            "llg_plus": np.linspace(0, 0.5, rounds).tolist(),
        },
        accuracy=[0.9 * r / rounds if r % 10 == 0 else float("nan") for r in range(rounds)],
        trained=True,
        **{"attacks": ["llg", "llg_plus"], **options},
    )


def draw(path, most=8, **options):
    frame = analysis.load(path)
    with open_results(path) as results, rc_context(STYLE):
        return rounds_figure(results, frame, most, **options), frame


def test_success_in_bins_of_rounds_above_the_accuracy(tmp_path):
    figure, frame = draw(build(tmp_path / "run.h5", [trained()], title="The training"))
    above, beneath = figure.axes
    assert figure.get_suptitle() == "The training"
    lines = {line.get_label(): line for line in above.get_lines()}
    assert list(lines) == ["LLG", "LLG+", *GUESSES]
    assert lines["LLG"].get_xdata().tolist() == [5 * at + 2 for at in range(20)]
    rows = frame[(frame["attack"] == "llg") & frame["round"].between(50, 54)]
    assert lines["LLG"].get_ydata()[10] == pytest.approx(rows["asr"].mean())
    assert lines["uniform guess"].get_ydata()[10] == pytest.approx(rows["uniform"].mean())
    low, high = bootstrap_interval(rows["asr"], rows["round"])
    band = above.collections[0].get_paths()[0].vertices
    at_52 = band[band[:, 0] == 52][:, 1]
    assert sorted({round(y, 9) for y in at_52}) == [round(low, 9), round(high, 9)]
    assert lines["LLG"].get_ydata()[0] > 0.9 > lines["LLG"].get_ydata()[-1] + 0.2
    (line,) = beneath.get_lines()
    assert line.get_xdata().tolist() == list(range(0, 100, 10))
    assert line.get_ydata().tolist() == pytest.approx([0.09 * at for at in range(10)])
    assert (above.get_ylabel(), beneath.get_ylabel()) == ("attack success rate", "accuracy")
    assert beneath.get_xlabel() == "round"
    assert beneath.get_xlim() == above.get_xlim()


def test_few_rounds_are_shown_one_by_one_without_bands(tmp_path):
    figure, frame = draw(build(tmp_path / "run.h5", [trained(rounds=12, every=2)]))
    line = figure.axes[0].get_lines()[0]
    assert line.get_xdata().tolist() == [0, 2, 4, 6, 8, 10]
    means = frame[frame["attack"] == "llg"].groupby("round")["asr"].mean()
    assert line.get_ydata().tolist() == means.tolist()
    bands = [c for c in figure.axes[0].collections if c.get_paths()]
    assert all(np.isnan(path.vertices[:, 1]).all() for c in bands for path in c.get_paths())


def test_seeds_are_one_panel_and_every_round_of_theirs_a_sample(tmp_path):
    specs = [trained({"seed": seed}, rounds=10) for seed in range(5)]
    figure, frame = draw(build(tmp_path / "run.h5", specs))
    above, beneath = figure.axes
    line = above.get_lines()[0]
    assert line.get_xdata().tolist() == list(range(10))
    rows = frame[(frame["attack"] == "llg") & (frame["round"] == 3)]
    assert line.get_ydata()[3] == pytest.approx(rows["asr"].mean())
    low, high = bootstrap_interval(rows["asr"], rows["scenario"])
    band = above.collections[0].get_paths()[0].vertices
    at_3 = {round(y, 9) for y in band[band[:, 0] == 3][:, 1]}
    assert at_3 == {round(max(low, 0), 9), round(min(high, 1), 9)}
    assert len(beneath.get_lines()) == 1


def test_a_panel_for_each_setting_and_none_where_rounds_are_repetitions(tmp_path):
    specs = [
        trained({"federation.local_steps": 1}, rounds=30),
        trained({"federation.local_steps": 10}, rounds=30),
        dataclasses.replace(trained({"federation.local_steps": 2}, rounds=30), trained=False),
        trained({"federation.local_steps": 100}, rounds=1),
    ]
    figure, _ = draw(build(tmp_path / "run.h5", specs))
    titles = [axes.get_title() for axes in figure.axes]
    assert [title for title in titles if title] == ["local steps 1", "local steps 10"]
    figure, _ = draw(build(tmp_path / "none.h5", specs[2:]))
    assert figure is None


def test_which_attacks_are_drawn(tmp_path):
    attacks = ["llg", *(f"attack_{index}" for index in range(9))]
    errors = {f"attack_{index}": index / 10 for index in range(9)}
    spec = dataclasses.replace(trained(rounds=20, attacks=attacks), errors=errors)
    path = build(tmp_path / "run.h5", [spec])
    figure, _ = draw(path, most=4)
    names = [line.get_label() for line in figure.axes[0].get_lines()]
    assert names == ["LLG", "attack_0", "attack_1", "attack_2", *GUESSES]
    figure, _ = draw(path, most=4, chosen=True)
    assert len(figure.axes[0].get_lines()) == 10 + 3


def test_attacks_on_all_updates_so_far_have_a_guess_of_their_own(tmp_path):
    spec = trained(
        rounds=30,
        attacks=["llg", "llg+rounds"],
        adapted={"llg+rounds": "llg"},
        accumulated=["llg+rounds"],
    )
    figure, frame = draw(build(tmp_path / "run.h5", [spec]))
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert list(lines) == ["LLG", "LLG, accumulated", *GUESSES, "uniform guess, accumulated"]
    single, summed = (lines[name].get_ydata() for name in ("uniform guess", list(lines)[-1]))
    rows = frame[frame["round"].between(25, 29)]
    assert single[-1] == pytest.approx(rows[rows["attack"] == "llg"]["uniform"].mean())
    assert summed[-1] == pytest.approx(rows[rows["attack"] != "llg"]["uniform"].mean())
    assert summed[-1] > single[-1] + 0.2


def test_without_evaluation_there_is_no_panel_of_accuracy(tmp_path):
    path = build(tmp_path / "run.h5", [dataclasses.replace(trained(rounds=30), accuracy=None)])
    figure, _ = draw(path)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "round"
    with h5py.File(path, "a") as file:
        del file["scenarios/0000/rounds/accuracy"]
    assert len(draw(path)[0].axes) == 1


def test_the_figure_is_one_of_a_file_s(tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.figures.save_figure", lambda _, path: path)
    path = build(tmp_path / "run.h5", [trained(rounds=20)])
    names = [drawn.stem for drawn in figures([path], tmp_path)]
    assert names == ["run-success", "run-rounds", "run-occurrences"]


CASES = {
    "one": [trained(rounds=40)],
    "defences": [
        trained({"defenses": defenses}, rounds=30)
        for defenses in (
            [],
            [{"name": "dp_sgd", "bound": 1.0, "noise_multiplier": 0.8, "accountant": "rdp"}],
            [{"name": "top_k", "theta": 0.9, "scope": "tensor"}, {"name": "float16"}],
            [{"name": "secure_aggregation", "protocol": "reduction"}],
            [{"name": "clip", "bound": 1.0}],
        )
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_overlaps_or_is_cut_off(tmp_path, case):
    title = "A title with $dollars_ and & that is far longer than the figure is wide " * 2
    figure, _ = draw(build(tmp_path / "run.h5", CASES[case], title=title))
    check_layout(figure)
