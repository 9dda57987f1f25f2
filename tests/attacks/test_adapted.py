"""Adapted attacks: what defences take away comes back, and nothing else changes."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
from closed_form import SEEDS, observe, random_posterior, server
from global_models import CLASSES, Federation, infer, perceptron, success
from hypothesis import given
from torch import nn

from testbed.attacks import (
    Answer,
    Attack,
    Knowledge,
    LabelCounts,
    LabelDistribution,
    LabelPresence,
    Observed,
    Outputs,
    attacks,
    make_attack,
)
from testbed.attacks.adapted import AdaptedAttack, adapts
from testbed.attacks.defended import DefendedAdversary, is_defended
from testbed.defenses import (
    Defense,
    LabelDefense,
    Sparsifier,
    Stage,
    Targets,
    Tensors,
    VectorDefense,
    make_defense,
)
from testbed.encoding import decoded

BASELINES = ("random", "uniform", "prior", "oracle")


@dataclass(frozen=True, kw_only=True)
class Stretched(Defense):
    """Multiplies what is sent."""

    stage: ClassVar[Stage] = Stage.CLIP
    by: float

    def undo(self, observations, _known):
        return _each(observations, lambda values: values / self.by)

    def imitate(self, simulated, _rng):
        return _each(simulated, lambda values: values * self.by)


@dataclass(frozen=True, kw_only=True)
class Shifted(Defense):
    """Adds a constant to what is sent."""

    stage: ClassVar[Stage] = Stage.NOISE
    by: float

    def undo(self, observations, _known):
        return _each(observations, lambda values: values - self.by)

    def imitate(self, simulated, _rng):
        return _each(simulated, lambda values: values + self.by)


@dataclass(frozen=True, kw_only=True)
class Rolled(Defense):
    """Trains on the class behind that of a label."""

    stage: ClassVar[Stage] = Stage.LABELS

    def restore(self, counts, _labels):
        return np.roll(counts, -1, axis=1)


@dataclass(frozen=True, kw_only=True)
class Halved(Defense):
    """Trains half of the time on the first class."""

    stage: ClassVar[Stage] = Stage.LABELS

    def restore(self, counts, labels):
        others = 2 * counts
        others[:, 0] -= labels
        return others


@dataclass(frozen=True, kw_only=True)
class Idle(Defense):
    """Leaves nothing to adapt to."""

    stage: ClassVar[Stage] = Stage.SUM


@dataclass(frozen=True)
class Fixed(Attack):
    """Answers what it is made of."""

    answer: object = None

    knowledge: ClassVar = Knowledge.GRADIENTS
    name: ClassVar = "fixed"
    title: ClassVar = "Fixed"
    source: ClassVar = "this test"

    def infer(self, _observations, _calibration):
        return self.answer


def _each(observations, change):
    parts = ("row_sums", "bias_gradient", "weight_gradient")
    given = {name: getattr(observations, name) for name in parts}
    return replace(observations, **{name: change(v) for name, v in given.items() if v is not None})


def tensors(federation):
    layout = federation.flat.layout
    sizes = [parameter.numel() for parameter in federation.flat.module.parameters()]
    weight = slice(layout.weight, layout.weight + layout.classes * layout.features)
    bias = None if layout.bias is None else slice(layout.bias, layout.bias + layout.classes)
    names = tuple(name for name, _ in federation.flat.module.named_parameters())
    return Tensors(names, np.cumsum([0, *sizes]), weight, bias, layout.classes)


def adapted(attack, defenses, where, has_bias=True):
    return AdaptedAttack(attack, tuple(defenses), where, has_bias)


def private_batches(federation, clients, size, skewed=True, seed=4):
    """Return positions [N, B] among the clients' samples, half of each batch of one class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=(clients, size))
    if skewed:
        labels[:, : size // 2] = rng.integers(CLASSES, size=(clients, 1))
    own = federation._clients.on_auxiliary().labels
    return np.vectorize(lambda c: rng.choice(np.flatnonzero(own == c)))(labels)


def trained_on(federation, chosen, defense=None):
    """Observe clients with the samples [N, B] that train on what a defence makes of the labels."""
    outputs = federation._clients.on_auxiliary()
    weights, biases, rng = [], [], np.random.default_rng(6)
    for batch in chosen:
        targets = Targets(np.eye(CLASSES, dtype=np.float32)[outputs.labels[batch]])
        if defense is not None:
            targets = defense.transform(targets, batch, rng, 9)
        residual = outputs.posterior[batch] - targets.probabilities
        weights.append(residual.T @ outputs.features[batch] / len(batch))
        biases.append(residual.mean(axis=0))
    counts = np.array([np.bincount(outputs.labels[b], minlength=CLASSES) for b in chosen])
    return observe(np.array(weights), np.array(biases), chosen.shape[1]), counts


def sent(federation, observations, defense):
    """Observe the same clients when a defence is applied to their whole updates."""
    where, updates = tensors(federation), observations.update.copy()
    for row, vector in enumerate(updates):
        _apply(defense, vector[: where.size], where, np.random.default_rng([8, row]))
    norm = np.linalg.norm(updates[:, : where.size].astype(np.float64), axis=1)
    return replace(federation.observe(updates), norm=norm)


def _apply(defense, vector, where, rng):
    if isinstance(defense, VectorDefense):
        defense.apply(vector, where, rng)
    elif isinstance(defense, Sparsifier):
        chosen = defense.select(vector, where, rng)
        values = vector[chosen] * np.float32(defense.factor)
        vector[:] = 0
        vector[chosen] = values
    else:
        bounds = where.bounds(defense.scope)
        vector[:] = decoded(defense.quantise(vector.copy(), bounds, rng), bounds)


def each_success(counts, truth):
    return np.minimum(counts, truth).sum(axis=1) / truth.sum(axis=1)


def interval(differences):
    """Return a 95 % interval of the mean of paired differences."""
    half = 1.96 * differences.std(ddof=1) / np.sqrt(len(differences))
    return differences.mean() - half, differences.mean() + half


NOWHERE = Tensors((), np.zeros(1, np.int64), slice(0, 0), None, 3)


def observed(updates=2, classes=3):
    return observe(np.ones((updates, classes, 2)), np.ones((updates, classes)), 4)


def answer_of(inferred, defenses, observations, answers=None):
    attack = Fixed(inferred)
    if answers is not None:
        object.__setattr__(attack, "answers", answers)
    wrapped = adapted(attack, defenses, NOWHERE)
    outputs = Outputs(np.full((1, 3), 1 / 3), np.ones((1, 2)), None)
    return wrapped.infer(observations, wrapped.calibrate(server(outputs)))


# Who adapts


def test_baselines_do_not_adapt():
    assert not any(adapts(make_attack(name, {}), [Stretched(by=2)]) for name in BASELINES)


@pytest.mark.parametrize(
    ("attack", "defense", "expected"),
    [
        ("llg", Idle(), False),
        ("llg", Stretched(by=2.0), True),
        ("llg", Rolled(), True),
        ("gradinversion_presence", Rolled(), False),
        ("batchnorm", Stretched(by=2.0), False),
        ("batchnorm", Rolled(), False),
        ("batchnorm_joint", Rolled(), True),
    ],
)
def test_an_attack_adapts_where_a_defence_leaves_something_to_do(attack, defense, expected):
    assert adapts(make_attack(attack, {}), [Idle(), defense]) is expected


SIMULATE = {
    "lmmse": {"simulations": 20},
    "posterior_regression": {"simulations": 20, "steps": 2},
    "ldia": {"shadows": 20, "epochs": 1},
    "batchnorm": {"batches": 20},
    "batchnorm_joint": {"batches": 20},
}


@pytest.mark.parametrize(
    "name", sorted(n for n, cls in attacks().items() if cls.knowledge is Knowledge.AUXILIARY)
)
def test_imitation_is_of_use_to_those_attacks_that_simulate_gradients(name):
    federation = Federation(perceptron(norm=True), local_steps=2)
    observations, _ = federation.draw(1)
    attack = make_attack(name, SIMULATE.get(name, {}))
    adversary = Counting(federation.adversary(attack))
    attack.calibrate(adversary)
    attack.calibrate_updates(adversary, observations.restricted(attack))

    class Imitated(Defense):
        def imitate(self, simulated, _rng):
            return simulated

    # Of simulated clients it takes the statistics alone, which no defence changes.
    useful = adversary.simulated > 0 and name != "batchnorm"
    assert adapts(attack, [Imitated()]) is useful


class Counting:
    """Counts how often clients are simulated."""

    def __init__(self, adversary):
        self.adversary, self.simulated = adversary, 0

    def __getattr__(self, name):
        return getattr(self.adversary, name)

    def simulate(self, batches):
        self.simulated += 1
        return self.adversary.simulate(batches)


# What it declares


@pytest.mark.parametrize("name", sorted(attacks()))
def test_declares_what_the_plain_attack_does_and_the_bias_where_there_is_one(name):
    plain = make_attack(name, {})
    with_bias, without = (adapted(plain, [Idle()], NOWHERE, has) for has in (True, False))
    for declared in ("name", "knowledge", "source", "assumes", "answers"):
        assert getattr(with_bias, declared) == getattr(plain, declared)
    assert with_bias.title == f"{plain.title}, adapted"
    assert with_bias.options() == {**plain.options(), "adapted": True}
    assert with_bias.observes == plain.observes | {Observed.BIAS_GRADIENT}
    assert without.observes == plain.observes
    assert with_bias.arrays().items() > plain.arrays().items()


def test_a_stored_calibration_of_the_plain_attack_is_no_other():
    plain = make_attack("llg_plus", {})
    wrapped = adapted(plain, [Idle()], NOWHERE)
    assert wrapped.calibrated_by == (*plain.calibrated_by, "adapted")
    assert adapted(make_attack("lmmse", {}), [], NOWHERE).calibrated_by is None


# What it knows of the model


@pytest.mark.parametrize(
    ("name", "expected"), [("llg", "alike"), ("ilrg", "dummy"), ("aux_mean", "auxiliary")]
)
def test_asks_for_no_more_than_the_attack_declares(name, expected):
    federation = Federation(perceptron())
    attack = make_attack(name, {})
    dummy, auxiliary = federation.model.on_dummy("random", 32), federation.model.on_auxiliary(8)
    posterior, features = {
        "alike": (np.full((1, CLASSES), 1 / CLASSES), None),
        "dummy": (dummy.posterior, dummy.features),
        "auxiliary": (auxiliary.posterior, auxiliary.features),
    }[expected]
    wrapped = adapted(attack, [Idle()], tensors(federation))
    calibration = federation.calibrate(wrapped, federation.draw(2)[0])
    np.testing.assert_allclose(calibration["adapted_posterior"][0], posterior.mean(axis=0))
    size, mass, spread = calibration["adapted_numbers"][0]
    assert size == 8
    if features is None:
        assert mass == spread == 0
    else:
        masses = features.sum(axis=1)
        assert mass == pytest.approx(masses.mean())
        assert spread * mass == pytest.approx(masses.std())


# Undoing


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llg", {}),
        ("llg_plus", {}),
        ("aux_mean", {}),
        ("aux_ls_interpolated", {}),
        ("ilrg", {"variant": "released"}),
        ("rlg", {}),
        ("lmmse", {"simulations": 100}),
        ("ldia", {"shadows": 40, "epochs": 2}),
        ("posterior_regression", {"simulations": 60, "steps": 20}),
    ],
)
def test_is_the_plain_attack_bit_for_bit_where_there_is_nothing_to_do(name, options):
    federation = Federation(perceptron(nn.ReLU), local_steps=2)
    observations, _ = federation.draw(4)
    attack = make_attack(name, options)
    plain = federation.run(attack, observations)
    found = federation.run(adapted(attack, [Idle()], tensors(federation)), observations)
    np.testing.assert_array_equal(found.values, plain.values)
    if getattr(plain, "scores", None) is not None:
        np.testing.assert_array_equal(found.scores, plain.scores)


