"""A client's defences in order, from the labels of a batch to the bytes on the wire."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from testbed.defenses.base import (
    Compression,
    Defense,
    LabelDefense,
    Levels,
    Quantiser,
    Sparsifier,
    Stage,
    Targets,
    Tensors,
    Vector,
    VectorDefense,
)
from testbed.defenses.samples import DPSGD
from testbed.defenses.withholding import Soteria, WithholdLastLayer
from testbed.encoding import Encoding, decoded
from testbed.seeds import Purpose, seed64, stream

State = dict[str, NDArray[np.float32]]
# A stream for each place in the list.
Streams = Callable[[int], np.random.Generator]


@dataclass(frozen=True)
class Draws:
    """The streams of random numbers of one client's defences in one round.

    Attributes
    ----------
    seed
        The experiment's.
    key
        Scenario, round, client.
    """

    seed: int
    key: tuple[int, ...]

    def stream(self, place: int, step: int) -> np.random.Generator:
        """Return the stream of a defence, by its place in the list, in a local step.

        The final update's streams are those of step -1.
        """
        return stream(self.seed, Purpose.DEFENSE, *self.key, place, step + 1)

    def responses(self) -> int:
        """Return the seed of what clients draw once per sample, for the whole scenario."""
        return seed64(self.seed, Purpose.RESPONSES, self.key[0])


def _nearest(values: Levels, entries: Vector, bounds: NDArray[np.int64]) -> Levels:
    """Return the codes with the scales that bring each part nearest to the entries.

    What is kept back is then never larger than the entries. With the scales that make stochastic
    rounding right on average it may be, and would grow from round to round: error feedback needs a
    contraction (Stich and Karimireddy, JMLR 2020).
    """
    scales = values.scales.copy()
    for part in range(len(scales)):
        # One scale may serve all parts of a vector.
        start, stop = (bounds[part], bounds[part + 1]) if len(scales) > 1 else bounds[[0, -1]]
        codes = values.codes[start:stop].astype(np.float64)
        square = float(codes @ codes)
        if square and np.isfinite(scales[part]):
            scales[part] = values.levels * float(codes @ entries[start:stop]) / square
    return replace(values, scales=scales)


class Pipeline:
    """What the clients of a scenario do, one after the other in the order of the list.

    Parameters
    ----------
    defenses
        As the experiment lists them.
    tensors, buffers
        Where parameter tensors lie in an update, and how many float buffers are shared behind them.

    Attributes
    ----------
    per_sample
        The defence on per-sample gradients, if there is one, and its place in the list.
    columns
        The defence that zeroes columns of the last layer by their features, if there is one.
    withheld
        The defence that keeps the last layer from the server, if there is one.
    each_step
        Whether some defence works on each step's gradient.
    compresses
        Whether updates leave in an encoding of their own; plain ones are float32 values.
    """

    def __init__(self, defenses: Sequence[Defense], tensors: Tensors, buffers: int) -> None:
        self._tensors = tensors
        placed = list(enumerate(defenses))
        self._labels = [(i, d) for i, d in placed if isinstance(d, LabelDefense)]
        self._vectors = [(i, d) for i, d in placed if isinstance(d, VectorDefense)]
        packed = [(i, d) for i, d in placed if isinstance(d, Compression)]
        self._packed_steps = [(i, d) for i, d in packed if d.at == "step"]
        self._packed = [(i, d) for i, d in packed if d.at == "update"]
        self.per_sample = next(((i, d) for i, d in placed if isinstance(d, DPSGD)), None)
        self.columns = next((d for d in defenses if isinstance(d, Soteria)), None)
        self.withheld = next((d for d in defenses if isinstance(d, WithholdLastLayer)), None)
        self._kept = None if self.withheld is None else self.withheld.kept(tensors)
        self.each_step = bool(
            self._packed_steps
            or self.columns is not None
            or any(d.at == "step" for _, d in self._vectors)
        )
        # A sum is over whole vectors, each entry in its place.
        self._summed = any(d.stage is Stage.SUM for d in defenses)
        self.compresses = bool(self._packed or self.withheld) and not self._summed
        self._remembers = any(d.error_feedback for _, d in self._packed)
        self._momentum = max((getattr(d, "momentum", 0.0) for _, d in self._packed), default=0.0)
        self._encoding = Encoding(tensors, buffers)
        # For what is encoded and decoded on the client itself.
        self._inner = Encoding(tensors, 0)
        self._nothing = np.zeros(0, np.float32)

    @property
    def capacity(self) -> int:
        """The most bytes that an encoded update takes."""
        return self._encoding.capacity

    def targets(
        self, labels: NDArray[np.int64], samples: NDArray[np.int64], draws: Draws, step: int
    ) -> Targets | None:
        """Return what a batch is trained on; None where it is the labels themselves."""
        if not self._labels:
            return None
        targets = Targets(np.eye(self._tensors.classes, dtype=np.float32)[labels])
        seed = draws.responses()
        for place, defense in self._labels:
            targets = defense.transform(targets, samples, draws.stream(place, step), seed)
        return targets

    def defend_step(
        self, gradient: Vector, draws: Draws, step: int, keep: NDArray[np.bool_] | None = None
    ) -> None:
        """Apply, in place, what is applied to each local step's gradient [P].

        ``keep``, bool [D], says which columns of the last layer `columns` leaves.
        """
        for place, defense in self._vectors:
            if defense.at == "step":
                defense.apply(gradient, self._tensors, draws.stream(place, step))
        if self.columns is not None and keep is not None:
            self.columns.apply_columns(gradient, self._tensors, keep)
        if self._packed_steps:
            self._simplify(self._packed_steps, gradient, partial(draws.stream, step=step))

    def defend_update(
        self, vector: Vector, draws: Draws, state: State, *, delivered: bool = True
    ) -> None:
        """Apply, in place, what is applied to the final update [P] before it is encoded.

        Updates that are added up in secret are compressed in value, but not on the wire: a sum has
        all entries. Where it is not ``delivered``, since the round is lost, all of it is kept.
        """
        for place, defense in self._vectors:
            if defense.at == "update":
                defense.apply(vector, self._tensors, draws.stream(place, -1))
        if not self._summed:
            return
        if not delivered:
            if self._remembers:
                self._recall(vector, state)
                state["residual"] = vector.copy()
            return
        if self._packed:
            self._simplify(self._packed, vector, partial(draws.stream, step=-1), state)
        if self._kept is not None:
            vector[self._left_out()] = 0

    def pack(
        self,
        vector: Vector,
        buffers: Vector,
        body: NDArray[np.uint8],
        draws: Draws,
        state: State,
    ) -> int:
        """Encode an update as it is shared.

        Parameters
        ----------
        vector
            float32 [P]; changed in place.
        buffers
            float32 [S].
        body
            uint8, at least `capacity`: receives the encoding.
        draws
            See `Draws`.
        state
            What the client remembers from its last update, changed in place: what it did not send,
            ``residual``, and the momentum of its compression, ``momentum``.

        Returns
        -------
        int
            How many bytes of ``body`` are used.
        """
        rng = partial(draws.stream, step=-1)
        return self._pack(self._packed, vector, buffers, body, self._encoding, rng, state)

    def unpack(self, body: NDArray[np.uint8], out: Vector) -> None:
        """Decode what `pack` encoded into a plain update, float32 [P + S]; 0 where nothing came."""
        self._encoding.decode(body, out)

    def _simplify(
        self,
        packed: Sequence[tuple[int, Compression]],
        vector: Vector,
        rng: Streams,
        state: State | None = None,
    ) -> None:
        """Put in a vector's place what is left of it when it has been encoded and decoded."""
        body = np.empty(self._inner.capacity, np.uint8)
        used = self._pack(packed, vector, self._nothing, body, self._inner, rng, state)
        self._inner.decode(body[:used], vector)

    def _pack(
        self,
        packed: Sequence[tuple[int, Compression]],
        vector: Vector,
        buffers: Vector,
        body: NDArray[np.uint8],
        encoding: Encoding,
        rng: Streams,
        state: State | None,
    ) -> int:
        positions = None if state is None else self._kept
        if not np.isfinite(vector).all():
            # The server leaves it out; it must not spoil what the client remembers.
            packed, state = [], None
        if positions is not None:
            vector[self._left_out()] = 0
        if state is not None and self._remembers:
            self._recall(vector, state)
        left, factor = vector, 1.0
        for place, defense in packed:
            if isinstance(defense, Sparsifier):
                chosen = defense.select(left, self._tensors, rng(place))
                if positions is not None:
                    chosen = np.intersect1d(positions, chosen, assume_unique=True)
                positions = chosen
                left = np.zeros_like(vector)
                left[positions] = vector[positions]
                factor *= defense.factor
        entries = vector if positions is None else vector[positions]
        if factor != 1:
            entries = entries * np.float32(factor)
        values: Vector | NDArray[np.float16] | Levels = entries
        bounds = self._tensors.bounds("update")
        for place, defense in packed:
            if isinstance(defense, Quantiser):
                bounds = self._tensors.bounds(defense.scope)
                if positions is not None:
                    bounds = np.searchsorted(positions, bounds)
                values = defense.quantise(entries, bounds, rng(place))
                if state is not None and self._remembers and isinstance(values, Levels):
                    values = _nearest(values, entries, bounds)
        used = encoding.encode(
            body, positions=positions, values=values, bounds=bounds, buffers=buffers
        )
        if state is not None and self._remembers:
            sent = decoded(values, bounds)
            if np.isfinite(sent).all() and np.isfinite(vector).all():
                self._remember(vector, positions, sent, state)
            else:  # it overflowed, and the server leaves it out
                state.pop("residual", None)
                state.pop("momentum", None)
        return used

    def _recall(self, vector: Vector, state: State) -> None:
        """Add to a vector, in place, what was not sent before."""
        if self._momentum:
            momentum = state.setdefault("momentum", np.zeros_like(vector))
            momentum *= np.float32(self._momentum)
            momentum += vector
            vector[:] = momentum
        if "residual" in state:
            vector += state["residual"]

    def _remember(
        self, vector: Vector, positions: NDArray[np.int64] | None, sent: Vector, state: State
    ) -> None:
        residual = vector.copy()
        place = slice(None) if positions is None else positions
        residual[place] -= sent
        state["residual"] = residual
        if self._momentum:
            # Momentum factor masking (Lin et al. 2018): what was sent does not push on.
            state["momentum"][place] = 0

    def _left_out(self) -> NDArray[np.bool_]:
        left_out = np.ones(self._tensors.size, np.bool_)
        left_out[self._kept] = False
        return left_out
