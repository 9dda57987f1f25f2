"""An adversary with arrays in place of a model gives what the one with the model gives."""

from typing import Any

import numpy as np
import pytest
import torch
from small_run import plan_of, setups_for
from torch import nn

from testbed.attacks import Head, Knowledge, Observed, Outputs, attacks, make_attack
from testbed.attacks.adversary import AuxiliarySamples, GlobalModel
from testbed.attacks.offline import ArrayAdversary, NotGivenError
from testbed.attacks.restricted import RestrictedAdversary
from testbed.attacks.simulation import softmax
from testbed.errors import UserError
from testbed.models.flat import FlatModel
from testbed.models.last_layer import find_last_layer

CLASSES, WIDTH, BATCH, RATE = 6, 5, 4, 0.3
SHAPE = (1, 3, 3)
QUICK = {"shadows": 12, "simulations": 40, "batches": 40, "epochs": 2, "hidden": 4}


@pytest.fixture(scope="module", params=[1, 3], ids=["one step", "three steps"])
def model(request: pytest.FixtureRequest) -> GlobalModel:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(9, WIDTH), nn.Sigmoid(), nn.Linear(WIDTH, CLASSES)
    )
    flat = FlatModel(module, find_last_layer(module, SHAPE, CLASSES), torch.device("cpu"))
    labels = np.repeat(np.arange(CLASSES), 7)
    auxiliary = AuxiliarySamples(torch.rand(len(labels), *SHAPE), labels)
    model = GlobalModel(flat, auxiliary, SHAPE, local_steps=request.param, learning_rate=RATE)
    model.enter(flat.state.numpy().copy(), 0, (0, 0))
    return model


def both(model: GlobalModel, knowledge: Knowledge) -> tuple[RestrictedAdversary, ArrayAdversary]:
    arrays = ArrayAdversary(
        knowledge,
        model.classes,
        batch_size=BATCH,
        local_steps=model.local_steps,
        learning_rate=model.learning_rate,
        seed=11,
        head=model.head(),
        auxiliary=model.on_auxiliary(),
    )
    return RestrictedAdversary(model, knowledge, BATCH, 11), arrays


def test_the_same_outputs_and_simulations(model: GlobalModel) -> None:
    live, arrays = both(model, Knowledge.AUXILIARY)
    for name in ("classes", "batch_size", "local_steps", "learning_rate", "seed"):
        assert getattr(live, name) == getattr(arrays, name)
    batches = np.random.default_rng(0).integers(7 * CLASSES, size=(5, model.local_steps, BATCH))
    pairs: list[tuple[Any, Any]] = [
        (live.head(), arrays.head()),
        (live.on_auxiliary(), arrays.on_auxiliary()),
        (live.simulate(batches), arrays.simulate(batches)),
    ]
    for expected, found in pairs:
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(found, name), value)


# Those that look at BatchNorm's statistics have none of this model's to calibrate on.
CALIBRATED = [
    name for name, attack in attacks().items() if Observed.STATISTICS not in attack.observes
]


@pytest.mark.parametrize("name", CALIBRATED)
def test_attacks_calibrate_alike(model: GlobalModel, name: str) -> None:
    knobs = {key: value for key, value in QUICK.items() if hasattr(make_attack(name, {}), key)}
    attack = make_attack(name, knobs)
    live, arrays = both(model, attack.knowledge)
    try:
        found = attack.calibrate(arrays)
    except NotGivenError:  # it runs the model: see the next test
        return
    expected = attack.calibrate(live)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)


def test_which_attacks_calibrate_on_arrays(model: GlobalModel) -> None:
    calibrated = set()
    for name in ("random", "llg", "llg_plus", "llg_star"):
        attack = make_attack(name, {})
        try:
            attack.calibrate(both(model, attack.knowledge)[1])
            calibrated.add(name)
        except NotGivenError:
            pass
    assert calibrated == {"random", "llg", "llg_plus"}


UPDATE = np.zeros(3, np.float32)
CALLS: dict[str, tuple[Knowledge, Any]] = {
    "head": (Knowledge.MODEL, lambda a: a.head()),
    "on_dummy": (Knowledge.MODEL, lambda a: a.on_dummy("zeros", 1)),
    "on_auxiliary": (Knowledge.AUXILIARY, lambda a: a.on_auxiliary()),
    "after": (Knowledge.MODEL, lambda a: a.after(UPDATE)),
    "simulate": (Knowledge.AUXILIARY, lambda a: a.simulate(np.zeros((1, 1, 1), np.int64))),
    "local_update": (Knowledge.AUXILIARY, lambda a: a.local_update(np.zeros((1, 1), np.int64))),
    "weight_gradient": (Knowledge.GRADIENTS, lambda a: a.weight_gradient(UPDATE)),
    "bias_gradient": (Knowledge.GRADIENTS, lambda a: a.bias_gradient(UPDATE)),
    "statistics_sent": (Knowledge.MODEL, lambda a: a.statistics_sent()),
    "logit_gradients": (Knowledge.AUXILIARY, lambda a: a.logit_gradients()),
    "normalised": (Knowledge.AUXILIARY, lambda a: a.normalised(np.zeros(3, np.float32))),
    "disturbed": (
        Knowledge.MODEL,
        lambda a: a.disturbed(np.zeros((1, 3), np.float32), 0.1, np.random.default_rng(0)),
    ),
    "planted": (Knowledge.MALICIOUS, lambda a: a.planted()),
    "white_box": (Knowledge.MODEL, lambda a: a.white_box()),
}


