"""How the victims' samples are divided among the clients of a population."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from testbed.errors import UserError, suggest

PARTITIONS = ("iid", "dirichlet", "dirichlet_classes", "shards", "user")

# How often `dirichlet_classes` is drawn anew before it gives up.
_DRAWS = 1000
# Smaller concentrations give the same: all of a share, up to 1e-300, in one place.
_LEAST_CONCENTRATION = 1e-300


@dataclass(frozen=True, eq=False)
class Partition:
    """Which samples each client of a population has.

    Attributes
    ----------
    indices
        Per client int64 ``[samples]``, ascending: indices into the data set, disjoint.
    """

    indices: tuple[NDArray[np.int64], ...]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """How many samples each client has, int64 ``[clients]``."""
        return np.array([len(samples) for samples in self.indices], np.int64)

    def counts(self, labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
        """Return how many samples of each class each client has, int64 ``[clients, classes]``.

        Parameters
        ----------
        labels
            int64 ``[n]``, of the whole data set.
        classes
            The number of classes.
        """
        owner = np.repeat(np.arange(len(self.indices)), self.sizes)
        cells = owner * classes + labels[np.concatenate(self.indices)]
        return np.bincount(cells, minlength=len(self.indices) * classes).reshape(-1, classes)


def partition(
    kind: str,
    labels: NDArray[np.int64],
    part: NDArray[np.int64],
    clients: int,
    classes: int,
    rng: np.random.Generator,
    *,
    alpha: float | None = None,
    classes_per_client: int | None = None,
    minimum: int = 1,
    users: NDArray[np.int64] | None = None,
) -> Partition:
    """Divide the victims' samples among the clients of a population.

    Every kind but ``"user"`` gives each sample to one client.

    Parameters
    ----------
    kind
        One of `PARTITIONS`; see the notes.
    labels
        int64 ``[n]``, of the whole data set, in 0..classes-1.
    part
        int64 ``[m]``: the victims' samples, different indices into it.
    clients
        The size of the population.
    classes
        The number of classes.
    rng
        Its state decides the partition.
    alpha
        Concentration of the kinds ``"dirichlet"`` and ``"dirichlet_classes"``, finite and > 0.
        Other kinds ignore it.
    classes_per_client
        Shards of a client, s, in 1..classes; of the kind ``"shards"``, ignored by others.
    minimum
        The fewest samples that a client may have, at least 1.
    users
        int64 ``[n]``: whose each sample is, -1 for nobody's; None for a data set without users. Of
        the kind ``"user"``, ignored by others.

    Raises
    ------
    UserError
        If the kind is unknown, a value that it needs is missing or out of range, the population is
        too large for the samples or the users, or no draw gave each client the minimum.
    ValueError
        If the minimum is below 1.

    Notes
    -----
    ``"iid"``: at random; sizes are equal up to one.

    ``"dirichlet"`` (Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for
    Federated Visual Classification", 2019): sizes are equal up to one. Every client draws its
    label proportions q from Dir(alpha * prior), where the prior is the share of each class among
    the victims' samples, then its samples one by one, without replacement: a label from q, and any
    sample of that label. When a class runs out, q is renormalised over the others. Clients draw
    one after the other, in a random order: most have labels from their q, and the last ones in the
    order what the others left, which is of few classes also where alpha is large.

    ``"dirichlet_classes"`` (Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural
    Networks", ICML 2019; Li et al., "Federated Learning on Non-IID Data Silos", ICDE 2022): the
    samples of every class are divided among the clients by proportions from the symmetric
    Dir(alpha) over the clients, each share rounded up or down, without bias. Sizes vary. All
    classes are drawn again until each client has the minimum, 1000 times at most. The authors' code
    also gives no more to clients that have their mean share; the papers do not, nor does this.

    ``"shards"`` (McMahan et al., "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", AISTATS 2017): the samples are sorted by label, in random order within a
    label, and cut into clients * s shards, whose sizes are equal up to one sample where the paper's
    are equal; every client gets s of them at random. A shard that lies across the border of two
    classes has both, and two shards of a client may have the same class.

    ``"user"``: one client per user with at least the minimum of victims' samples, ascending. Where
    the population is smaller, a random sample of these users; the others' samples stay unused.
    """
    if minimum < 1:
        raise ValueError(f"every client needs a sample; got a minimum of {minimum}")
    if kind not in PARTITIONS:
        raise UserError(f"partition.kind: unknown kind {kind!r}; {suggest(kind, PARTITIONS)}")
    if clients < 1:
        raise UserError(f"federation.population: {clients}; expected 1 client or more")
    if kind == "user":
        return _by_user(part, clients, rng, minimum, users)
    if clients * minimum > len(part):
        raise UserError(
            f"federation.population: {clients} clients cannot have {_samples(minimum)} each, as "
            f"the victims have {len(part)} in all; set it to at most {len(part) // minimum}"
        )
    samples = rng.permutation(part)
    if kind == "iid":
        owner = np.repeat(np.arange(clients), _equal(len(part), clients))
        return _divided(samples, owner, clients)

    samples = samples[np.argsort(labels[samples], kind="stable")]
    if kind == "shards":
        shards = _shards(classes_per_client, classes, len(part), clients, minimum)
        owner = rng.permutation(np.repeat(np.arange(clients), shards // clients))
        return _divided(samples, np.repeat(owner, _equal(len(part), shards)), clients)

    counts = np.bincount(labels[part], minlength=classes)
    concentration = _concentration(alpha, kind)
    if kind == "dirichlet":
        taken = _draw_by_client(counts, clients, concentration, rng)
    else:
        taken = _draw_by_class(counts, clients, concentration, rng, minimum)
    owner = np.repeat(np.tile(np.arange(clients), classes), taken.T.ravel())
    return _divided(samples, owner, clients)


def _by_user(
    part: NDArray[np.int64],
    clients: int,
    rng: np.random.Generator,
    minimum: int,
    users: NDArray[np.int64] | None,
) -> Partition:
    if users is None or (users < 0).all():
        others = ", ".join(kind for kind in PARTITIONS if kind != "user")
        raise UserError(
            "partition.kind: user, but this data set does not say whose its samples are; expected "
            f"one of {others} here, or a data set with users"
        )
    of_part = users[part]
    owned = part[of_part >= 0]
    each, whose, counts = np.unique(of_part[of_part >= 0], return_inverse=True, return_counts=True)
    eligible = np.flatnonzero(counts >= minimum)
    if clients > len(eligible):
        raise UserError(
            f"federation.population: {clients} clients, but {len(eligible)} users have "
            f"{_samples(minimum)} or more among the victims'; set it to at most {len(eligible)}"
        )
    if clients < len(eligible):
        eligible = np.sort(rng.choice(eligible, clients, replace=False))
    client = np.full(len(each), -1)
    client[eligible] = np.arange(clients)
    owner = client[whose]
    return _divided(owned[owner >= 0], owner[owner >= 0], clients)


def _shards(s: int | None, classes: int, samples: int, clients: int, minimum: int) -> int:
    """Return the number of shards, once it is known that the samples are enough for them."""
    if s is None or not 1 <= s <= classes:
        raise UserError(
            f"partition.classes_per_client: {'not set' if s is None else s}; expected 1..{classes} "
            "for the kind shards"
        )
    shards = s * clients
    if s * (samples // shards) < minimum:
        raise UserError(
            f"partition.classes_per_client: {s} for each of {clients} clients are {shards} shards, "
            f"cut from {_samples(samples)}, too few for {_samples(minimum)} per client; lower it, "
            "or federation.population"
        )
    return shards


def _concentration(alpha: float | None, kind: str) -> float:
    if alpha is None or not (math.isfinite(alpha) and alpha > 0):
        raise UserError(
            f"partition.alpha: {'not set' if alpha is None else alpha}; expected a finite number "
            f"above 0 for the kind {kind}"
        )
    return alpha


def _draw_by_client(
    counts: NDArray[np.int64], clients: int, alpha: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return how many samples of each class [C] each client takes, [clients, C]."""
    taken = np.zeros((clients, len(counts)), np.int64)
    left = counts.copy()
    sizes = _equal(int(counts.sum()), clients)
    for client in rng.permutation(clients):
        logs = _log_dirichlet(alpha * (counts / counts.sum()), rng)
        missing = int(sizes[client])
        # Only counts matter, so that labels need not be drawn one by one: those beyond what is left
        # of a class are drawn again from the classes that remain, which is to renormalise.
        while missing:
            remain = np.flatnonzero(left)
            drawn = rng.multinomial(missing, _normalised(logs[remain]))
            drawn = np.minimum(drawn, left[remain])
            taken[client, remain] += drawn
            left[remain] -= drawn
            missing -= int(drawn.sum())
    return taken


def _draw_by_class(
    counts: NDArray[np.int64],
    clients: int,
    alpha: float,
    rng: np.random.Generator,
    minimum: int,
) -> NDArray[np.int64]:
    """Return how many samples of each class [C] each client gets, [clients, C]."""
    for _ in range(_DRAWS):
        shares = _normalised(_log_dirichlet(np.full((len(counts), clients), alpha), rng))
        sums = np.cumsum(shares, axis=1)
        # Without an offset of each class, the same clients would lose by rounding in all of them.
        ends = sums / sums[:, -1:] * counts[:, None] + rng.random((len(counts), 1))
        bounds = np.minimum(np.floor(ends).astype(np.int64), counts[:, None])
        taken = np.diff(bounds, axis=1, prepend=0).T
        if taken.sum(axis=1).min() >= minimum:
            return taken
    raise UserError(
        f"partition.alpha: {alpha} left some client with fewer than {_samples(minimum)} in each of "
        f"{_DRAWS} draws; set it higher, or federation.population, now {clients}, lower"
    )


def _log_dirichlet(
    concentration: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return the logarithms, up to a constant, of draws from a Dirichlet over the last axis.

    A gamma variate of shape a is one of shape a + 1 times U^(1/a), U uniform (Marsaglia and Tsang
    2000). Its logarithm is finite for concentrations whose shares would underflow to zero.
    """
    shape = np.maximum(concentration, _LEAST_CONCENTRATION)
    return np.log(rng.standard_gamma(shape + 1)) - rng.standard_exponential(shape.shape) / shape


def _normalised(logs: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logs - logs.max(axis=-1, keepdims=True))
    shares: NDArray[np.float64] = weights / weights.sum(axis=-1, keepdims=True)
    return shares


def _equal(total: int, parts: int) -> NDArray[np.int64]:
    """Return sizes [parts] of that sum, equal up to one."""
    return np.diff(np.arange(parts + 1) * total // parts)


def _divided(samples: NDArray[np.int64], owner: NDArray[np.int64], clients: int) -> Partition:
    """Return the partition in which each of the samples [m] is its owner's [m]."""
    order = samples[np.lexsort((samples, owner))]
    ends = np.cumsum(np.bincount(owner, minlength=clients))
    return Partition(tuple(np.split(order, ends[:-1])))


def _samples(count: int) -> str:
    return "1 sample" if count == 1 else f"{count} samples"
