"""When something that happens every so many steps, epochs or examples is due."""


def crosses_multiple(every: int | None, before: int, after: int) -> bool:
    """Whether a count that grew from `before` to `after` reached a multiple of `every` (None: never due)."""
    return bool(every) and after // every > before // every
