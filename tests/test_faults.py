"""Nothing is ever lost: one seed of the rows of bench/faults.py that differ between stages, and a
signal to a script as a user types it. bench/faults.py runs them all."""

import signal
import subprocess
import sys

import pytest

from bench import faults

ELSEWHERE = ("torchrun", "typed_again")  # start many processes: only bench/faults.py runs them
# The same code in every stage (runtime/run.py, checkpoint.py, process.py): tested in one
SHARED = {
    **dict.fromkeys(("sigint", "two_signals", "flipped", "missing", "truncated"), "sft"),
    **dict.fromkeys(("no_permission", "two_runs", "full_disk", "changed_data", "rank_killed"), "sft"),
    **dict.fromkeys(("sigterm", "shard_killed"), "pretrain"),
    "rank_stopped": "sft",
}
# What a killed stage, and one that goes on with other ranks, computes is also in its own tests
# (test_a_killed_run..., test_one_process_micro_batches_and_two_processes_agree)
SAMPLED = {"kill": ("sft", "rlaif", "grpo"), "other_ranks": ("sft", "reward", "dpo")}
# The same guard in every stage (test_guard.py): tested where it is cheap, and in two that train
USERS_REWARDS = {
    *(("evaluate", f"reward_{what}") for what in ("exits", "moves", "prints")),
    *(("grpo", f"reward_{what}") for what in ("hangs", "nan", "moves")),
    *(("ppo", f"reward_{what}") for what in ("hangs", "raises", "exits")),
}


def rows():
    found = []
    for stage in faults.STAGES:
        for fault in faults.FAULTS:
            if not faults.applies(stage, fault) or fault in ELSEWHERE or stage != SHARED.get(fault, stage):
                continue
            if stage not in SAMPLED.get(fault, faults.STAGES):
                continue
            if fault.startswith("reward_") and (stage, fault) not in USERS_REWARDS:
                continue
            group = pytest.mark.xdist_group(f"faults {stage}")
            found.append(pytest.param(stage, fault, marks=group, id=f"{stage}-{fault}"))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory, warm):
    return faults.make_inputs(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("stage, fault", rows())
def test_nothing_is_lost(made, stage, fault):
    *_, found, seen, _ = faults.check(made, stage, fault, 0)
    if not found:
        pytest.skip("this fault cannot be made here")
    assert all(found.values()), seen
    # after a nan_ fault there may be nothing to continue
    assert set(found) == set(faults.COLUMNS) or fault.startswith("nan_")


def test_sigterm_to_a_script_as_a_user_types_it(made):
    row = faults.Row(made, made / "typed", "sft", 0)
    faults.fresh(row)
    script, flags = faults.STAGES["sft"]
    command = [sys.executable, script.__file__, *(f"--{name}={value}" for name, value in (flags | {"seed": 0}).items())]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=row.folder, **pipes)
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGTERM)
            break
    said = process.stderr.read()
    assert process.wait() == 143, said
    assert "SIGTERM: finishing this step, then saving" in said and "rerun with --resume to continue" in said
    done = subprocess.run([*command, "--resume"], cwd=row.folder, capture_output=True, text=True)
    assert done.returncode == 0 and not faults.lost(row) and not faults.difference(row), done.stderr
