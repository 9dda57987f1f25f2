import itertools

import h5py
import matplotlib.image
import numpy as np
import pytest
from build_file import Spec, build, paper_sweep
from launching import run_here, write_experiment
from layout import check_layout
from matplotlib.colors import to_rgb

import analysis
from analysis.figures import PALETTE, STYLE, figures
from analysis.occurrences import occurrences_figure
from analysis.success import success_figure
from analysis.table import summarise
from testbed.errors import UserError
from testbed.results.reader import open_results


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    return build(tmp_path_factory.mktemp("paper") / "paper.h5", paper_sweep(12), title="The paper")


def draw(path, kind="success"):
    """Return a figure of a file as it is saved."""
    frame = analysis.load(path)
    with open_results(path) as results, matplotlib.rc_context(STYLE):
        if kind == "success":
            return success_figure(summarise(frame), results.title)
        return occurrences_figure(results, frame)


def test_png_files_of_a_complete_file(paper, tmp_path):
    drawn = figures([paper], tmp_path / "new" / "folder")
    assert [path.name for path in drawn] == ["paper-success.png", "paper-occurrences.png"]
    for path in drawn:
        pixels = matplotlib.image.imread(path)
        height, width = pixels.shape[:2]
        assert (width, height) >= (900, 500)
        assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50


@pytest.mark.parametrize(("suffix", "magic"), [("pdf", b"%PDF-"), ("svg", b"<?xml")])
def test_vector_formats(paper, tmp_path, suffix, magic):
    drawn = figures([str(paper)], str(tmp_path), suffix)
    assert [path.suffix for path in drawn] == [f".{suffix}"] * 2
    for path in drawn:
        assert path.read_bytes().startswith(magic)


def test_a_partial_file_and_equal_names(tmp_path):
    (tmp_path / "other").mkdir()
    build(tmp_path / "run.h5.partial", [Spec(rounds=9)], committed=[4])
    build(tmp_path / "other" / "run.h5", [Spec(rounds=2)])
    build(tmp_path / "empty.h5.partial", [Spec(rounds=2)], committed=[0])
    files = [tmp_path / "run.h5", tmp_path / "empty.h5", tmp_path / "other" / "run.h5"]
    names = [path.name for path in figures(files, tmp_path / "out")]
    assert names == [f"{stem}-{kind}.png" for stem in ("run", "run-2")
                     for kind in ("success", "occurrences")]  # fmt: skip


def test_what_cannot_be_drawn_or_written(tmp_path):
    empty = build(tmp_path / "empty.h5.partial", [Spec(rounds=2)], committed=[0])
    with pytest.raises(UserError, match="no round with an attack"):
        figures([empty], tmp_path)
    path = build(tmp_path / "run.h5", [Spec(rounds=2)])
    with pytest.raises(UserError, match="cannot write the figure"):
        figures([path], path / "folder")


def test_success_curves_are_the_means_over_batch_sizes(paper):
    figure = draw(paper)
    assert figure.get_suptitle() == "The paper"
    assert [axes.get_title() for axes in figure.axes] == ["digits, balanced", "digits, unbalanced"]
    summary = summarise(analysis.load(paper))
    for axes, distribution in zip(figure.axes, ("balanced", "unbalanced"), strict=True):
        assert axes.get_xscale() == "log"
        assert axes.xaxis.get_transform().base == 2
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels == ["1", "2", "4", "8", "16", "32", "64", "128"]
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert list(lines) == [
            *("Random", "LLG", "LLG*", "LLG+"),
            *("random guess (expected)", "uniform guess", "oracle"),
        ]
        rows = summary.query(f"distribution == '{distribution}' and attack == 'llg_plus'")
        assert lines["LLG+"].get_xdata().tolist() == rows["batch_size"].tolist()
        assert lines["LLG+"].get_ydata().tolist() == rows["mean"].tolist()
        expected = lines["random guess (expected)"]
        assert expected.get_linestyle() == "--"
        assert (lines["oracle"].get_ydata() == 1).all()
        assert expected.get_ydata() == pytest.approx(rows["random"].to_numpy())
        band = axes.collections[3].get_paths()[0].vertices
        assert band[:, 1].min() == rows["low"].min()
        assert band[:, 1].max() == rows["high"].max()


def test_bars_where_the_batch_size_is_not_swept(tmp_path):
    specs = [
        Spec({"defense.noise": noise}, rounds=5, attacks=attacks)
        for noise, attacks in [(0, ["llg", "random"]), (0.1, ["llg", "llg_plus"])]
    ]
    path = build(tmp_path / "run.h5", specs)
    (axes,) = draw(path).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["noise 0", "noise 0.1"]
    summary = summarise(analysis.load(path))
    bars = {container.get_label(): container for container in axes.containers
            if hasattr(container, "patches")}  # fmt: skip
    assert list(bars) == ["LLG", "Random", "LLG+"]
    for attack, name in [("llg", "LLG"), ("llg_plus", "LLG+")]:
        heights = [patch.get_height() for patch in bars[name].patches]
        assert heights == summary[summary["attack"] == attack]["mean"].tolist()
    centres = [patch.get_x() + patch.get_width() / 2 for patch in bars["LLG+"].patches]
    assert len(centres) == 1
    assert abs(centres[0] - 1) < 0.5


