"""A client's local work on its batches: gradients, local steps, and the truth about them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from testbed.client_optimizer import LocalOptimizer
from testbed.defenses.pipeline import Draws, Pipeline
from testbed.experiment import Scenario
from testbed.models.flat import FlatModel
from testbed.models.norms import Norm
from testbed.per_sample import PerSampleGradients
from testbed.samples import Samples
from testbed.sections import FederationSection
from testbed.soteria import feature_scores

Batches = Sequence[NDArray[np.int64]]


@dataclass(frozen=True)
class Trained:
    """What local work left beside the update.

    Attributes
    ----------
    posterior
        float32 [C]: mean softmax output over the batches, each at the model of its step; every
        sample weighs the same.
    loss
        Mean over the steps of the batch's loss, as it was trained on.
    """

    posterior: NDArray[np.float32]
    loss: float


def local_optimizer(federation: FederationSection) -> LocalOptimizer:
    """Return the optimiser of a client's local steps."""
    return LocalOptimizer(
        federation.learning_rate,
        momentum=federation.momentum,
        weight_decay=federation.weight_decay,
        proximal=federation.proximal,
    )


class LocalTraining:
    """Runs local steps from the global model.

    The update is the sum of the steps' directions, ``(w_0 - w_E) / learning_rate``: for plain SGD
    the sum of the batches' gradients, and for a single step the gradient itself, to the bit.

    Parameters
    ----------
    scenario
        Says how clients train.
    model
        A module of the client's own; holds the last local step's values afterwards.
    samples
        Of the data set.
    pipeline
        The client's defences.
    """

    def __init__(
        self, scenario: Scenario, model: FlatModel, samples: Samples, pipeline: Pipeline
    ) -> None:
        federation = scenario.federation
        self._model = model
        self._samples = samples
        self._pipeline = pipeline
        self._optimizer = local_optimizer(federation)
        frozen = federation.batch_norm == "frozen"
        modules = list(model.module.modules())
        self._still = [one for one in modules if isinstance(one, Norm) and frozen]
        self._moving = [one for one in modules if one not in self._still]
        self._on_gpu = samples.device.type == "cuda"
        split = model.layout.parameters
        # On the CPU a single step's gradient is made where it is shared from.
        self._total = torch.empty(split if self._on_gpu else 0, device=samples.device)
        self._gradient = torch.empty(split, device=samples.device)
        self._per_sample = PerSampleGradients(model)
        withheld, tensors = pipeline.withheld, model.tensors
        self._frozen = list(model.frozen)
        if withheld is not None and withheld.head == "frozen":
            head = (tensors.weight, tensors.bias)
            self._frozen += [place for place in head if place is not None]

    def run(self, batches: Batches, vector: NDArray[np.float32], draws: Draws) -> Trained:
        """Train on the batches, from the model that is loaded.

        Parameters
        ----------
        batches
            Indices into the data set, for each local step.
        vector
            float32 [P], on the host: receives the update, without its final defences.
        draws
            The streams of random numbers of this client in this round.
        """
        self._enter_training()
        parameters = self._model.state[: self._model.layout.parameters]
        host = torch.from_numpy(vector)
        total = self._total if self._on_gpu else host
        gradient = total if len(batches) == 1 else self._gradient
        self._optimizer.begin(parameters)
        posterior = torch.zeros(self._model.layout.classes, device=self._samples.device)
        losses = []
        for step, batch in enumerate(batches):
            loss, logits, keep = self._backward(batch, gradient, draws, step)
            self._defend(gradient, keep, draws, step)
            direction = self._optimizer.direction(gradient, parameters)
            for place in self._frozen:
                direction[place] = 0
            if len(batches) > 1:
                total.copy_(direction) if step == 0 else total.add_(direction)
                self._optimizer.step(parameters, direction)
            posterior += torch.softmax(logits, dim=1).sum(dim=0)
            losses.append(loss)
        if self._on_gpu:
            host.copy_(total, non_blocking=True)
        posterior /= sum(len(batch) for batch in batches)
        mean = float(torch.stack(losses).mean())
        result = Trained(posterior.cpu().numpy(), mean)
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
        return result

    def _enter_training(self) -> None:
        """Put the module into training mode, but for frozen statistics."""
        # An evaluation or another scenario may have left another mode. To look is cheaper than to
        # set it, which takes as long as a small model's layer.
        if not all(one.training for one in self._moving):
            self._model.module.train()
        for norm in self._still:
            if norm.training:
                norm.eval()

    def _backward(
        self, batch: NDArray[np.int64], out: torch.Tensor, draws: Draws, step: int
    ) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.bool_] | None]:
        """Compute a batch's gradient; return loss, logits, and which features are shared."""
        inputs, labels = self._samples.inputs(batch), self._samples.targets(batch)
        targets = self._pipeline.targets(self._samples.labels[batch], batch, draws, step)
        trained_on = labels
        if targets is not None:
            trained_on = torch.from_numpy(targets.probabilities).to(inputs.device)
            if targets.partner is not None and targets.share is not None:
                own = torch.from_numpy(targets.share).to(inputs.device)[:, None, None, None]
                partner = torch.from_numpy(targets.partner).to(inputs.device)
                inputs = own * inputs + (1 - own) * inputs[partner]
        keep = None
        if self._pipeline.columns is not None:
            # Before the step itself, which then draws the same dropout.
            scores = feature_scores(self._model, inputs).cpu().numpy()
            keep = self._pipeline.columns.mask(scores)
        if self._pipeline.per_sample is not None:
            place, defense = self._pipeline.per_sample
            if targets is None:
                classes = self._model.layout.classes
                trained_on = torch.nn.functional.one_hot(labels, classes).to(torch.float32)
            bounds, bound = defense.bounds(self._model.tensors)
            loss, logits = self._per_sample.mean_clipped(inputs, trained_on, bounds, bound, out)
            noise = np.zeros(len(out), np.float32)
            defense.disturb(noise, len(batch), draws.stream(place, step))
            out += torch.from_numpy(noise).to(out.device)
            return loss, logits, keep
        logits = self._model.module(inputs)
        loss = torch.nn.functional.cross_entropy(logits, trained_on)
        self._model.gradient(loss, out)
        return loss.detach(), logits.detach(), keep

    def _defend(
        self, gradient: torch.Tensor, keep: NDArray[np.bool_] | None, draws: Draws, step: int
    ) -> None:
        """Apply what is applied to each step's gradient."""
        if not self._pipeline.each_step:
            return
        host = gradient.cpu().numpy()
        self._pipeline.defend_step(host, draws, step, keep)
        if self._on_gpu:
            gradient.copy_(torch.from_numpy(host))
