"""Bytes that wait on disk until their turn comes."""

from __future__ import annotations

from typing import IO, TypeAlias

Place: TypeAlias = tuple[int, int]  # where bytes lie, and how many


class Spool:
    """A temporary file to append to and to read from. ``put`` says where bytes lie, ``get`` reads them there."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def put(self, content: bytes) -> Place:
        """Append bytes.

        Args:
            content: of any length.

        Returns:
            Where they lie.
        """
        place = self._file.seek(0, 2)
        self._file.write(content)
        return place, len(content)

    def get(self, place: Place) -> bytes:
        """Read bytes, as often as wanted.

        Args:
            place: from ``put``.

        Returns:
            What was put there.
        """
        self._file.seek(place[0])
        return self._file.read(place[1])