def test_bars_with_one_round_and_with_equal_values(tmp_path):
    path = build(tmp_path / "one.h5", [Spec(rounds=1)])
    assert len(figures([path], tmp_path)) == 2
    path = build(tmp_path / "equal.h5", [Spec(rounds=7, clients=3)])
    with h5py.File(path, "a") as file:
        truth = np.zeros(10, int)
        truth[:5] = 2
        for name, counts in [("truth", truth), ("attacks/llg", np.roll(truth, 2))]:
            file[f"scenarios/0000/{name}/counts"][...] = counts
    assert len(figures([path], tmp_path)) == 2


def test_panels_and_scenarios_that_are_left_out_are_told(tmp_path):
    specs = [
        Spec({"defense.noise": noise, "federation.batch_size": size}, rounds=2, clients=1)
        for noise in range(18)
        for size in (1, 2)
    ]
    path = build(tmp_path / "run.h5", specs)
    figure = draw(path)
    assert len(figure.axes) == 16
    assert "2 more panels left out" in figure.legends[0].get_title().get_text()
    figure = draw(path, "occurrences")
    assert len(figure.axes) == 8
    assert "8 of 36 scenarios" in figure.get_supxlabel()


def test_occurrences_scatter_and_rho(paper):
    figure = draw(paper, "occurrences")
    titles = [axes.get_title() for axes in figure.axes]
    sizes = [1, 4, 32, 128]
    assert [title.split("\n")[0] for title in titles] == [
        f"{distribution}, batch size {size}"
        for distribution, size in itertools.product(("balanced", "unbalanced"), sizes)
    ]
    with open_results(paper) as results:
        scenario = results.scenarios[2]
        truth = scenario.array("truth/counts").ravel()
        sums = scenario.array("observations/row_sums").ravel()
    rho = np.corrcoef(truth, sums)[0, 1]
    assert titles[1].endswith(f"= {rho:.3f}")
    points = figure.axes[1].collections[0].get_offsets()
    assert np.rint(points[:, 0]).tolist() == truth.tolist()
    assert points[:, 1].tolist() == sums.tolist()
    assert len(np.unique(points[:, 0])) == len(truth)


def test_occurrences_leave_out_what_is_not_finite_or_does_not_vary(tmp_path):
    path = build(tmp_path / "run.h5", [Spec(rounds=6, clients=1)])
    with h5py.File(path, "a") as file:
        sums = file["scenarios/0000/observations/row_sums"]
        sums[...] = 3.3
        sums[2] = np.nan
    (axes,) = draw(path, "occurrences").axes
    assert axes.get_title().endswith("= undefined")
    assert len(axes.collections[0].get_offsets()) == 50


def test_many_points_are_thinned_but_all_count_for_rho(tmp_path, monkeypatch):
    path = build(tmp_path / "run.h5", [Spec(rounds=40)])
    whole = draw(path, "occurrences").axes[0]
    monkeypatch.setattr("analysis.occurrences._MAX_POINTS", 100)
    thin = draw(path, "occurrences").axes[0]
    assert len(whole.collections[0].get_offsets()) == 800
    assert len(thin.collections[0].get_offsets()) == 100
    assert thin.get_title() == whole.get_title()


CASES = {
    "paper": paper_sweep(3, clients=1),
    "one scenario": [Spec(rounds=3)],
    "bars": [
        Spec({"model.name": model, "defense.noise": noise}, rounds=3)
        for model in ("cnn", "resnet20", "a_package.module:a_model_of_my_own")
        for noise in (0.0, 0.01, 0.1, 1.0)
    ],
    "panels": [
        Spec({"model.name": model, "defense.noise": noise, "federation.batch_size": size}, rounds=3)
        for model in ("cnn", "resnet20")
        for noise in (0.01, 0.1, 1.0)
        for size in (1, 8, 64)
    ],
}


@pytest.mark.parametrize("kind", ["success", "occurrences"])
@pytest.mark.parametrize("case", CASES)
def test_nothing_overlaps_or_is_cut_off(tmp_path, case, kind):
    title = "A title with $dollars_ and & that is far longer than the figure is wide " * 2
    check_layout(draw(build(tmp_path / "run.h5", CASES[case], title=title), kind))


