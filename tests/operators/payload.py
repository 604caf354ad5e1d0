"""A pickle that gives itself away: for tests that nothing is ever unpickled."""

import os
from collections.abc import Callable
from pathlib import Path


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)
