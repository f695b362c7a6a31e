"""Exclusive locks on open files. The operating system releases one when its process ends, also by kill -9."""


def lock(descriptor: int, *, wait: bool = True) -> bool:
    """Lock an open file until its descriptor is closed; return False where there are no locks.

    These are advisory locks of Unix, which native Windows and some network file systems do not have. Raises
    BlockingIOError if another process or descriptor has the lock and `wait` is off.
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
