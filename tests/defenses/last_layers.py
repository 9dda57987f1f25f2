"""What tests of vector defences share: layouts of updates, and gradients of a last layer."""

import numpy as np
from hypothesis import strategies as st

from testbed.attacks.base import Observations
from testbed.defenses import Known, Tensors

SEEDS = st.integers(0, 2**32 - 1)
BUFFERS = 3


def layout(body=(7, 5), classes=4, features=6, bias=True):
    """Return tensors of the given sizes, the last layer's behind them."""
    sizes = [*body, classes * features] + [classes] * bias
    offsets = np.cumsum([0, *sizes])
    names = [f"body.{i}" for i in range(len(body))] + ["head.weight", "head.bias"][: 1 + bias]
    weight = slice(int(offsets[len(body)]), int(offsets[len(body) + 1]))
    place = slice(weight.stop, weight.stop + classes) if bias else None
    return Tensors(tuple(names), offsets, weight, place, classes)


@st.composite
def layouts(draw):
    body = draw(st.lists(st.integers(1, 40), max_size=4))
    return layout(body, draw(st.integers(2, 5)), draw(st.integers(1, 5)), draw(st.booleans()))


def rng_of(seed):
    return np.random.Generator(np.random.PCG64(seed))


def normal(seed, size):
    return rng_of(seed).standard_normal(size, np.float32)


def posteriors(rng, samples, classes):
    odds = np.exp(rng.normal(size=(samples, classes)))
    return odds / odds.sum(axis=1, keepdims=True)


def updates(seed, tensors, labels, posterior=None, steps=1):
    """Return whole updates [N, P + S], float32, of clients with labels [N, B].

    All samples have the same posterior, if one is given. The last layer's part is a real gradient.
    """
    rng = rng_of(seed)
    classes = tensors.classes
    features = (tensors.weight.stop - tensors.weight.start) // classes
    out = rng.normal(size=(len(labels), tensors.size + BUFFERS)).astype(np.float32)
    for row, batch in zip(out, labels, strict=True):
        p = posteriors(rng, len(batch), classes) if posterior is None else posterior
        error = (p - np.eye(classes)[batch]) * steps / len(batch)
        row[tensors.weight] = (error.T @ rng.uniform(size=(len(batch), features))).reshape(-1)
        if tensors.bias is not None:
            row[tensors.bias] = error.sum(axis=0)
    return out


def observe(update, tensors, steps=1, batch=8):
    """Observe updates [N, P + S] as the server does, all parts, read-only."""
    flat = update[:, : tensors.size]
    weight = flat[:, tensors.weight].reshape(len(flat), tensors.classes, -1)
    observed = Observations(
        row_sums=weight.sum(axis=2, dtype=np.float64).astype(np.float32),
        bias_gradient=None if tensors.bias is None else flat[:, tensors.bias],
        weight_gradient=weight,
        labels=np.full(len(flat), batch * steps),
        keys=np.arange(len(flat)),
        local_steps=steps,
        update=update,
        norm=np.linalg.norm(flat.astype(np.float64), axis=1),
    )
    for values in (update, observed.row_sums, observed.weight_gradient, observed.norm):
        values.flags.writeable = False
    return observed


def known(tensors, posterior=None, batch=8):
    classes = tensors.classes
    even = np.full(classes, 1 / classes)
    return Known(even if posterior is None else posterior, batch, tensors)


def agree(observed, tensors):
    """Check that all parts of observations tell of the same last layer."""
    flat = observed.update[:, : tensors.size]
    weight = observed.weight_gradient
    np.testing.assert_array_equal(weight.reshape(len(flat), -1), flat[:, tensors.weight])
    np.testing.assert_allclose(observed.row_sums, weight.sum(axis=2), rtol=1e-4, atol=1e-5)
    if tensors.bias is not None:
        np.testing.assert_array_equal(observed.bias_gradient, flat[:, tensors.bias])


def applied(defense, update, tensors, seed=0):
    """Apply a vector defence to the gradient part of each update."""
    out = update.copy()
    for row in out:
        defense.apply(row[: tensors.size], tensors, rng_of(seed))
    return out
