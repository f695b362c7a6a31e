"""Points between the steps of a run, and intervals of recurring events."""

import dataclasses
from typing import NamedTuple


class RunPoint(NamedTuple):
    """A point between two steps, when `step` of `total_steps` steps are finished and `examples` examples consumed.

    `epochs` are the numbers of finished epochs before and after the latest step.
    """

    step: int
    total_steps: int
    epochs: tuple[int, int] = (0, 0)
    examples: int = 0


@dataclasses.dataclass(frozen=True)
class Every:
    """When an event happens: every `steps` steps or `epochs` epochs (None: not counted), at the start, at the end."""

    steps: int | None = None
    epochs: int | None = None
    at_start: bool = False
    at_end: bool = False

    def due(self, point: RunPoint) -> bool:
        """Return whether the event is due at this point."""
        if point.step == 0:
            return self.at_start
        return (
            crosses_multiple(self.steps, point.step - 1, point.step)
            or crosses_multiple(self.epochs, *point.epochs)
            or (self.at_end and point.step == point.total_steps)
        )


def crosses_multiple(every: int | None, before: int, after: int) -> bool:
    """Return whether a count that grew from `before` to `after` reached a multiple of `every` (None: never)."""
    return bool(every) and after // every > before // every
