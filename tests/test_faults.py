"""Nothing is ever lost: one seed of bench/faults.py, every stage under every fault, and a signal to a script as a user types it."""
import signal
import subprocess
import sys

import pytest

from bench import faults

# Two start many processes; and three are in every stage the same code, and here in the stage that has most to lose by it.
ROWS = [pytest.param(stage, fault, marks=pytest.mark.xdist_group(f"faults {stage}"), id=f"{stage}-{fault}")
        for stage in faults.STAGES for fault in faults.FAULTS if faults.applies(stage, fault) and fault not in ("torchrun", "typed_again") and (stage == "ppo" or fault not in ("sigint", "flipped", "missing"))]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return faults.make_inputs(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("stage, fault", ROWS)
def test_nothing_is_lost(made, stage, fault):
    *_, found, seen, _ = faults.check(made, stage, fault, 0)
    if not found:
        pytest.skip("this fault cannot be made here")
    assert all(found.values()), seen
    assert set(found) == set(faults.COLUMNS) or fault.startswith("nan_")  # after which there may be nothing to go on with


def test_sigterm_to_a_script_as_a_user_types_it(made):
    row = faults.Row(made, made / "typed", "sft", 0)
    faults.fresh(row)
    script, flags = faults.STAGES["sft"]
    command = [sys.executable, script.__file__, *(f"--{name}={value}" for name, value in (flags | {"seed": 0}).items())]
    process = subprocess.Popen(command, cwd=row.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGTERM)
            break
    said = process.stderr.read()
    assert process.wait() == 143 and "SIGTERM: finishing this step, then saving" in said and "the same command with --resume goes on" in said, said
    done = subprocess.run([*command, "--resume"], cwd=row.folder, capture_output=True, text=True)
    assert done.returncode == 0 and not faults.lost(row) and not faults.difference(row), done.stderr
