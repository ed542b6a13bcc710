"""What README.md and docs/ say is so: their links lead somewhere, their commands have flags that
exist, and files, functions and tests that they name are there."""

import ast
import dataclasses
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest

import dpo
import grpo
from runtime.cli import check_ranges, parse_cli

ROOT = Path(__file__).parents[1]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))
PAGES = ["README.md", *DOCS]
SCRIPTS = [*PAGES, "bench/gpu_first.sh"]  # that have commands
STAGES = ["pretrain", "sft", "reward", "ppo", "dpo", "grpo", "distill", "rlaif"]
NOT_OURS = {"pytest", "venv", "llama.cpp/convert_hf_to_gguf.py", "bench.NAME", "FILE.py", "my_rewards.py"}
COMMAND = re.compile(r"(?<![\w-])(?:python3?|torchrun --nproc_per_node=\d+) (?:-m )?([\w./]+)([^`\n|&#;]*)")
PATH = re.compile(r"(?<![\w./])((?:bench|data|docs|kernels|runtime|tests)/[\w./-]+\.\w+|\w+\.(?:py|sh))\b")
FLAG = re.compile(r"--(\w+)")


def read(page):
    return (ROOT / page).read_text().replace("\\\n", " ")


@functools.cache
def sources():
    """{path: text} of all Python files."""
    folders = (ROOT, *(ROOT / name for name in ("bench", "data", "kernels", "runtime", "tests")))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for f in folders for path in f.glob("*.py")}


def config_of(script):
    """The Config of a script: `sft.py`, `data.world`."""
    return importlib.import_module(script.removesuffix(".py")).Config


def flags_of(script):
    return {field.name for field in dataclasses.fields(config_of(script))}


def commands(text):
    """[(script, flags as text)] of a page."""
    return [(script, flags) for script, flags in COMMAND.findall(text) if script not in NOT_OURS]


# --------------------------------------------------------------------------------------------------
# Commands


@pytest.mark.parametrize("page", [page for page in SCRIPTS if commands(read(page))])
def test_every_command_could_be_typed(page):
    """Its flags are those of its script; and where nothing is left for the shell or the reader to
    fill in, they parse and lie within their ranges."""
    for script, text in commands(read(page)):
        path = script.removesuffix(".py").replace(".", "/") + ".py"
        assert (ROOT / path).exists(), script
        flags = set(FLAG.findall(text))
        if script == "bench.house":  # it is read without the product, and so has no Config
            assert not [flag for flag in flags if f'"--{flag}"' not in (ROOT / path).read_text()]
            continue
        if not flags:
            continue
        assert flags <= flags_of(script), (script, flags - flags_of(script))
        if "..." not in text and "$" not in text:
            words = shlex.split(text, comments=True)
            check_ranges(parse_cli(config_of(script), [word for word in words if word.startswith("--")]))


def test_every_flag_that_is_named_is_one_of_some_script():
    scripts = [name for name, text in sources().items() if text.endswith("    launch(main, Config)\n")]
    scripts = [name for name in scripts if not name.startswith("bench/")]
    known = set().union(*(flags_of(name.removesuffix(".py").replace("/", ".")) for name in scripts))
    known |= {"help", "shutdown"}  # torchrun's --shutdown-timeout
    named = {flag for page in PAGES for span in re.findall(r"`--[^`]*`", read(page)) for flag in FLAG.findall(span)}
    assert len(scripts) >= 12 and len(named) > 15
    assert named <= known, named - known


def sections(text, mark="## "):
    """{heading: what stands below it}."""
    parts = re.split(rf"^{mark}", text, flags=re.M)[1:]
    return {part.partition("\n")[0]: part for part in parts}


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_of_a_stage_is_explained(stage):
    parts = sections(read("docs/stages.md"))
    text = parts[f"{stage}.py"] + parts["Flags of every run"]
    if stage in ("ppo", "grpo"):
        text += parts["Flags of PPO and GRPO"]
    explained = {flag for line in text.splitlines() if line.startswith("| `--") for flag in FLAG.findall(line)}
    assert not flags_of(f"{stage}.py") - explained


