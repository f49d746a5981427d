"""What a command raises when the user can mend it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """One sentence: what was got, what was expected. Printed without a traceback, exit code 2."""


@contextmanager
def one_sentence(*kinds: type[Exception]) -> Iterator[None]:
    """Turns the errors of the layers below into a UserError with the same sentence."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error


def need_extra(error: ImportError) -> UserError:
    """The error for a package that only the programs need."""
    return UserError(
        f"this command needs the package {error.name}, which is not installed; "
        'install it with: pip install "fused_lm[lm]"'
    )
