"""The report: what it takes, and what it leaves out."""

import json

import report


def test_the_report_takes_any_log_or_leaves_it_out_in_one_line(tmp_path, capsys):
    good = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "kl": None, "event": "x"}]
    lines = "".join(json.dumps(line) + "\n" for line in good)
    logs = {  # taken, whatever they hold
        "whole": lines,
        "cut": lines + '{"step": 3, "lo',
        "binary": lines.encode() + b"\xff\x00\n",
        "strange": lines
        + '[1]\n7\nnull\n{"loss": "low"}\n{"step": [1], "loss": {}}\n{"reward": true}\n{"loss": NaN}\n',
        "empty": "",
        "old": '{"chosen_ratio": 1.0, "iter": 3}\n',
    }
    for name, text in logs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "folder/log.jsonl").mkdir(parents=True)
    (tmp_path / "gone.json").symlink_to("nowhere")
    figure = {"value": 0.5, "low": None, "high": None}
    (tmp_path / "fine.json").write_text(json.dumps({"figures": {"reward data/world.py:gold": figure, "x": figure}}))
    (tmp_path / "best.json").write_text(json.dumps({"figures": {"best of 1: data/world.py:gold": figure}}))
    left_out = {
        "huge/log.jsonl": f'{{"step": 1, "loss": {10**400}}}\n',
        "a.json": "{",
        "b.json": '{"figures": {"x": 3}}',
        "c.json": '{"figures": {"x": {"value": "high", "low": null, "high": null}}}',
        "d.json": '{"figures": {"x": {"value": 1.0}}}',
        "empty.log.jsonl": "",
        "short.log.jsonl": '{"figures": {"bias": [1.0]}}\n',
        "words.log.jsonl": '{"counts": {"pairs": "many"}}\n',
        "x_answers.jsonl": '{"completion": "no prompt"}\n',
        "y_answers.jsonl": '{"prompt": "cut", "com',
    }
    for name, text in left_out.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    odd = [7, [], {}, ["hi"], [{"content": 3}], "text"]
    rows = [{"prompt": prompt, "completion": prompt, "finished": 3, "my.py:gold": "much"} for prompt in odd]
    (tmp_path / "z_answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "fine.log.jsonl").write_text('{"rows": 9}\n{"figures": {"bias": [3.5, 7]}, "counts": {"pairs": 7}}\n')

    page = report.make(tmp_path, {}).read_text()
    printed = capsys.readouterr().out.splitlines()
    for name in left_out:
        assert len([line for line in printed if line.startswith("left out: ") and f"{tmp_path / name}:" in line]) == 1
    damaged = {"cut": 1, "binary": 1, "strange": 4}
    for name, n in damaged.items():
        assert f"left out: {n} damaged lines of {tmp_path / name / 'log.jsonl'}" in printed
    assert len(printed) == len(left_out) + len(damaged)
    assert "0.5 of 7" in page and (
        report.matplotlib is None or all(f"{name}: loss" in page for name in logs if name != "empty")
    )
