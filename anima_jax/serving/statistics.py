"""What the engine does and did, in numbers."""

import dataclasses
import threading
from typing import Any

import jax

from anima_jax.serving.adapters import AdapterStatistics

EVENT = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """The number of programs that threads whose names begin with `prefix` have compiled."""

    def __init__(self, prefix: str):
        self.count = 0
        self._prefix = prefix
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        # JAX calls this in the thread that compiles.
        if event == EVENT and threading.current_thread().name.startswith(self._prefix):
            self.count += 1

    def close(self) -> None:
        """Count no more."""
        jax.monitoring.unregister_event_duration_listener(self._listen)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What the engine does now, and did since it was made."""

    waiting: int
    drawing: int
    decoding: int
    slots: int
    """Slots of all pools."""
    used_slots: int
    pools: int
    evaluations: int
    """Evaluations of pools and of images that are drawn alone."""
    image_evaluations: int
    """The same, counted once for each image that took part."""
    images: int
    failed: int
    cancelled: int
    compilations: int
    """Programs that were compiled; a pool needs none after its first image."""
    seconds_per_evaluation: float
    adapters: AdapterStatistics
