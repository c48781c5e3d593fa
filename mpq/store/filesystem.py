"""Whether a file is on a disk of this machine."""

from __future__ import annotations

from pathlib import Path

_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "beegfs", "fuse.sshfs"}
_MOUNTS = Path("/proc/self/mounts")


def is_network(path: Path, mounts: str | None = None) -> bool:
    """Tell whether a file is on a network file system; False where that cannot be known.

    `mounts` are lines such as those of /proc/self/mounts, which are read by default.
    """
    if mounts is None:
        try:
            mounts = _MOUNTS.read_text(errors="replace")
        except OSError:
            return False
    place = path.resolve()
    found = [fields for line in mounts.splitlines() if len(fields := line.split()) > 2]
    holding = [(len(f[1]), i) for i, f in enumerate(found) if place.is_relative_to(_point(f[1]))]
    return bool(holding) and found[max(holding)[1]][2] in _NETWORK


def _point(text: str) -> str:
    return text.replace("\\040", " ")
