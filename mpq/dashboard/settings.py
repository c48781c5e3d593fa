"""What the operator of a server decided."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True, slots=True)
class Rate:
    """How often one who asks may: `burst` at once, and `per_second` from then on."""

    burst: int
    per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server behaves; every number is a limit of what one request may take.

    `allow_modules` are prefixes of modules whose entry points jobs may name, `allow_hub` lets
    them name Hugging Face models, `allow_hosts` are names beside the loopback ones that it is
    reached by. With `require_token` nobody is served without a token even where none was made.
    """

    allow_modules: tuple[str, ...] = ()
    allow_hub: bool = False
    allow_hosts: tuple[str, ...] = ()
    require_token: bool = False
    body_bytes: int = 2_000_000
    submits: Rate = Rate(500, 10.0)
    solves: Rate = Rate(60, 2.0)
    moves: Rate = Rate(300, 40.0)  # quick answers to a budget that someone drags
    solves_at_once: int = 2
    solve_seconds: float = 20.0
    solve_cells: int = 2_000_000
    streams: int = 200

    @property
    def hosts(self) -> frozenset[str]:
        """Every name that a request may be for, in lower case."""
        return frozenset(host.lower() for host in (*LOOPBACK, *self.allow_hosts))


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address to listen on."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"  # what other names lead to is decided elsewhere


def names_of(host: str) -> tuple[str, ...]:
    """Return the names beside the loopback ones by which an address to listen on is reached."""
    if is_loopback(host) or host in ("0.0.0.0", "::", ""):  # the last are no names of anything
        return ()
    return (f"[{host}]" if ":" in host else host,)
