"""The secret that the endpoints of one run share."""

from __future__ import annotations

import hmac
import secrets

from runtime.fabric.handshake import MIN_SECRET_BYTES
from runtime.settings import FABRIC_SECRET, fabric_secret

_BYTES = 32


def secret_to_hand_out() -> bytes | None:
    """A new run's secret, to be handed to its actors; None where the cluster's processes have one in their
    environment, which then travels nowhere. Raises ValueError if that is too short."""
    return None if _of_cluster() else secrets.token_bytes(_BYTES)


def secret_of(run: str, handed_out: bytes | None) -> bytes:
    """The secret of ``run`` in one of its processes: what was handed out, or one derived from the cluster's,
    so that an endpoint of one run is of no use to another. Raises ValueError if this process has neither."""
    if handed_out is not None:
        return handed_out
    of_cluster = _of_cluster()
    if of_cluster is None:
        raise ValueError(
            f"${FABRIC_SECRET} is set where the run {run} was started and not on this node: set it to the "
            "same value on every node of the cluster"
        )
    return hmac.digest(of_cluster, b"reknit fabric " + run.encode(), "sha256")


def _of_cluster() -> bytes | None:
    secret = fabric_secret()
    if secret is not None and len(secret) < MIN_SECRET_BYTES:
        raise ValueError(
            f"${FABRIC_SECRET} has {len(secret)} bytes: use at least {MIN_SECRET_BYTES}, for example what "
            "`openssl rand -hex 32` prints"
        )
    return secret