def test_calls_are_those_of_the_live_adversary() -> None:
    public = {name for name in vars(RestrictedAdversary) if not name.startswith("_")}
    assert public == {*CALLS, "classes", "momentum"}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("declared", Knowledge)
def test_what_is_not_there(declared: Knowledge, call: str) -> None:
    needed, function = CALLS[call]
    adversary = ArrayAdversary(declared, CLASSES, batch_size=BATCH)
    if not declared.includes(needed):
        with pytest.raises(PermissionError, match=f"and asks for '{needed.value}'"):
            function(adversary)
        return
    with pytest.raises(UserError) as caught:
        function(adversary)
    given = {
        "head": "weights",
        "on_auxiliary": "auxiliary samples",
        "simulate": "auxiliary samples",
    }
    assert given.get(call, "needs the whole model") in str(caught.value)
    assert ("run it live" in str(caught.value)) == (call not in given)


def outputs(labels: list[int]) -> Outputs:
    rng = np.random.default_rng(0)
    features = rng.random((len(labels), WIDTH))
    return Outputs(softmax(features @ np.ones((WIDTH, CLASSES))), features, np.array(labels))


def test_auxiliary_samples_are_sorted_by_class() -> None:
    given = outputs([3, 0, 3, 1, 0])
    adversary = ArrayAdversary(Knowledge.AUXILIARY, CLASSES, batch_size=1, auxiliary=given)
    found = adversary.on_auxiliary()
    order = [1, 4, 3, 0, 2]
    assert found.labels is not None
    assert found.labels.tolist() == [0, 0, 1, 3, 3]
    np.testing.assert_array_equal(found.features, given.features[order])
    np.testing.assert_array_equal(found.posterior, given.posterior[order])
    assert not found.features.flags.writeable
    assert given.features.flags.writeable


def test_auxiliary_samples_need_labels() -> None:
    unlabelled = Outputs(np.ones((1, CLASSES)), np.ones((1, WIDTH)), None)
    with pytest.raises(ValueError, match="need labels"):
        ArrayAdversary(Knowledge.AUXILIARY, CLASSES, batch_size=1, auxiliary=unlabelled)


def test_several_simulated_steps_need_the_last_layer() -> None:
    given = outputs([0, 1, 2])
    without = ArrayAdversary(Knowledge.AUXILIARY, CLASSES, batch_size=1, auxiliary=given)
    assert without.simulate(np.zeros((2, 1, 3), np.int64)).row_sums.shape == (2, CLASSES)
    with pytest.raises(NotGivenError, match="weights of the global model's last layer"):
        without.simulate(np.zeros((2, 2, 3), np.int64))
    head = Head(np.zeros((CLASSES, WIDTH)), np.zeros(CLASSES))
    with_head = ArrayAdversary(
        Knowledge.AUXILIARY, CLASSES, batch_size=1, auxiliary=given, head=head
    )
    assert with_head.simulate(np.zeros((2, 2, 3), np.int64)).local_steps == 2


def test_a_model_of_the_catalog() -> None:
    plan = plan_of("data.auxiliary_per_class=3")
    setup = setups_for([plan]).make(plan)
    model = GlobalModel(setup.model, setup.auxiliary(), setup.samples.shape)
    state = torch.empty(setup.layout.size)
    setup.initialise(state, (0, 0))
    model.enter(state.numpy(), 0, (0, 0))
    live, arrays = both(model, Knowledge.AUXILIARY)
    found, expected = (make_attack("llg_plus", {}).calibrate(one) for one in (arrays, live))
    np.testing.assert_array_equal(found["offset"], expected["offset"])
    # What the last layer makes of the features is the posterior.
    head, given = arrays.head(), arrays.on_auxiliary()
    np.testing.assert_allclose(
        softmax(given.features @ head.weight.T + head.bias), given.posterior, atol=1e-6
    )


def test_nothing_is_known_of_buffers():
    known = ArrayAdversary(Knowledge.MODEL, 3, batch_size=2)
    assert known.momentum().shape == (0,)
    with pytest.raises(PermissionError, match="asks for 'model'"):
        ArrayAdversary(Knowledge.GRADIENTS, 3, batch_size=2).momentum()