def test_the_table_of_defaults_has_those_of_the_scripts():
    lines = sections(read("docs/stages.md"))["Defaults"].splitlines()
    rows = {line[3:].partition(".py")[0]: line for line in lines if line.startswith("| `")}
    assert set(rows) == set(STAGES) - {"rlaif"}
    for stage, text in rows.items():
        defaults = {field.name: field.default for field in dataclasses.fields(config_of(stage))}
        defaults |= {"dpo": {"beta": dpo.LOSSES["dpo"].beta}, "grpo": grpo.DEFAULT_RECIPE}.get(stage, {})
        for flag, value in re.findall(r"`--(\w+)=([\d.]+)`", text):
            assert float(value) == defaults[flag], (stage, flag)
        for number, name in re.findall(r"(\d+) (pairs|prompts|answers|steps)", text):
            flag = {"pairs": "batch_size", "prompts": "prompts_per_step", "answers": "group_size"}.get(name, "steps")
            assert int(number) == defaults[flag], (stage, flag)
        assert "one answer" not in text or defaults["group_size"] == 1
        assert defaults.get("max_new_tokens", 256) == 256 or stage == "pretrain"
    rates = dict(re.findall(r"`(\w+)\.py` \| (\S+) \(128", read("docs/stages.md")))
    for stage in ("sft", "reward", "dpo", "distill"):
        assert f"0: {rates[stage]} (128 / width)^" in sources()[f"{stage}.py"], stage
    assert f"0: ppo {rates['ppo']} (128 / width)^2, grpo half of that" in sources()["runtime/run.py"]
    assert float(rates["grpo"]) == float(rates["ppo"]) / 2


# --------------------------------------------------------------------------------------------------
# Links


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", read(page), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", read(page), flags=re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), link


def test_every_page_is_linked_from_another():
    text = "".join(read(page) for page in PAGES)
    assert not [page for page in DOCS if Path(page).name not in text]


# --------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("page", SCRIPTS)
def test_every_file_that_is_named_exists(page):
    everywhere = {path.name for path in ROOT.glob("*.*")} | {Path(name).name for name in sources()} | NOT_OURS
    named = set(PATH.findall(read(page)))
    assert not {name for name in named if name not in everywhere and not (ROOT / name).exists()}


@pytest.mark.parametrize("page", PAGES)
def test_every_function_and_test_that_is_named_exists(page):
    """A name with an underscore between backticks is one of the code, or of what it writes."""
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
    map_ = sections(read("docs/architecture.md"))["The map"]
    product = [name for name in sources() if not name.startswith(("bench/", "tests/")) and "__init__" not in name]
    assert not [name for name in product if Path(name).name not in map_]


def test_the_glossary_has_forty_words_in_order_each_with_its_file():
    rows = re.findall(r"^\| (\S.*?) \| .* \| (.*?) ?\|$", read("docs/glossary.md"), re.M)[1:]
    words = [word.lower() for word, _ in rows]
    assert len(words) >= 40 and words == sorted(words)


# --------------------------------------------------------------------------------------------------
# Figures


@functools.cache
def numbers_of(logs):
    """All numbers in some logs."""
    text = "".join((ROOT / "bench/results" / log).read_text() for log in logs)
    return [float(number.replace(",", "")) for number in re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text)]


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md", "docs/gpu.md", "docs/story.md"])
def test_every_figure_is_in_the_log_beside_it(page):
    """A number with a decimal point in a section that links logs (of the story: anywhere) is a
    number of those logs, rounded, also as a percentage."""
    checked = 0
    parts = {"all": read(page)} if page == "docs/story.md" else sections(read(page))
    for heading, text in parts.items():
        logs = tuple(sorted(set(re.findall(r"bench/results/([\w.]+)", text))))
        if not logs:
            continue
        prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|commit \w+|\d{4}\.\d{5}|[-\w]+ \d[\d.]*:", "", text, flags=re.S)
        for number in re.findall(r"(?<![\w.])[-−]?\d+\.\d+(?:e-?\d+)?(?![\w.]*\w)", prose):
            digits = len(number.partition("e")[0].partition(".")[2])
            value = float(number.replace("−", "-"))
            step = 10.0**-digits * (10.0 ** int(number.partition("e")[2] or 0))
            known = numbers_of(logs)
            assert any(abs(value - x) <= 0.5001 * step for x in [*known, *(100 * x for x in known)]), (heading, number)
            checked += 1
    assert checked > 15


def test_the_table_of_features_counts_right():
    """Ours only where a test or a bench shows it, and as many as there are."""
    text = sections(read("README.md"))["Comparison"]
    rows = [line.split(" | ") for line in text.splitlines() if line.count(" | ") == 6][1:]
    ours = {row[0]: row[1] for row in rows}
    claims = [cell for name, cell in ours.items() if cell != "no" and name != "lines of Python"]
    assert all(re.search(r"\]\((?:tests|bench)/", cell) for cell in claims)
    assert len(claims) >= 10
    assert f"[{len(dpo.LOSSES)} losses]" in ours["DPO"] and f"[{len(grpo.RECIPES)} recipes]" in ours["GRPO"]
    lines = sum(text.count("\n") for name, text in sources().items() if not name.startswith(("bench/", "tests/")))
    assert abs(int(ours["lines of Python"].replace(",", "")) / lines - 1) < 0.1