@pytest.mark.parametrize("name", ["llg", "llg_plus", "aux_mean", "ilrg", "lmmse"])
def test_observations_are_undone_in_reverse_order(name):
    # Halves and eighths are exact, so that any other order would differ.
    federation = Federation(perceptron())
    observations, _ = federation.draw(20)
    observations = _each(observations, lambda values: np.round(values * 4096) / 4096)
    defenses = [Stretched(by=0.5), Shifted(by=0.125), Stretched(by=4.0)]
    sent = _each(observations, lambda values: (values * 0.5 + 0.125) * 4)
    attack = make_attack(name, {})
    wrapped = adapted(attack, defenses, tensors(federation))
    plain = federation.run(attack, observations)
    without_imitation = wrapped.infer(
        sent.restricted(wrapped),
        federation.calibrate(adapted(attack, [Idle()], tensors(federation)), observations),
    )
    np.testing.assert_array_equal(without_imitation.counts, plain.counts)


def test_what_depends_on_updates_is_derived_from_undone_ones():
    federation = Federation(perceptron(), local_steps=2)
    observations, _ = federation.draw(3)

    class Lost(Defense):
        """Sends nothing that an attacker could use as it is."""

        def undo(self, observed, _known):
            return replace(observed, update=kept, bias_gradient=observations.bias_gradient)

    kept = observations.update
    sent = replace(observations, update=np.zeros_like(kept), bias_gradient=0 * kept[:, :CLASSES])
    attack = make_attack("aux_mean_interpolated", {})
    found = federation.run(adapted(attack, [Lost()], tensors(federation)), sent)
    plain = federation.run(attack, observations)
    np.testing.assert_array_equal(found.scores, plain.scores)


