"""``python -m fedferret.resident SITE_FOLDER``; see ``process.py``."""

from __future__ import annotations

from fedferret.resident.process import main

if __name__ == "__main__":
    main()
