"""A JSONL file that is written batch by batch, and its log, from which it resumes to the same
bytes.

The first line of FILE.log.jsonl says what FILE.jsonl is made of. Each batch adds a record of all
that is done so far: rows of the input, bytes of FILE.jsonl, seconds, counts; of figures' values
the sum x and the number n, and over the prompts of each batch the sums of their x^2, x n and n^2:

    {"rows": 9, "bytes": 850, "seconds": 2.5, "counts": {"pairs": 7},
     "figures": {"bias": [3.5, 7]}, "squares": {"bias": [4.25, 8.5, 17.0]}}
"""

import json
from pathlib import Path

import numpy as np

from runtime import checkpoint
from runtime.errors import UserError
from runtime.files import append, check_apart, json_lines, lock_file, replace_text


def open_output(config, head):
    """Lock --out and its log, cut both after the last batch that is complete -> the record so far.

    config: a stage's, with out, resume and overwrite; head: {"stage", "config", "data"}, the first
    line of a new log; data has the names of what is read. Raises UserError if --out or its log is
    one of them, or a file of another run is there.
    """
    if not config.out.endswith(".jsonl"):
        raise UserError(f"--out={config.out}: name a .jsonl file")
    if config.resume and config.overwrite:
        raise UserError("--resume and --overwrite: choose one")
    out, log, records = Path(config.out), Path(config.out).with_suffix(".log.jsonl"), []
    if out.exists() and not out.is_file():
        raise UserError(f"--out={out}: is no regular file, and an interrupted run continues from its file; name one")
    for file in (out, log):
        check_apart("out", file, head["data"])
    record = {"rows": 0, "bytes": 0, "seconds": 0.0, "counts": {}, "figures": {}, "squares": {}}
    try:
        lock_file(out.with_name(f".{out.name}.lock"), config.out)
        if out.exists() and not (config.resume or config.overwrite):
            raise UserError(f"--out={out}: is here already; --resume continues it, --overwrite replaces it")
        if out.exists() and config.resume:
            stage, data, size = head["stage"], head["data"], out.stat().st_size
            lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
            head, *records = [json.loads(line) for line in lines if line.endswith(b"\n")]
            checkpoint.check_same_run(head, stage, config)
            checkpoint.check_same_data(head, data)
            records = [record for record in records if record["bytes"] <= size]
            if records:
                record = records[-1]
                check_record(record)
        append(out, b"", record["bytes"])
        replace_text(log, json_lines([head, *records]))
        return record
    except OSError as e:
        raise UserError(f"--out={out}: {e.strerror}") from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise UserError(
            f"--resume: {log} is missing, damaged, or of another script or version; --overwrite starts again"
        ) from None


def check_record(record):
    """Raises an error of some kind unless a record is as `write_batch` makes it."""
    sums = []
    for name, (total, n) in record["figures"].items():
        xx, xn, nn = record["squares"][name]
        sums += total, n, xx, xn, nn
    for number in (record["rows"], record["bytes"], record["seconds"], *record["counts"].values(), *sums):
        if not 0 <= number < 2**63:
            raise ValueError


def write_batch(out, record, rows, n, counts, values, prompts):
    """Append what became of n rows of the input to --out, and add it to the record and the log.

    rows: [dict] to write; counts: {name: number}; values, prompts: see `add_values`.
    """
    record["bytes"] = append_text(out, json_lines(rows, default=str))
    record["rows"] += n
    for name, number in counts.items():
        record["counts"][name] = record["counts"].get(name, 0) + number
    add_values(record, values, prompts)
    append_text(Path(out).with_suffix(".log.jsonl"), json_lines([record]))


def add_values(record, values, prompts):
    """Add the values of a batch to a record's sums.

    values: {figure: float64 [p] or [p, k], nan where there is none}; prompts: int [p], from 0.
    """
    for name, numbers in values.items():
        known = np.isfinite(numbers)
        total, size = record["figures"].get(name, (0.0, 0))
        record["figures"][name] = total + float(numbers[known].sum()), size + int(known.sum())
        prompt = prompts[np.nonzero(known)[0]]  # of each value
        x, k = np.bincount(prompt, numbers[known]), np.bincount(prompt)  # [prompts]
        record["squares"][name] = (np.array([x @ x, x @ k, k @ k]) + record["squares"].get(name, 0.0)).tolist()


def append_text(path, text):
    """Add a text to the end of a file and have the disk hold it -> the size of the file."""
    try:
        return append(path, text.encode("utf-8", "replace"))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; --resume continues after the last batch that was written") from None