def test_the_attack_is_not_shown_what_only_undoing_needs():
    shown = []

    class Looks(Fixed):
        def infer(self, observations, calibration):
            shown.append((observations, dict(calibration)))
            return self.answer

    wrapped = adapted(Looks(LabelCounts(np.ones((2, 3), np.int64))), [Stretched(by=2)], NOWHERE)
    outputs = Outputs(np.full((1, 3), 1 / 3), np.ones((1, 2)), None)
    wrapped.infer(observed(), wrapped.calibrate(server(outputs)))
    assert shown[0][0].bias_gradient is None
    assert shown[0][1] == {}


def test_each_update_may_have_a_calibration_of_its_own():
    class Scaled(Defense):
        def undo(self, observations, known):
            return _each(observations, lambda values: values / known.batch_size)

    federation = Federation(perceptron())
    observations, _ = federation.draw(3)
    wrapped = adapted(make_attack("aux_mean", {}), [Scaled()], tensors(federation))
    calibration = federation.calibrate(wrapped, observations)
    each = {name: np.repeat(values, 3, axis=0) for name, values in calibration.items()}
    each["adapted_numbers"][:, 0] = 8.0, 2.0, 4.0
    found = infer(wrapped, observations, each)
    for row, size in enumerate((8.0, 2.0, 4.0)):
        one = calibration | {"adapted_numbers": np.array([[size, 0.0, 0.0]])}
        alone = infer(wrapped, observations.rows(slice(row, row + 1)), one)
        np.testing.assert_array_equal(found.scores[row], alone.scores[0])


