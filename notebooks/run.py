"""Runs the notebooks from top to bottom on this machine.

    python notebooks/run.py --small    # a few steps each, nothing is kept: `make test-notebooks`
    python notebooks/run.py            # in full, with the outputs written into the notebooks

They share one folder of runs, so sample_and_score loads what quickstart trained. Run it on a CPU
with JAX_PLATFORMS=cpu.
"""

import argparse
import os
import pathlib
import tempfile
import time

import nbclient
import nbformat

HERE = pathlib.Path(__file__).parent
NOTEBOOKS = ("quickstart", "sample_and_score")
# Code to run after the cell with a tag.
_FOLDER = "FOLDER = pathlib.Path({folder!r})"
_SMALL = {
    "settings": """
training = {"data.dir": FOLDER / "data", "train.num_steps": 6}
num_scored, walks = 20, (2, 3)""",
    "sizes": """
digits |= {"train.num_steps": 6}
digits_finetune = {"sample.steps": 4}
mine |= {"model.width": 32, "model.depth": 3, "train.batch_size": 8}
mine_pretrain = mine_finetune = {"train.num_steps": 6}
num_scored = 20""",
}


def run(name: str, folder: str, small: bool) -> None:
    """Runs one notebook, and saves its outputs unless `small`.

    Args:
      name: its file's name.
      folder: for data and runs.
      small: whether to take a few steps only.

    Raises:
      nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    path = HERE / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for i, cell in reversed([*enumerate(notebook.cells)]):
        (tag,) = cell.metadata.get("tags", ()) or ("",)
        lines = [_FOLDER.format(folder=folder)] if tag == "settings" else []
        if small and tag in _SMALL:
            lines.append(_SMALL[tag])
        if lines:
            added = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["added"]})
            notebook.cells.insert(i + 1, added)
    nbclient.NotebookClient(
        notebook,
        timeout=1800,
        coalesce_streams=True,
        resources={"metadata": {"path": str(HERE)}},
    ).execute()
    notebook.cells = [c for c in notebook.cells if "added" not in c.metadata.get("tags", ())]
    if not small:
        for count, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
            cell.execution_count = count
            cell.metadata.pop("execution", None)  # times of this machine
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
        # As in a reader's copy, where runs are in the folder "runs".
        path.write_text(nbformat.writes(notebook).replace(folder, "runs") + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a few steps; keep nothing")
    small = parser.parse_args().small
    os.environ.setdefault("TQDM_DISABLE", "1")
    with tempfile.TemporaryDirectory(prefix="maskdm_notebooks_") as folder:
        for name in NOTEBOOKS:
            start = time.perf_counter()
            run(name, folder, small)
            print(f"{name}: every cell ran, in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
