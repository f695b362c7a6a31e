"""Moments between the steps of a run, and intervals of recurring events."""

import dataclasses
from typing import NamedTuple


class Moment(NamedTuple):
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

    def due(self, at: Moment) -> bool:
        """Return whether the event is due at this moment."""
        if at.step == 0:
            return self.at_start
        return (
            crosses_multiple(self.steps, at.step - 1, at.step)
            or crosses_multiple(self.epochs, *at.epochs)
            or (self.at_end and at.step == at.total_steps)
        )


def crosses_multiple(every: int | None, before: int, after: int) -> bool:
    """Return whether a count that grew from `before` to `after` reached a multiple of `every` (None: never)."""
    return bool(every) and after // every > before // every
