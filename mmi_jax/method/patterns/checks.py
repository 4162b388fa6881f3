"""Checks that patterns share."""


def check_at_least(pattern, **least: int) -> None:
    """Raises ValueError unless each named field is at least the given number."""
    for name, lowest in least.items():
        value = getattr(pattern, name)
        if value < lowest:
            raise ValueError(f"{type(pattern).__name__}.{name} must be at least {lowest}, got {value}")
