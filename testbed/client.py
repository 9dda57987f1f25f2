"""A client's local work: draw a batch, compute its gradient, write the update."""

import time

import numpy as np
import torch
from numpy.typing import NDArray

from testbed.data import Sampler, draw_skew
from testbed.norm_statistics import NoisyStatistics
from testbed.plan import ScenarioPlan, Task
from testbed.seeds import Purpose, seed64, stream
from testbed.startup import ScenarioSetup
from testbed.update import Message


class ClientWorker:
    """Computes the updates of any number of clients of a scenario, one after the other.

    FedSGD: a client's update is the gradient of the mean cross entropy over one batch, at the
    global model, followed by the float buffers as its forward pass left them. By the experiment's
    ``federation.share_statistics`` and ``federation.statistics_noise`` they are as the client
    received them instead (Li et al., FedBN, ICLR 2021), or noisy.
    """

    def __init__(self, plan: ScenarioPlan, setup: ScenarioSetup, rank: int) -> None:
        self._plan = plan
        self._rank = rank
        self._model = setup.model
        self._samples = setup.samples
        self._sampler = Sampler(setup.samples.labels, setup.parts.victim, setup.layout.classes)
        self._buffers = torch.empty_like(setup.model.buffers)
        noise = plan.scenario.federation.statistics_noise
        self._noise = NoisyStatistics(setup.model.module, noise) if noise else None
        self._on_gpu = setup.samples.device.type == "cuda"
        # Where the gradient is made before it leaves the GPU; on the CPU, it is made in place.
        self._gradient = torch.empty(
            setup.layout.parameters if self._on_gpu else 0, device=setup.samples.device
        )

    def load(self, model: NDArray[np.float32]) -> None:
        """Take over the global model of a round."""
        self._model.load(torch.from_numpy(model))
        self._buffers.copy_(self._model.buffers)

    def draw(self, task: Task) -> NDArray[np.int64]:
        """Return the samples of a client's batch, as indices into the data set."""
        scenario = self._plan.scenario
        distribution = scenario.labels.distribution
        skew = None
        if distribution == "unbalanced":
            key = self._plan.key(Purpose.SKEW, task)
            skew = draw_skew(self._model.layout.classes, stream(scenario.seed, Purpose.SKEW, *key))
        rng = stream(scenario.seed, Purpose.BATCH, *self._plan.key(Purpose.BATCH, task))
        return self._sampler.draw(distribution, scenario.federation.batch_size, rng, skew)

    def _seed(self, seed: int) -> None:
        """Seed what dropout and the like draw from."""
        # `torch.manual_seed` also visits every kind of device there is, which takes longer than a
        # small model's forward pass.
        torch.default_generator.manual_seed(seed)
        if self._on_gpu:
            torch.cuda.manual_seed(seed)

    def work(self, task: Task, message: Message) -> None:
        """Compute a client's update at the loaded model into a message."""
        started = time.perf_counter()
        model, split = self._model, self._model.layout.parameters
        indices = self.draw(task)
        # The client before this one left its buffers behind; the parameters do not change.
        model.load_buffers(self._buffers)
        self._seed(
            seed64(self._plan.scenario.seed, Purpose.LOCAL, *self._plan.key(Purpose.LOCAL, task))
        )
        if not model.module.training:
            model.module.train()
        logits = model.module(self._samples.inputs(indices))
        loss = torch.nn.functional.cross_entropy(logits, self._samples.targets(indices))
        payload = torch.from_numpy(message.payload)
        if self._on_gpu:
            model.gradient(loss, self._gradient)
            payload[:split].copy_(self._gradient, non_blocking=True)
        else:
            model.gradient(loss, payload[:split])
        shares = self._plan.scenario.federation.share_statistics
        payload[split:].copy_(model.buffers if shares else self._buffers, non_blocking=True)
        posterior = torch.softmax(logits.detach(), dim=1).mean(dim=0)
        message.posterior[:] = posterior.cpu().numpy()
        message.counts[:] = np.bincount(
            self._samples.labels[indices], minlength=model.layout.classes
        )
        final_loss = float(loss.detach())
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
        if shares and self._noise is not None:
            key = self._plan.key(Purpose.STATISTICS, task)
            rng = stream(self._plan.scenario.seed, Purpose.STATISTICS, *key)
            self._noise.disturb(message.payload[split:], rng)
        header = message.header
        header["scenario"], header["round"], header["client"] = (
            task.scenario,
            task.round,
            task.client,
        )
        header["samples"] = len(indices)
        header["rank"] = self._rank
        header["loss"] = final_loss
        header["payload_bytes"] = message.payload.nbytes
        header["seconds"] = time.perf_counter() - started
