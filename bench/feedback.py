"""The loop closed by a simulated crowd, over real HTTP: ask, compare, vote, sharpen, serve again.

200 visitors, 8 at a time, ask questions of the embedded world, see two answers without names, and
vote by their own noisy taste (data/world.py's label). Four ways to learn from the same number of
votes, each from the same SFT model:

    offline   dpo.py on the world's own pairs, without a server: the bound
    one       all votes on the SFT model's answers, then sharpen.py once
    rounds    a third of the votes, sharpen.py, votes on the new model's answers, and so on
    ppo       the votes of "one", by sharpen.py --method=ppo: reward.py, then ppo.py

The server runs through all of it and follows what is trained; once a round it is killed (SIGKILL)
at a random moment with votes in flight, and no acknowledged vote may be missing. What is measured
is the gold of answers to held-out questions, through the server: of the next visitors, so to speak.
Done parts are kept in --out: the same command continues. Last line of output: JSON.

    python -m bench.feedback --start=out/quickstart --seeds=5
    python -m bench.feedback --start=out/quickstart --seeds=1 --ways=offline,one
"""

import http.client
import json
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.browser import free_port, start_server
from data import world
from data.feedback import freeze
from data.read import read_json
from figures import mean_interval
from runtime.checkpoint import newest_finished
from runtime.cli import check_ranges
from runtime.errors import UserError
from runtime.files import write_json
from runtime.process import launch

WAYS = ["offline", "one", "rounds", "ppo"]


@dataclass
class Config:
    # directory with sft/ and world/, as quickstart.py makes it
    start: str = "out/quickstart"
    # directory of everything
    out: str = "out/people"
    # crowds, each with its own taste and its own training [>= 1]
    seeds: int = 5
    # comma-separated: offline, one, rounds, ppo
    ways: str = "offline,one,rounds,ppo"
    # votes that prefer one answer [>= 1]
    votes: int = 1500
    # rounds of the way of that name [>= 1]
    rounds: int = 3
    # visitors, each with a name [>= 1]
    visitors: int = 200
    # visitors at a time [>= 1]
    at_once: int = 8
    # held-out questions that gold is measured on [>= 2]
    questions: int = 500
    # flags of dpo.py
    dpo: str = "--nll=0.2 --batch_size=16 --epochs=2"
    # flags of reward.py
    reward: str = "--lr=1.5e-3 --max_new_tokens=64"
    # flags of ppo.py
    ppo: str = "--steps=24 --max_new_tokens=64 --min_accuracy=0"


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def post(address, path, body):
    """The JSON answer; tries until a server answers, as the page does with a vote."""
    data = json.dumps(body).encode()
    for _ in range(6000):
        try:
            return json.load(urllib.request.urlopen(urllib.request.Request(address + path, data), timeout=60))
        except urllib.error.HTTPError as e:
            raise UserError(f"{path}: {e.status}: {e.read()[:300]}") from None
        except (OSError, http.client.HTTPException):  # it has been killed
            time.sleep(0.1)
    raise UserError("the server does not come back")


def answers(address, row, seed, n):
    """[(text, gold)] of n answers to a question, and the name of the model."""
    question = [{"role": "user", "content": row["prompt"]}]
    body = {"messages": question, "seed": seed, "n": n, "max_tokens": 64}
    answer = post(address, "/v1/chat/completions", body)
    found = []
    for choice in answer["choices"]:
        text, finished = choice["message"]["content"].strip(), choice["finish_reason"] == "stop"
        found.append((text, world.gold("", text, row | {"finished": finished})))
    return found, answer["model"]


# --------------------------------------------------------------------------------------------------
# The crowd


