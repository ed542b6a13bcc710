"""What the house looks like: size, density, long functions, imports; and the map that README shows.

Size is counted in Python tokens, without comments and docstrings: unlike lines, they cannot be
made longer. Python 3.11 counts (later ones divide f-strings). tests/ and bench/ are left out.

    python -m bench.house           the figures
    python -m bench.house --map     one line a file: path, what it is, tokens
"""

import argparse
import ast
import fnmatch
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

STAGES = ["pretrain.py", "sft.py", "reward.py", "ppo.py", "dpo.py", "grpo.py", "rlaif.py", "distill.py"]
# Bottom up. A file stands on the first floor that has a pattern for it, and imports from its own
# floor or a lower one.
FLOORS = [
    ["kernels/*", "runtime/__init__.py", "runtime/errors.py", "runtime/cli.py", "runtime/files.py"],
    ["data/*"],
    ["model.py", "variants.py"],
    ["optim.py", "runtime/*"],
    ["rollout.py", "scoring.py", "figures.py", "engine.py"],
    [*STAGES, "evaluate.py", "sample.py", "serve.py", "export.py", "report.py"],
    ["*"],
]
MAX_LINES, MAX_NAMES, MAX_COLUMNS = 60, 45, 120
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def product_files(root):
    """{path below `root`: its text}, without tests, benchmarks, outputs and hidden folders."""
    files = {}
    for path in sorted(Path(root).glob("**/*.py")):
        name = path.relative_to(root).as_posix()
        if not re.match(r"(tests|bench|out|build)/|\.|.*/\.", name):
            files[name] = path.read_text()
    return files


def count_tokens(text):
    """The Python tokens of a source text. Strings in triple quotes count as docstrings."""
    total = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        docstring = token.type == tokenize.STRING and re.match("r?(\"\"\"|''')", token.string)
        total += token.type not in NOT_CODE and not docstring
    return total


def functions(text):
    """[(name, lines, bound names)] of every function; names as Name nodes that are stored to."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            found.append((node.name, node.end_lineno - node.lineno + 1, len(stored)))
    return found


def formatted_lines(text):
    """How many lines ruff makes of a source text at 120 columns; None if there is no ruff."""
    command = [sys.executable, "-m", "ruff", "format", "--isolated", f"--line-length={MAX_COLUMNS}", "-"]
    result = subprocess.run(command, input=text, capture_output=True, text=True)
    return None if result.returncode else result.stdout.count("\n")


def imported_modules(node):
    """The dotted names that an import statement may mean; of `from a import b` both a and a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def imports(root):
    """{file: the product's files that it imports}, imports inside functions included.

    A package's __init__.py holds no code here and is not counted.
    """
    files = product_files(root)
    arrows = {}
    for name, text in files.items():
        modules = [module for node in ast.walk(ast.parse(text, name)) for module in imported_modules(node)]
        paths = {f"{module.replace('.', '/')}.py" for module in modules}
        arrows[name] = sorted(paths & files.keys() - {name})
    return arrows


def floor(name):
    """The number of the floor that a file stands on."""
    return next(i for i, patterns in enumerate(FLOORS) if any(fnmatch.fnmatch(name, p) for p in patterns))


def upward_imports(root):
    """[(importer, imported)] that break the order of the floors.

    Two more rules hold: no stage imports another, and data/ imports no kernels.
    """
    pairs = [(name, target) for name, targets in imports(root).items() for target in targets]
    upward = [(name, target) for name, target in pairs if floor(target) > floor(name)]
    between_stages = [(name, target) for name, target in pairs if {name, target} <= set(STAGES)]
    from_data = [(name, target) for name, target in pairs if floor(name) == 1 and target.startswith("kernels/")]
    return upward + between_stages + from_data


def cycles(root):
    """The import cycles, each as the sorted list of the files that all reach each other."""
    arrows = imports(root)
    reachable = {}
    for name in arrows:
        seen, waiting = set(), [name]
        while waiting:
            new = set(arrows[waiting.pop()]) - seen
            seen |= new
            waiting += new
        reachable[name] = seen
    groups = {tuple(sorted(b for b in reachable[a] if a in reachable[b])) for a in arrows}
    return [list(group) for group in sorted(groups) if group]


def loaded_by(root, module):
    """Which of kernels/, torch, triton and slow parts of torch `import module` loads; or the error
    it ends in."""
    slow = {"torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp"}
    code = f"import sys, {module}; print(*sorted({slow | {'kernels', 'torch', 'triton'}} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    if result.returncode:
        return result.stderr.strip().splitlines()[-1]
    return result.stdout.strip() or "neither kernels nor torch nor triton"


def first_sentence(text):
    """The first sentence of a module's docstring, on one line."""
    paragraph = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    return re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(paragraph.split()))[0]


def print_map(files):
    for name, text in files.items():
        print(f"{name:<24} {count_tokens(text):>6,}  {first_sentence(text)}")


def print_sizes(files):
    sizes = {name: count_tokens(text) for name, text in files.items()}
    kernels = sum(size for name, size in sizes.items() if name.startswith("kernels/"))
    print(f"Python tokens: {sum(sizes.values()) - kernels:,} of product and {kernels:,} of kernels/")
    for name in sorted(sizes, key=sizes.get, reverse=True):
        print(f"  {sizes[name]:>7,}  {name}")

    print("\nstage         tokens  tokens a nonblank line  formatted lines  lines of main  names in main")
    for name in filter(files.__contains__, STAGES):
        density = sizes[name] / sum(bool(line.strip()) for line in files[name].splitlines())
        lines = formatted_lines(files[name]) or "no ruff"
        main_lines, names = next(((n, k) for f, n, k in functions(files[name]) if f == "main"), (0, 0))
        print(f"{name:<12} {sizes[name]:>7,} {density:>23.1f} {lines:>16} {main_lines:>14} {names:>14}")


def print_limits(files):
    print(f"\nFunctions over {MAX_LINES} lines or {MAX_NAMES} names, and lines over {MAX_COLUMNS} columns:")
    for name, text in files.items():
        for function, lines, names in functions(text):
            if lines - 1 > MAX_LINES or names > MAX_NAMES:
                print(f"  {name}:{function} {lines} lines, {names} names")
        wide = sum(len(line) > MAX_COLUMNS for line in text.splitlines())
        if wide:
            print(f"  {name} {wide} wide lines")


def print_imports(root):
    pairs = [(name, target) for name, targets in imports(root).items() for target in targets]
    folders = Counter(tuple(f"{n.split('/')[0]}/" if "/" in n else "scripts" for n in pair) for pair in pairs)
    print(f"\nImports between files: {len(pairs)}; between folders:")
    for (importer, imported), number in sorted(folders.items()):
        print(f"  {number:>4}  {importer} -> {imported}")
    upward = [f"{importer} -> {imported}" for importer, imported in upward_imports(root)]
    print(f"Upward: {', '.join(upward) or 'none'}")
    print(f"Cycles: {'; '.join(' <-> '.join(cycle) for cycle in cycles(root)) or 'none'}")
    print(f"\n`import data.world` loads {loaded_by(root, 'data.world')}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=Path(__file__).parents[1], help="the checkout to measure")
    parser.add_argument("--map", action="store_true", help="print the map of files only")
    arguments = parser.parse_args()
    files = product_files(arguments.root)
    if arguments.map:
        return print_map(files)
    print_sizes(files)
    print_limits(files)
    print_imports(arguments.root)


if __name__ == "__main__":
    main()
