"""examples/tour.ipynb runs from its first cell to its last on the model that `make demo` trained."""

import os
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tour.ipynb"


def shown(cell) -> str:
    """What a cell printed, and its value."""
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tour(demo_output, monkeypatch):
    monkeypatch.setenv("DELTA_LLAVA_DEMO", str(demo_output.resolve()))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()

    said = {cell.source: shown(cell) for cell in notebook.cells if cell.cell_type == "code"}
    assert not any("error:" in text for text in said.values())
    (counting,) = (text for source, text in said.items() if source.startswith("adapted ="))
    after = counting.partition("after")[2]
    assert sum(digit in after for digit in "01234") > 1
    assert not any(word in after for word in ("zero", "one", "two", "three", "four"))
    (published,) = (text for source, text in said.items() if "delta-llava publish" in source)
    assert "checked on the Hub" in published
    (asked,) = (text for source, text in said.items() if source.startswith("!delta-llava ask"))
    assert asked.split()[-1] in "01234"
