"""One module per claim on speed or memory: ``fedferret bench NAME`` or ``python -m benchmarks.NAME [--save]``."""
