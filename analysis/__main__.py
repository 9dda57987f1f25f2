"""The command line: ``python -m analysis show|table|compare|tradeoff|figures|replay|attack``."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.commands import COMMANDS, FILES, add_parsers, write_out
from testbed.errors import UserError

_STYLES = ("text", "csv", "markdown", "latex")
_FORMATS = ("png", "pdf", "svg")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        Arguments; those of the process by default.

    Returns
    -------
    int
        Exit status: 0, or 2 for what the user has to mend.
    """
    arguments = _parser().parse_args(argv)
    try:
        commands = {
            "show": _show,
            "table": _table,
            "compare": _compare,
            "tradeoff": _tradeoff,
            "figures": _figures,
            **COMMANDS,
        }
        if "files" in arguments:
            from analysis.files import expand_files

            arguments.files = expand_files(arguments.files)
        commands[arguments.command](arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader (`head`, a pager) has seen enough; Python would complain on flushing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="analysis",
        description="Analyse results files offline: complete ones, ones that are still being "
        "written, and ones left behind by a run that was killed (NAME stands for NAME.partial "
        "too). The shares of an experiment (--share i/n, as of a job array) are read as one run.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    show = commands.add_parser("show", help="what is in a file, and how far it is")
    table = commands.add_parser(
        "table", help="success of each attack in each scenario, beside guessing and the oracle"
    )
    table.add_argument(
        "--rows",
        choices=("auto", "scenarios", "attacks"),
        default="auto",
        help="what has a row of its own (default: attacks where there are more than 8)",
    )
    table.add_argument(
        "--per-seed",
        action="store_true",
        help="keep scenarios apart that differ in the seed alone (default: average them)",
    )
    compare = commands.add_parser(
        "compare", help="one attack against the best of the others, with the difference's interval"
    )
    compare.add_argument("--attack", metavar="LABEL", required=True, help="the attack")
    compare.add_argument(
        "--against",
        type=_labels,
        default=[],
        metavar="A,B,...",
        help="the others (default: all that know no more)",
    )
    tradeoff = commands.add_parser(
        "tradeoff",
        help="what leaks in spite of each defence, beside accuracy, bytes and privacy",
        description="Leakage by the strongest attack, as it is and adapted to the defences, "
        "beside final accuracy, bytes on the wire and privacy budget of each scenario; as a table, "
        "or as a figure where the name of the output ends in .png, .pdf or .svg.",
    )
    tradeoff.add_argument(
        "--attack",
        type=_labels,
        default=[],
        metavar="A,B,...",
        help="the strongest of these attacks, in place of all",
    )
    tradeoff.add_argument(
        "--last",
        type=int,
        default=1,
        metavar="K",
        help="final accuracy: mean of the last K evaluated rounds (default: 1)",
    )
    for command in (table, compare, tradeoff):
        command.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to a file")
        command.add_argument(
            "--format", choices=_STYLES, default="text", help="csv is the tidy form (default: text)"
        )
        command.add_argument(
            "--metric", default="asr", metavar="NAME", help="metric to show (default: asr)"
        )
    figures = commands.add_parser(
        "figures",
        help="success against batch size, stage of training and the like, or as a matrix of all "
        "attacks and scenarios; gradients against number of occurrences",
    )
    figures.add_argument(
        "-o", "--output", type=Path, metavar="DIR", required=True, help="folder to write to"
    )
    figures.add_argument("--format", choices=_FORMATS, default="png", help="(default: png)")
    for command in (table, figures):
        command.add_argument(
            "--attacks", type=_labels, default=[], metavar="A,B,...", help="these attacks alone"
        )
    for command in (show, table, compare, tradeoff, figures):
        command.add_argument("files", nargs="+", metavar="FILE", help=FILES)
    add_parsers(commands)
    return parser


def _labels(text: str) -> list[str]:
    labels = [label.strip() for label in text.split(",") if label.strip()]
    if not labels:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected labels of attacks: A,B,...")
    return labels


def _show(arguments: argparse.Namespace) -> None:
    from analysis.show_shares import show_all

    write_out("\n".join(show_all(arguments.files)), None, "description")


def _table(arguments: argparse.Namespace) -> None:
    from analysis.load import load_attacked
    from analysis.scenarios import choose_attacks
    from analysis.table import render

    frame = choose_attacks(load_attacked(*arguments.files), arguments.attacks)
    text = render(
        frame, arguments.format, arguments.metric, arguments.rows, per_seed=arguments.per_seed
    )
    _note_incomplete(arguments.files, shares=_is_elsewhere(arguments))
    write_out(text, arguments.output, "table")


def _compare(arguments: argparse.Namespace) -> None:
    from analysis.compare import render_comparison
    from analysis.load import load_attacked

    text = render_comparison(
        load_attacked(*arguments.files),
        arguments.attack,
        arguments.format,
        arguments.metric,
        arguments.against,
    )
    _note_incomplete(arguments.files, shares=_is_elsewhere(arguments))
    write_out(text, arguments.output, "table")


def _tradeoff(arguments: argparse.Namespace) -> None:
    from analysis.load import load_attacked
    from analysis.tradeoff import render_tradeoff

    frame, output = load_attacked(*arguments.files), arguments.output
    options = (arguments.attack, arguments.metric, arguments.last)
    if output is not None and output.suffix.removeprefix(".") in _FORMATS:
        from analysis.tradeoff_figure import save_tradeoff

        print(save_tradeoff(frame, output, *options))
    else:
        write_out(render_tradeoff(frame, arguments.format, *options), output, "table")
    _note_incomplete(arguments.files, shares=_is_elsewhere(arguments))


def _figures(arguments: argparse.Namespace) -> None:
    from analysis.figures import figures

    for path in figures(arguments.files, arguments.output, arguments.format, arguments.attacks):
        print(path)
    _note_incomplete(arguments.files, shares=_is_elsewhere(arguments))


def _is_elsewhere(arguments: argparse.Namespace) -> bool:
    """Return whether the notes of a table or a figure are not on the screen."""
    return arguments.format == "csv" or arguments.output is not None


def _note_incomplete(files: Sequence[str], *, shares: bool) -> None:
    """Say on standard error what tables do not show: rounds that lack, sums that were clipped.

    Which shares are missing stands under tables, where a user sees these.
    """
    from analysis.share_notes import share_notes
    from analysis.shares import share_file, share_sets
    from analysis.show import clipped_entries, progress
    from testbed.results.reader import open_results

    found, notes = [], []
    for file in files:
        with open_results(file) as results:
            found.append(share_file(file, results))
            if not results.complete and found[-1].count == 1:
                notes.append(f"{results.path}: {progress(results)}")
            clipped = clipped_entries(results)
            if clipped:
                notes.append(f"{results.path}: {clipped}")
    for note in [*(share_notes(share_sets(found)) if shares else ()), *notes]:
        print(f"note: {note}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
