"""One module per claim about speed or memory: ``fedferret bench NAME`` or ``python -m benchmarks.NAME [--save]``."""
