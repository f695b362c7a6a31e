"""Exit codes besides 0 and 2 (a mistake of the user): docs/multihost.md says what schedulers should do with them."""

FAULT = 1
"""Exit code after an error of the system, such as a full disk: the same command may work at another time."""

STOPPED = 75
"""Exit code of a run that was asked to stop and can be resumed: sysexits.h's EX_TEMPFAIL, "try again"."""

INTERRUPTED = 130
"""Exit code after a keyboard interrupt, as shells report it."""

CLOSED_PIPE = 141
"""Exit code after the reader of stdout has gone (`| head`), as shells report it."""
