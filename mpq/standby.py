"""A driver process that has imported everything and waits for its run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path


class Standby:
    """One process of `python -m mpq.driver --wait`; it ends by itself when this one does.

    With `ray_address` it is connected to that cluster and holds one worker of it, which has
    imported everything, too, and one CPU.
    """

    def __init__(self, environment: Mapping[str, str], ray_address: str | None = None) -> None:
        command = [sys.executable, "-m", "mpq.driver", "--wait"]
        if ray_address is not None:
            command += ["--ray-address", ray_address]
        with said_in(f"standby-{os.getpid()}").open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=dict(environment),
            )

    def give(self, run_id: str, instead_of: str) -> subprocess.Popen[bytes] | None:
        """Let the process drive a run that was taken for it; None where it is no more."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([run_id, instead_of]).encode() + b"\n")
            self._process.stdin.close()
        except BrokenPipeError:
            self._process.wait()
            return None
        return self._process

    def close(self) -> None:
        """End the process if it has no run."""
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            self._process.stdin.close()
            self._process.wait()


def awaited() -> tuple[str, str] | None:
    """Return the run and who took it, None where whoever started this process is gone.

    From then on what this process says is in the file of the run.
    """
    line = sys.stdin.readline()
    if not line:
        return None
    run_id, instead_of = json.loads(line)
    with said_in(run_id).open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    return run_id, instead_of


def said_in(run_id: str) -> Path:
    """Return the file of what a driver process says beside its log."""
    return Path(tempfile.gettempdir()) / f"mpq-driver-{run_id}.log"