# Imitating


def test_simulated_clients_are_defended_and_undone_like_real_ones():
    federation = Federation(perceptron())
    attack = make_attack("posterior_regression", {})
    defenses = (Stretched(by=0.5), Shifted(by=0.125))
    wrapped = adapted(attack, defenses, tensors(federation))
    adversary = federation.adversary(attack)
    known = wrapped._known(adversary)
    batches = np.arange(24).reshape(3, 1, 8)
    plain = adversary.simulate(batches)
    through = DefendedAdversary(adversary, wrapped, defenses, known).simulate(batches)
    np.testing.assert_allclose(through.weight_gradient, plain.weight_gradient, atol=1e-6)
    np.testing.assert_allclose(through.bias_gradient, plain.bias_gradient, atol=1e-6)

    class NotUndone(Stretched):
        undo = Defense.undo

    other_order = DefendedAdversary(adversary, wrapped, (NotUndone(by=0.5), *defenses), known)
    np.testing.assert_allclose(
        other_order.simulate(batches).bias_gradient, plain.bias_gradient * 0.5, atol=1e-6
    )


def test_imitated_draws_depend_on_the_seed_alone_and_on_no_stream_of_the_attack():
    class Noisy(Defense):
        def imitate(self, simulated, rng):
            return _each(simulated, lambda values: rng.standard_normal(values.shape))

    federation = Federation(perceptron())
    attack = make_attack("lmmse", {})
    wrapped = adapted(attack, [Noisy()], tensors(federation))

    def simulate(seed):
        adversary = federation.adversary(attack, seed)
        known = wrapped._known(adversary)
        defended = DefendedAdversary(adversary, wrapped, [Noisy()], known)
        return defended.simulate(np.zeros((2, 1, 8), np.int64)).row_sums

    np.testing.assert_array_equal(simulate(1), simulate(1))
    assert (simulate(1) != simulate(2)).all()
    own = np.random.Generator(np.random.PCG64(1)).standard_normal(simulate(1).shape)
    assert (simulate(1) != own).all()


