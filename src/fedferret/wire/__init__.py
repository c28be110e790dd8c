"""What crosses the wire, and what it costs."""
