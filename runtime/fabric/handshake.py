"""How two endpoints prove to each other that they know the job's secret.

Mutual challenge-response with HMAC-SHA256 (RFC 2104; the shape is that of ISO/IEC 9798-4,
three-pass mutual authentication): each side contributes a fresh nonce, both ids and the lane are
bound into both proofs, and the two proofs carry different labels so that none can be reflected.
All three messages have a fixed size, so a stranger cannot make anybody read or allocate more than 89 bytes.

    dialler  -> acceptor   HELLO: magic, lane, dialler's id, acceptor's id, nonce
    acceptor -> dialler    nonce, HMAC(secret, "accept" + HELLO + nonce)
    dialler  -> acceptor   HMAC(secret, "dial" + HELLO + nonce)

Connections are authenticated when they are made; what follows is neither encrypted nor signed. On a
network where others can read or inject packets, run the job inside an encrypted one (WireGuard,
an encrypting CNI).
"""

from __future__ import annotations

import hmac
import os
import socket
import struct
from enum import IntEnum

from runtime.plan import WorkerId

_MAGIC = b"reknit01"
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_HELLO = struct.Struct(f"!8sBqq{_NONCE_BYTES}s")
MIN_SECRET_BYTES = 16


class Lane(IntEnum):
    """What a link carries, so that nothing urgent queues behind something large."""

    CONTROL = 0
    MAIN = 1
    BACKGROUND = 2


class Refused(Exception):
    """The other side is not who it should be."""


def _proof(secret: bytes, label: bytes, hello: bytes, nonce: bytes) -> bytes:
    return hmac.digest(secret, label + hello + nonce, "sha256")


def dial(sock: socket.socket, secret: bytes, dialler: WorkerId, acceptor: WorkerId, lane: Lane) -> None:
    """The dialler's side, on a connected socket with a timeout.

    Raises Refused if the acceptor does not know the secret, OSError if the connection ends or
    the timeout passes.
    """
    hello = _HELLO.pack(_MAGIC, lane, dialler, acceptor, os.urandom(_NONCE_BYTES))
    sock.sendall(hello)
    reply = bytearray()
    while len(reply) < _NONCE_BYTES + _PROOF_BYTES:
        part = sock.recv(_NONCE_BYTES + _PROOF_BYTES - len(reply))
        if not part:
            raise ConnectionResetError("refused the connection")
        reply += part
    nonce, proof = bytes(reply[:_NONCE_BYTES]), bytes(reply[_NONCE_BYTES:])
    if not hmac.compare_digest(proof, _proof(secret, b"accept", hello, nonce)):
        raise Refused("does not know the job's secret")
    sock.sendall(_proof(secret, b"dial", hello, nonce))


class Acceptance:
    """The acceptor's side, fed by a receiver that never waits.

    ``advance`` reads what has come; it returns True once the dialler is proved to be ``dialler`` on
    ``lane`` and raises Refused or OSError where the connection is to be dropped.
    """

    dialler: WorkerId
    lane: Lane

    def __init__(self, sock: socket.socket, secret: bytes, acceptor: WorkerId) -> None:
        self.sock = sock
        self._secret = secret
        self._acceptor = acceptor
        self._received = bytearray()
        self._hello = b""
        self._nonce = os.urandom(_NONCE_BYTES)

    def advance(self) -> bool:
        while True:
            wanted = _PROOF_BYTES if self._hello else _HELLO.size
            try:
                part = self.sock.recv(wanted - len(self._received))
            except BlockingIOError:
                return False
            if not part:
                raise Refused("closed the connection during the handshake")
            self._received += part
            if len(self._received) < wanted:
                continue
            received, self._received = bytes(self._received), bytearray()
            if self._hello:
                expected = _proof(self._secret, b"dial", self._hello, self._nonce)
                if not hmac.compare_digest(received, expected):
                    raise Refused("does not know the job's secret")
                return True
            self._answer(received)

    def _answer(self, hello: bytes) -> None:
        magic, lane, self.dialler, acceptor, _ = _HELLO.unpack(hello)
        if magic != _MAGIC or lane not in tuple(Lane) or acceptor != self._acceptor:
            raise Refused("speaks another protocol or looks for another worker")
        self.lane = Lane(lane)
        self._hello = hello
        # 64 bytes into an empty socket buffer: this never blocks.
        self.sock.sendall(self._nonce + _proof(self._secret, b"accept", hello, self._nonce))
