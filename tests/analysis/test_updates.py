"""Labels from updates of one's own: arrays in files, through the real command line."""

import csv
import doctest
import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

import analysis.updates
from analysis import attack_update
from analysis.__main__ import main
from analysis.updates import UpdateWarning
from testbed.attacks import Answer, Knowledge, Observed, attacks
from testbed.errors import UserError

ROOT = Path(__file__).parents[2]
BLOCKED = """
import sys
sys.modules.update(dict.fromkeys(["torch", "mpi4py", "h5py", "pandas", "matplotlib"]))
from analysis.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
C, D, B, N = 6, 9, 12, 3
RATE = 0.05


def softmax(logits):
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


class World:
    """A last layer on features that cluster by class, and clients that train it."""

    def __init__(self, seed=0, classes=C):
        self.rng = np.random.default_rng(seed)
        self.classes = classes
        self.W = self.rng.normal(scale=0.1, size=(classes, D))
        self.b = self.rng.normal(scale=0.1, size=classes)
        self.means = self.rng.random((classes, D)) * 2
        self.y = np.repeat(np.arange(classes), 8)
        self.h = self.features(self.y)

    def features(self, labels):
        return np.abs(self.means[labels] + self.rng.normal(scale=0.05, size=(len(labels), D)))

    def update(self, steps=1, size=B):
        """Return the weights and bias that a client ends with, and its label counts."""
        W, b, counts = self.W.copy(), self.b.copy(), np.zeros(self.classes, int)
        for _ in range(steps):
            y = self.rng.integers(self.classes, size=size)
            h = self.features(y)
            error = softmax(h @ W.T + b) - np.eye(self.classes)[y]
            W, b = W - RATE * error.T @ h / size, b - RATE * error.mean(axis=0)
            counts += np.bincount(y, minlength=self.classes)
        return W, b, counts

    def gradient(self, **options):
        W, b, counts = self.update(**options)
        return (self.W - W) / RATE, (self.b - b) / RATE, counts

    def known(self):
        return {
            "model_weights": self.W,
            "model_bias": self.b,
            "auxiliary_features": self.h,
            "auxiliary_labels": self.y,
        }


@pytest.fixture
def world():
    return World()


@pytest.fixture
def files(tmp_path, monkeypatch, world):
    """Write a world's arrays into the working directory, and return the truth of three updates."""
    monkeypatch.chdir(tmp_path)
    updates = [world.gradient() for _ in range(N)]
    weight, bias, counts = (np.array(part) for part in zip(*updates, strict=True))
    np.save("g.npy", weight)
    np.save("b.npy", bias)
    np.save("one.npy", weight[0].astype(np.float32))
    np.savez("model.npz", W=world.W, b=world.b, h=world.h, y=world.y)
    return counts


MODEL = [
    *("--model-weights", "model.npz:W", "--model-bias", "model.npz:b"),
    *("--auxiliary-features", "model.npz:h", "--auxiliary-labels", "model.npz:y"),
]


def run(*arguments):
    return main(["attack", "--batch-size", str(B), *arguments])


