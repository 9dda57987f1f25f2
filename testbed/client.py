"""A client's part of a round: draw batches, train, defend, write the update."""

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from testbed.data import Sampler, draw_skew
from testbed.data.batches import local_batches
from testbed.defenses.pipeline import Draws, State
from testbed.evaluation import accuracy
from testbed.local_training import LocalTraining, Trained
from testbed.norm_statistics import NoisyStatistics
from testbed.plan import ScenarioPlan, Task
from testbed.seeds import Purpose, seed64, stream
from testbed.startup import ScenarioSetup
from testbed.summing import ClientSum
from testbed.update import Message

Batches = list[NDArray[np.int64]]


class ClientWorker:
    """Computes the updates of any number of clients of a scenario, one after the other.

    FedSGD: a client's update is the gradient of the mean cross entropy over one batch, at the
    global model. FedAvg: the sum of its local steps, in units of gradients (`LocalTraining`). The
    float buffers follow, as the last forward pass left them; by the experiment's
    ``federation.batch_norm`` and ``federation.statistics_noise`` as the client received them
    instead, or noisy.

    Attributes
    ----------
    states
        What clients remember from round to round, by identity: what they did not send, the momentum
        of their compression, their own last layer.
    """

    def __init__(self, plan: ScenarioPlan, setup: ScenarioSetup, rank: int) -> None:
        self._plan = plan
        self._setup = setup
        self._rank = rank
        self._model = setup.model
        self._samples = setup.samples
        self._pipeline = setup.pipeline
        self._training = LocalTraining(plan.scenario, setup.model, setup.samples, setup.pipeline)
        self._sampler = Sampler(setup.samples.labels, setup.parts.victim, setup.layout.classes)
        self._global = torch.empty(0)
        # Whether the module's parameters are those of the global model.
        self._fresh = False
        self._buffers = torch.empty_like(setup.model.buffers)
        noise = plan.scenario.federation.statistics_noise
        self._noise = NoisyStatistics(setup.model.module, noise) if noise else None
        self._on_gpu = setup.samples.device.type == "cuda"
        apart = setup.pipeline.compresses or plan.summed is not None
        # Where the update is made before it is encoded; a plain one is made in its message.
        self._vector = np.empty(setup.layout.size if apart else 0, np.float32)
        withheld, tensors = setup.pipeline.withheld, setup.model.tensors
        self._own_head = plan.keeps_state and withheld is not None and withheld.head == "personal"
        everything = np.arange(tensors.size)
        self._head = (
            everything if withheld is None else np.delete(everything, withheld.kept(tensors))
        )
        self._sum = None
        if plan.summed is not None:
            self._sum = ClientSum(plan, setup.shared, setup.weigh)
        self.states: dict[int, State] = {}

    def load(self, model: NDArray[np.float32]) -> None:
        """Take over the global model of a round."""
        self._global = torch.from_numpy(model)
        self._model.load(self._global)
        self._buffers.copy_(self._model.buffers)
        self._fresh = True

    def draw(self, task: Task) -> Batches:
        """Return the samples of a client's local steps, as indices into the data set."""
        plan, scenario = self._plan, self._plan.scenario
        federation = scenario.federation
        rng = stream(scenario.seed, Purpose.BATCH, *plan.key(Purpose.BATCH, task))
        if self._setup.partition is not None:
            own = self._setup.partition.indices[self._identity(task)]
            epochs = federation.local_epochs
            return local_batches(
                own, federation.batch_size, rng, steps=plan.local_steps, epochs=epochs
            )
        distribution, skew = scenario.labels.distribution, None
        if distribution == "unbalanced":
            key = plan.key(Purpose.SKEW, task)
            skew = draw_skew(self._model.layout.classes, stream(scenario.seed, Purpose.SKEW, *key))
        return [
            self._sampler.draw(distribution, federation.batch_size, rng, skew)
            for _ in range(plan.local_steps or 1)
        ]

    def work(self, task: Task, message: Message) -> None:
        """Compute a client's update at the loaded model into a message."""
        started = time.perf_counter()
        plan, split = self._plan, self._model.layout.parameters
        state = self.states.setdefault(self._identity(task), {}) if plan.keeps_state else {}
        self._restore(state)
        personal = self._personal_accuracy(task) if self._own_head else np.nan
        batches = self.draw(task)
        self._seed(seed64(plan.scenario.seed, Purpose.LOCAL, *plan.key(Purpose.LOCAL, task)))
        draws = Draws(plan.scenario.seed, plan.key(Purpose.DEFENSE, task))
        update = self._vector if len(self._vector) else message.payload
        vector, buffers = update[:split], update[split:]
        trained = self._training.run(batches, vector, draws)
        self._fresh = self._fresh and len(batches) == 1
        if self._own_head:
            self._keep_head(state, vector)
        self._share_buffers(task, buffers)
        delivered = self._sum is None or not self._sum.is_lost(task.round)
        self._pipeline.defend_update(vector, draws, state, delivered=delivered)
        for place in self._model.frozen:
            vector[place] = 0  # also where noise has been added to everything
        self._tell(task, message, batches, trained)
        message.header["accuracy"] = personal
        message.header["payload_bytes"] = self._share(task, update, message, draws, state)
        message.header["seconds"] = time.perf_counter() - started

    def take_sum(self) -> NDArray[Any]:
        """Return the sum of the updates since the last call, for MPI's reduction."""
        assert self._sum is not None
        return self._sum.take()

    def _tell(self, task: Task, message: Message, batches: Batches, trained: Trained) -> None:
        """Write down whose the update is, what it weighs, and the truth behind it."""
        chosen = np.concatenate(batches)
        classes = self._model.layout.classes
        message.posterior[:] = trained.posterior
        message.counts[:] = np.bincount(self._samples.labels[chosen], minlength=classes)
        header = message.header
        header["scenario"], header["round"] = task.scenario, task.round
        header["client"], header["identity"] = task.client, self._identity(task)
        header["rank"] = self._rank
        header["steps"], header["labels"] = len(batches), len(chosen)
        header["weight"] = self._setup.weigh(self._identity(task))
        header["loss"] = trained.loss

    def _identity(self, task: Task) -> int:
        return self._plan.participants(task.round).identities[task.client]

    def _restore(self, state: State) -> None:
        """Set the module to the global model, with what is the client's own in its place."""
        if not self._fresh:
            self._model.load(self._global)
            self._fresh = True
        else:
            # The client before this one left its buffers behind; the parameters did not change.
            self._model.load_buffers(self._buffers)
        if "head" in state:
            own = torch.from_numpy(state["head"]).to(self._model.state.device)
            self._model.state[self._head] = own
            self._fresh = False

    def _keep_head(self, state: State, vector: NDArray[np.float32]) -> None:
        before = state.get("head")
        if before is None:
            before = self._global.numpy()[self._head]
        rate = np.float32(self._plan.scenario.federation.learning_rate)
        state["head"] = before - rate * vector[self._head]

    def _personal_accuracy(self, task: Task) -> float:
        """Return how well the client's own model does on the test part, before its local steps."""
        if not self._plan.is_evaluated(task.round):
            return float(np.nan)
        return accuracy(
            self._model,
            self._samples,
            self._setup.parts.test,
            normalised_by_batch=self._plan.scenario.federation.batch_norm == "local",
        )

    def _share_buffers(self, task: Task, buffers: NDArray[np.float32]) -> None:
        federation = self._plan.scenario.federation
        shared = self._model.buffers if federation.shares_statistics else self._buffers
        torch.from_numpy(buffers).copy_(shared)
        if federation.shares_statistics and self._noise is not None:
            key = self._plan.key(Purpose.STATISTICS, task)
            rng = stream(self._plan.scenario.seed, Purpose.STATISTICS, *key)
            self._noise.disturb(buffers, rng)

    def _share(
        self,
        task: Task,
        update: NDArray[np.float32],
        message: Message,
        draws: Draws,
        state: State,
    ) -> int:
        """Write the update as it is shared; return how many bytes it takes."""
        split, stop = self._model.layout.parameters, self._setup.shared
        if self._sum is not None:
            return self._sum.add(task, update[:stop], message)
        if self._pipeline.compresses:
            buffers = update[split:stop]
            return self._pipeline.pack(update[:split], buffers, message.body, draws, state)
        return 4 * stop

    def _seed(self, seed: int) -> None:
        """Seed what dropout and the like draw from."""
        # `torch.manual_seed` also visits every kind of device there is, which takes longer than a
        # small model's forward pass.
        torch.default_generator.manual_seed(seed)
        if self._on_gpu:
            torch.cuda.manual_seed(seed)
