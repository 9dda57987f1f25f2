"""Models at stages of a training: the same for every scenario, rank and number of ranks."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import assert_same_results, run_here, run_testbed, write_experiment
from numpy.typing import NDArray
from small_run import plan_of, setups_for

from testbed.data import Sampler
from testbed.experiment import parse_experiment
from testbed.plan import ScenarioPlan, make_plan
from testbed.pretraining import Pretraining
from testbed.results.reader import open_results
from testbed.seeds import Purpose, stream
from testbed.transport.local import LocalTransport

TEXT = """\
title: stages
data: {name: digits}
model: {name: cnn}
pretraining: {steps: 0, batch_size: 8, learning_rate: 0.2}
federation: {fresh_model: true, rounds: 2, batch_size: 4}
attacks: [llg]
sweep:
  pretraining.steps: [7, 0, 3]
  federation.batch_size: [4, 8]
"""


def trained(plans: list[ScenarioPlan]) -> dict[tuple[int, int], NDArray[np.float32]]:
    pretraining = Pretraining(LocalTransport(), setups_for(plans), plans)
    found = {}
    for plan in plans:
        pretraining.prepare(plan)
        for number in range(plan.rounds):
            state = pretraining.initial(plan, number)
            assert state is not None
            found[plan.index, number] = state
    return found


def test_stages_are_those_of_one_training_by_plain_sgd() -> None:
    plans = list(make_plan(parse_experiment(TEXT)))
    found = trained(plans)
    setup = setups_for(plans).make(plans[0])
    state = torch.empty(setup.layout.size)
    setup.initialise(state, (1,))
    setup.model.load(state)
    module = setup.model.module
    optimiser = torch.optim.SGD(module.parameters(), lr=0.2)
    sampler = Sampler(setup.samples.labels, setup.parts.victim, 10)
    rng = stream(0, Purpose.PRETRAINING, 1)
    expected = {0: state.numpy().copy()}
    for step in range(1, 8):
        batch = sampler.draw("natural", 8, rng)
        optimiser.zero_grad()
        logits = module(setup.samples.inputs(batch))
        torch.nn.functional.cross_entropy(logits, setup.samples.targets(batch)).backward()
        optimiser.step()
        expected[step] = setup.model.state.numpy().copy()
    for plan in plans:
        steps = plan.pretraining_steps
        assert steps is not None
        np.testing.assert_allclose(found[plan.index, 1], expected[steps], rtol=1e-5, atol=1e-6)
        assert not np.array_equal(found[plan.index, 0], found[plan.index, 1])


def test_scenarios_share_the_models_and_train_once() -> None:
    plans = list(make_plan(parse_experiment(TEXT)))
    said: list[str] = []
    pretraining = Pretraining(LocalTransport(), setups_for(plans), plans)
    by_steps: dict[int | None, list[Any]] = {}
    for plan in plans:
        pretraining.prepare(plan, said.append)
        by_steps.setdefault(plan.pretraining_steps, []).append(pretraining.initial(plan, 0))
    assert said == ["training 2 models for 7 steps"]
    # What no later scenario attacks is not kept: the sweep began with the 7th step.
    with pytest.raises(KeyError):
        pretraining.initial(plans[0], 0)
    for first, second in by_steps.values():
        np.testing.assert_array_equal(first, second)
    assert len({state.tobytes() for (state, _) in by_steps.values()}) == 3


def test_another_training_has_models_of_its_own() -> None:
    text = TEXT.replace("federation.batch_size: [4, 8]", "pretraining.learning_rate: [0.2, 0.3]")
    plans = list(make_plan(parse_experiment(text)))
    found = trained(plans)
    for slow, fast in zip(plans[::2], plans[1::2], strict=True):
        same = np.array_equal(found[slow.index, 0], found[fast.index, 0])
        assert same == (slow.pretraining_steps == 0)


def test_without_the_section_there_is_no_training() -> None:
    plan = plan_of()
    pretraining = Pretraining(LocalTransport(), setups_for([plan]), [plan])
    pretraining.prepare(plan, lambda text: (_ for _ in ()).throw(AssertionError(text)))
    assert pretraining.initial(plan, 0) is None
    assert plan.initial_key(2) == (0, 2)


def test_batchnorm_statistics_are_trained_too() -> None:
    plan = plan_of("model.name=resnet20", "pretraining.steps=2", "federation.fresh_model=true")
    (state, *_) = trained([plan]).values()
    setup = setups_for([plan]).make(plan)
    initial = torch.empty(setup.layout.size)
    setup.initialise(initial, (0,))
    split = setup.layout.parameters
    assert (state[split:] != initial.numpy()[split:]).mean() > 0.9


@pytest.mark.mpi
def test_any_number_of_ranks_attacks_the_same_models(tmp_path: Path) -> None:
    experiment = write_experiment(
        tmp_path / "e.yaml",
        data={"name": "digits"},
        model={"name": "cnn", "activation": "relu", "init": "torch"},
        pretraining={"steps": 0, "learning_rate": 0.3},
        federation={"fresh_model": True, "rounds": 3, "batch_size": 8, "evaluate_every": 1},
        attacks=["llg", "llg_plus"],
        sweep={"pretraining.steps": [0, 200]},
    )
    done = [run_here("run", experiment, "-o", "1.h5", cwd=tmp_path)]
    for ranks in (2, 3):
        line = ("run", experiment, "-o", f"{ranks}.h5")
        done.append(run_testbed(*line, ranks=ranks, cwd=tmp_path))
    for one in done:
        assert one.status == 0, one.err
        assert "training 3 models for 200 steps" in one.err
    assert_same_results(tmp_path / "1.h5", tmp_path / "2.h5")
    assert_same_results(tmp_path / "1.h5", tmp_path / "3.h5")
    with open_results(tmp_path / "1.h5") as results:
        before, after = (s.array("rounds/accuracy").mean() for s in results.scenarios)
    assert before < 0.25 < 0.5 < after


@pytest.mark.ranks
def test_dropout_in_training_draws_the_same_on_every_rank(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("small_run.py"), tmp_path)
    experiment = write_experiment(
        tmp_path / "e.yaml",
        data={"name": "digits"},
        model={"name": "small_run:normalised", "arguments": {"dropout": 0.5}},
        pretraining={"steps": 20},
        federation={"fresh_model": True, "rounds": 3, "batch_size": 8},
        attacks=["llg"],
    )
    done = run_here("run", experiment, "-o", "1.h5", cwd=tmp_path)
    assert done.status == 0, done.err
    done = run_testbed("run", experiment, "-o", "2.h5", ranks=2, cwd=tmp_path)
    assert done.status == 0, done.err
    assert_same_results(tmp_path / "1.h5", tmp_path / "2.h5")


def test_training_can_begin_with_a_trained_model(tmp_path: Path) -> None:
    experiment = write_experiment(
        tmp_path / "e.yaml",
        data={"name": "digits"},
        model={"name": "cnn", "activation": "relu", "init": "torch"},
        pretraining={"steps": 200, "learning_rate": 0.3},
        federation={"rounds": 2, "clients": 2, "batch_size": 8, "evaluate_every": 1},
        attacks=["llg"],
    )
    done = run_here("run", experiment, "-o", "a.h5", cwd=tmp_path)
    assert done.status == 0, done.err
    with open_results(tmp_path / "a.h5") as results:
        accuracy = results.scenarios[0].array("rounds/accuracy")
    assert accuracy[0] > 0.4
    assert accuracy[0] != accuracy[1]