def as_json(capsys, *arguments):
    assert run(*arguments, "--format", "json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def needs_live(attack):
    return attack.knowledge in (Knowledge.MALICIOUS, Knowledge.TRUTH) or attack.observes & {
        Observed.STATISTICS,
        Observed.UPDATE,
    }


def test_all_attacks_that_can_be_run(files, capsys):
    content = as_json(capsys, "--weight-gradient", "g.npy", "--bias-gradient", "b.npy", *MODEL)
    assert (content["updates"], content["classes"], content["labels_per_update"]) == (N, C, B)
    assert content["attacks"].keys() | content["not_run"].keys() == attacks().keys()
    assert not content["attacks"].keys() & content["not_run"].keys()
    for name, attack in attacks().items():
        if needs_live(attack):
            assert "run it live" in content["not_run"][name]
        elif attack.knowledge is Knowledge.GRADIENTS:
            assert name in content["attacks"]
        elif name in content["not_run"]:
            assert content["not_run"][name].startswith("it needs the whole model")
    for told in content["attacks"].values():
        values = np.array(told["values"])
        assert values.shape == (N, C)
        if told["answers"] == "counts":
            assert (values.sum(axis=1) == B).all()
            assert (values >= 0).all()
        elif told["answers"] == "distribution":
            np.testing.assert_allclose(values.sum(axis=1), 1)
        else:
            assert values.dtype == bool
    # With auxiliary samples like the client's, this one is exact.
    assert content["attacks"]["aux_ls"]["values"] == files.tolist()


def test_less_given_less_run(files, capsys):
    content = as_json(capsys, "--weight-gradient", "one.npy")
    for name, attack in attacks().items():
        if attack.knowledge is Knowledge.AUXILIARY or Observed.BIAS_GRADIENT in attack.observes:
            assert name in content["not_run"]
    assert "it needs the bias gradient" in content["not_run"].values()
    assert content["attacks"].keys() >= {"llg", "random"}


def test_what_an_attack_takes_for_granted(files, capsys):
    content = as_json(capsys, "--weight-gradient", "one.npy", "--attack", "idlg")
    assert content["attacks"]["idlg"]["broken_assumptions"] == {
        "one label per update": f"{B} labels per update"
    }
    np.savez("other.npz", h=-np.load("model.npz")["h"])
    assert run(*["--weight-gradient", "one.npy", *MODEL[:4]]) == 0
    assert "non-negative" not in capsys.readouterr().out
    auxiliary = ["--auxiliary-features", "other.npz", "--auxiliary-labels", "model.npz:y"]
    assert run(*["--weight-gradient", "one.npy", *MODEL[:4], *auxiliary, "--attack", "idlg"]) == 0
    assert "idlg assumes non-negative features, found features down to -" in capsys.readouterr().out


def test_named_attacks_with_options(files, capsys):
    arguments = ["--weight-gradient", "g.npy", *MODEL, "--attack", "llg", "--attack", "llg_plus"]
    content = as_json(capsys, *arguments, "scaling=reference", "--label", "plus")
    assert list(content["attacks"]) == ["llg", "plus"]
    assert content["attacks"]["plus"]["options"]["scaling"] == "reference"
    assert content["not_run"] == {}


def test_an_attack_of_ones_own(files, capsys):
    Path("its_own.py").write_text(
        "from testbed.attacks.llg import LLG\nclass Own(LLG):\n    name = 'own'\n"
    )
    content = as_json(
        capsys, "--weight-gradient", "g.npy", "--attack", "its_own:Own", "--attack", "llg"
    )
    assert content["attacks"]["Own"]["values"] == content["attacks"]["llg"]["values"]


def test_formats(files, capsys, tmp_path):
    arguments = ["--weight-gradient", "g.npy", "--attack", "llg", "--attack", "idlg_presence"]
    content = as_json(capsys, *arguments)
    assert run(*arguments, "--format", "csv", "-o", "out.csv") == 0
    assert capsys.readouterr() == ("", "")
    rows = list(csv.DictReader(io.StringIO(Path("out.csv").read_text())))
    assert len(rows) == N * 2 * C
    for row in rows:
        told = content["attacks"][row["attack"]]
        assert float(row["value"]) == told["values"][int(row["update"])][int(row["class"])]
        assert (row["title"], row["answers"]) == (told["title"], told["answers"])
    assert run(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["update", "attack", "knows", "answers", *map(str, range(C))]
    for update in range(N):
        counts, presence = (line.split() for line in lines[2 + 2 * update : 4 + 2 * update])
        found = content["attacks"]["llg"]["values"][update]
        assert counts == [str(update), "llg", "gradients", "counts", *map(str, found)]
        found = content["attacks"]["idlg_presence"]["values"][update]
        assert presence[4:] == ["yes" if value else "-" for value in found]
    assert f"{B} labels per update" in lines[-1]


def test_many_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    many = World(classes=40)
    weight, _, _ = many.gradient(size=100)
    np.save("g.npy", weight)
    arguments = ["attack", "--weight-gradient", "g.npy", "--batch-size", "100"]
    assert main([*arguments, "--attack", "llg", "--attack", "idlg_presence"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 120
    assert lines[0].split()[0] == "attack"
    counts = attack_update(weight, batch_size=100, attacks=["llg"])["llg"]
    best = int(counts.argmax())
    assert f" {best}:{counts[best]}, " in lines[2]
    assert lines[2].endswith(f"and {(counts > 0).sum() - 8} more")


@pytest.mark.parametrize("steps", [1, 4])
def test_weights_before_and_after(tmp_path, monkeypatch, capsys, world, steps):
    monkeypatch.chdir(tmp_path)
    W, b, counts = world.update(steps=steps)
    for name, array in (("W0", world.W), ("W1", W), ("b0", world.b), ("b1", b)):
        np.save(name, array)
    np.savez("model.npz", h=world.h, y=world.y)
    content = as_json(
        capsys,
        *("--weights-before", "W0.npy", "--weights-after", "W1.npy"),
        *("--bias-before", "b0.npy", "--bias-after", "b1.npy", "--learning-rate", str(RATE)),
        *("--local-steps", str(steps), *MODEL[4:]),
    )
    assert content["labels_per_update"] == steps * B
    (values,) = content["attacks"]["aux_ls"]["values"]
    assert np.minimum(values, counts).sum() >= (1 if steps == 1 else 0.9) * steps * B
    found = attack_update(
        (world.W - W) / RATE,
        bias_gradient=(world.b - b) / RATE,
        batch_size=B,
        local_steps=steps,
        learning_rate=RATE,
        **world.known(),
    )
    assert found.keys() == content["attacks"].keys()
    for label, values in found.items():
        assert [values.tolist()] == content["attacks"][label]["values"]


def test_several_updates_from_the_same_weights(tmp_path, monkeypatch, capsys, world):
    monkeypatch.chdir(tmp_path)
    updates = [world.update() for _ in range(N)]
    np.save("W0", world.W)
    np.save("W1", [W for W, _, _ in updates])
    arguments = ["--weights-before", "W0.npy", "--weights-after", "W1.npy"]
    content = as_json(capsys, *arguments, "--learning-rate", str(RATE), "--attack", "llg")
    expected = [
        attack_update((world.W - W) / RATE, batch_size=B, attacks=["llg"])["llg"].tolist()
        for W, _, _ in updates
    ]
    assert content["attacks"]["llg"]["values"] == expected


def test_rows_do_not_depend_on_each_other(world):
    updates = [world.gradient() for _ in range(N)]
    weight, bias, _ = (np.array(part) for part in zip(*updates, strict=True))
    together = attack_update(weight, bias_gradient=bias, batch_size=B, **world.known())
    for row in range(N):
        alone = attack_update(weight[row], bias_gradient=bias[row], batch_size=B, **world.known())
        for label, values in alone.items():
            if attacks()[label].answers is Answer.COUNTS and label not in ("random", "uniform"):
                np.testing.assert_array_equal(values, together[label][row], err_msg=label)


def test_linear_algebra_is_on_one_thread_and_the_callers_setting_comes_back(world, monkeypatch):
    import scipy.linalg  # noqa: F401 - loaded meanwhile, it would come with a number of its own

    def threads():
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    within = []
    kept = analysis.updates._run
    monkeypatch.setattr(
        analysis.updates, "_run", lambda *words: within.append(threads()) or kept(*words)
    )
    weight, _, _ = world.gradient()
    with threadpool_limits(2):
        before = threads()
        attack_update(weight, batch_size=B, attacks=["llg"])
        assert threads() == before
    assert within == [{1}]


@given(st.integers(0, 10**6), st.sampled_from(["float16", "float32", "float64"]))
def test_one_sample_is_always_found(seed, dtype):
    world = World(seed)
    weight, _, counts = world.gradient(size=1)
    found = attack_update(weight.astype(dtype), batch_size=1, attacks=["llg", "idlg"])
    for values in found.values():
        assert values.tolist() == counts.tolist()


def test_the_seed_decides_what_is_drawn(world):
    weight, _, _ = world.gradient()

    def draw(seed):
        return attack_update(weight, batch_size=1000, attacks=["random"], seed=seed)["random"]

    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()


def test_the_example_in_the_documentation():
    assert doctest.testmod(analysis.updates).attempted >= 4
    assert doctest.testmod(analysis.updates).failed == 0


def test_neither_torch_nor_mpi(files):
    done = subprocess.run(
        [
            *(sys.executable, "-c", BLOCKED, "attack", "--batch-size", str(B)),
            *("--weight-gradient", "g.npy", "--bias-gradient", "b.npy", *MODEL),
        ],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "llg_plus" in done.stdout


def test_updates_that_are_no_gradients(files, capsys, world):
    weight = np.load("g.npy")
    weight[1] += 0.3 * np.abs(weight).max()
    weight[2] = 0
    np.save("odd.npy", weight)
    assert run("--weight-gradient", "odd.npy", "--attack", "llg") == 0
    out, err = capsys.readouterr()
    assert out.startswith("update")
    first, second = err.splitlines()
    assert first.startswith("warning: update 1: gradients of the cross entropy cancel")
    assert "weight decay" in first
    assert second == "warning: update 2: it is zero and tells nothing"
    np.save("turned.npy", np.load("one.npy").T)
    assert run("--weight-gradient", "turned.npy", "--attack", "llg") == 0
    assert "is the array transposed" in capsys.readouterr().err
    with pytest.warns(UpdateWarning) as caught:
        attack_update(weight, batch_size=B, attacks=["llg"])
    assert [str(warning.message).partition(":")[0] for warning in caught] == [
        "update 1",
        "update 2",
    ]
    assert {Path(warning.filename).name for warning in caught} == {"test_updates.py"}


def test_no_warning_for_a_gradient_in_half_precision(world):
    weight, bias, _ = world.gradient()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack_update(
            weight.astype(np.float16),
            bias_gradient=bias.astype(np.float16),
            batch_size=B,
            attacks=["llg"],
        )


BAD = {
    "nan.npy": np.full((C, D), np.nan),
    "inf.npy": np.full((C, D), np.inf),
    "large.npy": np.full((C, D), 1e300),
    "overflow.npy": np.full((C, D), 3e38),
    "text.npy": np.full((C, D), "x"),
    "complex.npy": np.ones((C, D), complex),
    "flags.npy": np.ones((C, D), bool),
    "flat.npy": np.ones(C),
    "deep.npy": np.ones((1, 1, C, D)),
    "empty.npy": np.ones((0, D)),
    "single.npy": np.ones((1, D)),
    "classes.npy": np.ones(C + 1),
    "wide.npy": np.ones((C, D + 1)),
    "floats.npy": np.full(8 * C, 0.5),
    "beyond.npy": np.full(8 * C, C),
    "below.npy": np.full(8 * C, -1),
    "short.npy": np.zeros(3, int),
    "unsoftened.npy": np.ones((8 * C, C)),
}
G = ["--weight-gradient", "one.npy"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weight-gradient", "missing.npy"], ["missing.npy", "no such file"]),
        (["--weight-gradient", "."], ["this is a folder"]),
        (["--weight-gradient", "cut.npy"], ["cut.npy: cannot read"]),
        (["--weight-gradient", "cut.npz"], ["cut.npz: not a readable"]),
        (["--weight-gradient", "lies.npy"], ["lies.npy: cannot read"]),
        (["--weight-gradient", "note.txt"], ["note.txt: this is no .npy or .npz file"]),
        (["--weight-gradient", "objects.npy"], ["objects.npy", "Python objects"]),
        (["--weight-gradient", "model.npz"], ["4 arrays", "model.npz:NAME (W, b, h, y)"]),
        (["--weight-gradient", "model.npz:w"], ["no array 'w'", "known: W, b, h, y"]),
        (["--weight-gradient", "nan.npy"], ["weight gradient", "NaN"]),
        (["--weight-gradient", "inf.npy"], ["infinity"]),
        (["--weight-gradient", "large.npy"], ["beyond single precision"]),
        (["--weight-gradient", "overflow.npy"], ["row sums", "beyond single precision"]),
        (["--weight-gradient", "text.npy"], ["<U1", "real numbers"]),
        (["--weight-gradient", "complex.npy"], ["complex128", "real numbers"]),
        (["--weight-gradient", "flags.npy"], ["bool", "real numbers"]),
        (["--weight-gradient", "flat.npy"], [f"({C},)", "[C, D]"]),
        (["--weight-gradient", "deep.npy"], ["[N, C, D]"]),
        (["--weight-gradient", "empty.npy"], ["empty"]),
        (["--weight-gradient", "single.npy"], ["1 class"]),
        ([*G, "--bias-gradient", "classes.npy"], [f"1 x {C + 1}", f"1 x {C}"]),
        ([*G, "--bias-gradient", "b.npy"], [f"{N} x {C}", f"1 x {C}"]),
        ([*G, "--model-weights", "wide.npy"], ["model weights", f"[{C}, {D}]"]),
        ([*G, *MODEL[:2], "--model-bias", "classes.npy"], ["model bias"]),
        ([*G, *MODEL[2:4]], ["model bias", "without the model weights"]),
        (
            ["--weight-gradient", "g.npy", "--bias-gradient", "b.npy", *MODEL[:2]],
            ["model bias: missing"],
        ),
        ([*G, *MODEL[4:6]], ["auxiliary labels: missing"]),
        ([*G, *MODEL[6:]], ["auxiliary features: missing"]),
        ([*G, *MODEL[4:]], ["auxiliary posterior: missing"]),
        ([*G, *MODEL[:6], "--auxiliary-labels", "floats.npy"], ["whole numbers from 0 to 5"]),
        ([*G, *MODEL[:6], "--auxiliary-labels", "beyond.npy"], ["from 6 to 6", "0 to 5"]),
        ([*G, *MODEL[:6], "--auxiliary-labels", "below.npy"], ["from -1 to -1"]),
        ([*G, *MODEL[:6], "--auxiliary-labels", "short.npy"], ["[n, D] = [3, 9]"]),
        ([*G, *MODEL, "--auxiliary-posterior", "unsoftened.npy"], ["softmax outputs"]),
        ([*G, "--attack", "llgg"], ["unknown attack 'llgg'", "did you mean"]),
        ([*G, "--attack", "llg", "x"], ["'x'", "KEY=VALUE"]),
        ([*G, "--attack", "llg", "x=1"], ["no option 'x'"]),
        ([*G, "--attack", "llg_plus"], ["'llg_plus'", "needs auxiliary samples"]),
        ([*G, "--attack", "llg_star"], ["'llg_star'", "needs the whole model", "run it live"]),
        ([*G, "--attack", "oracle"], ["'oracle'"]),
        ([*G, "--batch-size", "0"], ["batch size: found 0"]),
        ([*G, "--batch-size", "-3"], ["batch size: found -3"]),
        ([*G, "--local-steps", "0"], ["local steps: found 0"]),
        ([*G, "--local-steps", "2"], ["learning rate: missing"]),
        ([*G, "--learning-rate", "nan"], ["learning rate: found nan"]),
        (["--weights-before", "one.npy"], ["--weights-after", "belong together"]),
        ([*G, "--weights-after", "one.npy"], ["belong together"]),
        (
            ["--weights-before", "one.npy", "--weights-after", "one.npy"],
            ["without --learning-rate"],
        ),
        (
            ["--weights-before", "one.npy", "--weights-after", "wide.npy", "--learning-rate", "1"],
            ["before and after", "shapes"],
        ),
        (
            [
                *(*G, "--bias-gradient", "flat.npy", "--bias-before", "flat.npy"),
                *("--bias-after", "flat.npy", "--learning-rate", "1"),
            ],
            ["--bias-gradient and --bias-before are alternatives"],
        ),
        ([*G, "--attack", "llg", "-o", "no/x.txt"], ["no/x.txt: cannot write"]),
    ],
)
def test_mistakes_get_one_line_and_status_2(files, capsys, arguments, words):
    for name, array in BAD.items():
        np.save(name, array)
    for name in ("g.npy", "model.npz"):
        content = Path(name).read_bytes()
        Path(name.replace("g.", "cut.").replace("model.", "cut.")).write_bytes(content[:-200])
    with Path("lies.npy").open("wb") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(b"0" * 80)
    np.save("objects.npy", np.array([[{}, 1], [2, 3]], object), allow_pickle=True)
    Path("note.txt").write_text("not an array")
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch-size", "4"],
        ["--weight-gradient", "g.npy"],
        ["--weight-gradient", "g.npy", "--weights-before", "g.npy", "--batch-size", "4"],
        ["--weight-gradient", "g.npy", "--batch-size", "four"],
        ["--weight-gradient", "g.npy", "--batch-size", "4", "--label", "x"],
    ],
)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["attack", *arguments])
    assert caught.value.code == 2
    assert "usage: analysis attack" in capsys.readouterr().err


def test_ragged_lists_from_python():
    with pytest.raises(UserError, match="weight gradient"):
        attack_update([[1.0, 2.0], [3.0]], batch_size=1)