def test_a_defended_adversary_is_otherwise_the_one_it_wraps():
    federation = Federation(perceptron(), local_steps=2)
    attack = make_attack("lmmse", {})
    adversary = federation.adversary(attack)
    wrapped = adapted(attack, [Shifted(by=1.0)], tensors(federation))
    defended = DefendedAdversary(adversary, wrapped, wrapped.defenses, wrapped._known(adversary))
    assert is_defended(defended)
    assert not is_defended(adversary)
    for name in ("classes", "batch_size", "local_steps", "learning_rate", "seed"):
        assert getattr(defended, name) == getattr(adversary, name)
    batches = np.arange(16).reshape(2, 8)
    update = adversary.local_update(batches)
    np.testing.assert_array_equal(defended.local_update(batches), update)
    later, expected = defended.after(update), adversary.after(update)
    assert is_defended(later)
    np.testing.assert_array_equal(later.head().weight, expected.head().weight)
    gradients = federation.adversary(make_attack("llg", {}))
    with pytest.raises(PermissionError, match="declare what it uses"):
        DefendedAdversary(gradients, wrapped, (), wrapped._known(adversary)).head()


# Restoring


@given(seed=SEEDS)
def test_counts_are_restored_in_reverse_order_before_they_are_rounded(seed):
    rng = np.random.default_rng(seed)
    truth = rng.multinomial(4, np.full(3, 1 / 3), size=2)
    # Rolled first, then half of the labels were changed to the first class.
    behind = np.roll(truth, 1, axis=1) / 2
    behind[:, 0] += 2
    wrong = np.full((2, 3), -1)
    found = answer_of(LabelCounts(wrong, behind), [Rolled(), Halved()], observed())
    np.testing.assert_array_equal(found.counts, truth)
    np.testing.assert_allclose(found.scores, truth)


def test_counts_without_scores_are_restored_from_the_counts():
    counts = np.array([[4, 0, 0], [2, 1, 1]])
    found = answer_of(LabelCounts(counts), [Halved()], observed())
    np.testing.assert_array_equal(found.counts, [[4, 0, 0], [0, 2, 2]])


@given(seed=SEEDS)
def test_shares_are_restored_to_shares(seed):
    rng = np.random.default_rng(seed)
    shares = random_posterior(rng, 2, 3, 2.0)
    found = answer_of(LabelDistribution(shares), [Halved()], observed(), Answer.DISTRIBUTION)
    assert (found.shares >= 0).all()
    np.testing.assert_allclose(found.shares.sum(axis=1), 1)
    valid = shares[:, 0] >= 0.5
    np.testing.assert_allclose(found.shares[valid, 1:], 2 * shares[valid, 1:], atol=1e-12)


