"""The one kind of error that a user can act on, and the kinds of warning."""


class UserError(ValueError):
    """What is wrong, where, what was expected and what to do next, in one line of plain words.

    Commands print it as one line on stderr and exit with status 1; from Python it is an ordinary ``ValueError``.
    """


class LeftOutWarning(UserWarning):
    """A part of the user's input that does not count; commands print it as one line on stderr."""


class AssumedWarning(UserWarning):
    """Something that the input does not say and that was taken to be so; commands print it as one line on stderr."""


class NoScoreError(UserError):
    """A score that does not exist on the features it was given."""


def listed(names: list[str], limit: int = 5) -> str:
    """Names in a sentence, cut to a readable number.

    Examples:
        >>> listed(["a", "b", "c"], limit=2)
        'a, b and 1 more'
        >>> listed(["a"])
        'a'
    """
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
