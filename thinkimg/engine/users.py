"""Users of the engine's servers at this moment: what all of them need stays as it is."""

import threading
from collections.abc import Callable


class Users:
    """Users of servers by the version of the weights that they need; for threads.

    Weights are replaced, and servers started again, by the first user after all others have left.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._versions: dict[object, str] = {}

    def join(self, user: object, version: str, fits: Callable[[], bool]) -> bool:
        """Return True if the user may have the servers now, and count it; else ask again later.

        fits: called where there are others with the same version: True if the servers' limits are wide enough.
        """
        with self._lock:
            others = set(self._versions.values())
            if others and not (others == {version} and fits()):
                return False
            self._versions[user] = version
            return True

    def leave(self, user: object) -> None:
        """Count the user no more; do nothing if it has left before."""
        with self._lock:
            self._versions.pop(user, None)
