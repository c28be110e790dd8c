"""The epoch at a site: earlier ones are refused, later ones undo what the server undid, and nothing is lost unsaid."""

from __future__ import annotations

server = __import__("unit.test_trainer", fromlist=["server"]).server  # the fixture