def test_presence_is_left_as_it_is():
    presence = np.array([[True, False, True], [False, False, True]])
    found = answer_of(LabelPresence(presence), [Rolled()], observed(), Answer.PRESENCE)
    np.testing.assert_array_equal(found.presence, presence)


# With the defences that there are


@pytest.fixture(scope="module")
def untrained():
    return Federation(perceptron(), batch_size=16)


@pytest.fixture(scope="module")
def wide():
    """A model with as many features as errors of single entries average out over."""
    return Federation(perceptron(width=200), batch_size=8)


@pytest.mark.parametrize("bound", [0.01, 0.1])
@pytest.mark.parametrize("name", ["llg_plus", "aux_mean", "aux_ls"])
def test_what_clipping_takes_comes_back(untrained, name, bound):
    observations, counts = untrained.draw(40)
    defense, attack = make_defense("clip", {"bound": bound}), make_attack(name, {})
    clipped = sent(untrained, observations, defense)
    clean = success(untrained.run(attack, observations).counts, counts)
    plain = success(untrained.run(attack, clipped).counts, counts)
    wrapped = adapted(attack, [defense], tensors(untrained))
    found = success(untrained.run(wrapped, clipped).counts, counts)
    assert plain < clean - 0.3
    assert found > clean - 0.1


@pytest.mark.parametrize(
    ("name", "defense", "options"),
    [
        ("aux_mean", "noise", {"sigma": 0.1}),
        ("aux_ls", "noise", {"sigma": 0.1}),
        ("aux_mean", "terngrad", {}),
        ("aux_ls", "qsgd", {"levels": 4}),
        ("aux_mean", "random_k", {"theta": 0.5}),
        ("aux_ls", "gradient_dropout", {"p": 0.5, "rescale": True}),
        ("llg_plus", "random_k", {"theta": 0.5}),
        ("llg_plus", "dp_paper", {"bound": 0.1, "sigma": 1e-3}),
        ("llg_plus", "clip", {"bound": 0.1, "scope": "tensor"}),
    ],
)
def test_what_is_done_to_entries_is_undone_by_the_row_sums(wide, name, defense, options):
    observations, counts = wide.draw(60)
    made, attack = make_defense(defense, options), make_attack(name, {})
    defended = sent(wide, observations, made)
    clean = each_success(wide.run(attack, observations).counts, counts)
    plain = each_success(wide.run(attack, defended).counts, counts)
    found = each_success(wide.run(adapted(attack, [made], tensors(wide)), defended).counts, counts)
    assert interval(found - plain)[0] > 0
    assert found.mean() - plain.mean() > 0.4 * (clean.mean() - plain.mean())


def test_what_was_not_clipped_is_left_alone(untrained):
    observations, _ = untrained.draw(10)
    defense = make_defense("clip", {"bound": 1e3})
    whole = sent(untrained, observations, defense)
    attack = make_attack("aux_mean", {})
    found = untrained.run(adapted(attack, [defense], tensors(untrained)), whole)
    np.testing.assert_array_equal(found.scores, untrained.run(attack, observations).scores)


@pytest.mark.parametrize("name", ["llg_plus", "aux_mean", "ilrg"])
def test_smoothed_labels_are_restored(untrained, name):
    defense, attack = make_defense("label_smoothing", {"epsilon": 0.3}), make_attack(name, {})
    chosen = private_batches(untrained, 40, 32)
    clean, counts = trained_on(untrained, chosen)
    smoothed, _ = trained_on(untrained, chosen, defense)
    untouched = success(untrained.run(attack, clean).counts, counts)
    plain = success(untrained.run(attack, smoothed).counts, counts)
    wrapped = adapted(attack, [defense], tensors(untrained))
    found = success(untrained.run(wrapped, smoothed).counts, counts)
    assert plain < untouched - 0.05
    assert found > untouched - 0.02


