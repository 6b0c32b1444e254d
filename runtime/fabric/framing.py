"""Messages as bytes: a fixed prefix, a small header, then every tensor's memory, raw.

prefix = header length (uint32) + payload length (uint64), network order; header = (tag, note,
[(dtype, shape)]) as ``notes`` writes it. Tensor bytes are in the sender's (little-endian) order and are read
straight into new tensors: large ones are copied by the kernel only. Nothing here is called before the peer
has proved that it knows the job's secret. PyTorch is imported with the first tensor: the controller sends and
gets none, and starts in a third of the time without it.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from runtime.fabric import notes
from runtime.fabric.interface import Message, Tag
from runtime.plan import WorkerId

if TYPE_CHECKING:
    from torch import Tensor, dtype

_PREFIX = struct.Struct("!IQ")
MAX_HEADER_BYTES = 64 << 20
STAGING_BYTES = 64 << 10
_TINY_BYTES = 4 << 10
_SCRATCH = memoryview(bytearray(1 << 20))  # where the bytes of dropped messages go; never read


@cache
def _dtypes() -> dict[str, dtype]:
    import torch

    return {_name(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}


@cache
def _name(dtype: dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_bytes(tensor: Tensor) -> bytes | memoryview:
    """The bytes of a contiguous CPU tensor of any dtype, bf16 included, that needs no gradient.

    A view of its memory, except for tiny tensors: copying those costs less than making a view.
    """
    if tensor.nbytes <= _TINY_BYTES:
        return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
    return _view(tensor)


def _view(tensor: Tensor) -> memoryview:
    view: memoryview = tensor.reshape(-1).view(_dtypes()["uint8"]).numpy().data
    return view


def on_host(tensor: Tensor) -> Tensor:
    """The tensor, detached and contiguous, in CPU memory. CUDA tensors pass through pinned memory."""
    if tensor.is_cpu:
        if tensor.is_contiguous() and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg()):
            return tensor
        return tensor.detach().resolve_conj().resolve_neg().contiguous()
    import torch

    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return pinned.copy_(tensor.detach())


def _empty(name: str, shape: tuple[int, ...]) -> Tensor:
    import torch

    return torch.empty(shape, dtype=_dtypes()[name], device="cpu")


def encode_head(tag: Tag, tensors: Sequence[Tensor], note: Any) -> bytes:
    """Prefix and header. Raises ValueError if the note is too large."""
    specs = [(_name(t.dtype), tuple(t.shape)) for t in tensors]
    header = notes.dumps((tag, note, specs))
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(
            f"the note of message {tag.what!r} takes {len(header)} bytes, more than {MAX_HEADER_BYTES}; "
            "send bulk data as tensors"
        )
    payload = sum([t.nbytes for t in tensors])
    return _PREFIX.pack(len(header), payload) + header


@dataclass(slots=True)
class Head:
    """What is known of a message before its tensors: ``size`` counts the payload's bytes."""

    tag: Tag
    note: Any
    specs: list[tuple[str, tuple[int, ...]]]
    size: int


