"""A process that fills a store, for the tests to kill: `python -m tests.data.store_killed FOLDER TURN OF [MOST]`.

It writes the parts whose turn it is among `OF` processes, of those that are not there. After `MOST` it waits to be
killed.
"""

import hashlib
import signal
import sys

import numpy as np

from anima_jax.data.store import Store

PARTS, RECORDS_A_PART = 150, 3


def records_of(part: int) -> list[tuple[bytes, bytes]]:
    """A part's (key, record): sizes from nothing to a hundred kilobytes, different in each."""
    rng = np.random.default_rng(part)
    return [
        (hashlib.sha256(f"{part} {row}".encode()).digest(), rng.bytes(int(rng.integers(0, 100_000))))
        for row in range(RECORDS_A_PART)
    ]


def main() -> None:
    folder, turn, of, most = sys.argv[1], *map(int, [*sys.argv[2:], PARTS][:3])
    store = Store(folder)
    for part in range(turn, PARTS, of):
        records = records_of(part)
        if records[0][0] not in store:
            if not most:
                signal.pause()
            store.write_part(records)
            most -= 1


if __name__ == "__main__":
    main()