def test_randomised_responses_are_inverted_in_large_batches():
    federation = Federation(perceptron(), batch_size=200)
    defense = make_defense("randomised_response", {"epsilon": 2.0, "memoise": False})
    observations, counts = trained_on(federation, private_batches(federation, 40, 200), defense)
    attack = make_attack("aux_mean", {})
    plain = each_success(federation.run(attack, observations).counts, counts)
    wrapped = adapted(attack, [defense], tensors(federation))
    found = each_success(federation.run(wrapped, observations).counts, counts)
    assert interval(found - plain)[0] > 0.05


@pytest.mark.parametrize("steps", [1, 2])
def test_a_learned_attack_is_better_where_it_learns_from_noise(steps):
    federation = Federation(perceptron(nn.ReLU, 32), local_steps=steps, batch_size=8, training=200)
    observations, counts = federation.draw(60)
    defense = make_defense("noise", {"sigma": 0.05})
    noisy = sent(federation, observations, defense)
    attack = make_attack("posterior_regression", {"simulations": 600, "steps": 300})
    plain = each_success(federation.run(attack, noisy).counts, counts)
    wrapped = adapted(attack, [defense], tensors(federation))
    found = each_success(federation.run(wrapped, noisy).counts, counts)
    assert interval(found - plain)[0] > 0


# Labels that simulated clients train on


@dataclass(frozen=True, kw_only=True)
class Cycled(LabelDefense):
    """Trains on the next class, and remembers which samples it was asked for."""

    seen: list

    def transform(self, targets, samples, _rng, _seed):
        self.seen.append(samples)
        return replace(targets, probabilities=np.roll(targets.probabilities, 1, axis=1))

    def restore(self, _counts, _labels):
        raise AssertionError("what was learned is not to be restored")


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_simulated_clients_train_on_the_labels_that_real_ones_do(norm, steps):
    federation = Federation(perceptron(norm=norm), local_steps=steps)
    attack, defense = make_attack("lmmse", {}), Cycled(seen=[])
    wrapped = adapted(attack, [defense], tensors(federation))
    adversary = federation.adversary(attack)
    defended = DefendedAdversary(adversary, wrapped, [defense], wrapped._known(adversary))
    batches = np.arange(3 * steps * 8).reshape(3, steps, 8)
    found = defended.simulate(batches)
    labels = federation.model.on_auxiliary(8).labels[batches]
    one_hot = np.eye(CLASSES, dtype=np.float32)
    own = adversary.simulate(batches, one_hot[labels])
    plain = adversary.simulate(batches)
    np.testing.assert_allclose(own.bias_gradient, plain.bias_gradient, atol=1e-6)
    expected = adversary.simulate(batches, one_hot[(labels + 1) % CLASSES])
    np.testing.assert_allclose(found.bias_gradient, expected.bias_gradient, atol=1e-6)
    assert np.abs(found.bias_gradient - plain.bias_gradient).max() > 0.05
    # What clients remember of a sample is drawn anew for every simulated one.
    assert len(np.unique(np.concatenate(defense.seen))) == batches.size


def test_what_an_attack_has_learned_is_not_restored():
    federation = Federation(perceptron(), batch_size=16)
    attack, defense = make_attack("lmmse", {}), Cycled(seen=[])
    observations, counts = trained_on(federation, private_batches(federation, 30, 16), defense)
    wrapped = adapted(attack, [defense], tensors(federation))
    assert success(federation.run(attack, observations).counts, counts) < 0.5
    assert success(federation.run(wrapped, observations).counts, counts) > 0.9


def test_a_trained_model_tells_the_labels_behind_randomised_responses():
    federation = Federation(perceptron(nn.ReLU, 64), batch_size=32, training=1500)
    defense = make_defense("randomised_response", {"epsilon": 1.0})
    observations, counts = trained_on(federation, private_batches(federation, 40, 32), defense)
    attack = make_attack("posterior_regression", {"simulations": 1000, "steps": 500})
    plain = each_success(federation.run(attack, observations).counts, counts)
    wrapped = adapted(attack, [defense], tensors(federation))
    found = each_success(federation.run(wrapped, observations).counts, counts)
    assert interval(found - plain)[0] > 0.2
