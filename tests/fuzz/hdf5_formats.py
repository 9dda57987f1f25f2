"""Files of HDF5: packed data sets, and results files as every command of `analysis` reads them."""

import io
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import written
from build_file import Spec, build
from command_lines import analysis
from data_formats import reads
from formats import Files, Format, Input
from hdf5_edits import FIFO, edited
from mutate import damage

from testbed.results.writer import partial_path

# Figures take a second each.
_COMMANDS = (
    *[("show",)] * 4,
    *[("table",), ("table", "--rows=attacks"), ("table", "--metric=presence_f1", "--format=csv")]
    * 2,
    *[("compare", "--attack=llg"), ("tradeoff",), ("tradeoff", "--format=csv", "--last=2")],
    *[("replay", "--attack", "llg", "--only"), ("replay", "--attack", "ebi", "--label", "new")] * 2,
)
_SLOW = (
    ("figures", "--format=svg"),
    ("tradeoff", "-o", "tradeoff.svg"),
    ("figures", "--attacks=llg"),
)


def packed() -> list[Files]:
    """Return two data sets as `data pack` writes them, or might."""
    rng = np.random.default_rng(0)
    files: list[Files] = []
    for dtype in (np.uint8, np.float32):
        image = io.BytesIO()
        with h5py.File(image, "w", libver=("v110", "v110")) as file:
            file.attrs.update({"encoding-type": "testbed-dataset", "encoding-version": "1.0"})
            file.attrs.update(name="digits", variant="", classes=3, test_start=9)
            file.attrs["scale"] = 1 / 255 if dtype == np.uint8 else 1.0
            file["labels"], file["users"] = np.arange(12) % 3, np.arange(12) % 2
            names = np.array(["a", "b", "é"], object)
            file.create_dataset("class_names", data=names, dtype=h5py.string_dtype())
            pixels = (
                rng.integers(0, 256, (12, 1, 4, 5))
                if dtype == np.uint8
                else rng.random((12, 1, 4, 5))
            )
            options = {"compression": 4, "shuffle": True} if dtype == np.uint8 else {}
            file.create_dataset(
                "images", data=pixels.astype(dtype), chunks=(5, 1, 4, 5), fletcher32=True, **options
            )
        files.append({"data": image.getvalue()})
    return files


def results() -> list[Files]:
    """Return small results files: a sweep, a training with defences, secure sums."""
    small = {"rounds": 3, "clients": 2, "classes": 4}
    trained = Spec(
        {"defenses": [{"name": "top_k", "share": 0.9}]},
        trained=True,
        accuracy=0.5,
        adapted={"llg+adapted": "llg", "llg+rounds": "llg"},
        accumulated=["llg+rounds"],
        attacks=("random", "llg", "llg+adapted", "llg+rounds"),
        broken={"llg": {"relu": "the features are negative"}},
        privacy={"epsilon": 3.0, "delta": 1e-5, "note": "a note"},
        **small,
    )
    specs = (
        [Spec({"federation.batch_size": size}, **small) for size in (2, 8)],
        [Spec({"defenses": []}, trained=True, accuracy=0.4, **small), trained],
        [Spec(cohort=3, dropout=0.2, idle={"llg_plus": "why not"}, **small)],
    )
    found: list[Files] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, spec in enumerate(specs):
            path = build(Path(folder, f"{number}.h5"), spec, committed=[2] * len(spec))
            found.append({"data": path.read_bytes()})
    return found


def unfinished() -> list[Files]:
    """Return what a writer leaves that is stopped in the middle, as the program writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.h5")
        told = {"title": "A title", "created": "2026-01-02T03:04:05+00:00"}
        writer = written.make(path, attributes=told)
        for number in range(4):
            writer.append(0, number, written.rows_of(written.HEADER, number))
        writer.close()
        return [{"run.h5.partial": partial_path(path).read_bytes()}]


def _resume(folder: Path, _: Sequence[str]) -> None:
    _traps(folder)
    written.resume(folder / "run.h5").close()


def _edit_unfinished(files: Files, rng: random.Random) -> Files:
    change = edited if rng.random() < 0.6 else damage
    return {name: change(content, rng) for name, content in files.items()}


def _edit(files: Files, rng: random.Random) -> Input:
    return Input({**files, "data": edited(files["data"], rng)}, _command(rng))


def _damage(files: Files, rng: random.Random) -> Input:
    return Input({**files, "data": damage(files["data"], rng)}, _command(rng))


def _command(rng: random.Random) -> Sequence[str]:
    return rng.choice(_COMMANDS if rng.random() < 0.97 else _SLOW)


def _packed(folder: Path, _: Sequence[str]) -> None:
    _traps(folder)
    _read_packed(folder, ())


_read_packed = reads("packed")


def _results(folder: Path, arguments: Sequence[str]) -> None:
    _traps(folder)
    name, *options = arguments or ("table",)
    if name == "replay":
        analysis(name, str(folder / "data"), *options, "-o", str(folder / "replayed.h5"))
        return
    if name == "figures":
        options += ["-o", str(folder / "figures")]
    os.chdir(folder)
    try:
        analysis(name, *options, "data")
    finally:
        os.chdir(folder.parent)


def _traps(folder: Path) -> None:
    """Lay traps where a file that names another one would find it."""
    for place in (folder, folder.parent):
        if not (place / FIFO).exists():
            os.mkfifo(place / FIFO)


FORMATS = {
    form.name: form
    for form in (
        Format("packed", packed, _packed, _edit),
        Format("packed-bytes", packed, _packed, _damage),
        Format("results", results, _results, _edit, seconds=60, share=0.3),
        Format("resume", unfinished, _resume, _edit_unfinished, seconds=60, share=0.5),
        Format("results-bytes", results, _results, _damage, seconds=60, share=0.6),
    )
}
