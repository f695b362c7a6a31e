"""Exclusive locks on open files. The operating system releases a lock when its process ends, even after kill -9."""


def lock(descriptor: int, *, wait: bool = True) -> bool:
    """Lock an open file until its descriptor is closed. Return whether it is locked: False where locks do not exist.

    These are advisory Unix locks, which native Windows and some network file systems do not have. Raises
    BlockingIOError if another process or descriptor has the lock and `wait` is False.
    """
    try:
        import fcntl
    except ImportError:  # native Windows
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True
