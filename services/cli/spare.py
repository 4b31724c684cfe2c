"""A process that has loaded a service's code already, to take the place of one that dies.

Loading takes a sidecar longer than everything else at its start; transfers wait for it. One spare stands by for all
processes of its kind, whichever dies first; another is made some time later, when the successor has the cores no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path

from services.cli.process import ProcessSpec, start_process

_PROGRAM = Path(__file__).with_name("spare_program.py")
_PAUSE_S = 3.0


class Spare:
    """Stands by for processes that run one module. Owned by the supervisor, on its loop.

    Args:
        module: As in `python -m`; its `__main__` has a `main()` and reads the environment only there.
        pause_s: From the use of one spare to the start of the next.
    """

    def __init__(self, module: str, *, pause_s: float = _PAUSE_S) -> None:
        self._module = module
        self._pause_s = pause_s
        self._process: asyncio.subprocess.Process | None = None
        self._preparing: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that stands by; None while there is none."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def prepare(self) -> None:
        """Starts the process; it loads by itself."""
        with contextlib.suppress(OSError):  # then the next death is followed by an ordinary start
            self._process = await start_process(
                (sys.executable, "-P", str(_PROGRAM), self._module),
                {},
                stdin=asyncio.subprocess.PIPE,
                output=asyncio.subprocess.DEVNULL,
            )

    def become(self, spec: ProcessSpec) -> asyncio.subprocess.Process | None:
        """Has the spare begin a life of `spec`; None where there is no spare."""
        process, self._process = self._process, None
        self._preparing = asyncio.create_task(self._prepare_later())
        if process is None or process.returncode is not None or process.stdin is None:
            return None
        order = {"environment": spec.environment, "log_path": str(spec.log_path)}
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.close()
        return process

    async def stop(self) -> None:
        """Ends the process that stands by."""
        if self._preparing is not None:
            self._preparing.cancel()
            await asyncio.wait([self._preparing])
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def _prepare_later(self) -> None:
        await asyncio.sleep(self._pause_s)
        await self.prepare()
