"""Where messages wait until somebody asks for them, and where interrupts wake who waits.

``Inbox`` is all that the two kinds of endpoint have in common: matching by (sender, tag), the
generation and its interrupts, and the count of bytes that hold the receiver back. It starts no
thread and does no I/O.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from runtime.fabric.interface import CONTROL, EndpointClosed, Interrupted, Message, Tag
from runtime.plan import WorkerId

_Channel = tuple[int, int, int, str]  # a Tag without its index
_Place = tuple[int | tuple[int, ...], WorkerId]  # (index, sender): sorts by index first
_Entry = tuple[Message, int]  # with the bytes that it counts for


class Reader(Protocol):
    """Lets threads that wait read for themselves."""

    def lead(self, waiter: Waiter) -> None:
        """Reads and delivers in the calling thread while ``waiter.waiting``. Returns at once where another
        thread does so already."""
        ...

    def wake(self) -> None:
        """Has a thread inside ``lead`` look at its ``waiting`` again. Never waits."""
        ...


class Waiter:
    """A thread that waits for a message for which ``wants`` is true."""

    __slots__ = ("condition", "thread", "waiting", "wants")

    def __init__(self, wants: Callable[[_Channel, _Place], bool]) -> None:
        self.wants = wants
        self.waiting = True
        self.thread = threading.get_ident()
        self.condition: threading.Condition | None = None  # once it no longer reads for itself


class Inbox:
    """Messages by channel and sender. Thread-safe.

    ``limit_bytes`` is soft: ``full`` says that no further message should be begun. It is never
    full while a thread is blocked, because that thread may be waiting for what has not been read
    yet, or for a peer that is itself blocked on us; nor after a poll in vain, until something that it
    asked for has come. So the limit cannot cause a deadlock.
    ``on_room`` is called, with a lock held, each time that ``full`` may have become false; it must
    neither block nor call back. ``reader``, where there is one, is what a thread reads with while it waits.
    """

    def __init__(self, limit_bytes: int, on_room: Callable[[], None] = lambda: None) -> None:
        self._limit = limit_bytes
        self.on_room = on_room
        self.reader: Reader | None = None
        self._lock = threading.Lock()
        self._waiters: list[Waiter] = []
        self._channels: dict[_Channel, dict[_Place, deque[_Entry]]] = {}
        self._blocked = 0
        self._polled: frozenset[_Channel] = frozenset()  # in vain, while the limit was reached
        self._interrupted = False
        self._closed = False
        self.generation = 0
        self.bytes = 0
        self.peak_bytes = 0

    # Arriving.

    def full(self) -> bool:
        """Whether the limit is reached and nobody needs what has not been read yet."""
        return self.bytes >= self._limit and self._blocked == 0 and not self._polled

    def is_stale(self, tag: Tag) -> bool:
        """Whether a message with this tag would be dropped on arrival."""
        return tag.generation < self.generation and tag.what != CONTROL

    def reserve(self, size: int) -> None:
        """Counts ``size`` bytes for a message that is about to arrive."""
        with self._lock:
            self.bytes += size
            self.peak_bytes = max(self.peak_bytes, self.bytes)

    def release(self, size: int) -> None:
        """Gives back what ``reserve`` counted, for a message that will not be delivered."""
        with self._lock:
            self._subtract(size)

    def deliver(self, message: Message, size: int) -> None:
        """Takes in a message whose ``size`` bytes were reserved; drops it if it is stale."""
        channel, place = message.tag[:4], (message.tag.index, message.sender)
        with self._lock:
            if self._closed or message.tag.generation < self.generation:
                self._subtract(size)
                return
            self._channels.setdefault(channel, {}).setdefault(place, deque()).append((message, size))
            if channel in self._polled:
                self._polled = frozenset()
            for waiter in self._waiters:
                if waiter.waiting and waiter.wants(channel, place):
                    self._rouse(waiter)

    # Asking.

    def take(self, sender: WorkerId, tag: Tag) -> Message:
        """Waits for one exact message. Raises Interrupted and EndpointClosed."""
        place = (tag.index, sender)
        with self._lock:
            while True:
                self._admit(tag)
                if place in self._channels.get(tag[:4], ()):
                    return self._pop(tag[:4], place)
                self._wait(lambda channel, where: channel == tag[:4] and where == place)

    def take_any(self, tags: Iterable[Tag]) -> Message:
        """Waits for the first message on any of the channels. Raises as ``take`` does."""
        wanted = tuple(tags)
        channels = {tag[:4] for tag in wanted}
        with self._lock:
            while True:
                message = self._first(wanted)
                if message is not None:
                    return message
                self._wait(lambda channel, _: channel in channels)

    def poll_any(self, tags: Iterable[Tag]) -> Message | None:
        """As ``take_any``, but returns None where nothing has come."""
        wanted = tuple(tags)
        with self._lock:
            message = self._first(wanted)
            if message is None and self.bytes >= self._limit:
                self._polled = frozenset(tag[:4] for tag in wanted)
                self.on_room()
            return message

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Marks the calling thread as blocked elsewhere (in a send): the inbox is not full then."""
        with self._lock:
            self._block()
        try:
            yield
        finally:
            with self._lock:
                self._blocked -= 1

    # The generation.

    def interrupt(self, generation: int, lost: Iterable[WorkerId] = ()) -> None:
        """Enters ``generation``, forgets what is older or from ``lost``, and wakes who waits.

        An older generation is ignored; the same one again only forgets ``lost``.
        """
        gone = frozenset(lost)
        with self._lock:
            if generation < self.generation:
                return
            if generation > self.generation:
                self.generation = generation
                self._interrupted = True
            self._polled = frozenset()
            for channel, places in list(self._channels.items()):
                for place in list(places):
                    if channel[0] < generation or place[1] in gone:
                        self._subtract(sum(size for _, size in places.pop(place)))
                if not places:
                    del self._channels[channel]
            self._rouse_all()

    def check(self) -> None:
        """Raises Interrupted if an interrupt is not acknowledged yet, or EndpointClosed."""
        if self._closed:
            raise EndpointClosed("this endpoint is closed")
        if self._interrupted:
            raise Interrupted(self.generation)

    def admit(self, tag: Tag) -> None:
        """Raises if a call about ``tag`` must not go on. Control messages always may."""
        if self._closed or tag.what != CONTROL:
            self._admit(tag)

    def acknowledge(self) -> int:
        """Accepts the newest interrupt and returns its generation. Raises EndpointClosed."""
        with self._lock:
            self._interrupted = False
            self.check()
            return self.generation

    def close(self) -> None:
        """Wakes every waiting call with EndpointClosed and forgets all messages."""
        with self._lock:
            self._closed = True
            self._channels.clear()
            self._subtract(self.bytes)
            self._rouse_all()

    # Inside; the lock is held.

    def _admit(self, tag: Tag) -> None:
        if self._closed or self._interrupted or tag.generation < self.generation:
            self.check()
            raise Interrupted(self.generation)

    def _first(self, tags: tuple[Tag, ...]) -> Message | None:
        self.check()
        for tag in tags:
            self._admit(tag)
            if places := self._channels.get(tag[:4]):
                return self._pop(tag[:4], min(places))
        return None

    def _pop(self, channel: _Channel, place: _Place) -> Message:
        places = self._channels[channel]
        message, size = places[place].popleft()
        if not places[place]:
            del places[place]
            if not places:
                del self._channels[channel]
        self._subtract(size)
        return message

    def _block(self) -> None:
        self._blocked += 1
        if self.bytes >= self._limit:
            self.on_room()

    def _wait(self, wants: Callable[[_Channel, _Place], bool]) -> None:
        waiter = Waiter(wants)
        self._waiters.append(waiter)
        self._block()
        try:
            if self.reader is not None:
                self._lock.release()
                try:
                    self.reader.lead(waiter)
                finally:
                    self._lock.acquire()
            if waiter.waiting:
                waiter.condition = threading.Condition(self._lock)
                while waiter.waiting:
                    waiter.condition.wait()
        finally:
            if waiter.waiting:  # Ctrl-C
                self._rouse(waiter)
            self._waiters.remove(waiter)

    def _rouse(self, waiter: Waiter) -> None:
        """From here on the thread no longer counts as blocked, though it may not run yet."""
        waiter.waiting = False
        self._blocked -= 1
        if waiter.condition is not None:
            waiter.condition.notify()
        elif self.reader is not None and waiter.thread != threading.get_ident():
            self.reader.wake()

    def _rouse_all(self) -> None:
        for waiter in self._waiters:
            if waiter.waiting:
                self._rouse(waiter)

    def _subtract(self, size: int) -> None:
        was_full = self.bytes >= self._limit
        self.bytes = max(0, self.bytes - size)  # a message may end after ``close`` forgot its bytes
        if was_full and self.bytes < self._limit:
            self.on_room()


class InboxEndpoint:
    """The half of ``Endpoint`` that concerns its inbox."""

    worker: WorkerId
    _inbox: Inbox

    @property
    def generation(self) -> int:
        return self._inbox.generation

    def receive(self, sender: WorkerId, tag: Tag) -> Message:
        return self._inbox.take(sender, tag)

    def receive_any(self, tags: Iterable[Tag]) -> Message:
        return self._inbox.take_any(tags)

    def poll_any(self, tags: Iterable[Tag]) -> Message | None:
        return self._inbox.poll_any(tags)

    def check(self) -> None:
        self._inbox.check()

    def acknowledge(self) -> int:
        return self._inbox.acknowledge()
