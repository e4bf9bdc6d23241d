"""The listening side of blocking links: accepts, does the handshake, hands the links over."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

from tramontane.cluster import doors, frames, handshake
from tramontane.cluster.link import Link, read_message, write_all
from tramontane.cluster.link_errors import LinkClosed
from tramontane.cluster.log_lines import refusals
from tramontane.cluster.messages import Hello
from tramontane.cluster.site import Site

log = logging.getLogger(__name__)

ACCEPT_PAUSE_S = 0.1
"""After an accept that failed, for lack of file descriptors as a rule."""

OnLink: TypeAlias = Callable[[Link, Hello], None]


class Listener:
    """Listens from construction on and hands over every link whose dialler has passed the handshake.

    `on_link` is called in a thread of the link's own and may keep the link; it owns the link from then on.
    """

    def __init__(self, name: str, site: Site, on_link: OnLink) -> None:
        """Open the unix door and, where the site has a host, the TCP one.

        Raises:
            ValueError, OSError: see `doors.listen_unix` and `doors.listen_tcp`.
        """
        self._name = name
        self._site = site
        self._on_link = on_link
        self._path = site.socket_path(name)
        self._closed = threading.Event()
        self._strangers: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._doors = doors.open_all(self._path, site.host)
        self.address = doors.address_of(self._doors, site.node)
        self._threads = [
            threading.Thread(target=self._accept, args=(door,), name="link accept", daemon=True) for door in self._doors
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Close the doors and drop diallers in their handshake; links that were handed over stay."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._path.unlink(missing_ok=True)
        for door in self._doors:
            door.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for door in self._doors:
            door.close()
        with self._lock:
            for stranger in self._strangers:
                with contextlib.suppress(OSError):
                    stranger.shutdown(socket.SHUT_RDWR)

    def _accept(self, door: socket.socket) -> None:
        while not self._closed.is_set():
            try:
                line, _ = door.accept()
            except OSError as error:
                if not self._closed.is_set():
                    log.error("%s: accept failed: %s", self._name, error)
                    self._closed.wait(ACCEPT_PAUSE_S)
                continue
            with self._lock:
                crowded = len(self._strangers) >= (most := handshake.MAX_HANDSHAKES)
                if not crowded:
                    self._strangers.add(line)
            if crowded:
                refusals.warning("%s refused a dialler: %d others are in their handshake", self._name, most)
                line.close()
            else:
                threading.Thread(target=self._greet, args=(line,), name="link handshake", daemon=True).start()

    def _greet(self, line: socket.socket) -> None:
        deadline = time.monotonic() + handshake.HANDSHAKE_TIMEOUT_S
        try:
            doors.check_peer(line)
            greeter = handshake.Greeter(self._site.secret)
            write_all(line, frames.encode(greeter.challenge), deadline)
            _, message = read_message(line, frames.HANDSHAKE_LIMITS, deadline)
            hello = greeter.check(message)
            write_all(line, frames.encode(greeter.welcome(hello)), deadline)
        except (OSError, frames.FrameError, handshake.HandshakeError, LinkClosed) as error:
            if not self._closed.is_set():
                refusals.warning("%s refused a dialler: %s", self._name, error)
            hello = None
        with self._lock:
            self._strangers.discard(line)
            refused = hello is None or self._closed.is_set()
        if refused or hello is None:
            line.close()
            return
        link = Link(line, self._site.silence_s)
        try:
            self._on_link(link, hello)
        except Exception:
            log.exception("%s failed with a link of %s", self._name, hello.name)
            link.close()
