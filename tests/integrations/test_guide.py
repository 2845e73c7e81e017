"""The scripts of docs/integrations.md run as they stand, one after another in one folder."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported

import re
import textwrap
from pathlib import Path

import pytest
import torch

GUIDE = Path(__file__).parents[2] / "docs" / "integrations.md"


def _scripts():
    blocks = re.findall(
        r"^( *)```python\n(.*?)^\1```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE
    )
    return [textwrap.dedent(code) for _, code in blocks]


@pytest.mark.slow
def test_the_scripts(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    plain, lightning, transformers, rebuild = _scripts()
    for code in (plain, lightning):
        spaces = {"__name__": "__main__"}
        exec(compile(code, GUIDE.name, "exec"), spaces)
        pruner = spaces["pruning"].pruner if "pruning" in spaces else spaces["pruner"]
        assert pruner.step_count == pruner.total_steps == 300
        assert pruner.structure()["eliminated"]
    exec(compile(transformers, GUIDE.name, "exec"), trained := {"__name__": "__main__"})
    exec(compile(rebuild, GUIDE.name, "exec"), rebuilt := {"__name__": "__main__"})
    assert trained["model"].config.layerprune_eliminated
    assert Path("out/checkpoint-150/layerprune_pruner.pt").is_file()
    images = trained["images"][:50]
    left, right = (part["model"].eval()(images).logits for part in (trained, rebuilt))
    assert left.equal(right)
