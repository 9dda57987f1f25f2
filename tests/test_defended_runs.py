"""Defences in whole runs: what reaches the server, what clients keep, and what attackers do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from whole_run import WholeRun, gradient_of, joined, loss_of, run_whole

from testbed import privacy
from testbed.defenses import make_defense
from testbed.defenses.pipeline import Draws
from testbed.plan import Task
from testbed.seeds import Purpose

FEDAVG = {"algorithm": "fedavg", "local_steps": 3}
HEAD = slice(7536, 8026)
BN = {"name": "cnn_bn", "init": "torch"}


def task_key(run: WholeRun, task: Task) -> Draws:
    return Draws(0, run.plan.key(Purpose.DEFENSE, task))


# Compression


@pytest.mark.parametrize(
    "defenses",
    [
        [{"name": "top_k", "theta": 0.9, "error_feedback": True}],
        [{"name": "dgc", "theta": 0.95, "scope": "tensor"}],
        [{"name": "signsgd", "error_feedback": True}],
        [{"name": "qsgd", "levels": 4, "error_feedback": True}],
        [{"name": "top_k", "theta": 0.5, "error_feedback": True}, {"name": "terngrad"}],
    ],
)
def test_error_feedback_loses_nothing_in_a_run(
    tmp_path: Path, defenses: list[dict[str, Any]]
) -> None:
    run = run_whole(tmp_path, federation={**FEDAVG, "rounds": 6, "clients": 2}, defenses=defenses)
    gathered, shown = np.zeros((2, 8026)), np.zeros((2, 8026))
    for task in run.plan.tasks():
        module = run.module(run.models[task.round])
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        for batch in run.batches(task):
            gathered[task.client] += gradient_of(module, batch)
            optimizer.zero_grad()
            loss_of(module, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        shown[task.client] += run.decoded(task)
        rest = run.states[task]["residual"]
        scale = np.abs(gathered[task.client]).max() + np.abs(rest).max()
        np.testing.assert_allclose(
            shown[task.client] + rest, gathered[task.client], atol=1e-5 * scale
        )
        assert np.abs(rest).max() > 1e-3


def test_the_server_steps_by_what_was_sent(tmp_path: Path) -> None:
    defenses = [{"name": "top_k", "theta": 0.95}, {"name": "qsgd", "levels": 8}]
    run = run_whole(tmp_path, federation={"rounds": 3}, defenses=defenses)
    for number in range(2):
        sent = [run.decoded(task).astype(float) for task in run.plan.round_tasks(number)]
        expected = run.models[number] - 0.5 * np.mean(sent, axis=0)
        np.testing.assert_allclose(run.models[number + 1], expected, atol=1e-6)
        for client, update in enumerate(sent):
            assert 0 < np.count_nonzero(update) <= round(0.05 * 8026)
            rows = update[7536:8016].reshape(10, 48).sum(axis=1)
            np.testing.assert_allclose(
                run["observations/row_sums"][number, client], rows, atol=1e-6
            )
            norm = run["observations/norm"][number, client]
            assert norm == pytest.approx(np.linalg.norm(update), rel=1e-5)
    assert (run["updates/bytes_on_wire"] < 4 * 8026 / 10).all()


def test_steps_and_updates_are_defended_apart(tmp_path: Path) -> None:
    """Clipped steps add up to more than a clipped sum; each is what the formula says."""
    norms = {}
    for at in ("step", "update"):
        for scope in ("update", "tensor"):
            clip = {"name": "clip", "bound": 0.3, "at": at, "scope": scope}
            run = run_whole(
                tmp_path / at / scope, federation={**FEDAVG, "rounds": 1}, defenses=[clip]
            )
            for task in run.plan.tasks():
                expected = clipped(run, task, at, scope)
                np.testing.assert_allclose(run.plain(task), expected, atol=1e-5)
                norms[at, scope, task.client] = np.linalg.norm(expected)
    for client in range(3):
        assert norms["update", "update", client] == pytest.approx(0.3, rel=1e-4)
        assert norms["update", "tensor", client] > 0.3
        assert norms["step", "update", client] > 0.35


def clipped(run: WholeRun, task: Task, at: str, scope: str) -> np.ndarray[Any, Any]:
    """Return a client's update of clipped steps, or clipped as a whole, by PyTorch's own hand."""

    def clip(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        whole = torch.linalg.vector_norm(torch.cat([part.flatten() for part in parts]))
        norms = [torch.linalg.vector_norm(part) for part in parts]
        used = norms if scope == "tensor" else [whole] * len(parts)
        return [part * min(1.0, 0.3 / float(norm)) for part, norm in zip(parts, used, strict=True)]

    module = run.module(run.models[0])
    parameters = list(module.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for batch in run.batches(task):
        step = list(torch.autograd.grad(loss_of(module, batch), parameters))
        if at == "step":
            step = clip(step)
        with torch.no_grad():
            for parameter, part, entry in zip(parameters, step, total, strict=True):
                parameter -= 0.5 * part
                entry += part
    return joined(clip(total) if at == "update" else total)


def test_noise_of_steps_adds_up_and_that_of_the_update_does_not(tmp_path: Path) -> None:
    spread = {}
    for at in ("step", "update"):
        # So small a rate that the noise does not change the steps.
        federation = {**FEDAVG, "local_steps": 9, "rounds": 1, "learning_rate": 1e-6}
        noise = [{"name": "noise", "sigma": 0.5, "at": at}]
        plain = run_whole(tmp_path / f"{at} without", federation=federation)
        noisy = run_whole(tmp_path / at, federation=federation, defenses=noise)
        added = [noisy.plain(task) - plain.plain(task) for task in plain.plan.tasks()]
        spread[at] = np.std(added)
        assert abs(np.corrcoef(added)[np.triu_indices(3, 1)]).max() < 0.06
    # 24 078 draws: 1 % is more than two standard deviations, and seeds are fixed.
    assert spread["update"] == pytest.approx(0.5, rel=0.015)
    assert spread["step"] == pytest.approx(0.5 * 3, rel=0.015)


def test_dp_sgd_without_noise_is_a_loop_over_samples(tmp_path: Path) -> None:
    dp = {"name": "dp_sgd", "bound": 0.7, "noise_multiplier": 0.0}
    federation = {**FEDAVG, "local_steps": 2, "batch_size": 5, "rounds": 1, "clients": 2}
    run = run_whole(tmp_path, federation=federation, defenses=[dp])
    cut = 0
    for task in run.plan.tasks():
        module = run.module(run.models[0])
        total = np.zeros(8026)
        for images, labels in run.batches(task):
            single = [gradient_of(module, (images[i : i + 1], labels[i : i + 1])) for i in range(5)]
            norms = [float(np.linalg.norm(one)) for one in single]
            cut += sum(norm > 0.7 for norm in norms)
            step = np.mean(
                [one * min(1.0, 0.7 / norm) for one, norm in zip(single, norms, strict=True)],
                axis=0,
            )
            total += step
            moved = torch.from_numpy(joined(list(module.parameters())) - np.float32(0.5) * step)
            nn.utils.vector_to_parameters(moved.float(), module.parameters())
        np.testing.assert_allclose(run.plain(task), total, atol=1e-5)
    assert cut > 3


def test_smoothed_labels_are_trained_on_and_the_true_ones_scored(tmp_path: Path) -> None:
    smoothing = [{"name": "label_smoothing", "epsilon": 0.3}]
    run = run_whole(tmp_path, federation={"rounds": 1}, defenses=smoothing)
    for task in run.plan.tasks():
        ((images, labels),) = run.batches(task)
        module = run.module(run.models[0])
        loss = nn.functional.cross_entropy(module(images), labels, label_smoothing=0.3)
        gradient = joined(torch.autograd.grad(loss, list(module.parameters())))
        np.testing.assert_allclose(run.plain(task), gradient, atol=1e-6)
        at = task.round, task.client
        assert run["updates/loss"][at] == pytest.approx(loss.item(), rel=1e-5)
        counts = np.bincount(labels.numpy(), minlength=10)
        np.testing.assert_array_equal(run["truth/counts"][at], counts)


def test_responses_are_drawn_once_for_each_sample(tmp_path: Path) -> None:
    """A sample that comes again has the same answer: none can be averaged out."""
    defenses = [{"name": "randomised_response", "epsilon": 1.0}]
    run = run_whole(
        tmp_path,
        federation={"rounds": 12, "batch_size": 200, "clients": 2},
        defenses=defenses,
        labels={"distribution": "natural"},
    )
    said: dict[int, set[int]] = {}
    for task in run.plan.tasks():
        (batch,) = run.worker.draw(task)
        labels = run.setup.samples.labels[batch]
        targets = run.setup.pipeline.targets(labels, batch, task_key(run, task), 0)
        assert targets is not None
        for sample, row in zip(batch.tolist(), targets.probabilities, strict=True):
            said.setdefault(sample, set()).add(int(row.argmax()))
        module = run.module(run.models[task.round])
        ((images, _),) = run.batches(task)
        loss = nn.functional.cross_entropy(module(images), torch.from_numpy(targets.probabilities))
        gradient = joined(torch.autograd.grad(loss, list(module.parameters())))
        np.testing.assert_allclose(run.plain(task), gradient, atol=1e-6)
    assert all(len(answers) == 1 for answers in said.values())
    truth = run.setup.samples.labels[list(said)]
    lied = np.mean(
        [answers != {label} for answers, label in zip(said.values(), truth, strict=True)]
    )
    assert lied == pytest.approx(9 / (9 + np.e), abs=0.06)


# What is withheld


@pytest.mark.parametrize("more", [[], [{"name": "dgc", "theta": 0.5}]])
def test_clients_train_heads_of_their_own_that_nobody_else_sees(
    tmp_path: Path, more: list[dict[str, Any]]
) -> None:
    defenses = [{"name": "withhold_last_layer", "head": "personal"}, *more]
    federation = {"clients": 2, "population": 4, "rounds": 10, "evaluate_every": 3}
    run = run_whole(tmp_path, federation=federation, defenses=defenses, attacks=["llg", "random"])
    heads: dict[int, Any] = {}
    for task in run.plan.tasks():
        identity = run.plan.participants(task.round).identities[task.client]
        start = run.models[task.round].copy()
        start[HEAD] = heads.get(identity, start[HEAD])
        (batch,) = run.batches(task)
        gradient = gradient_of(run.module(start), batch)
        heads[identity] = start[HEAD] - np.float32(0.5) * gradient[HEAD]
        np.testing.assert_allclose(run.states[task]["head"], heads[identity], atol=1e-6)
        decoded = run.decoded(task)
        assert (decoded[HEAD] == 0).all()
        if not more:
            np.testing.assert_allclose(decoded[: HEAD.start], gradient[: HEAD.start], atol=1e-6)
        # Not one value of it is among the bytes.
        secret = gradient[HEAD][gradient[HEAD] != 0]
        assert len(secret) > 100
        assert not np.isin(secret, run.sent[task].body.view(np.float32)).any()
    assert len(heads) == 4
    assert len({head.tobytes() for head in heads.values()}) == 4
    for number, model in run.models.items():
        np.testing.assert_array_equal(model[HEAD], run.models[0][HEAD], err_msg=str(number))
    assert np.abs(run.final[: HEAD.start] - run.models[0][: HEAD.start]).max() > 1e-3
    # An attack on what is not there says so, and the others run.
    assert run.attributes("attacks/llg")["not_applicable"] == "the last layer is withheld"
    assert (run["attacks/llg/counts"] == -1).all()
    assert (run["attacks/random/counts"].sum(axis=2) == 8).all()
    accuracy = run["rounds/accuracy"]
    assert np.flatnonzero(np.isfinite(accuracy)).tolist() == [0, 3, 6, 9]


def test_accuracy_is_that_of_the_clients_own_models(tmp_path: Path) -> None:
    defenses = [{"name": "withhold_last_layer"}]
    federation = {**FEDAVG, "clients": 2, "rounds": 3, "evaluate_every": 1}
    run = run_whole(tmp_path, federation=federation, defenses=defenses)
    test = run.setup.parts.test
    for number in range(3):
        right = []
        for task in run.plan.round_tasks(number):
            model = run.models[number].copy()
            if number:
                model[HEAD] = run.states[Task(0, number - 1, task.client)]["head"]
            module = run.module(model).eval()
            with torch.no_grad():
                guess = module(run.setup.samples.inputs(test)).argmax(dim=1)
            right.append(float((guess == run.setup.samples.targets(test)).double().mean()))
        assert run["rounds/accuracy"][number] == pytest.approx(np.mean(right), abs=2e-3)


def test_a_frozen_head_never_changes_and_the_body_trains_through_it(tmp_path: Path) -> None:
    defenses = [{"name": "withhold_last_layer", "head": "frozen"}]
    run = run_whole(tmp_path, federation={**FEDAVG, "momentum": 0.5}, defenses=defenses)
    assert all(state == {} for state in run.states.values())
    for task in run.plan.tasks():
        module = run.module(run.models[task.round])
        weight, bias = list(module.parameters())[-2:]
        weight.requires_grad_(False)
        bias.requires_grad_(False)
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.5, momentum=0.5)
        for batch in run.batches(task):
            optimizer.zero_grad()
            loss_of(module, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        expected = (run.models[task.round] - joined(list(module.parameters()))) / 0.5
        np.testing.assert_allclose(run.decoded(task), expected, atol=1e-5)
    for model in run.models.values():
        np.testing.assert_array_equal(model[HEAD], run.models[0][HEAD])
    assert np.abs(run.final[: HEAD.start] - run.models[0][: HEAD.start]).max() > 1e-3


# Attackers who know


def test_adapted_attacks_stand_beside_plain_ones(tmp_path: Path) -> None:
    attacks = ["random", "llg", {"name": "llg_plus", "label": "plus"}]
    defenses = [{"name": "noise", "sigma": 0.05}]
    run = run_whole(tmp_path, federation={"rounds": 3}, attacks=attacks, defenses=defenses)
    labels = {"random", "llg", "llg+adapted", "llg+rounds", "plus", "plus+adapted", "plus+rounds"}
    assert set(run.names("attacks")) == labels
    adaptation = [f"noise: {make_defense('noise', {'sigma': 0.05}).adaptation}"]
    for label in labels:
        described = run.attributes(f"attacks/{label}")
        plain, _, kind = label.partition("+")
        assert described.get("adapted", "") == (plain if kind else "")
        assert json.loads(described.get("adaptation", "[]")) == (adaptation if kind else [])
        assert described["target"] == ("accumulated" if kind == "rounds" else "update")
        assert (run[f"attacks/{label}/counts"] >= 0).all()
    # The plain attack is what it would be without anyone who knows.
    alone = run_whole(
        tmp_path / "alone",
        federation={"rounds": 3},
        attacks=attacks,
        defenses=defenses,
        adversary={"adaptive": False},
    )
    assert set(alone.names("attacks")) == {"random", "llg", "plus"}
    for label in ("random", "llg", "plus"):
        np.testing.assert_array_equal(
            alone[f"attacks/{label}/counts"], run[f"attacks/{label}/counts"]
        )


@pytest.mark.parametrize("every", [1, 3])
def test_sums_over_rounds_are_scored_against_all_labels_so_far(tmp_path: Path, every: int) -> None:
    federation = {"clients": 2, "population": 4, "dropout": 0.2, "rounds": 10}
    run = run_whole(
        tmp_path,
        federation={**federation, "attack_every": every},
        attacks=["llg"],
        defenses=[{"name": "dgc", "theta": 0.9}],
    )
    accumulated, truth = run["truth/accumulated"], run["truth/counts"]
    attacked = [number for number in range(10) if number % every == 0]
    others = [number for number in range(10) if number % every]
    for name in (
        "truth/counts",
        "truth/accumulated",
        "attacks/llg/counts",
        "attacks/llg+rounds/counts",
    ):
        assert (run[name][others] == -1).all()
    totals = np.zeros((4, 10), int)
    for number in range(10):
        arriving = run.plan.participants(number).arriving
        for client in arriving:
            identity = run.plan.participants(number).identities[client]
            totals[identity] += run.sent[Task(0, number, client)].counts
            if number in attacked:
                np.testing.assert_array_equal(accumulated[number, client], totals[identity])
                np.testing.assert_array_equal(
                    truth[number, client], run.sent[Task(0, number, client)].counts
                )
                found = run["attacks/llg+rounds/counts"][number, client]
                assert found.sum() == totals[identity].sum()
        gone = sorted({0, 1} - set(arriving))
        assert (accumulated[number, gone] == -1).all()
    assert totals.sum(axis=1).max() > 16


def test_who_waits_sees_more_of_what_is_held_back(tmp_path: Path) -> None:
    """The sum over rounds infers better than a single sparse update does."""
    run = run_whole(
        tmp_path,
        federation={"clients": 4, "rounds": 30, "batch_size": 8, "learning_rate": 0.05},
        attacks=["llg_plus"],
        defenses=[{"name": "dgc", "theta": 0.99}],
        labels={"distribution": "unbalanced"},
    )
    success = {}
    for label, truth in (("llg_plus", "truth/counts"), ("llg_plus+rounds", "truth/accumulated")):
        counts, true = run[f"attacks/{label}/counts"][-5:], run[truth][-5:]
        success[label] = np.minimum(counts, true).sum() / true.sum()
    assert success["llg_plus+rounds"] > success["llg_plus"] + 0.05


def test_baselines_and_undefended_scenarios_have_no_adapted_attacks(tmp_path: Path) -> None:
    run = run_whole(tmp_path, federation={"rounds": 1}, attacks=["random", "llg"])
    assert set(run.names("attacks")) == {"random", "llg"}
    fresh = run_whole(
        tmp_path / "fresh",
        federation={"rounds": 2, "fresh_model": True},
        attacks=["random", "llg"],
        defenses=[{"name": "noise", "sigma": 0.1}],
    )
    assert set(fresh.names("attacks")) == {"random", "llg", "llg+adapted"}


# The budget


@pytest.mark.parametrize("kind", ["shared", "iid", "dirichlet_classes"])
def test_budget_is_that_of_the_sample_that_spends_most(tmp_path: Path, kind: str) -> None:
    dp = {"name": "dp_sgd", "bound": 1.0, "noise_multiplier": 1.5, "delta": 1e-4}
    federation = {**FEDAVG, "clients": 2, "population": 5, "rounds": 6, "batch_size": 4}
    partition: dict[str, Any] = {"kind": kind}
    if kind == "dirichlet_classes":
        partition["alpha"] = 1.0
        federation |= {"local_steps": None, "local_epochs": 1, "batch_size": 100}
    run = run_whole(
        tmp_path,
        federation=federation,
        partition=partition,
        labels={"distribution": "natural"},
        defenses=[dp],
    )
    if run.setup.partition is None:
        # All draw from the same samples: 3 steps of 2 clients in 6 rounds.
        spent = {(4 / len(run.setup.parts.victim), 36)}
    else:
        chosen = [i for number in range(6) for i in run.plan.participants(number).identities]
        times = np.bincount(chosen, minlength=5)
        assert times.min() < times.max() < 6
        sizes = run.setup.partition.sizes
        steps = -(-sizes // 100) if kind == "dirichlet_classes" else np.full(5, 3)
        rates = federation["batch_size"] / sizes
        spent = set(zip(rates.tolist(), (steps * times).tolist(), strict=True))
    budgets = {
        privacy.epsilon(1.5, rate, number, 1e-4, "rdp"): (rate, number) for rate, number in spent
    }
    largest = max(budgets)
    budget = json.loads(run.attributes()["privacy"])
    assert budget["epsilon"] == pytest.approx(largest)
    assert (budget["sampling_rate"], budget["steps"]) == pytest.approx(budgets[largest])
    assert (budget["delta"], budget["noise_multiplier"]) == (1e-4, 1.5)
    assert 0 < largest < 50


def test_without_dp_sgd_there_is_no_budget(tmp_path: Path) -> None:
    run = run_whole(
        tmp_path, federation={"rounds": 1}, defenses=[{"name": "dp_paper", "bound": 1.0}]
    )
    assert json.loads(run.attributes()["privacy"]) == {}
