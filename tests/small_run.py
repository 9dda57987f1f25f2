"""A small experiment, and its pieces: for tests of what works on plans, models and rounds."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from testbed.experiment import ResolvedExperiment, parse_experiment
from testbed.plan import ScenarioPlan, make_plan
from testbed.results.records import AttackInfo, Rank, ScenarioHeader
from testbed.results.schema import scenario_arrays
from testbed.startup import ScenarioSetup, Setups
from testbed.transport.local import LocalTransport

TEXT = """\
title: small
data: {name: digits}
model: {name: cnn}
federation: {rounds: 3, clients: 2, batch_size: 4}
attacks: [llg]
"""

RANKS = [Rank(rank=0, host="here", device="cpu", role="server+client", local_rank=0)]


def resolve(*overrides: str) -> ResolvedExperiment:
    return parse_experiment(TEXT, overrides)


def plan_of(*overrides: str) -> ScenarioPlan:
    (plan,) = make_plan(resolve(*overrides))
    return plan


def setups_for(plans: Sequence[ScenarioPlan]) -> Setups:
    setups = Setups(LocalTransport(), torch.device("cpu"))
    setups.load_data(plans)
    return setups


def normalised(momentum: float = 0.1, dropout: float = 0.0) -> nn.Module:
    """Build a model for the digits whose BatchNorm normalises one value per image."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 12),
        nn.BatchNorm1d(12, momentum=momentum),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(12, 10),
    )


class Tabled(nn.Module):
    """A model for the digits with a float buffer that is none of BatchNorm's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(12))
        self.body, self.head = nn.Linear(64, 12), nn.Linear(12, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        logits: torch.Tensor = self.head(self.table * self.body(images.flatten(1)).relu())
        return logits


def unbiased() -> nn.Module:
    """Build a model for the digits whose last layer has no bias."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 12), nn.Sigmoid(), nn.Linear(12, 10, bias=False)
    )


def header_of(plan: ScenarioPlan, setup: ScenarioSetup) -> ScenarioHeader:
    """Return what the results file says of a scenario."""
    layout = setup.layout
    lengths = {
        "round": plan.rounds,
        "client": plan.clients,
        "class": layout.classes,
        "feature": layout.features,
    }
    if not plan.keeps_weights:
        del lengths["feature"]
    elif layout.buffers:
        lengths["buffer"] = layout.buffers
    attacks: Mapping[str, AttackInfo] = {
        label: AttackInfo(
            attack.name, attack.title, attack.knowledge.value, attack.source, attack.options()
        )
        for label, attack in setup.attacks.items()
    }
    return ScenarioHeader(
        swept=plan.swept,
        parameters={},
        model_parameters=layout.parameters,
        model_buffers=layout.buffers,
        last_layer=setup.model.last_layer.name,
        lengths=lengths,
        arrays=scenario_arrays(
            bias=layout.bias is not None,
            weight=plan.keeps_weights,
            statistics=plan.keeps_weights and layout.buffers > 0,
            attacks={
                label: (attack.answers.value, attack.arrays())
                for label, attack in setup.attacks.items()
            },
        ),
        attacks=attacks,
    )
