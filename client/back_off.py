"""How long a site waits before it tries again."""

from __future__ import annotations

import secrets
import time

FIRST_DELAY_SECONDS, GREATEST_DELAY_SECONDS = 0.2, 15.0


class BackOff:
    """Waits longer after each failure, up to a bound, and from the start again after a success."""

    def __init__(self) -> None:
        self._delay = FIRST_DELAY_SECONDS

    def reset(self) -> None:
        """Notes a success."""
        self._delay = FIRST_DELAY_SECONDS

    def wait(self) -> None:
        """Waits, with a fifth of jitter so that many sites do not come at once."""
        time.sleep(self._delay * (0.8 + 0.4 * secrets.randbelow(1000) / 1000))
        self._delay = min(self._delay * 2, GREATEST_DELAY_SECONDS)
