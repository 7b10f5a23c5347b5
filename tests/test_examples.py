"""The example runs from top to bottom, its notebook is the same text, and its words are true."""

import importlib.util
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPT, NOTEBOOK = EXAMPLES / "digits.py", EXAMPLES / "digits.ipynb"


@pytest.fixture(scope="module")
def maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_notebook", EXAMPLES / "make_notebook.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_runs_from_rows_to_a_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):  # covers U1, U11
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLM_GRPO_EXAMPLE_STEPS", "2")
    names = runpy.run_path(str(SCRIPT))
    shown = capsys.readouterr().out

    parts = [names[part] for part in ("labelled", "train", "held_out")]
    assert [len(part) for part in parts] == [100, 1247, 450], "as the text says"
    pictures = [[row["image"].tobytes() for row in part.select_columns("image")] for part in parts]
    distinct = {picture for part in pictures for picture in part}
    assert len(distinct) == sum(len(set(part)) for part in pictures) == 1797, "no picture stands in two parts"

    before, after, control = names["before"], names["after"], names["control"]
    assert {len(result.answers) for result in (before, after, control)} == {450}
    assert before.answers != after.answers != control.answers
    assert f"after {after.accuracy:22.1%}" in shown and "[" in shown
    assert names["trainer"].state.global_step == 2

    run = tmp_path / "runs" / "digits-example" / "grpo"
    assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json", "tokenizer.json"} <= {
        path.name for path in run.iterdir()
    }
    assert names["reply"] == after.answers[0], "the saved model answers as the trained one did"
    assert shown.rstrip().endswith(f"{names['reply']}\nright: {names['held_out'][0]['answer']}")


def test_the_examples_reward_by_hand():
    """Executes the one cell, so that it needs no model."""
    names: dict[str, Any] = {}
    (cell,) = [cell for cell in SCRIPT.read_text().split("# %%\n") if cell.startswith("def is_right")]
    exec(cell.partition("# %% [markdown]")[0], names)
    said = [[{"role": "assistant", "content": text}] for text in ("one", " two ", "three", "")]
    assert names["is_right"](said, ["one", "two", "four", "five"], image=None) == [1.0, 1.0, 0.0, 0.0]


def test_the_notebook_is_the_script(maker: Any):
    expected = maker.notebook(SCRIPT.read_text(encoding="utf-8"))
    again = "python examples/make_notebook.py examples/digits.py"
    assert NOTEBOOK.read_bytes() == expected.encode(), f"digits.ipynb is not digits.py's notebook; run: {again}"


def test_the_notebook_is_valid_and_its_cells_compile():
    document = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (document["nbformat"], document["nbformat_minor"]) == (4, 5)
    assert document["metadata"]["kernelspec"]["name"] == "python3"
    code, text = [], []
    for index, cell in enumerate(document["cells"]):
        assert cell["id"] == f"cell-{index}" and cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            compile("".join(cell["source"]), cell["id"], "exec")
            code.append("".join(cell["source"]))
        else:
            assert cell["cell_type"] == "markdown" and set(cell) == {"cell_type", "id", "metadata", "source"}
            text.append("".join(cell["source"]))
    assert text[0].startswith("# Teach") and len(code) == len(text)
    assert all(not line.startswith("# %%") for cell in code + text for line in cell.splitlines())


def test_every_line_of_a_script_has_its_cell(maker: Any):
    script = "# %% [markdown]\n# # Title\n#\n# `x`\n\n# %%\n\nx = 1\n\n\n# a comment\ny = 2\n\n# %%\n"
    cells = json.loads(maker.notebook(script))["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells] == [
        ("markdown", "# Title\n\n`x`"),
        ("code", "x = 1\n\n\n# a comment\ny = 2"),
        ("code", ""),
    ]
    with pytest.raises(ValueError, match="line 1 stands before the first cell: 'x = 1'"):
        maker.notebook("x = 1\n# %%\n")
    with pytest.raises(ValueError, match="line 2 of a markdown cell is no comment: 'x = 1'"):
        maker.notebook("# %% [markdown]\nx = 1\n")
