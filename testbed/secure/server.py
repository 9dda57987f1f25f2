"""The server's side of secure aggregation: from masked vectors to their sum."""

import numpy as np
from numpy.typing import NDArray

from testbed.secure.fixed_point import Encoded
from testbed.secure.keys import commitment
from testbed.secure.masks import add_mask, agree, public_key, subtract_mask
from testbed.secure.protocol import MessageError, SecureRound, checksum, header
from testbed.secure.shamir import reconstruct, weights


class Aggregator:
    """The server's side of a round: adds up masked vectors and takes the masks off the sum.

    It never has a single vector without its masks, and no seed of a client.
    """

    def __init__(self, round_: SecureRound) -> None:
        self._round = round_
        self._total: Encoded = np.zeros(round_.size, round_.dtype)
        self._publics: dict[int, bytes] = {}
        self._shares: dict[int, NDArray[np.uint8]] = {}
        self._session = b""

    def add(self, client: int, message: NDArray[np.uint8]) -> None:
        """Take a survivor's message, uint8; nothing of it is kept but its shares.

        Raises
        ------
        MessageError
            It is truncated or altered, of another client or round, or was added already.
        """
        round_, what = self._round, f"the message of client {client}"
        if message.size != round_.message_bytes:
            raise MessageError(
                f"{what} has {message.size} bytes; expected {round_.message_bytes}: it was "
                f"truncated, or is of another round"
            )
        record = header(message)
        if record["length"] != message.size or record["checksum"] != checksum(message):
            raise MessageError(f"{what} was altered on its way: the checksum does not fit")
        if record["client"] != client or client not in round_.survivors:
            raise MessageError(f"{what} is of client {record['client']}, or it is no survivor")
        if client in self._shares:
            raise MessageError(f"{what} was added already")
        session = record["session"].tobytes()
        if self._shares and session != self._session:
            raise MessageError(f"{what} is of another round, or of other keys, than those before")
        self._session = session
        self._publics[client] = record["public"].tobytes()
        self._shares[client] = round_.shares(message).copy()
        np.add(self._total, round_.vector(message), out=self._total)

    def finish(self) -> Encoded:
        """Return the sum of the survivors' vectors, uint32 or uint64 [P].

        Raises
        ------
        TooFewSurvivorsError
            Fewer than the threshold survive.
        MessageError
            A survivor's message is missing, or the secrets that the shares give are not those that
            the clients announced.
        """
        round_ = self._round
        round_.check()
        missing = [client for client in round_.survivors if client not in self._shares]
        if missing:
            raise MessageError(f"the messages of clients {missing} are missing")
        secrets = self._reconstruct()
        publics = [
            self._publics.get(client) or public_key(secret)
            for client, secret in zip(round_.cohort, secrets, strict=True)
        ]
        commitments = [
            commitment(secret)
            for client, secret in zip(round_.cohort, secrets, strict=True)
            if client in self._publics
        ]
        if round_.session(publics, commitments) != self._session:
            raise MessageError(
                "the secrets that the shares give are not those that the clients announced: a "
                "message was altered, or clients and server disagree about the round"
            )
        total = self._total.copy()
        for client, secret in zip(round_.cohort, secrets, strict=True):
            if client in self._publics:
                subtract_mask(total, secret)
            else:
                self._cancel(total, client, secret)
        return total

    def _reconstruct(self) -> list[int]:
        """Return each client's secret: the survivors' own masks, the others' private keys."""
        round_ = self._round
        chosen = round_.survivors[: round_.threshold]
        lagrange = weights([round_.cohort.index(client) + 1 for client in chosen])
        secrets = []
        for member in range(len(round_.cohort)):
            rows = (self._shares[client][member] for client in chosen)
            shares = [int.from_bytes(row.tobytes(), "little") for row in rows]
            secrets.append(reconstruct(shares, lagrange))
        return secrets

    def _cancel(self, total: Encoded, dropped: int, private: int) -> None:
        """Add to the sum what the masks of a client that dropped out would have added."""
        for client, public in self._publics.items():
            mask = add_mask if dropped < client else subtract_mask
            mask(total, agree(private, public))