class Crowd:
    """Visitors who vote at a server until so many votes prefer one answer."""

    def __init__(self, config, seed, server, asked):
        self.config, self.server, self.seed = config, server, seed
        self.asked = asked  # questions so far
        self.rng = random.Random(f"{seed} crowd")
        self.questions = rows_of(Path(config.start) / "world/prompts.jsonl")
        self.rng.shuffle(self.questions)

    def vote(self, votes):
        """Have so many votes cast; kills the server once. Returns the acknowledged ones."""
        acknowledged, kill_after, kills = [], self.rng.randrange(votes // 4, 3 * votes // 4), self.server.kills
        with ThreadPoolExecutor(self.config.at_once) as pool:
            while len(acknowledged) < votes:
                left = votes - len(acknowledged)
                for row in pool.map(self.visit, range(self.asked, self.asked + left)):
                    if row:
                        acknowledged.append(row)
                    if len(acknowledged) == kill_after and self.server.kills == kills:
                        self.server.kill()
                self.asked += left
        self.server.check(acknowledged)
        return acknowledged

    def visit(self, number):
        """A question and a vote -> what was acknowledged; None if the answers were equal."""
        row = self.questions[number % len(self.questions)]
        rng = random.Random(f"{self.seed} {number} visitor")
        seed = rng.getrandbits(48)
        (first, second), model = answers(self.server.address, row, seed, 2)
        if not (first[0] and second[0]) or first[0] == second[0]:
            return None
        said = world.label(rng, {}, first, second)
        entry = {
            "vote": "left" if said["chosen"] == first[0] else "right",
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "answers": [first[0], second[0]],
            "models": [model, model],
            "seeds": [seed, seed],
            "by": f"visitor {number % self.config.visitors}",
        }
        post(self.server.address, "/v1/feedback", entry)
        return row["prompt"], said["chosen"], said["rejected"]


class Server:
    """serve.py in its own process, which can be killed and comes back."""

    def __init__(self, folder, model):
        self.folder = folder
        self.flags = {"model": model, "feedback": folder / "feedback", "follow": folder / "rounds", "device": "cpu"}
        self.flags["port"] = free_port()
        self.process, self.address = start_server(**self.flags)
        self.kills = 0

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.kills += 1
        self.process, _ = start_server(**self.flags)

    def check(self, acknowledged):
        """Raises UserError if a vote that was acknowledged is not in the file, whole."""
        kept = {(r["prompt"][0]["content"], r["chosen"], r["rejected"]) for r in freeze(self.pairs, "pairs")}
        lost = [vote for vote in acknowledged if vote not in kept]
        if lost or not self.pairs.read_bytes().endswith(b"\n"):
            raise UserError(f"{self.pairs}: {len(lost)} acknowledged votes are missing, {lost[:1]}")

    @property
    def pairs(self):
        return self.folder / "feedback/pairs.jsonl"

    def votes(self):
        return len(freeze(self.pairs, "pairs"))

    def wait_for(self, name):
        """Wait until the newest checkpoint below `name` answers."""
        for _ in range(6000):
            model = json.load(urllib.request.urlopen(f"{self.address}/v1/models"))["data"][0]["id"]
            if name in model:
                return
            time.sleep(0.1)
        raise UserError(f"the server does not follow to {name}")

    def gold(self, config):
        """Gold of one answer to each held-out question, as a list."""
        questions = rows_of(Path(config.start) / "world/prompts_test.jsonl")[: config.questions]
        with ThreadPoolExecutor(config.at_once) as pool:
            found = pool.map(lambda i: answers(self.address, questions[i], i, 1)[0][0][1], range(len(questions)))
            return list(found)

    def stop(self):
        self.process.terminate()
        self.process.wait()


# --------------------------------------------------------------------------------------------------
# Ways to learn


def python(*words):
    status = subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL).returncode
    if status:
        raise UserError(f"{' '.join(words)} ended with status {status}")


def training_flags(seed):
    return f"--seed={seed} --micro_batch_tokens=4096 --eval_every=0 --print_every=100"


