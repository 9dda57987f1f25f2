"""Command lines: what is printed is what is run."""

import os
import shlex
import subprocess
import sys

import pytest
from fakes import script
from hypothesis import given
from hypothesis import strategies as st
from launching import finish

from launch.words import Command, NoAnswer
from testbed.errors import UserError

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)


@given(
    st.lists(TEXTS, min_size=1), st.dictionaries(st.from_regex(r"[A-Z]+", fullmatch=True), TEXTS)
)
def test_a_printed_line_has_every_word_and_every_setting(words, settings):
    printed = shlex.split(str(Command(words, settings)))
    assert printed == [*(f"{name}={value}" for name, value in settings.items()), *words]


def test_a_printed_line_does_in_a_shell_what_the_command_does():
    words = ["sh", "-c", 'printf "%s|" "$NAME" "$@"', "sh", "two words", "$HOME", "it's", "", "*"]
    command = Command(words, {"NAME": "a 'b' $c"})
    by_shell = subprocess.run(str(command), shell=True, capture_output=True, text=True, check=True)
    assert command.finish().stdout == by_shell.stdout == "a 'b' $c|two words|$HOME|it's||*|"


def test_a_finished_program_has_its_status_and_what_it_said():
    said = Command(["sh", "-c", r"cat; echo out; printf '\377' >&2; exit 7"]).finish()
    assert (said.returncode, said.stdout, said.stderr) == (7, "out\n", "\N{REPLACEMENT CHARACTER}")


def test_a_program_that_does_not_come_to_its_end_is_killed():
    with pytest.raises(NoAnswer, match=r"^sleep 60: no answer within 0\.2 s$"):
        Command(["sleep", "60"]).finish(0.2)
    # That it raises at all says that it was not waited for: the program would end with status 0.


def test_programs_that_cannot_be_started_are_errors_of_one_line(tmp_path):
    (tmp_path / "text").write_text("no program")
    for word, reason in (("absent", "No such file or directory"), ("text", "Permission denied")):
        path = tmp_path / word
        for run in (Command([str(path)]).finish, Command([str(path)]).replace_this_process):
            with pytest.raises(UserError) as caught:
                run()
            assert str(caught.value) == f"{path}: cannot be started: {reason}"


def test_a_program_takes_the_place_of_this_process(tmp_path):
    # SigIgn: bit 12 is SIGPIPE, which Python ignores.
    program = script(tmp_path, "p", 'echo "$$ $NAME $1"; grep SigIgn /proc/$$/status; exit 9')
    code = (
        "import os\nfrom launch.words import Command\nprint(os.getpid())\n"
        f"Command([{str(program)!r}, 'a b'], {{'NAME': 'value'}}).replace_this_process()\n"
    )
    done = finish([sys.executable, "-c", code])
    before, after, ignored = done.out.splitlines()
    assert after == f"{before} value a b"
    assert not int(ignored.split()[1], 16) & 1 << 12
    assert done.status == 9


def test_settings_are_beside_those_of_this_process(monkeypatch):
    monkeypatch.setenv("KEPT", "1")
    said = Command(["sh", "-c", 'echo "$KEPT $ADDED"'], {"ADDED": "2"}).finish()
    assert said.stdout == "1 2\n"
    assert "ADDED" not in os.environ
