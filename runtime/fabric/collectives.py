"""Collectives composed over an endpoint. A group is a tuple of worker ids and has no other existence.

So editing a group costs nothing: the next call simply names other members. All members call with the
same group and tag; calls that overlap in time need tags that differ. Everything here raises
Interrupted and EndpointClosed as ``Endpoint`` does, and the inputs are then in an undefined state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.fabric.interface import Endpoint, Message, Tag
from runtime.plan import WorkerId

DIRECT_MEMBERS = 8
"""Up to here small collectives go all to all (n(n-1) messages, one trip), beyond through one member
(2(n-1) messages, two trips)."""


def exchange(endpoint: Endpoint, group: Sequence[WorkerId], tag: Tag, note: Any) -> dict[WorkerId, Any]:
    """All-gathers one small note per member; the result is by member, ascending."""
    members, me = sorted(group), endpoint.worker
    assert me in members
    if len(members) <= DIRECT_MEMBERS:
        for member in _after(members, me):
            endpoint.send(member, tag, note=note)
        return {m: note if m == me else endpoint.receive(m, tag).note for m in members}
    root, others = members[0], members[1:]
    if me != root:
        endpoint.send(root, tag, note=note)
        notes: dict[WorkerId, Any] = endpoint.receive(root, tag).note
        return notes
    received = _gather(endpoint, others, tag)
    notes = {root: note} | {member: received[member].note for member in others}
    for member in others:
        endpoint.send(member, tag, note=notes)
    return notes


def all_reduce(endpoint: Endpoint, group: Sequence[WorkerId], tag: Tag, tensor: Tensor) -> None:
    """Sums a small tensor of any shape over the members, in place.

    Terms are added in ascending order of members: all of them get the same bits.
    """
    members, me = sorted(group), endpoint.worker
    assert me in members
    direct = len(members) <= DIRECT_MEMBERS
    root = members[0]
    if direct:
        for member in _after(members, me):
            endpoint.send(member, tag, [tensor])
    elif me != root:
        endpoint.send(root, tag, [tensor])
        tensor.copy_(endpoint.receive(root, tag).tensors[0])
        return
    terms = _gather(endpoint, [member for member in members if member != me], tag)
    total = torch.zeros_like(tensor)
    for member in members:
        total += tensor if member == me else terms[member].tensors[0].to(tensor.device)
    tensor.copy_(total)
    if not direct:
        for member in members[1:]:
            endpoint.send(member, tag, [tensor])


def _after(members: Sequence[WorkerId], me: WorkerId) -> Iterator[WorkerId]:
    """The other members, beginning after ``me``, so that not all send to the same one first."""
    place = members.index(me)
    return (members[(place + k) % len(members)] for k in range(1, len(members)))


def _gather(endpoint: Endpoint, members: Sequence[WorkerId], tag: Tag) -> dict[WorkerId, Message]:
    """One message from each, the highest waited for first: as a rule it is the last to come, and this
    thread then wakes once rather than once per member."""
    return {member: endpoint.receive(member, tag) for member in reversed(members)}
