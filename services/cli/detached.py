"""`python -m services.cli.detached SPEC_JSON`: the supervisor behind `tandem up --detach`."""

from __future__ import annotations

import sys

from services.cli.quiet import quiet_libraries
from services.cli.up import run_detached

if __name__ == "__main__":
    quiet_libraries()
    run_detached(sys.argv[1])
