import builtins
import copyreg
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from official_files import Python2Pickle, cifar_bytes, cifar_rows
from traced import peak_below

from testbed.data.pickles import MAX_BYTES, read_pickle
from testbed.errors import UserError


class Reduces:
    """Pickles as a call."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call = (call, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Plain:
    """Pickles by copyreg in protocol 0 and 1, by NEWOBJ later."""

    def __init__(self) -> None:
        self.value = 1


def failure(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_pickle(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    return message


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "call",
    [
        (os.system, "mkdir {mark}"),
        (builtins.eval, "__import__('os').mkdir({mark!r})"),
        (builtins.exec, "__import__('os').mkdir({mark!r})"),
        (Path.mkdir, Path("{mark}")),
    ],
)
def test_calls_nothing(tmp_path: Path, protocol: int, call: tuple[Any, Any]) -> None:
    mark = tmp_path / "mark"
    argument = type(call[1])(str(call[1]).format(mark=str(mark)))
    content = pickle.dumps({"data": Reduces(call[0], argument)}, protocol)
    # It would work, unless it is refused.
    pickle.loads(content)
    assert mark.exists()
    mark.rmdir()
    assert "refused: its pickle" in failure(tmp_path / "file", content)
    assert not mark.exists()


def test_refused_name_is_named(tmp_path: Path) -> None:
    message = failure(tmp_path / "file", pickle.dumps(Reduces(os.system, "true"), 2))
    assert f"{os.system.__module__}.system" in message
    assert "nothing of it was run" in message


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        Plain(),
        Reduces(vars(copyreg)["_reconstructor"], Plain, object, None),
        np.array([Plain()], object),
        np.array([(1, 2)], [("a", int), ("b", int)]),
        np.array(["text"]),
        np.float64(1),
        np.dtype("O"),
        {1, 2},
        frozenset({1}),
        bytearray(b"x"),
        1j,
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_objects_are_refused(tmp_path: Path, protocol: int, value: Any) -> None:
    failure(tmp_path / "file", pickle.dumps({"data": value}, protocol))


def test_object_array_message(tmp_path: Path) -> None:
    array = np.array([Reduces(os.system, "true")], object)
    assert "array of type 'O8', expected integers" in failure(
        tmp_path / "file", pickle.dumps(array, 3)
    )


CORE = b"cnumpy.core.multiarray\n_reconstruct\n"
ARRAY = CORE + b"cnumpy\nndarray\nK\0\x85C\x01b\x87R"
U1 = b"cnumpy\ndtype\nX\2\0\0\0u1\x85R"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        # The name comes from the stack, where no scan sees it.
        (b"\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R", "'posix.system'"),
        (b"cnumpy\nndarray\nK\1\x85R", "damaged"),
        (CORE + b"cnumpy\ndtype\nK\0\x85C\x01b\x87R", "something else than a plain array"),
        (CORE + b"cbuiltins\nlist\n)\x87R", "'builtins.list'"),
        (CORE + b")R", "something else than a plain array"),
        # BUILD on what find_class returned must not alter it.
        (CORE + b"}X\x01\0\0\0xK\1sb", "damaged"),
        (CORE + b"N}X\x08\0\0\0__call__K\1s\x86b", "damaged"),
        (b"cnumpy\ndtype\n}X\x01\0\0\0xK\1sb", "damaged"),
        (ARRAY + b"Nb", "without shape, type and elements"),
        (ARRAY + b"(NNNNNtb", "not a plain one"),
        (ARRAY + b"(K\1K\1\x85" + U1 + b"\x89X\1\0\0\0atb", "not a plain one"),
        (ARRAY + b"(K\1J\xff\xff\xff\xff\x85" + U1 + b"\x89C\0tb", "not a plain one"),
        (ARRAY + b"(K\1\x88\x85" + U1 + b"\x89C\1atb", "not a plain one"),
        (ARRAY + b"(K\1J\0\0\0\x10\x85" + U1 + b"\x89C\1atb", "268435456 bytes by its shape"),
        (ARRAY + b"(K\1(" + b"K\1" * 100 + b"t" + U1 + b"\x89C\1atb", "damaged"),
        (b"cnumpy\ndtype\nX\2\0\0\0O8\x85R", "type 'O8'"),
        (b"cnumpy\ndtype\n)R", "type 'None'"),
        (b"cnumpy\ndtype\n]\x85R", "type 'None'"),
        (U1 + b"(K\3X\1\0\0\0|tb", "compound type"),
        (U1 + b"(K\3X\1\0\0\0|K\1NNtb", "compound type"),
        (U1 + b"(K\3X\1\0\0\0?NNNtb", "compound type"),
        (b"Pid\n", "opcode PERSID"),
        (b"K\1Q", "opcode BINPERSID"),
        (b"\x82\1", "opcode EXT1"),
        (b"(cposix\nsystem\no", "opcode OBJ"),
        (b"(iposix\nsystem\n", "opcode INST"),
        (b"cposix\nsystem\n)\x81", "opcode NEWOBJ"),
        (b"I1\n", "opcode INT"),
        # Bombs: memory, the C stack, the memo table.
        (b"K\1r\xff\xff\xff\x7f", "memo slot 2147483647"),
        (b"]" * 501, "more than 500 containers"),
        (b"N" + b"\x85" * 100_000 + b"}\x94h\0K\1s", "more than 500 containers"),
        (b"\x8e" + b"\xff" * 7 + b"\x7f", "damaged"),
        (b"B\xff\xff\xff\xff", "damaged"),
        (b"T\xff\xff\xff\xff", "damaged"),
        (b"\x95" + b"\xff" * 7 + b"\x7f", "damaged"),
        (b"]\x94h\0a}h\0K\1s", "damaged"),
    ],
)
def test_crafted_pickle(tmp_path: Path, body: bytes, expected: str) -> None:
    path = tmp_path / "file"
    with peak_below(8e6):
        message = failure(path, b"\x80\x04" + body + b".")
    assert expected in message


def test_too_many_values(tmp_path: Path) -> None:
    content = b"\x80\x02](" + b"N" * 1_000_001 + b"e."
    assert "or 1000000 values" in failure(tmp_path / "file", content)


def test_too_large_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(UserError, match=f"at most {MAX_BYTES} bytes"):
        read_pickle(path)


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_pickle(tmp_path)


def test_names_with_line_breaks_stay_in_one_line(tmp_path: Path) -> None:
    module = b"a\nb" * 50
    content = b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c\x01x\x93."
    assert r"'a\nb" in failure(tmp_path / "file", content)


def test_plain_values_are_read(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "b": (b"x", "y"), "c": {"d": 2**70}, "e": ()}
    for protocol in (3, 4):
        (tmp_path / "file").write_bytes(pickle.dumps(value, protocol))
        assert read_pickle(tmp_path / "file") == value


def test_arrays_own_no_copy_and_are_read_only(tmp_path: Path) -> None:
    pickle2 = Python2Pickle()
    pickle2.raw(b"}")
    pickle2.string(b"data")
    pickle2.array((2, 3), b"u1", bytes(range(6)))
    pickle2.raw(b"s")
    (tmp_path / "file").write_bytes(pickle2.finish())
    array = read_pickle(tmp_path / "file")["data"]
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert not array.flags.writeable


CONTENT = cifar_bytes(cifar_rows(1, 0)[:, :4], [5])


def test_damage_is_found_in_lengths(tmp_path: Path) -> None:
    # A wrong length shifts all that follows.
    start = CONTENT.index(b"numpy\ndtype")
    place = CONTENT.index(struct.pack("<BB", ord("U"), 4), start)
    content = CONTENT[: place + 1] + b"\x05" + CONTENT[place + 2 :]
    failure(tmp_path / "file", content)
