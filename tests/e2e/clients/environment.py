"""Clients that people use, each in an environment of its own: their own pins exclude each other.

`make clients` makes the environments, from the pins beside this file.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENVIRONMENTS = Path(os.environ.get("TANDEM_CLIENTS_DIR") or Path.home() / ".cache" / "tandem-clients")


def seen_by(client: str, scenario: str, *arguments: str, timeout_s: float = 100) -> dict:
    """Runs a scenario in the client's environment; what it printed last is what the client saw.

    Raises:
        Skipped: There is no such environment here.
    """
    if client == "node":
        program, home = ["node"], ENVIRONMENTS / "node"
        needed = home / "node_modules" / "openai"
    else:
        program, home = [str(ENVIRONMENTS / client / "bin" / "python"), "-P"], Path.cwd()
        needed = Path(program[0])
    if not needed.exists():
        pytest.skip(f"{needed} is not there: `make clients` installs the pinned clients")
    kept = {"PATH", "HOME", "LANG", "TMPDIR"}
    environment = {name: value for name, value in os.environ.items() if name in kept}
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    result = subprocess.run(
        [*program, str(HERE / scenario), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment | offline | {"NODE_PATH": str(home / "node_modules"), "TOKENIZERS_PARALLELISM": "false"},
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])
