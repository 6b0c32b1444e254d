"""What every fabric offers: interruptible point-to-point messages, matched by tag.

Two implementations: ``sockets`` (TCP between processes) and ``inprocess`` (threads of one
process, for tests and simulation). Collectives (``collectives``) are composed over this interface,
and a group is nothing but a tuple of worker ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from runtime.plan import WorkerId

if TYPE_CHECKING:
    from torch import Tensor


class Tag(NamedTuple):
    """What a message is, apart from who sent it.

    ``what`` names the channel ("forward", "reduce", ...). ``attempt`` counts the tries at the
    same step in the same generation (a gradient that outgrew its scale repeats the step).
    ``index`` tells messages of one channel apart: a micro-batch, or (block, start).
    """

    generation: int
    step: int
    attempt: int
    what: str
    index: int | tuple[int, ...] = 0  # type: ignore[assignment]  # hides tuple.index, which nobody needs


@dataclass(slots=True)
class Message:
    """A received message. ``tensors`` own their memory; ``note`` is what ``notes`` can encode."""

    sender: WorkerId
    tag: Tag
    tensors: list[Tensor] = field(default_factory=list)
    note: Any = None


class Interrupted(Exception):
    """The membership changed: leave what you wait for. ``generation`` is the new one."""

    def __init__(self, generation: int) -> None:
        super().__init__(f"interrupted: generation {generation} begins")
        self.generation = generation


class EndpointClosed(Exception):
    """This endpoint was closed; nothing more can be sent or received."""


class Endpoint(Protocol):
    """One worker's (or the controller's) end of the fabric. Thread-safe.

    A message of an older generation than ``generation`` is dropped on arrival; one of a newer
    generation waits until this endpoint gets there. Messages on the channel ``CONTROL`` go to the
    ``on_control`` callback instead of the inbox, whatever their generation, and are handled on the
    receiving thread: the callback must not block.
    """

    worker: WorkerId

    @property
    def generation(self) -> int:
        """The newest generation that ``interrupt`` entered, acknowledged or not."""
        ...

    @property
    def address(self) -> str:
        """Where others connect to, such as ``"10.0.0.3:41873"``."""
        ...

    def connect(self, addresses: Mapping[WorkerId, str]) -> None:
        """Learns peers' addresses. Links are made when first used and kept from then on.

        Groups come and go without touching links.
        """
        ...

    def send(
        self,
        to: WorkerId,
        tag: Tag,
        tensors: Sequence[Tensor] = (),
        note: Any = None,
        *,
        background: bool = False,
        fleeting: bool = False,
    ) -> None:
        """Sends; returns when the tensors may be overwritten.

        On the channel ``CONTROL`` nobody ever waits for a peer that reads nothing: messages are held for it,
        but for those that are ``fleeting``, of use only now.

        With ``background`` it returns at once and the tensors must stay untouched until the
        receiver has them (bulk copies that nobody waits for; dropped when the generation ends).
        Tensors on a GPU pass through host memory. A message to oneself is delivered too. A message
        to a lost peer vanishes: the loss itself is reported through ``on_lost``.
        """
        ...

    def receive(self, sender: WorkerId, tag: Tag) -> Message:
        """Waits for exactly this message.

        Raises Interrupted when the generation moves past ``tag.generation`` and EndpointClosed.
        """
        ...

    def receive_any(self, tags: Iterable[Tag]) -> Message:
        """Waits for the first message, from whomever, that matches one of ``tags``; ``index`` of
        those tags is ignored. Where several are there, the earliest tag in ``tags`` wins, then
        the lowest index. Raises as ``receive`` does.
        """
        ...

    def poll_any(self, tags: Iterable[Tag]) -> Message | None:
        """As ``receive_any``, but returns None at once where nothing has come."""
        ...

    def interrupt(self, generation: int, lost: Iterable[WorkerId] = ()) -> None:
        """Enters ``generation``: drops older messages, closes links to ``lost`` and wakes every
        waiting call with Interrupted. Called from any thread; an older generation is ignored.
        """
        ...

    def check(self) -> None:
        """Raises Interrupted if an interrupt has come since ``acknowledge``. Costs nothing much;
        called between layers so that long computations end early too.
        """
        ...

    def acknowledge(self) -> int:
        """Accepts the interrupt: from now on calls work in the newest generation, returned."""
        ...

    def close(self) -> None:
        """Closes every link and wakes every waiting call with EndpointClosed. Idempotent."""
        ...

    def statistics(self) -> dict[str, int]:
        """``bytes_sent``, ``bytes_received``, ``messages_sent``, ``inbox_bytes``,
        ``inbox_peak_bytes``."""
        ...


CONTROL = "control"
"""The channel of commands and reports between controller and workers."""

ControlCallback = Callable[[Message], None]
LostCallback = Callable[[WorkerId, str], None]
"""Called with (peer, reason) when an established link to a peer ends without being closed here."""

EndpointMaker = Callable[[ControlCallback, LostCallback], Endpoint]
