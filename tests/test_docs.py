"""What README.md, docs/ and bench/gpu_first.sh name exists: scripts and their flags, files,
functions, tests."""

import ast
import dataclasses
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/architecture.md", "docs/story.md", "docs/gpu.md", "bench/gpu_first.sh"]
NOT_OURS = {"pytest", "llama.cpp/convert_hf_to_gguf.py", "bench.NAME", "FILE.py"}
COMMAND = re.compile(r"(?:python3?|torchrun --nproc_per_node=\d+) (?:-m )?([\w./]+)([^`\n|&#]*)")
PATH = re.compile(r"(?<![\w./])((?:bench|data|docs|kernels|runtime|tests)/[\w./-]+\.\w+|\w+\.(?:py|sh))\b")
FLAG = re.compile(r"--(\w+)")


def read(page):
    return (ROOT / page).read_text().replace("\\\n", " ")


def sources():
    """{path: text} of all Python files."""
    folders = (ROOT, *(ROOT / name for name in ("bench", "data", "kernels", "runtime", "tests")))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for f in folders for path in f.glob("*.py")}


def flags_of(script):
    """The names of a script's flags: `sft.py`, `data.world`."""
    module = importlib.import_module(script.removesuffix(".py"))
    return {field.name for field in dataclasses.fields(module.Config)}


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_of_a_command_is_one_of_its_script(page):
    commands = [(script, FLAG.findall(words)) for script, words in COMMAND.findall(read(page))]
    wrong = []
    for script, flags in commands:
        path = script.removesuffix(".py").replace(".", "/") + ".py"
        if script in NOT_OURS:
            continue
        if not (ROOT / path).exists():
            wrong.append(script)
        elif script == "bench.house":  # it is read without the product, and so has no Config
            wrong += [f"{script} --{flag}" for flag in flags if f'"--{flag}"' not in (ROOT / path).read_text()]
        elif flags:
            wrong += [f"{script} --{flag}" for flag in sorted(set(flags) - flags_of(script))]
    assert not wrong
    assert commands


def test_every_flag_that_is_named_is_one_of_some_script():
    scripts = [name for name, text in sources().items() if text.endswith("    launch(main, Config)\n")]
    scripts = [name for name in scripts if not name.startswith("bench/")]
    known = set().union(*(flags_of(name.removesuffix(".py").replace("/", ".")) for name in scripts))
    known |= {"help", "shutdown"}  # torchrun's --shutdown-timeout
    named = {flag for page in PAGES[:4] for span in re.findall(r"`--[^`]*`", read(page)) for flag in FLAG.findall(span)}
    assert len(scripts) >= 12 and len(named) > 15
    assert named <= known, named - known


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    everywhere = {path.name for path in ROOT.glob("*.*")} | {Path(name).name for name in sources()} | NOT_OURS
    named = set(PATH.findall(read(page)))
    assert named
    assert not {name for name in named if name not in everywhere and not (ROOT / name).exists()}


@pytest.mark.parametrize("page", PAGES[:4])
def test_every_function_and_test_that_is_named_exists(page):
    """A name with an underscore between backticks is one of the code."""
    text, files = read(page), sources()
    words = set().union(*(re.findall(r"\w+", source) for source in files.values()))
    names = set(re.findall(r"`([a-z]+(?:_[a-z]+)+|[A-Z]+(?:_[A-Z]+)+)`", text))
    assert not names - words
    tests = {name for source in files.values() for name in re.findall(r"^def (test_\w+)", source, re.M)}
    named = {name for name in re.findall(r"\btest_\w+", text) if f"tests/{name}.py" not in files}
    assert not named - tests
    for file, name in re.findall(r"(tests/\w+\.py)::(\w+)", text):
        assert f"def {name}(" in files[file]


def test_the_code_of_the_story_finds_what_it_imports():
    for code in re.findall(r"```python\n(.*?)```", read("docs/story.md"), re.S):
        tree = ast.parse(code)
        modules = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {alias.name: importlib.import_module(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if hasattr(module, "__path__"):  # a module of a package
                        modules[alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                assert hasattr(modules[node.value.id], node.attr), f"{node.value.id}.{node.attr}"


def test_the_map_has_every_file_of_the_product():
    text = read("README.md")
    map_ = text[text.index("## Map") : text.index("## What is promised")]
    product = [name for name in sources() if not name.startswith(("bench/", "tests/")) and "__init__" not in name]
    assert not [name for name in product if Path(name).name not in map_]
