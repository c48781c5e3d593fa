"""A driver's hold on a run: a lease that is renewed while it works, and the ear for `stop`."""

from __future__ import annotations

import os
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from mpq.core.errors import MpqError, StorageError
from mpq.core.jobs import RunState
from mpq.store.store import Store

LEASE_S = 20.0
BEAT_S = 2.0  # a stop is heard so soon, and this many leases may be missed: LEASE_S / BEAT_S
_GRACE_S = 5.0  # for a driver process to end by itself once it was told to stop


def driver_name() -> str:
    """Return a name of this process that no other one has, "host:pid" to begin with."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"


@contextmanager
def driving(
    store: Store, run_id: str, *, instead_of: str | None = None, own_process: bool = False
) -> Iterator[None]:
    """Hold the lease of a run, renewed every two seconds by a thread.

    When the run is asked to stop, or the lease is lost, KeyboardInterrupt reaches the main thread,
    if that is the one that drives; where the process is the driver's own it ends after five seconds
    more, whatever it does. `instead_of` is who took the run for this process. Raises StorageError
    (`run_driven`) where another one drives.
    """
    is_main = threading.current_thread() is threading.main_thread()
    name = driver_name()
    store.take(run_id, name, LEASE_S, instead_of)
    done = threading.Event()
    beat = threading.Thread(
        target=_beat,
        args=(store, run_id, name, done, is_main, own_process),
        name="lease",
        daemon=True,
    )
    has_ear = not store.in_memory  # whose one connection is not for two threads
    if has_ear:
        beat.start()
    try:
        yield
    finally:
        done.set()
        if has_ear:
            beat.join(timeout=LEASE_S)
        store.release(run_id, name)


def _beat(
    store: Store,
    run_id: str,
    driver: str,
    done: threading.Event,
    is_main: bool,
    own_process: bool,
) -> None:
    while not done.wait(BEAT_S):
        try:
            stops, lost = store.renew(run_id, driver, LEASE_S), False
        except StorageError as error:
            if error.code != "lease_lost":
                continue  # a database that is away comes back, or the lease ends by itself
            stops, lost = True, True
        except MpqError:
            continue
        if not stops:
            continue
        if lost:
            store.log(run_id, "driver", f"{driver} lost its lease and ended")
        if not is_main:
            store.log(run_id, "driver", f"{driver} cannot be stopped: it is a thread of a program")
            return
        # To the thread itself, so that it also wakes from waiting.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if not own_process or done.wait(_GRACE_S):
            return
        if not lost:
            store.set_state(run_id, RunState.STOPPED)
            store.release(run_id, driver)
        os._exit(130)
