"""The quickstart notebook runs from top to bottom in a fresh kernel, and so do the lines on a model's card."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import nbformat
import pytest
from test_card import made

from demo import assets
from demo.scenes import scene
from pipelines import card

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> nbformat.NotebookNode:
    """The notebook with its outputs, and behind it the lines of a card, run in the model's folder."""
    with warnings.catch_warnings():  # Jupyter's own, on where its paths will be one day
        warnings.simplefilter("ignore", DeprecationWarning)
        from nbclient import NotebookClient

    assets.model()
    clone = tmp_path_factory.mktemp("clone")
    for name in ("artemis_vlm", "pipelines", "demo"):  # no runs/ of this checkout
        (clone / name).symlink_to(ROOT / name)
    scene(0, 0).image.save(clone / "photo.jpg")
    notebook = nbformat.read(ROOT / "demo" / "quickstart.ipynb", as_version=4)
    here = "from pathlib import Path\nPath('a3').mkdir()\n[Path('a3', f.name).symlink_to(f) for f in folder.iterdir()]"
    notebook.cells += [
        nbformat.v4.new_code_cell(f"{here}\n%cd a3\n!mv ../photo.jpg ."),
        nbformat.v4.new_code_cell(card_lines()),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(clone)}}).execute()
    return notebook


def card_lines() -> str:
    """The Python on a model's card as it stands; only the answer's length is cut."""
    (lines,) = re.findall(r"```python\n(.*?)```", card.model_card(*made(), "x"), re.DOTALL)
    assert "max_new_tokens=150" in lines
    return str(lines).replace("max_new_tokens=150", "max_new_tokens=8")


def printed(*cells: nbformat.NotebookNode) -> str:
    outputs = [output for cell in cells for output in cell.get("outputs", []) if output.get("name") != "stderr"]
    return "".join(str(output.get("text") or output.get("data", {}).get("text/plain", "")) for output in outputs)


def test_the_quickstart(executed: nbformat.NotebookNode) -> None:
    said = printed(*executed.cells[:-2])
    right, other = map(float, re.findall(r"(?:its own|another) image: ([0-9.]+)", said))
    assert right + 0.1 < other, "the model that ships looks at the image"
    assert "Paris" in said
    assert "every frozen tensor is what it was" in said
    assert any("image/png" in o.get("data", {}) for c in executed.cells for o in c.get("outputs", []))


def test_the_cards_lines(executed: nbformat.NotebookNode) -> None:
    assert printed(executed.cells[-1]).strip()


def test_it_is_stored_without_outputs() -> None:
    stored = json.loads((ROOT / "demo" / "quickstart.ipynb").read_text())
    code = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
