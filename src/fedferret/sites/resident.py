"""The process that has the trainer at a site with credentials: its messages are signed.

python -m fedferret.sites.resident SITE_FOLDER CREDENTIALS
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedferret.engines.transport import Seal
from fedferret.resident.process import main
from fedferret.sites.credentials import read_site
from fedferret.sites.signing import SiteSeal


def seal(folder: Path) -> Seal:
    """Return the seal of the site in a folder, with the credentials that the command line names.

    Args:
        folder: of the site.
    Raises:
        UserError: for invalid credentials.
    """
    return SiteSeal(read_site(Path(sys.argv[2])), folder)


if __name__ == "__main__":
    main(seal)
