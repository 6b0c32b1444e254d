"""Collectives composed over an endpoint. A group is a tuple of worker ids and has no other existence.

So editing a group costs nothing: the next call simply names other members. All members call with the
same group and tag; calls that overlap in time need tags that differ. Everything here raises
Interrupted and EndpointClosed as ``Endpoint`` does, and the inputs are then in an undefined state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.fabric.interface import Endpoint, Message, Tag
from runtime.plan import Shard, WorkerId

DIRECT_MEMBERS = 8
"""Up to here small collectives go all to all (n(n-1) messages, one trip), beyond through one member
(2(n-1) messages, two trips)."""


def exchange(endpoint: Endpoint, group: Sequence[WorkerId], tag: Tag, note: Any) -> dict[WorkerId, Any]:
    """All-gathers one small picklable note per member; the result is by member, ascending."""
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


def reduce_scatter(
    endpoint: Endpoint,
    tag: Tag,
    accumulators: Mapping[int, Tensor],
    shards: Iterable[Shard],
    members: Mapping[int, Sequence[WorkerId]],
    *,
    ordered: bool,
) -> None:
    """Sums flat accumulators over their members, each slice in place at the shard's owner.

    ``accumulators[block]`` is flat; ``members[block]`` names all who hold it, this worker included.
    ``shards`` of blocks that this worker does not hold are skipped; it may own only what it
    holds. Slices that it does not own keep its own terms. See ``send_parts`` and ``receive_sum``,
    which may also be called apart, with computation between them.
    """
    mine = [shard for shard in shards if shard.block in accumulators]
    send_parts(endpoint, tag, accumulators, mine)
    receive_sum(endpoint, tag, accumulators, mine, members, ordered=ordered)


def send_parts(
    endpoint: Endpoint, tag: Tag, accumulators: Mapping[int, Tensor], shards: Iterable[Shard]
) -> None:
    """Sends every other owner its slice of the flat accumulators. ``tag.index`` is set here, to
    (block, start); the accumulators may be reused on return."""
    mine = [shard for shard in shards if shard.block in accumulators]
    owners = sorted({shard.owner for shard in mine} | {endpoint.worker})
    turn = {owner: k for k, owner in enumerate(_after(owners, endpoint.worker))}
    for shard in sorted((s for s in mine if s.owner != endpoint.worker), key=lambda s: turn[s.owner]):
        part = accumulators[shard.block][shard.start : shard.stop]
        endpoint.send(shard.owner, _tag_of(tag, shard), [part])


def receive_sum(
    endpoint: Endpoint,
    tag: Tag,
    accumulators: Mapping[int, Tensor],
    shards: Iterable[Shard],
    members: Mapping[int, Sequence[WorkerId]],
    *,
    ordered: bool,
) -> None:
    """Adds the other members' slices to those that this worker owns, in place.

    In order of arrival, which is right for exact sums; with ``ordered`` (float32) in ascending order of
    members, so that a given membership gives the same bits each time. Without ``ordered``
    nothing else may be received on the channel of ``tag`` until this returns.
    """
    owned = {(s.block, s.start): s for s in shards if s.owner == endpoint.worker and s.block in accumulators}
    if ordered:
        for shard in owned.values():
            part = accumulators[shard.block][shard.start : shard.stop]
            _sum_ascending(endpoint, sorted(members[shard.block]), _tag_of(tag, shard), part)
        return
    for _ in range(sum(len(set(members[s.block]) - {endpoint.worker}) for s in owned.values())):
        message = endpoint.receive_any([tag])
        assert isinstance(message.tag.index, tuple)
        block, start = message.tag.index
        shard = owned[block, start]
        target = accumulators[block][shard.start : shard.stop]
        target.add_(message.tensors[0].to(target.device))


def all_gather(
    endpoint: Endpoint,
    tag: Tag,
    tensors: Mapping[int, Tensor],
    shards: Iterable[Shard],
    members: Mapping[int, Sequence[WorkerId]],
) -> None:
    """Completes flat tensors in place: every owner sends its slice to all members of the block.

    ``tensors[block]`` is flat and holds this worker's own shards; arguments as in
    ``reduce_scatter``. ``tag.index`` is set here, to (block, start).
    """
    mine = [shard for shard in shards if shard.block in tensors]
    for shard in mine:
        if shard.owner == endpoint.worker:
            part = tensors[shard.block][shard.start : shard.stop]
            for member in _after(sorted(members[shard.block]), endpoint.worker):
                endpoint.send(member, _tag_of(tag, shard), [part])
    for shard in mine:
        if shard.owner != endpoint.worker:
            message = endpoint.receive(shard.owner, _tag_of(tag, shard))
            tensors[shard.block][shard.start : shard.stop].copy_(message.tensors[0])


def _tag_of(tag: Tag, shard: Shard) -> Tag:
    return tag._replace(index=(shard.block, shard.start))


def _after(members: Sequence[WorkerId], me: WorkerId) -> Iterator[WorkerId]:
    """The other members, beginning after ``me``, so that not all send to the same one first."""
    place = members.index(me)
    return (members[(place + k) % len(members)] for k in range(1, len(members)))


def _gather(endpoint: Endpoint, members: Sequence[WorkerId], tag: Tag) -> dict[WorkerId, Message]:
    """One message from each, the highest waited for first: as a rule it is the last to come, and this
    thread then wakes once rather than once per member."""
    return {member: endpoint.receive(member, tag) for member in reversed(members)}


def _sum_ascending(endpoint: Endpoint, members: Sequence[WorkerId], tag: Tag, total: Tensor) -> None:
    own = total.clone()
    for k, member in enumerate(members):
        term = own if member == endpoint.worker else endpoint.receive(member, tag).tensors[0]
        if k == 0:
            total.copy_(term)
        else:
            total.add_(term.to(total.device))
