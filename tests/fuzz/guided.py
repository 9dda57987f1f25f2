"""Fuzzing guided by coverage, by hand: ``python tests/fuzz/guided.py FORMAT FILE [OPTION ...]``.

FILE is the name of the format's file that is varied; options are libFuzzer's, such as
``-max_total_time=600``. Needs atheris (``pip install atheris``), which is no part of the tests: it
has no wheels for every Python. It ends at the first input that is neither read nor refused.
"""

import os
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import atheris

with atheris.instrument_imports(include=["testbed", "analysis"]):
    from formats import Input, find
    from worker import try_one

    NAME, FILE = sys.argv[1:3]
    FORM = find(NAME)
    SEEDS = FORM.seeds()

from sandbox import Sandbox


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus = Path(tempfile.mkdtemp(prefix="fuzz-corpus-"))
    for number, seed in enumerate(SEEDS):
        (corpus / str(number)).write_bytes(seed[FILE])
    watching = Sandbox(folder)
    os.chdir(folder)

    def one(content: bytes) -> None:
        given = Input({**SEEDS[0], FILE: content})
        outcome, detail = try_one(FORM, given, folder / "in", watching)
        if outcome not in ("accepted", "refused"):
            raise RuntimeError(f"{outcome}\n{detail}")

    def mutated(content: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return atheris.Mutate(content, most)
        try:
            found = FORM.mutate({**SEEDS[0], FILE: content}, rng)
        # What was damaged before may have lost the parts that the mutator looks for.
        except Exception:
            return atheris.Mutate(content, most)
        return (found.files if isinstance(found, Input) else found)[FILE][:most]

    options = [sys.argv[0], *sys.argv[3:], "-max_len=1000000", "-rss_limit_mb=0", str(corpus)]
    atheris.Setup(options, one, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
