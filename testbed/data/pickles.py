"""Read pickles that hold plain values and integer arrays, and nothing else, without running them.

A pickle is a program. Two fences keep a hostile one harmless: its opcodes are checked against a
list before any is executed, and the only names that it may call lead to stand-ins defined here,
not to NumPy's own constructors, which were never meant for hostile arguments.
"""

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from testbed.errors import UserError

# Bounds that honest files stay far below: CIFAR-100's training file has 155 MB, a quarter of a
# million opcodes and a dozen containers.
MAX_BYTES = 1 << 29
_MAX_OPCODES = 1_000_000
_MAX_CONTAINERS = 500

_CONTAINERS = frozenset("EMPTY_LIST EMPTY_DICT EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3".split())  # noqa: SIM905
_PUTS = frozenset({"BINPUT", "LONG_BINPUT"})
_OPCODES = (
    _CONTAINERS
    | _PUTS
    | frozenset(
        """
        PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
        BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8
        SHORT_BINUNICODE BINUNICODE BINUNICODE8
        APPEND APPENDS SETITEM SETITEMS MEMOIZE BINGET LONG_BINGET
        GLOBAL STACK_GLOBAL REDUCE BUILD
        """.split()  # noqa: SIM905
    )
)
_INTEGERS = frozenset({"i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"})


def read_pickle(path: Path) -> dict[str, Any]:
    """Return the dictionary that a pickle holds.

    Values may be None, booleans, numbers, str, bytes, tuples, lists and dictionaries of these, and
    NumPy arrays of integers (read-only, not copied from the pickle's bytes). Python 2's strings
    are read as bytes, except that the dictionary's keys become str; other keys are left out.

    Parameters
    ----------
    path
        A pickle of protocol 2 or later, of at most `MAX_BYTES`.

    Raises
    ------
    UserError
        If the file cannot be read, is damaged, is too large, calls for anything else, or does not
        hold a dictionary.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: {size} bytes; expected a pickle of at most {MAX_BYTES} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); expected a readable pickle"
        ) from error
    try:
        _check_opcodes(content)
        value = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except _RefusedError as error:
        raise UserError(
            f"{path}: refused: {error}; nothing of it was run: get the official file again"
        ) from error
    # A damaged pickle can fail in any way that Python's own objects can.
    except Exception as error:
        reason = _brief(" ".join(str(error).split()) or type(error).__name__)
        raise UserError(
            f"{path}: damaged pickle ({reason}); expected the official file: get it again"
        ) from error
    if not isinstance(value, dict):
        kind = type(value).__name__.lstrip("_").lower()
        raise UserError(
            f"{path}: the pickle holds a {kind}; expected a dict: is it the right file?"
        )
    return {
        key.decode("latin-1") if isinstance(key, bytes) else str(key): (
            item.values if isinstance(item, _Array) else item
        )
        for key, item in value.items()
        if isinstance(key, (bytes, str))
    }


class _RefusedError(Exception):
    """The pickle wants something that no data file needs."""


def _check_opcodes(content: bytes) -> None:
    containers = puts = position = 0
    for count, (opcode, argument, found) in enumerate(pickletools.genops(content)):
        if opcode.name not in _OPCODES:
            raise _RefusedError(f"its pickle uses the opcode {opcode.name}, expected plain data")
        containers += opcode.name in _CONTAINERS
        # Nested tuples exhaust the C stack when they are hashed, objects the memory.
        if containers > _MAX_CONTAINERS or count > _MAX_OPCODES:
            raise _RefusedError(
                f"its pickle builds more than {_MAX_CONTAINERS} containers or {_MAX_OPCODES} values"
            )
        if opcode.name in _PUTS:
            # Python makes room for every slot below the one that is named.
            if argument is None or argument > puts:
                raise _RefusedError(f"its pickle names memo slot {argument}, expected {puts}")
            puts += 1
        position = found or 0
    if position != len(content) - 1:
        raise ValueError(
            f"{len(content) - 1 - position} bytes after its end, expected nothing there"
        )


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case (("numpy.core.multiarray" | "numpy._core.multiarray"), "_reconstruct"):
                return _Reconstruct()
            case "numpy", "ndarray":
                return _NdarrayClass()
            case "numpy", "dtype":
                return _DtypeClass()
        raise _RefusedError(
            f"its pickle names {_brief(f'{module}.{name}')!r}, "
            "expected none but NumPy's array constructor"
        )


# Instances without attributes, not functions or classes: the opcode BUILD can alter those.
class _NdarrayClass:
    __slots__ = ()


class _Reconstruct:
    __slots__ = ()

    def __call__(self, *arguments: Any) -> "_Array":
        if len(arguments) != 3 or not isinstance(arguments[0], _NdarrayClass):
            raise _RefusedError("its pickle builds something else than a plain array")
        return _Array()


class _DtypeClass:
    __slots__ = ()

    def __call__(self, *arguments: Any) -> "_Dtype":
        code = _text(arguments[0]) if arguments else None
        if code not in _INTEGERS:
            raise _RefusedError(
                f"its pickle holds an array of type {_brief(str(code))!r}, expected integers"
            )
        return _Dtype(code)


class _Dtype:
    """The state of a NumPy dtype: version, byte order, subtype, names, fields, sizes, flags."""

    __slots__ = ("value",)

    def __init__(self, code: str) -> None:
        self.value = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if not (
            isinstance(state, tuple)
            and len(state) >= 5
            and _text(state[1]) in {"|", "<", ">", "="}
            and state[2:5] == (None, None, None)
        ):
            raise _RefusedError("its pickle holds an array of a compound type, expected integers")
        self.value = np.dtype(f"{_text(state[1])}{self.value.str[1:]}")


class _Array:
    """The state of a NumPy array: version, shape, dtype, Fortran order, elements."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise _RefusedError("its pickle holds an array without shape, type and elements")
        _, shape, dtype, fortran, elements = state
        if not (
            isinstance(shape, tuple)
            and all(type(size) is int and 0 <= size <= MAX_BYTES for size in shape)
            and isinstance(dtype, _Dtype)
            and isinstance(elements, bytes)
        ):
            raise _RefusedError("its pickle holds an array that is not a plain one of integers")
        claimed = math.prod(shape) * dtype.value.itemsize
        if claimed != len(elements):
            raise ValueError(
                f"an array of {claimed} bytes by its shape, but {len(elements)} by its content"
            )
        order: Literal["F", "C"] = "F" if fortran else "C"
        self.values = np.frombuffer(elements, dtype.value).reshape(shape, order=order)


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return value if isinstance(value, str) else None


def _brief(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