def test_which_figures_a_file_has(tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.figures.save_figure", lambda _, path: path)
    attacks = ["llg", "llg_plus", *(f"attack_{index}" for index in range(7)), "there"]
    keys = ("seed", "pretraining.steps", "model.activation", "federation.batch_size", "a.b")
    specs = [
        Spec(
            dict(zip(keys, values, strict=True)),
            rounds=2,
            clients=1,
            attacks=attacks,
            answers={"there": "presence"},
        )
        for values in itertools.product((0, 1), (0, 10), ("relu", "tanh"), (1, 4), (0.5, 1.5))
    ]
    path = build(tmp_path / "run.h5", specs)

    def names(*chosen):
        return [drawn.stem for drawn in figures([path], tmp_path / "out", attacks=chosen)]

    stages = ["run-stages-b-0.5", "run-stages-b-1.5", "run-occurrences"]
    assert names() == ["run-success", "run-presence", *stages]
    assert names("llg", "there") == ["run-success", "run-presence", *stages]
    assert names("there") == ["run-presence", *stages]


def test_swept_knowledge_has_a_figure_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.figures.save_figure", lambda _, path: path)
    keys = ("data.auxiliary_per_class", "adversary.auxiliary_noise", "federation.auxiliary_noise")
    specs = [
        Spec(dict(zip(keys, values, strict=True)), rounds=2)
        for values in itertools.product((1, 50), (0.0, 0.5), (0.0, 1.0))
    ]
    path = build(tmp_path / "run.h5", specs)
    names = [drawn.stem for drawn in figures([path], tmp_path)]
    assert names == [
        *("run-success", "run-auxiliary_per_class", "run-auxiliary_noise", "run-occurrences")
    ]


def test_swept_defences_have_a_matrix_beside_few_attacks_and_local_steps_their_curves(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("analysis.figures.save_figure", lambda _, path: path)
    specs = [
        Spec({"defenses": defenses, "federation.local_steps": steps}, rounds=2, local_steps=steps)
        for defenses in ([], [{"name": "clip", "bound": 1.0}])
        for steps in (1, 10)
    ]
    path = build(tmp_path / "run.h5", specs)
    names = [drawn.stem for drawn in figures([path], tmp_path)]
    assert names == ["run-success", "run-defenses", "run-local_steps", "run-occurrences"]
    many = ["llg", *(f"attack_{index}" for index in range(8))]
    specs = [Spec(spec.swept, rounds=2, attacks=many) for spec in specs[::2]]
    names = [drawn.stem for drawn in figures([build(tmp_path / "many.h5", specs)], tmp_path)]
    assert names == ["many-success", "many-occurrences"]


def test_words_beneath_bars_are_not_cut(tmp_path):
    defenses = ([], [{"name": "secure_aggregation", "protocol": "masks"}], [{"name": "float16"}])
    path = build(tmp_path / "run.h5", [Spec({"defenses": value}, rounds=2) for value in defenses])
    (axes,) = draw(path).axes
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["no defence", "secure_aggregation(masks)", "float16"]


def test_offsets_of_each_client_are_removed_from_its_sums(tmp_path):
    path = build(tmp_path / "run.h5", [Spec(rounds=6, clients=3, attacks=["llg", "llg_plus"])])
    offsets = np.random.default_rng(0).normal(scale=50, size=(6, 3, 10))
    with h5py.File(path, "a") as file:
        group = file["scenarios/0000"]
        sums = group["observations/row_sums"][:] + offsets
        group["observations/row_sums"][...] = sums
        calibration = group.create_group("attacks/llg_plus/calibration")
        calibration.attrs["encoding-type"] = "calibration"
        calibration.attrs["encoding-version"] = "1.2"
        dataset = calibration.create_dataset("offset", data=offsets)
        for position, axis in enumerate(("round", "client", "class")):
            dataset.dims[position].attach_scale(group[axis])
        truth = group["truth/counts"][:]
    rho = np.corrcoef(truth.ravel(), (sums.astype(float) - offsets).ravel())[0, 1]
    (axes,) = draw(path, "occurrences").axes
    assert axes.get_title().endswith(f"offsets removed {rho:.3f}")
    assert rho < -0.9


def test_colours_differ_in_lightness_or_hue_for_dichromats():
    # Deuteranopes confuse colours along one direction: Viénot et al. 1999, linear RGB.
    simulate = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    linear = [simulate @ np.array(to_rgb(colour)) ** 2.2 for colour in PALETTE]
    for one, other in itertools.combinations(linear, 2):
        assert np.linalg.norm(np.clip(one, 0, 1) - np.clip(other, 0, 1)) > 0.1


def test_rho_without_the_offsets_that_the_most_knowing_attack_estimated(tmp_path):
    experiment = write_experiment(
        tmp_path / "e.yaml",
        federation={"rounds": 20, "clients": 2, "fresh_model": True, "batch_size": 16},
        attacks=["llg", "llg_star", "llg_plus"],
    )
    assert run_here("run", experiment, "-o", tmp_path / "r.h5").status == 0
    with open_results(tmp_path / "r.h5") as results:
        (scenario,) = results.scenarios
        truth = scenario.array("truth/counts")
        sums = scenario.array("observations/row_sums").astype(float)
        offset = scenario.array("attacks/llg_plus/calibration/offset")
    rho = np.corrcoef(truth.ravel(), sums.ravel())[0, 1]
    adjusted = np.corrcoef(truth.ravel(), (sums - offset[:, None, :]).ravel())[0, 1]
    (axes,) = draw(tmp_path / "r.h5", "occurrences").axes
    assert axes.get_title().endswith(f"= {rho:.3f}, offsets removed {adjusted:.3f}")
    assert adjusted < rho < 0
