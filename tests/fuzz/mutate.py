"""Damages bytes, text and trees of plain values, by chance and by what readers stumble over."""

import random
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

_EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_LONG = (0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF, 1 << 40)
# What text formats are asked to take for a number, a name, or a word.
WORDS = (
    *("", "0", "-1", "1e999", "-1e999", "1e-999", "NaN", "Infinity", "-inf", ".inf", ".nan"),
    *("2147483648", "-9223372036854775809", "18446744073709551616", "9" * 400, "9" * 5000),
    *("0x" + "f" * 4000, "0b" + "1" * 20000, "1:" * 400 + "1", "1_000", "٣", "²"),
    *("true", "no", "null", "~", "~nobody-of-that-name/x", "../../..", "/dev/zero", "/", "."),
    *(
        "\x00",
        "\x1b[2J",
        "\r",
        "\n",
        "\u2028",
        "\u202e",
        "\ufeff",
        "\ud800",
        "é" * 100,
        "a" * 70000,
    ),
    *("{", "}", "[", "]", '"', "'", ":", ",", "&a", "*a", "!!python/object/apply:os.system", "<<"),
    *("%s", "{0}", "$HOME", "__class__", "__proto__", "constructor", "2024-01-01", "1.0e+400"),
)


def damage(content: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """Return the content after one to four edits; parts of ``other`` may be put in."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        content = rng.choice(_EDITS)(content, rng, other or content)
    return content


def _flip(content: bytes, rng: random.Random, _: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if changed:
            changed[_place(changed, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _byte(content: bytes, rng: random.Random, _: bytes) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[_place(changed, rng)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(changed)


def _integer(content: bytes, rng: random.Random, _: bytes) -> bytes:
    """Set what may be an integer field to an extreme, or to one near what it is."""
    width, order = rng.choice((1, 2, 4, 4, 8)), rng.choice("<>")
    if len(content) < width:
        return content
    # Fields are aligned more often than not.
    place = _place(content[: len(content) - width + 1], rng)
    if rng.random() < 0.6:
        place -= place % width
    code, mask = {1: "B", 2: "H", 4: "I", 8: "Q"}[width], (1 << 8 * width) - 1
    (old,) = struct.unpack_from(f"{order}{code}", content, place)
    near = old + rng.choice((-1, 1, -8, 8, old, -old // 2, 1 << rng.randrange(8 * width)))
    value = rng.choice((near, rng.choice(_EXTREMES), rng.choice(_LONG), rng.getrandbits(64)))
    return content[:place] + struct.pack(f"{order}{code}", value & mask) + content[place + width :]


def _truncate(content: bytes, rng: random.Random, _: bytes) -> bytes:
    return content[: _place(content, rng)] if content else content


def _delete(content: bytes, rng: random.Random, _: bytes) -> bytes:
    start, stop = _range(content, rng)
    return content[:start] + content[stop:]


def _repeat(content: bytes, rng: random.Random, _: bytes) -> bytes:
    start, stop = _range(content, rng)
    return content[:stop] + content[start:stop] * rng.choice((1, 1, 2, 50)) + content[stop:]


def _splice(content: bytes, rng: random.Random, other: bytes) -> bytes:
    start, stop = _range(other, rng)
    place = _place(content, rng) if content else 0
    end = place if rng.random() < 0.3 else place + stop - start
    return content[:place] + other[start:stop] + content[end:]


def _fill(content: bytes, rng: random.Random, _: bytes) -> bytes:
    start, stop = _range(content, rng)
    return content[:start] + rng.choice((b"\0", b"\xff", b" ")) * (stop - start) + content[stop:]


def _noise(content: bytes, rng: random.Random, _: bytes) -> bytes:
    start, stop = _range(content, rng)
    return content[:start] + rng.randbytes(stop - start) + content[stop:]


def _append(content: bytes, rng: random.Random, _: bytes) -> bytes:
    return content + rng.choice((b"\0", b"\n", rng.randbytes(9), content[:200]))


_EDITS: Sequence[Callable[[bytes, random.Random, bytes], bytes]] = (
    *(_flip, _flip, _byte, _byte, _integer, _integer, _integer, _integer),
    *(_truncate, _delete, _repeat, _splice, _fill, _noise, _append),
)


def _place(content: bytes | bytearray, rng: random.Random) -> int:
    """Return a position, in the first half of the cases near the beginning: there are headers."""
    size = max(1, len(content))
    return rng.randrange(min(size, rng.choice((16, 64, 512, 4096))) if rng.random() < 0.5 else size)


def _range(content: bytes, rng: random.Random) -> tuple[int, int]:
    start = _place(content, rng)
    return start, min(len(content), start + rng.choice((1, 2, 4, 8, 16, 100, 1000)))


def damage_text(content: bytes, rng: random.Random) -> bytes:
    """Return text in which words were replaced, dropped, repeated or put in; or any damage."""
    if rng.random() < 0.2:
        return damage(content, rng)
    text = content.decode("utf-8", "surrogateescape")
    for _ in range(rng.choice((1, 1, 2, 3))):
        words = [match.span() for match in re.finditer(r"[\w.+-]+|[^\w\s]", text)]
        start, stop = rng.choice(words) if words else (0, 0)
        word = rng.choice(WORDS)
        new = rng.choice((word, word, text[start:stop] + word, text[start:stop] * 2, ""))
        text = text[:start] + new + text[stop:]
        if rng.random() < 0.15:
            lines = text.splitlines(keepends=True)
            at = rng.randrange(len(lines) + 1)
            lines[at:at] = rng.choice((lines[:1], lines[-1:], ["\n"] * 3, lines[at:] * 2, ["\t"]))
            text = "".join(lines)
    return text.encode("utf-8", "surrogatepass")


def leaf(rng: random.Random) -> Any:
    """Return a plain value that a reader may not have thought of."""
    return rng.choice(
        (
            *(None, True, False, 0, 1, -1, 2, 7, 10, 100, 1000, 1 << 31, -(1 << 63), 1 << 64),
            *(10**40, 10**400, 0.5, -0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")),
            *([], {}, [[]], [{}], [None], {"": None}, {"a": {}}, [0, 1], ["a"], list(range(50))),
            *("a", "llg", "name", rng.choice(WORDS), rng.choice(WORDS), rng.choice(WORDS)),
        )
    )


def damage_tree(tree: Any, rng: random.Random) -> Any:
    """Return a tree of mappings, lists and values in which one to three nodes are others."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        tree = _replaced(tree, rng)
    return tree


def _replaced(node: Any, rng: random.Random) -> Any:
    if isinstance(node, dict) and node and rng.random() < 0.9:
        key = rng.choice(list(node))
        draw = rng.random()
        if draw < 0.08:
            return {name: value for name, value in node.items() if name != key}
        if draw < 0.16:
            new = rng.choice((*WORDS, key.upper(), key + "s", "name", "label"))
            return {**node, new: rng.choice((node[key], leaf(rng)))}
        return {**node, key: _replaced(node[key], rng)}
    if isinstance(node, list) and node and rng.random() < 0.8:
        place, draw = rng.randrange(len(node)), rng.random()
        if draw < 0.1:
            return node[:place] + node[place + 1 :]
        if draw < 0.2:
            return node + [node[place]] * rng.choice((1, 2, 30))
        return [*node[:place], _replaced(node[place], rng), *node[place + 1 :]]
    if rng.random() < 0.1:
        return nested(node, rng.choice((2, 30, 100, 200)), rng)
    return leaf(rng)


def nested(node: Any, depth: int, rng: random.Random) -> Any:
    """Return a value deep inside lists or mappings."""
    mapping = rng.random() < 0.5
    for _ in range(depth):
        node = {"a": node} if mapping else [node]
    return node
