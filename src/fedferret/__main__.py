"""`python -m fedferret` is the command `fedferret`."""

from __future__ import annotations

from fedferret.cli import main

if __name__ == "__main__":
    main()
