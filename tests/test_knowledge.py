"""What the server has instead of the truth: shifted auxiliary samples, a guessed batch size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from launching import run_here, write_experiment
from small_run import plan_of, setups_for

from analysis import load
from testbed.attacks.adversary import AuxiliarySamples
from testbed.data import load as load_data
from testbed.errors import UserError
from testbed.results.reader import open_results


def own(*overrides: str) -> AuxiliarySamples:
    plan = plan_of("data.auxiliary_per_class=6", *overrides)
    return setups_for([plan]).make(plan).auxiliary()


def test_by_default_it_owns_the_auxiliary_part() -> None:
    plan = plan_of("data.auxiliary_per_class=6")
    setup = setups_for([plan]).make(plan)
    found = setup.auxiliary()
    torch.testing.assert_close(found.inputs, setup.samples.inputs(setup.parts.auxiliary))
    assert found.labels.tolist() == np.repeat(np.arange(10), 6).tolist()


def test_missing_classes_are_drawn_by_the_seed() -> None:
    lacking = {}
    for missing in (1, 3, 9):
        found = own(f"adversary.auxiliary_missing={missing}")
        assert len(found.labels) == len(found.inputs) == 6 * (10 - missing)
        assert (np.bincount(found.labels, minlength=10) % 6 == 0).all()
        lacking[missing] = set(range(10)) - set(found.labels.tolist())
    assert lacking[1] < lacking[3] < lacking[9]
    other = own("adversary.auxiliary_missing=3", "seed=5")
    assert set(range(10)) - set(other.labels.tolist()) != lacking[3]
    with pytest.raises(UserError, match="10 of 10 classes"):
        own("adversary.auxiliary_missing=10")


def test_noise_has_the_given_size_and_stays_in_range() -> None:
    clean, noisy = own(), own("adversary.auxiliary_noise=0.05")
    inner = (clean.inputs > 0.3) & (clean.inputs < 0.7)
    assert (noisy.inputs - clean.inputs)[inner].std() == pytest.approx(0.05, rel=0.1)
    assert noisy.inputs.min() == 0
    assert noisy.inputs.max() == 1
    torch.testing.assert_close(own("adversary.auxiliary_noise=0.05").inputs, noisy.inputs)


def test_another_data_set_in_the_victims_size(tmp_path: Path) -> None:
    images = np.zeros((80, 3, 16, 16), np.uint8)
    labels = np.arange(80) % 10
    images[:, :, :8] = (25 * labels)[:, None, None, None]
    np.savez(tmp_path / "other.npz", images=images, labels=labels)
    overrides = ("adversary.auxiliary_data=npz", f"adversary.auxiliary_root={tmp_path}/other.npz")
    found = own(*overrides)
    assert found.inputs.shape == (60, 1, 8, 8)
    assert found.labels.tolist() == np.repeat(np.arange(10), 6).tolist()
    # The upper half is as bright as the class, the lower one black.
    upper = found.inputs[:, 0, :3].mean(dim=(1, 2)).numpy()
    np.testing.assert_allclose(upper, 25 * found.labels / 255, atol=0.02)
    assert found.inputs[:, 0, 6:].abs().max() < 0.02
    with pytest.raises(UserError, match="9 samples of each of 10 classes are needed"):
        own(*overrides, "data.auxiliary_per_class=9")


def test_mnist_seen_through_the_digits_of_another_scanner(data_root: Path) -> None:
    plan = plan_of(
        "data.name=mnist", f"data.root={data_root}/mnist", "adversary.auxiliary_data=digits"
    )
    found = setups_for([plan]).make(plan).auxiliary()
    assert found.inputs.shape == (200, 1, 28, 28)
    digits = load_data("digits", None)
    means = [digits.images[digits.labels == c].mean() / 16 for c in range(10)]
    seen = [found.inputs[found.labels == c].mean().item() for c in range(10)]
    np.testing.assert_allclose(seen, means, atol=0.06)


def run(tmp_path: Path, name: str, **sections: object) -> Path:
    content: dict[str, object] = {
        "data": {"name": "digits"},
        "model": {"name": "cnn"},
        "federation": {"fresh_model": True, "rounds": 8, "clients": 2, "batch_size": 8},
        "attacks": ["random", "llg", "llg_plus"],
    }
    experiment = write_experiment(tmp_path / f"{name}.yaml", **{**content, **sections})
    done = run_here("run", experiment, "-o", f"{name}.h5", cwd=tmp_path)
    assert done.status == 0, done.err
    return tmp_path / f"{name}.h5"


def test_a_batch_size_that_is_wrong_by_a_factor(tmp_path: Path) -> None:
    # Stages of one training begin with the same models in all scenarios.
    path = run(
        tmp_path,
        "factor",
        pretraining={"steps": 0},
        sweep={"adversary.batch_size_factor": [1, 0.5, 2]},
    )
    with open_results(path) as results:
        for scenario, labels in zip(results.scenarios, (8, 4, 16), strict=True):
            assert (scenario.array("observations/labels") == labels).all()
            assert (scenario.array("truth/counts").sum(axis=2) == 8).all()
            for attack in ("llg", "llg_plus"):
                assert (scenario.array(f"attacks/{attack}/counts").sum(axis=2) == labels).all()
            # The offset does not depend on the batch size, the impact is inverse to it.
            offset = scenario.array("attacks/llg_plus/calibration/offset")
            impact = scenario.array("attacks/llg_plus/calibration/impact") * labels
            assert offset.shape == (8, 10)
            if scenario.index == 0:
                kept = offset, impact
            np.testing.assert_allclose(offset, kept[0], rtol=1e-12)
            np.testing.assert_allclose(impact, kept[1], rtol=1e-12)
    frame = load(path)
    best = frame[frame.attack == "llg_plus"].groupby("batch_size_factor")["asr"].mean()
    assert best[1.0] > 0.95
    assert best[0.5] <= 0.5
    assert best[2.0] <= 0.5
    # A guess that does not know the size either earns no more than that.
    guess = frame.groupby("batch_size_factor")["uniform"].mean()
    assert guess[0.5] < guess[1.0]
    assert guess[2.0] < guess[1.0]


def test_a_batch_size_that_is_estimated(tmp_path: Path) -> None:
    sizes = {"federation.batch_size": [2, 4]}
    path = run(tmp_path, "estimated", adversary={"batch_size": "estimated"}, sweep=sizes)
    with open_results(path) as results:
        for scenario, size in zip(results.scenarios, (2, 4), strict=True):
            labels = scenario.array("observations/labels")
            assert (labels == size).mean() > 0.8
            counts = scenario.array("attacks/llg/counts")
            np.testing.assert_array_equal(counts.sum(axis=2), labels)


def test_missing_classes_cost_success(tmp_path: Path) -> None:
    sweep = {"adversary.auxiliary_missing": [0, 5, 9]}
    path = run(tmp_path, "missing", attacks=["llg_plus", "class_basis"], sweep=sweep)
    means = load(path).groupby(["attack", "auxiliary_missing"])["asr"].mean()
    # It gives no label to a class that it has no samples of; a constant posterior needs none.
    assert means["class_basis", 0] > 0.95
    assert means["class_basis", 0] - 0.2 > means["class_basis", 5] > means["class_basis", 9] + 0.1
    assert means["llg_plus", 9] > 0.9


def test_what_is_wrong_does_not_depend_on_what_else_is() -> None:
    noise = "adversary.auxiliary_noise=0.2"
    whole, part = own(noise), own(noise, "adversary.auxiliary_missing=3")
    kept = torch.from_numpy(np.isin(whole.labels, part.labels))
    torch.testing.assert_close(part.inputs, whole.inputs[kept])
