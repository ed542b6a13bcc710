"""Sharpen a model with what people said of its answers, while serve.py keeps serving.

    python serve.py --model=out/sft --feedback=out/feedback --follow=out/rounds
    python sharpen.py --init=out/sft --feedback=out/feedback --rounds=out/rounds

One call is one round, out/rounds/1, out/rounds/2, ...; each is three lines that you could type:

    python -m data.feedback --feedback=out/feedback --out=out/rounds/2/pairs.jsonl \\
        --after=out/rounds/1/pairs.jsonl                                the votes cast since round 1
    python dpo.py --init=NEWEST --data=out/rounds/2/pairs.jsonl --out=out/rounds/2/dpo
    (serve.py --follow sees that the run has finished, and serves it)

NEWEST is the last finished round's model, or --init. With --method=ppo the votes train a reward
model, and PPO follows that one, on the questions that people asked. An interrupted round is
continued by the same call; one that has not saved a step yet begins with the votes of that moment.
"""

import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from data.feedback import freeze
from runtime.checkpoint import newest_finished
from runtime.cli import check_ranges, launch, refuse_unread
from runtime.errors import UserError
from runtime.files import LOCKS, lock_file

FEW = 200  # votes; of fewer than these, a fifth is held out to validate on, unless the flags say otherwise


@dataclass
class Config:
    # -- What you will set --
    # checkpoint that the first round starts from: what serve.py serves as --model
    init: str
    # directory that serve.py writes
    feedback: str = "out/feedback"
    # directory of the rounds, which serve.py follows
    rounds: str = "out/rounds"
    # dpo: from the votes themselves; ppo: from a reward model of them [one of dpo, ppo]
    method: str = "dpo"
    # -- What you may set --
    # further flags of dpo.py, in quotes: "--nll=0.2 --epochs=2"
    dpo: str = ""
    # further flags of reward.py
    reward: str = ""
    # further flags of ppo.py
    ppo: str = ""


def freezing(config, folder, earlier):
    """The words of the command that freezes a round's votes; earlier: those of rounds before."""
    after = [f"--after={','.join(map(str, earlier))}"] if earlier else []
    words = ["-m", "data.feedback", f"--feedback={config.feedback}", f"--out={folder / 'pairs.jsonl'}", *after]
    return [*words, "--overwrite=True"] if (folder / "pairs.jsonl").exists() else words


def training(config, folder, init, votes):
    """The words of each command that trains on a round's votes, so many."""
    start = [f"--init={init}", f"--data={folder / 'pairs.jsonl'}"]
    if config.method == "dpo":
        return [["dpo.py", *start, f"--out={folder}/dpo", *flags_for(votes, config.dpo)]]
    reward = ["reward.py", *start, f"--out={folder}/rm", *flags_for(votes, config.reward)]
    ppo = ["ppo.py", *start, f"--reward={folder}/rm", f"--out={folder}/ppo", *split(config.ppo)]
    return [reward, ppo]


def split(flags):
    try:
        return shlex.split(flags)
    except ValueError as e:
        raise UserError(f"{flags!r}: {e}; further flags stand in one pair of quotes") from None


def flags_for(votes, flags):
    """The words of `flags`, and what few votes need besides."""
    words = split(flags)
    if votes < FEW and not any(word.startswith("--val") for word in words):
        words.append("--val_fraction=0.2")
    return words


SIGNALS = []  # that have come


def execute(words):
    """Run one command. If a signal comes, the command saves and leaves, and then this process.

    After a signal no further command begins."""
    print(f"\n$ {shlex.join(['python', *words])}", flush=True)
    process = None

    def stop(number, frame):
        SIGNALS.append(number)
        if process and number == signal.SIGTERM:  # Ctrl-C reaches the command too
            process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if SIGNALS:
        raise UserError("stopped by a signal; the same call continues from here")
    # It holds our lock too: if we are killed and it is not, the next call is refused until it ends
    process = subprocess.Popen([sys.executable, *words], pass_fds=[lock.fileno() for lock in LOCKS])
    if status := process.wait():
        what = words[1] if words[0] == "-m" else words[0]
        raise UserError(f"{what} ended with status {status}; the same call continues from here")


def main(config):
    check_ranges(config)
    unread = ("dpo",) if config.method == "ppo" else ("reward", "ppo")
    refuse_unread(config, dict.fromkeys(unread, f"--method={config.method} does not run it"))
    here, rounds = Path(__file__).parent, Path(config.rounds)
    if Path.cwd() != here:
        raise UserError(f"run it from the repository's directory: cd {here}")
    lock_file(rounds / ".lock", rounds, "rounds")
    numbers = sorted(int(path.name) for path in rounds.glob("*") if path.name.isdecimal())
    if not numbers or newest_finished(rounds / str(numbers[-1])):
        numbers.append(numbers[-1] + 1 if numbers else 1)
    folder = rounds / str(numbers[-1])
    earlier = [rounds / str(n) / "pairs.jsonl" for n in numbers[:-1]]
    init = newest_finished(rounds) or config.init
    if not any(folder.glob("*/step_*")):  # or it has begun to train, and continues on the same votes
        execute(freezing(config, folder, earlier))
    for words in training(config, folder, init, len(freeze(folder / "pairs.jsonl", "pairs"))):
        execute([*words, "--resume"])
    print(f"\nround {folder.name} is finished: serve.py --follow={config.rounds} answers with it from now on")


if __name__ == "__main__":
    launch(main, Config)
