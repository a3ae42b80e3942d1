"""The notebook of the docs: its cells run, and show what the model does; the slow test lets it train its own model."""

import sys
from pathlib import Path

import pytest
from small_models import checkpoint, loaded

nbformat = pytest.importorskip("nbformat", reason="not installed: pip install -e '.[test]'")
nbclient = pytest.importorskip("nbclient", reason="not installed: pip install -e '.[test]'")
pytest.importorskip("ipykernel", reason="not installed: pip install -e '.[test]'")

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "first_look.ipynb"


def run(folder, monkeypatch, path=None, text=None):
    """Run the notebook in the Python of the tests, and return what the cells say, in order."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first.source.startswith("CHECKPOINT = None")
    if path is not None:
        first.source = f"CHECKPOINT = {str(path)!r}"
        for cell in notebook.cells:
            cell.source = cell.source.replace('TEXT = "the value of the"', f"TEXT = {text!r}")
    notebook.cells.append(nbformat.v4.new_code_cell("import sys; print(sys.executable)"))
    for variable in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(variable, str(folder / variable))  # a user's own kernels are none of ours
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    client = nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(folder)}})
    client.execute()
    said = [said_by(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert said.pop() == f"{sys.executable}\n"
    return said


def said_by(cell):
    """Return a cell's output as text; of a figure its type."""
    parts = []
    for output in cell.outputs:
        data = output.get("data", {})
        parts.append(output.get("text") or ("figure" if "image/png" in data else data.get("text/plain", "")))
    return "".join(parts)


def test_the_notebook_shows_what_the_model_does(data, tmp_path, monkeypatch):
    text = "word3 word1 word7"
    said = run(tmp_path, monkeypatch, checkpoint(data, "mixed"), text)
    model = loaded(data, "mixed")
    _, _, about, following, routes, tables, figure, samples = said
    assert "64 symbols, 4 experts a layer, reads 15 tokens at once" in about
    assert "torch.Size([4, 64])" in following
    assert str(model.next_token_probabilities(text, top=5)["token"][0]) in following
    assert "hash" in routes and "switch" in routes and f"[{model.routes(text)['expert'][0]}]" in routes
    assert "layer 0: 64 rows" in tables and "figure" in figure
    for sample in model.sample(text, length=12, number=3, top_p=0.9, seed=1):
        assert sample.text in samples


@pytest.mark.slow
def test_the_notebook_makes_its_own_model(tmp_path, monkeypatch):
    said = run(tmp_path, monkeypatch)
    assert "8 experts a layer" in said[2] and "figure" in said[6]


def test_the_notebook_is_small_and_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 100_000
    for cell in notebook.cells:
        assert not cell.get("outputs") and not cell.get("execution_count")
