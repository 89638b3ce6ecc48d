"""The committed notebooks; `make test-notebooks` runs them."""

import json

import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_shows_what_a_run_from_top_to_bottom_gave(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
    assert "/tmp/" not in path.read_text() and path.stat().st_size < 1_000_000


def test_the_quickstart_shows_what_training_prints_today():
    cells = code_cells(ROOT / "notebooks/quickstart.ipynb")
    streams = [o["text"] for cell in cells for o in cell["outputs"] if o["output_type"] == "stream"]
    lines = [line for text in streams for line in text]
    for row in ("data", "model", "noise", "optim", "image", "steps", "scores", "device", "writes"):
        assert sum(line.startswith(f"{row:9}") for line in lines) == 4, row  # four trainings
    assert not any(line.startswith("|") for line in lines)  # a table that --verbose prints


def test_a_class_is_drawn_with_and_without_guidance():
    cells = code_cells(ROOT / "notebooks/sample_and_score.ipynb")
    (cell,) = [c for c in cells if "label=c, guidance_scale=scale" in "".join(c["source"])]
    assert sum("image/png" in output.get("data", {}) for output in cell["outputs"]) == 2


def test_the_notebooks_start_alike_and_the_readme_has_their_badges():
    assert len(NOTEBOOKS) == 2
    first, second = ("".join(code_cells(path)[0]["source"]) for path in NOTEBOOKS)
    assert first == second
    readme = (ROOT / "README.md").read_text()
    for path in NOTEBOOKS:
        link = f"maskdm-jax/maskdm_jax/blob/main/notebooks/{path.name}"
        assert link in readme and link in path.read_text()
        assert "github.com/maskdm-jax/maskdm_jax" in first
