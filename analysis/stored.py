"""What a replay has to know of a stored scenario: its arrays, and the facts behind assumptions."""

from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from testbed.attacks import Assumption, Attack
from testbed.attacks.assumptions import Facts, assumptions, broken_assumptions
from testbed.attacks.base import Knowledge
from testbed.data import DATASETS, describe
from testbed.defenses.withholding import WithholdLastLayer
from testbed.errors import UserError
from testbed.models.catalog import MODELS
from testbed.results.reader import Scenario
from testbed.results.schema import ArraySpec

if TYPE_CHECKING:
    import h5py

_LARGE = {
    "observations/weight_gradient",
    "observations/update",
    "observations/statistics",
    "observations/statistics_sent",
}
_FOLDERS = {"truth", "observations", "rounds", "updates", "timings"}
# Where nothing tells D, assumptions about it are taken to hold.
_UNKNOWN_FEATURES = 1 << 31
# Keys whose values, where they are any, make auxiliary samples unlike the victims'.
_SHIFTS = ("adversary.auxiliary_noise", "adversary.auxiliary_missing", "adversary.auxiliary_data")


class StoredScenario:
    """A scenario of a results file, with its schema.

    Parameters
    ----------
    scenario
        To read arrays from.
    file
        The same file.

    Attributes
    ----------
    attributes
        Of the scenario's group.
    lengths
        Of its axes.
    arrays
        Every array with an axis of rounds, by path.
    """

    def __init__(self, scenario: Scenario, file: "h5py.File") -> None:
        from testbed.results import checked

        self.scenario = scenario
        try:
            group = file[f"scenarios/{scenario.index:04d}"]
            self.attributes: Mapping[str, Any] = dict(group.attrs)
            for name in ("model_parameters", "model_buffers"):
                checked.whole(group.attrs, name)
            checked.text(group.attrs, "last_layer")
            self.arrays = _schema(group)
            folders = {path.partition("/")[0] for path in self.arrays}
            if missing := sorted(_FOLDERS - folders):
                raise ValueError(f"there is nothing in {group.name}/{missing[0]}")
            names = [name for name, item in group.items() if _is_axis(item)]
            self.lengths = {name: checked.length(group, name) for name in names}
        # A damaged file can fail in any way that HDF5 can.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{file.filename}: the file is truncated or damaged ({reason}): copy it again"
            ) from error

    @cached_property
    def facts(self) -> Facts:
        """What of the scenario decides about the attacks' assumptions, as far as the file tells."""
        scenario = self.scenario
        told = scenario.parameters.get
        # Where only sums over a cohort are seen, an update is of that many batches.
        size = int(told("federation.batch_size", 1))
        size *= scenario.members if "member" in self.lengths else 1
        planted = (
            info.knowledge == Knowledge.MALICIOUS.value and not info.not_applicable
            for info in scenario.attacks.values()
        )
        return Facts(
            classes=scenario.classes,
            features=self.lengths.get("feature") or self._features() or _UNKNOWN_FEATURES,
            bias="observations/bias_gradient" in self.arrays,
            statistics=int(self.attributes["model_buffers"]) if self._shares_statistics() else 0,
            batch_size=size,
            local_steps=self._local_steps(size),
            known_size=told("adversary.batch_size", "known") == "known"
            and told("adversary.batch_size_factor", 1) == 1,
            fair_samples=not any(map(told, _SHIFTS)),
            statistics_noise=float(told("federation.statistics_noise") or 0),
            planted=any(planted),
            withheld=self._withholds(),
        )

    @property
    def varying(self) -> bool:
        """Whether clients may differ in their number of local steps."""
        return self.scenario.parameters.get("federation.local_epochs") is not None

    def broken(self, attack: Attack) -> Mapping[str, str]:
        """Return which of an attack's assumptions the scenario breaks, and what was found."""
        computed = broken_assumptions(attack, self.facts)
        # The run knew the model: what it found for its own attacks decides.
        found = {
            name: info.broken.get(name, "")
            for info in self.scenario.attacks.values()
            for name in info.assumes
        }
        names = (item.value for item in Assumption if item in assumptions(attack))
        broken = {name: found.get(name, computed.get(name, "")) for name in sorted(names)}
        return {name: what for name, what in broken.items() if what}

    def calibration(self, label: str) -> set[str]:
        """Return the names of the arrays in the calibration of a stored attack."""
        prefix = f"attacks/{label}/calibration/"
        return {path.removeprefix(prefix) for path in self.arrays if path.startswith(prefix)}

    def copied(self, attacks: Collection[str]) -> dict[str, ArraySpec]:
        """Return all arrays but the large ones and those of other attacks than the given."""

        def wanted(path: str) -> bool:
            for folder in ("attacks/", "timings/attacks/"):
                if path.startswith(folder):
                    return path.removeprefix(folder).partition("/")[0] in attacks
            return path not in _LARGE

        return {path: spec for path, spec in self.arrays.items() if wanted(path)}

    def bytes_per_round(self, paths: Iterable[str]) -> int:
        """Return what a round of some arrays takes in memory."""
        return sum(
            int(np.prod([self.lengths[axis] for axis in self.arrays[path].axes[1:]]))
            * np.dtype(self.arrays[path].dtype).itemsize
            for path in paths
        )

    def _shares_statistics(self) -> bool:
        told = self.scenario.parameters.get
        if "federation.share_statistics" in self.scenario.parameters:  # before version 1.2
            return bool(told("federation.share_statistics"))
        return str(told("federation.batch_norm", "aggregated")) == "aggregated"

    def _local_steps(self, size: int) -> int:
        """Return the local steps of an update; where they vary, of one in the middle."""
        if "updates/local_steps" in self.arrays:
            steps = self.scenario.array("updates/local_steps")
            steps = steps[steps > 0]
            return int(np.median(steps)) if steps.size else 1
        # Labels are the batch size times the local steps; round 0 is always attacked.
        first = self.scenario.array("truth/counts", 0, 1)
        return max(1, int(first.sum(axis=-1).max(initial=0) // size))

    def _withholds(self) -> bool:
        listed = self.scenario.parameters.get("defenses") or ()
        names = [entry.get("name") for entry in listed if isinstance(entry, Mapping)]
        return WithholdLastLayer.name in names

    def _features(self) -> int | None:
        told = self.scenario.parameters.get
        model, data = MODELS.get(told("model.name", "")), told("data.name", "")
        root = told("data.root")
        if model is None or data not in DATASETS:
            return None
        try:
            _, shape = describe(data, Path(root) if root else None)
        except UserError:  # the data were there when the run was
            return None
        return None if shape is None else model.features(shape)


def _schema(group: "h5py.Group") -> dict[str, ArraySpec]:
    import h5py

    from testbed.results import checked

    arrays: dict[str, ArraySpec] = {}
    known = checked.scales(group)

    def visit(path: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and not item.is_scale:
            axes = checked.axes(path, item, known)
            if axes[:1] != ("round",):
                raise ValueError(f"{item.name} has no axis of rounds")
            arrays[path] = ArraySpec(axes, item.dtype.str, item.compression is not None)

    group.visititems(visit)
    return arrays


def _is_axis(item: Any) -> bool:
    return bool(getattr(item, "is_scale", False))
