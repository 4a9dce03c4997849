"""Records of a data set that cannot be read: named, counted, an error when they are too many."""

from __future__ import annotations

import logging

logger = logging.getLogger("examples.rejects")


class TooManyRejectedError(ValueError):
    """A data set has more records that cannot be read than the caller allows."""


class Rejects:
    """Counts what a reader leaves out. A record that is left out twice counts once."""

    def __init__(self, allowed: int) -> None:
        """`allowed`: records that may be left out; one more is an error."""
        self.allowed = allowed
        self.reasons: dict[str, str] = {}  # where -> why

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, where: str, why: str) -> None:
        """Leave a record out.

        Arguments:
            where: the file, and the line of it if it has lines.
            why: what is wrong.

        Raises:
            TooManyRejectedError: more than `allowed` were left out; names this one.
        """
        if where in self.reasons:
            return
        self.reasons[where] = why
        if len(self.reasons) > self.allowed:
            raise TooManyRejectedError(
                f"{where}: {why}. {len(self.reasons)} records cannot be read, and {self.allowed} "
                "may be left out; repair the data, or raise --max-rejected"
            )
        logger.warning("left out: %s: %s", where, why)