class Decoder:
    """Turns one link's bytes into messages, without ever waiting.

    Every tensor gets memory of its own from torch, whose alignment (64 bytes) matrix products may need
    to give the same bits as at the sender.

    The caller alternates ``space`` / ``filled`` (bytes come in) with ``head`` / ``begin`` /
    ``message`` (they are taken out). Small messages come many to a read through a staging buffer, from
    which a head that is there as a whole is parsed in place; the bulk of large ones is read straight
    into tensors. Raises ValueError for bytes that are no message.
    """

    def __init__(self, sender: WorkerId) -> None:
        self._sender = sender
        staging = bytearray(STAGING_BYTES)
        self._staging = memoryview(staging)
        self._staging_address = ctypes.addressof(ctypes.c_char.from_buffer(staging))
        self._low = self._high = 0
        self._targets: deque[memoryview] = deque()  # what is to be filled next
        self._buffer: bytearray | None = None  # of a prefix, or a header, that comes in pieces
        self._parsing_header = False
        self._head: Head | None = None
        self._discarding = False
        self._tensors: list[Tensor] = []
        self.is_begun = False
        self.payload = 0  # bytes of the message at hand, once its prefix has come

    def _expect(self, buffer: bytearray) -> None:
        self._buffer = buffer
        self._targets.append(memoryview(buffer))

    def space(self) -> memoryview:
        """Where the next bytes are to be read to."""
        if self._targets and len(self._targets[0]) >= STAGING_BYTES:
            return self._targets[0]
        assert self._low == self._high, "staged bytes are used up before more are read"
        self._low = self._high = 0
        return self._staging

    def filled(self, space: memoryview, count: int) -> None:
        """``count`` bytes were read to ``space``, which came from the last call of ``space``."""
        if space is self._staging:
            self._high = count
        else:
            self._skip(count)

    def head(self) -> Head | None:
        """The head of the message that stands next, if it has come and has not begun."""
        if self._head is None and (self._buffer is not None or self._low < self._high):
            self._head = self._staged_head() if self._buffer is None else self._pieced_head()
        return None if self.is_begun else self._head

    def _staged_head(self) -> Head | None:
        start = self._low + _PREFIX.size
        if start <= self._high:
            end = start + self._header_length(self._staging[self._low : start])
            if end <= self._high:
                self._low = end
                return self._parse(self._staging[start:end])
        self._expect(bytearray(_PREFIX.size))
        return self._pieced_head()

    def _pieced_head(self) -> Head | None:
        assert self._buffer is not None
        while self._fill():
            if self._parsing_header:
                header, self._buffer, self._parsing_header = self._buffer, None, False
                return self._parse(header)
            self._parsing_header = True
            self._expect(bytearray(self._header_length(self._buffer)))
        return None

    def _header_length(self, prefix: bytearray | memoryview) -> int:
        length: int
        length, self.payload = _PREFIX.unpack(prefix)
        if not 0 < length <= MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        return length

    def begin(self, *, discard: bool = False) -> None:
        """Makes room for the payload of ``head``; with ``discard`` its bytes are thrown away."""
        assert self._head is not None and not self.is_begun
        self.is_begun, self._discarding = True, discard
        if discard:
            whole, rest = divmod(self.payload, len(_SCRATCH))
            self._targets.extend([_SCRATCH] * whole + ([_SCRATCH[:rest]] if rest else []))
            return
        self._tensors = [_empty(name, shape) for name, shape in self._head.specs]
        if self.payload <= min(_TINY_BYTES, self._high - self._low):  # all there, and not worth views
            for tensor in self._tensors:
                ctypes.memmove(tensor.data_ptr(), self._staging_address + self._low, tensor.nbytes)
                self._low += tensor.nbytes
        else:
            self._targets.extend(_view(t) for t in self._tensors if t.numel())

    @property
    def unfinished_bytes(self) -> int:
        """Payload bytes for which ``begin`` made room and which no ``message`` has returned."""
        return self.payload if self.is_begun and not self._discarding else 0

    def message(self) -> tuple[bool, Message | None]:
        """(whether the message that began is whole, the message unless it was discarded)."""
        if not self.is_begun or (self._targets and not self._fill()):
            return False, None
        assert self._head is not None
        message = None
        if not self._discarding:
            message = Message(self._sender, self._head.tag, self._tensors, self._head.note)
        self._head, self._tensors, self.is_begun = None, [], False
        return True, message

    def _parse(self, header: bytearray | memoryview) -> Head:
        tag, note, specs = notes.loads(header)
        size = 0
        for name, shape in specs:
            if name not in _dtypes():
                raise ValueError(f"no such dtype: {name}")
            size += math.prod(shape) * _dtypes()[name].itemsize
        if size != self.payload:
            raise ValueError(f"tensors of {size} bytes in a payload of {self.payload}")
        return Head(Tag(*tag), note, specs, size)

    def _fill(self) -> bool:
        """Moves staged bytes to where they belong; True once nothing is missing there."""
        while self._targets and self._low < self._high:
            count = min(len(self._targets[0]), self._high - self._low)
            self._targets[0][:count] = self._staging[self._low : self._low + count]
            self._low += count
            self._skip(count)
        return not self._targets

    def _skip(self, count: int) -> None:
        if count == len(self._targets[0]):
            self._targets.popleft()
        else:
            self._targets[0] = self._targets[0][count:]
