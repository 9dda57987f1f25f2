"""What is refused, or left out with a reason, before any rank computes."""

from pathlib import Path

import numpy as np
import pytest
from small_run import plan_of, setups_for

from testbed.attacks.assumptions import broken_assumptions, not_applicable
from testbed.errors import UserError
from testbed.server import scenario_facts

LONE = "model.name='small_run:normalised'"


@pytest.mark.parametrize("key", ["federation.batch_size", "pretraining.batch_size"])
def test_a_batch_of_one_has_no_variance(key: str) -> None:
    plan = plan_of(LONE, "pretraining.steps=1", f"{key}=1")
    with pytest.raises(UserError, match=f"^{key}: .* expected at least 2$"):
        setups_for([plan]).make(plan)


@pytest.mark.parametrize("model", ["model.name=cnn_bn", "model.name=cnn"])
def test_a_batch_of_one_image_with_many_values_is_taken(model: str) -> None:
    plan = plan_of(model, "federation.batch_size=1")
    setups_for([plan]).make(plan)


def test_buffers_that_are_none_of_batchnorm_are_no_statistics() -> None:
    plan = plan_of("model.name='small_run:Tabled'", "attacks=[batchnorm, batchnorm_joint]")
    setup = setups_for([plan]).make(plan)
    assert setup.layout.buffers == 12
    facts = scenario_facts(plan, setup)
    for attack in setup.attacks.values():
        assert "no BatchNorm statistics" in not_applicable(attack, facts)
    plan = plan_of(LONE, "attacks=[batchnorm]")
    assert scenario_facts(plan, setups_for([plan]).make(plan)).statistics == 24


def test_the_message_names_the_key_that_is_wrong(tmp_path: Path) -> None:
    plan = plan_of("adversary.auxiliary_data=npz", f"adversary.auxiliary_root={tmp_path}/no.npz")
    with pytest.raises(UserError, match=r"^adversary\.auxiliary_root: .* does not exist"):
        setups_for([plan])


def test_another_spelling_of_the_victims_file_is_no_other_data(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    np.savez(tmp_path / "a/x.npz", images=np.zeros((80, 1, 8, 8), np.uint8), labels=np.arange(80))
    (tmp_path / "link.npz").symlink_to(tmp_path / "a/x.npz")
    for other in ("a/../a/x.npz", "link.npz"):
        with pytest.raises(UserError, match="auxiliary_data is the victims' data set"):
            plan_of(
                *("data.name=npz", f"data.root={tmp_path}/a/x.npz"),
                *("adversary.auxiliary_data=npz", f"adversary.auxiliary_root={tmp_path}/{other}"),
            )
    with pytest.raises(UserError, match="reads no files: leave it out"):
        plan_of("adversary.auxiliary_data=digits", f"adversary.auxiliary_root={tmp_path}")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("pretraining.batch_size=16", "pretraining.batch_size is of no use without"),
        ("pretraining.learning_rate=1", "pretraining.learning_rate is of no use without"),
    ],
)
def test_training_without_steps_is_no_training(override: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        plan_of(override)
    plan_of(override, "pretraining.steps=0")


def test_noise_on_what_is_not_shared_is_refused() -> None:
    noise = "federation.statistics_noise=1"
    with pytest.raises(UserError, match="of no use where batch_norm is 'local'"):
        plan_of(noise, "federation.batch_norm=local")


@pytest.mark.parametrize(("momentum", "known"), [("0.1", True), ("null", False), ("0.0", False)])
def test_running_averages_that_cannot_be_undone(momentum: str, known: bool) -> None:
    arguments = f"model.arguments={{momentum: {momentum}}}"
    plan = plan_of(LONE, arguments, "attacks=[batchnorm_conditioned, batchnorm]")
    setup = setups_for([plan]).make(plan)
    broken = {
        label: broken_assumptions(attack, scenario_facts(plan, setup))
        for label, attack in setup.attacks.items()
    }
    assert ("running averages that can be undone" in broken["batchnorm_conditioned"]) != known
    assert not broken["batchnorm"]


def test_shifted_knowledge_and_noise_are_told() -> None:
    plan = plan_of(
        *(LONE, "adversary.auxiliary_missing=1", "federation.statistics_noise=0.1"),
        "attacks=[llg, llg_plus, batchnorm]",
    )
    setup = setups_for([plan]).make(plan)
    facts = scenario_facts(plan, setup)
    found = {label: set(broken_assumptions(a, facts)) for label, a in setup.attacks.items()}
    samples = "auxiliary samples of every class, as the victims' are"
    assert found == {
        "llg": set(),
        "llg_plus": {samples},
        "batchnorm": {samples, "statistics without noise"},
    }
