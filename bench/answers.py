"""One question of a quick start, answered by each of its models: README's four lines.

The answers are those that quickstart.py's own evaluate.py commands sampled to held-out prompts, one
each, at temperature 1. Nothing is chosen but the number of the row.

    python -m bench.answers --quickstart=out/quickstart --row=1
"""

from dataclasses import dataclass
from pathlib import Path

from data.read import read_jsonl
from runtime.cli import check_ranges, launch
from runtime.errors import UserError

MODELS = {"base": "base", "SFT": "sft", "PPO": "ppo", "GRPO": "grpo"}


@dataclass
class Config:
    # a finished quick start
    quickstart: str = "out/quickstart"
    # row of its held-out prompts, from 1 [>= 1]
    row: int = 1


def side_by_side(quickstart, row):
    """The lines: the question, and what each model answered, on one line each."""
    files = {"question": ("world/prompts_test", "prompt")}
    files |= {name: (f"{run}_answers", "completion") for name, run in MODELS.items()}
    lines = []
    for name, (file, field) in files.items():
        rows = [found for _, found in read_jsonl(quickstart / f"{file}.jsonl")]
        if row > len(rows):
            raise UserError(f"--row={row}: {file}.jsonl has {len(rows)} rows")
        lines.append(f"{name:<10}{' '.join(rows[row - 1][field].split())}")
    return lines


def main(config):
    check_ranges(config)
    print(*side_by_side(Path(config.quickstart), config.row), sep="\n")


if __name__ == "__main__":
    launch(main, Config)