def sharpen(config, folder, seed, method="dpo"):
    stages = ["dpo"] if method == "dpo" else ["reward", "ppo"]
    flags = [f"--{name}={vars(config)[name]} {training_flags(seed)}" for name in stages]
    init = f"--init={Path(config.start).resolve() / 'sft'}"
    where = [f"--feedback={folder / 'feedback'}", f"--rounds={folder / 'rounds'}", f"--method={method}"]
    python("sharpen.py", init, *where, *flags)


def learn(config, way, seed, folder):
    """{"curve": [[votes, gold of each answer], ...], "kills": n} of a way; the first is SFT's.

    What is done already is kept in folder/progress.json, in the votes and in the rounds.
    """
    start, file = Path(config.start).resolve(), folder / "progress.json"
    if way == "offline":
        pairs = rows_of(start / "world/pairs.jsonl")
        random.Random(f"{seed} pairs").shuffle(pairs)
        few, out = folder / "pairs.jsonl", folder / "rounds/1/dpo"
        few.write_text("".join(json.dumps(pair) + "\n" for pair in pairs[: config.votes]))
        flags = f"{config.dpo} {training_flags(seed)} --resume".split()
        python("dpo.py", f"--init={start / 'sft'}", f"--data={few}", f"--out={out}", *flags)
    if way == "ppo" and not (folder / "feedback").exists():
        shutil.copytree(folder.parent / "one/feedback", folder / "feedback")
    done = read_json(file) if file.exists() else {"curve": [], "kills": 0, "asked": 0}
    server = Server(folder, start / "sft")
    crowd, kills = Crowd(config, seed, server, done["asked"]), done["kills"]
    rounds = config.rounds if way == "rounds" else 1
    try:
        for n in range(len(done["curve"]), rounds + 1):
            votes = n * config.votes // rounds
            if n and way in ("one", "rounds") and server.votes() < votes:
                crowd.vote(votes - server.votes())
                done |= {"kills": kills + server.kills, "asked": crowd.asked}
                write_json(file, done)
            if n and way != "offline" and not newest_finished(folder / f"rounds/{n}"):
                sharpen(config, folder, seed, "ppo" if way == "ppo" else "dpo")
            if n:
                server.wait_for(f"/rounds/{n}/")
            if n or way != "offline":
                done["curve"].append([votes, server.gold(config)])
                write_json(file, done)
        return done
    finally:
        server.stop()


def win_rate(new, old):
    """Of new answers against old ones to the same questions, by gold; a tie counts half."""
    return mean_interval([(a > b) + 0.5 * (a == b) for a, b in zip(new, old)], seed=0)


def main(config):
    check_ranges(config)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # servers end as well
    ways = config.ways.split(",")
    if wrong := [way for way in ways if way not in WAYS]:
        raise UserError(f"--ways={config.ways}: {wrong[0]} is not one of {', '.join(WAYS)}")
    found = {}
    for seed in range(config.seeds):
        for way in ways:
            folder = Path(config.out).resolve() / f"seed{seed}" / way
            result = folder / "result.json"
            if not result.exists():
                folder.mkdir(parents=True, exist_ok=True)
                write_json(result, learn(config, way, seed, folder))
            record = read_json(result)
            for votes, gold in record["curve"]:
                mean = mean_interval(gold, seed=0)
                text = f"gold {mean['value']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]"
                if votes and len(record["curve"]) > 1:
                    rate = win_rate(gold, record["curve"][0][1])
                    text += f", wins {rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}] against the start"
                print(f"seed {seed}, {way:<8} {votes:5} votes: {text}", flush=True)
                found.setdefault(f"{way} {votes}", []).append(mean["value"])
            if record["kills"]:
                print(f"  killed {record['kills']} times with votes in flight; none was lost")
    if config.seeds > 1:
        for name, golds in found.items():
            mean = mean_interval(golds, seed=0)
            print(f"{name:<15} over {len(golds)} seeds: {mean['value']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]")
    print(json.dumps(found))


if __name__ == "__main__":
    launch(main, Config)
