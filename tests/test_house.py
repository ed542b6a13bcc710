"""The house: nobody imports upwards or in a circle, and what must stay light loads no kernels."""

import pytest
from conftest import ROOT

from bench.house import count_tokens, cycles, imports, loaded_by, upward_imports


def test_nobody_imports_upwards_or_in_a_circle():
    assert "runtime/run.py" in imports(ROOT)["ppo.py"]  # or the rest would prove nothing
    assert upward_imports(ROOT) == []
    assert cycles(ROOT) == []


def test_data_and_the_command_line_load_neither_torch_nor_triton():
    modules = "data.world, data.tokenizer, data.prepare, runtime.cli, runtime.files"
    assert loaded_by(ROOT, modules) == "neither kernels nor torch nor triton"
    assert loaded_by(ROOT, "data.pack, data.chat, data.rows, data.corpus") == "torch"  # for its tensors


def test_a_script_starts_without_the_compiler_and_without_sharding():
    """They double the time that `python sample.py` takes to start."""
    pytest.importorskip("triton")
    assert loaded_by(ROOT, "evaluate, sample, ppo, pretrain, rlaif, serve") == "kernels torch triton"


def house(tmp_path, **files):
    """A tree of files of one import each (__ for a slash)."""
    for name, text in files.items():
        path = tmp_path / (name.replace("__", "/") + ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_what_breaks_the_order_is_found(tmp_path):
    root = house(
        tmp_path,
        model="import data.pack\nfrom runtime import run",
        optim="def later():\n    from dpo import loss",
        dpo="import model, optim\nfrom ppo import gae",
        ppo="",
        data__pack="from kernels.head import IGNORE",
        kernels__head="",
        runtime__run="from model import GPT",
    )
    expected = {("model.py", "runtime/run.py"), ("optim.py", "dpo.py"), ("dpo.py", "ppo.py")}
    assert set(upward_imports(root)) == expected | {("data/pack.py", "kernels/head.py")}
    assert cycles(root) == [["dpo.py", "optim.py"], ["model.py", "runtime/run.py"]]


def test_comments_and_docstrings_are_not_counted():
    code = "def f(x):\n    return x + 1\n"
    documented = 'def f(x):\n    """One more."""\n\n    # the next number\n    return x + 1  # a sum\n'
    assert count_tokens(code) == count_tokens(documented) == 10
