import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def demo_output() -> Path:
    """What `make demo` wrote: `DELTA_LLAVA_DEMO`, which must then be there, or `demo-output` of this checkout."""
    named = os.environ.get("DELTA_LLAVA_DEMO")
    folder = Path(named) if named else REPOSITORY / "demo-output"
    if named is None and not (folder / "answers.png").is_file():
        pytest.skip("no trained demo model: run `make demo` first")
    return folder
