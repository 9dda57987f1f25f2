"""The command lines ``analysis replay`` and ``analysis attack``."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import UserError, printable

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

FILES = "results file, a folder of them, or a pattern in quotes: 'NAME_*of16.h5'"
_FORMATS = ("text", "csv", "json")
_ARRAY = "FILE.npy"
_KNOWN = {
    "bias-gradient": "[C] or [N, C]",
    "model-weights": "weights of the last layer before the update, [C, D]",
    "model-bias": "its bias, [C]",
    "auxiliary-features": "inputs of the last layer for samples of your own, [n, D]",
    "auxiliary-labels": "their labels, [n]",
    "auxiliary-posterior": "their softmax outputs, [n, C] (default: from the model weights)",
}


@dataclass
class Choice:
    """One attack as the command line has it: ``NAME KEY=VALUE ...``, and what follows on it."""

    name: str
    options: Sequence[str]
    details: dict[str, str] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """Return the attack as an experiment file would have it, or raise `UserError`."""
        from testbed.sweep import parse_yaml

        content: dict[str, Any] = {"name": self.name}
        for option in self.options:
            key, equals, text = option.partition("=")
            if not equals or not key:
                raise UserError(
                    f"attack {self.name!r}: found {option!r}, expected KEY=VALUE (results "
                    "files stand before the first --attack)"
                )
            if key in content:
                raise UserError(f"attack {self.name!r}: {key!r} stands there twice")
            content[key] = parse_yaml(text, f"attack {self.name!r}, {option!r}")
        return content | self.details


def add_parsers(commands: "Subparsers") -> None:
    """Add the two commands."""
    replay = commands.add_parser(
        "replay",
        help="run attacks again on the stored observations",
        description="Run attacks again on the observations of a results file, without torch and "
        "MPI, and write their answers beside the stored ones into a new results file; of several "
        "shares of an experiment into one for each share.",
    )
    replay.add_argument("files", nargs="+", metavar="FILE", help=FILES)
    _add_attacks(replay, required=True, about="attack to run, with its options; may be repeated")
    replay.add_argument(
        "--calibration",
        action=_Detail,
        metavar="LABEL",
        help="of the --attack before: the stored attack whose calibration to use (default: one of "
        "the same name and options)",
    )
    replay.add_argument("--only", action="store_true", help="leave the stored attacks out")
    replay.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        required=True,
        help="results file to write; of several shares NAME.h5 stands for NAME_0of16.h5 and so on",
    )
    replay.add_argument("--overwrite", action="store_true", help="replace an existing file")

    attack = commands.add_parser(
        "attack",
        help="attack updates of your own, given as arrays",
        description="Infer labels from gradients of a last layer, given as arrays in .npy files "
        "(or FILE.npz:NAME). C classes, D inputs of the layer, N updates. Attacks that need the "
        "whole model run live only.",
    )
    gradient = attack.add_mutually_exclusive_group(required=True)
    gradient.add_argument(
        "--weight-gradient", metavar=_ARRAY, help="of the last layer, [C, D] or [N, C, D]"
    )
    gradient.add_argument(
        "--weights-before", metavar=_ARRAY, help="instead: its weights before the update, [C, D]"
    )
    attack.add_argument(
        "--weights-after", metavar=_ARRAY, help="and after it, by plain gradient descent"
    )
    attack.add_argument("--bias-before", metavar=_ARRAY, help="likewise its bias, [C]")
    attack.add_argument("--bias-after", metavar=_ARRAY, help="and after it")
    for name, about in _KNOWN.items():
        attack.add_argument(f"--{name}", metavar=_ARRAY, help=about)
    attack.add_argument("--batch-size", type=int, required=True, metavar="B")
    attack.add_argument(
        "--local-steps", type=int, default=1, metavar="E", help="behind each update (default: 1)"
    )
    attack.add_argument("--learning-rate", type=float, metavar="RATE", help="of these steps")
    _add_attacks(
        attack, required=False, about="attack to run, with its options (default: all that can be)"
    )
    attack.add_argument("--seed", type=int, default=0, help="for attacks that draw (default: 0)")
    attack.add_argument("--format", choices=_FORMATS, default="text", help="(default: text)")
    attack.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to a file")


def _add_attacks(parser: argparse.ArgumentParser, *, required: bool, about: str) -> None:
    parser.add_argument(
        "--attack",
        action=_Attack,
        dest="attacks",
        nargs="+",
        metavar=("NAME", "KEY=VALUE"),
        required=required,
        help=about,
    )
    parser.add_argument(
        "--label",
        action=_Detail,
        metavar="LABEL",
        help="of the --attack before: what to call it (default: its name)",
    )


class _Attack(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        name, *options = values
        # A new list: a default would be shared by all command lines.
        namespace.attacks = [*(namespace.attacks or ()), Choice(name, options)]


class _Detail(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if not namespace.attacks:
            parser.error(f"{option_string} says something of the --attack before it: there is none")
        namespace.attacks[-1].details[self.dest] = values


def _replay(arguments: argparse.Namespace) -> None:
    from analysis.replay_shares import replay_shares
    from analysis.share_notes import share_notes
    from analysis.shares import find_sets, share_file
    from analysis.show import progress
    from testbed.results.reader import open_results

    contents = [choice.content() for choice in arguments.attacks]
    replayed = replay_shares(
        arguments.files,
        arguments.output,
        contents,
        only=arguments.only,
        overwrite=arguments.overwrite,
    )
    for file, path in replayed:
        print(path, flush=True)
        with open_results(path) as results:
            if not results.complete and share_file(file, results).count == 1:
                print(f"note: {file} lacks rounds: {progress(results)}", file=sys.stderr)
    for note in share_notes(find_sets(arguments.files)):
        print(f"note: {note}", file=sys.stderr)


def _attack(arguments: argparse.Namespace) -> None:
    from analysis.given import take
    from analysis.updates import render, run_attacks

    attacks = arguments.attacks and [choice.content() for choice in arguments.attacks]
    given = take(
        **_arrays(arguments),
        batch_size=arguments.batch_size,
        local_steps=arguments.local_steps,
        learning_rate=arguments.learning_rate,
    )
    for doubt in given.doubts:
        print(f"warning: {doubt}", file=sys.stderr)
    text = render(given, run_attacks(given, attacks, arguments.seed), arguments.format)
    write_out(text, arguments.output, "answers")


def _arrays(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arrays that are given, those of weights before and after as their gradient."""
    from analysis.arrays import read_array
    from analysis.given import gradient_of

    paths = vars(arguments)
    arrays = {
        name: read_array(paths[name])
        for name in ("weight_gradient", *(option.replace("-", "_") for option in _KNOWN))
        if paths[name] is not None
    }
    for part, gradient, model in (
        ("weights", "weight_gradient", "model_weights"),
        ("bias", "bias_gradient", "model_bias"),
    ):
        before, after = paths[f"{part}_before"], paths[f"{part}_after"]
        if before is None and after is None:
            continue
        if before is None or after is None:
            raise UserError(f"--{part}-before and --{part}-after belong together")
        if gradient in arrays:
            raise UserError(f"--{gradient.replace('_', '-')} and --{part}-before are alternatives")
        if arguments.learning_rate is None:
            raise UserError(f"--{part}-before: without --learning-rate there is no gradient")
        start = read_array(before)
        arrays[gradient] = gradient_of(start, read_array(after), arguments.learning_rate)
        if part == "weights" or "model_weights" in arrays:
            arrays.setdefault(model, start)
    return arrays


def write_out(text: str, path: Path | None, what: str) -> None:
    """Write text to a file, or print it; `UserError` where the file cannot be written.

    Files may hold any text as the name of something: a terminal gets what can be printed.
    """
    text = "\n".join(map(printable, text.split("\n")))
    if path is None:
        print(text, end="")
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot write the {what}: {error.strerror}") from None


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "replay": _replay,
    "attack": _attack,
}
