"""One way to choose among the implementations of an operation."""

from collections.abc import Callable, Mapping


class Unavailable(Exception):
    """Raised by an implementation that cannot serve this input here; says why."""


def select(
    operation: str,
    implementations: Mapping[str, Callable],
    name: str | None,
    order: tuple[str, ...],
) -> Callable:
    """The implementation called `name`, or with None the first of `order` that works.

    A name means exactly that implementation: its `Unavailable` reaches the caller.
    With None an implementation that raises `Unavailable` hands over to the next; the
    last one of `order` must serve every input.

    Raises:
      ValueError: `name` is not in the table.
    """
    if name is not None:
        if name not in implementations:
            raise ValueError(
                f"`implementation` of {operation} must be None or one of"
                f" {sorted(implementations)}; got {name!r}."
            )
        return implementations[name]

    def first_that_works(*args, **kwargs):
        for candidate in order[:-1]:
            try:
                return implementations[candidate](*args, **kwargs)
            except Unavailable:
                continue
        return implementations[order[-1]](*args, **kwargs)

    return first_that_works
