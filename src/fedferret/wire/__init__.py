"""The encoding of everything that crosses the wire, and the count of its bytes."""
