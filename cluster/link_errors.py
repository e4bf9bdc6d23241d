"""The exception of links that have ended, blocking and asyncio ones."""

from __future__ import annotations


class LinkClosed(Exception):  # noqa: N818  (an event as much as an error)
    """The link is closed; the message says why, for the log."""
