"""What a spare process runs: loads a service's code, then waits to be told which one of its kind to be.

`python -P spare_program.py MODULE`; one line of JSON on stdin, `{"environment": {...}, "log_path": "..."}`, begins the
service's life; end of file without one ends the process.
"""

from __future__ import annotations

import importlib
import json
import os
import sys


def main(module_name: str) -> None:
    """Becomes the service, or ends."""
    module = importlib.import_module(f"{module_name}.__main__")
    order = sys.stdin.buffer.readline()
    if not order:
        return
    life = json.loads(order)
    os.environ.update(life["environment"])
    with open(life["log_path"], "ab") as log, open(os.devnull, "rb") as nothing:
        for file, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(file.fileno(), target)
    module.main()


if __name__ == "__main__":
    main(sys.argv[1])
