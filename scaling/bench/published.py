"""Where published tables are found: they are not this project's to ship."""

import os
from pathlib import Path


def folder() -> Path:
    """``$SCALING_PUBLISHED``, else ../shared/published beside the repository; it may not be there."""
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "published"
    return Path(os.environ.get("SCALING_PUBLISHED", beside))
