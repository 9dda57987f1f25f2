"""A client's side of secure aggregation: the message that a survivor sends."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from testbed.secure.fixed_point import Encoded
from testbed.secure.keys import ClientKeys, client_keys
from testbed.secure.masks import add_mask, agree, subtract_mask
from testbed.secure.protocol import SecureRound, checksum, header
from testbed.secure.shamir import BYTES, share


def write_message(
    round_: SecureRound,
    seeds: Sequence[int],
    client: int,
    encoded: Encoded,
    out: NDArray[np.uint8],
) -> int:
    """Write what a survivor sends; return its length, `SecureRound.message_bytes`.

    Parameters
    ----------
    round_
        Who takes part and who survives.
    seeds
        An unsigned 64-bit seed for each client of the cohort, in its order, of this round alone.
        Those of the others stand for what the client would have received from them.
    client
        The survivor that sends.
    encoded
        uint32 or uint64 [P]: its vector times its weight. May be ``round_.vector(out)``.
    out
        uint8, at least as long as the message.

    Raises
    ------
    TooFewSurvivorsError
        Fewer than the threshold survive: clients reveal nothing then.
    ValueError
        The client does not survive, or a length or type is not the round's.
    """
    round_.check()
    if client not in round_.survivors:
        raise ValueError(f"client {client} is no survivor")
    if len(seeds) != len(round_.cohort):
        raise ValueError(f"found {len(seeds)} seeds; expected {len(round_.cohort)}")
    if encoded.shape != (round_.size,) or encoded.dtype != round_.dtype:
        raise ValueError(
            f"found integers {encoded.dtype}{list(encoded.shape)}; "
            f"expected {round_.dtype}[{round_.size}]"
        )
    if out.size < round_.message_bytes:
        raise ValueError(f"found room for {out.size} bytes; expected {round_.message_bytes}")
    message = out[: round_.message_bytes]
    keys = _cohort_keys(tuple(seeds), round_.threshold)
    survivors = set(round_.survivors)
    survives = [member in survivors for member in round_.cohort]
    position = round_.cohort.index(client)
    own = keys[position]

    vector = round_.vector(message)
    vector[:] = encoded
    add_mask(vector, own.self_secret)
    for other, theirs in enumerate(keys):
        if other != position:
            mask = add_mask if position < other else subtract_mask
            mask(vector, agree(own.pair_secret, theirs.public))

    shares = round_.shares(message)
    for row, theirs, alive in zip(shares, keys, survives, strict=True):
        coefficients = theirs.self_polynomial if alive else theirs.pair_polynomial
        value = share(coefficients, position + 1)
        row[:] = np.frombuffer(value.to_bytes(BYTES, "little"), np.uint8)

    commitments = [k.commitment for k, alive in zip(keys, survives, strict=True) if alive]
    record = header(message)
    record["length"] = message.size
    record["client"] = client
    record["session"] = list(round_.session([k.public for k in keys], commitments))
    record["public"] = list(own.public)
    record["checksum"] = checksum(message)
    return message.size


# A rank writes the messages of many clients of the same round, or of a few at once.
@lru_cache(maxsize=4)
def _cohort_keys(seeds: tuple[int, ...], threshold: int) -> tuple[ClientKeys, ...]:
    return tuple(client_keys(seed, threshold) for seed in seeds)
