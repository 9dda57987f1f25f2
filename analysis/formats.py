"""Pages of cells as text, Markdown and LaTeX."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Lines = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Page:
    """A table of cells; every line has as many.

    Attributes
    ----------
    head
        Lines above the rule; the last one names the columns.
    body, foot
        Lines beneath, and those that a rule sets apart at the bottom.
    title
        What the whole page has in common; may be empty.
    """

    head: Lines
    body: Lines
    foot: Lines = ()
    title: str = ""

    @property
    def lines(self) -> Lines:
        """All lines."""
        return [*self.head, *self.body, *self.foot]


def text(pages: Sequence[Page], notes: Sequence[str]) -> str:
    """Return aligned columns."""
    lines: list[str] = []
    for page in pages:
        widths = _widths(page.lines)
        rule = "-" * (sum(widths) + 2 * len(widths) - 2)
        lines += ["", page.title] if lines and page.title else [page.title] if page.title else []
        for part in (page.head, page.body, page.foot):
            lines += ["  ".join(map(str.ljust, line, widths)).rstrip() for line in part]
            lines += [rule] if part else []
    return "\n".join([*lines, *notes]) + "\n"


def markdown(pages: Sequence[Page], notes: Sequence[str]) -> str:
    """Return tables as GitHub renders them: with a single line of heads each."""
    blocks = []
    for page in pages:
        # Markdown has one line of heads; further ones become the first lines of the body.
        order = [page.head[-1], *page.head[:-1], *page.body, *page.foot]
        escaped = [[_escape(cell) for cell in line] for line in order]
        widths = _widths(escaped)
        head, *body = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in escaped]
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        title = [f"**{_escape(page.title)}**", ""] if page.title else []
        blocks += ["\n".join([*title, head, rule, *body, ""])]
    return "\n".join([*blocks, _escape(". ".join(notes)) + "."]) + "\n"


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("*", "\\*")


_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        '"': r"\textquotedbl{}",
        "±": r"$\pm$",
        "†": r"$\dagger$",
    }
)


def latex(pages: Sequence[Page], notes: Sequence[str]) -> str:
    """Return booktabs tables; titles and notes as comments above them."""
    lines = [r"% \usepackage{booktabs}", *("% " + note for note in notes)]
    for page in pages:
        lines += [f"% {page.title}"] if page.title else []
        lines += [r"\begin{tabular}{" + "l" * len(page.head[0]) + "}", r"  \toprule"]
        for part in filter(None, (page.head, page.body, page.foot)):
            lines += [
                "  " + " & ".join(cell.translate(_LATEX) for cell in line) + r" \\" for line in part
            ]
            lines += [r"  \midrule"]
        lines[-1] = r"  \bottomrule"
        lines += [r"\end{tabular}"]
    return "\n".join([*lines, ""])


def _widths(lines: Lines) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


RENDERERS: Mapping[str, Callable[[Sequence[Page], Sequence[str]], str]] = {
    "text": text,
    "markdown": markdown,
    "latex": latex,
}
