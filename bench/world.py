"""The quick start over several seeds (another world, other weights, another order of the data):
mean and spread of what later stages build on.

Each seed runs quickstart.py's own commands. Last line of output: JSON {"figure": {"mean", "low",
"high", "target"}}.

    python -m bench.world --seeds=5
"""

import json
from dataclasses import dataclass

import torch

import quickstart
from data.read import read_jsonl
from data.world import features
from runtime.checkpoint import INFO, find, read_json
from runtime.errors import UserError
from runtime.process import describe, launch

TARGETS = {  # figure: (what is asked of every seed, whether more is better)
    "nats per token above the floor": (0.03, False),
    "held-out sums right": (0.95, True),
    "judge: be kind, both orders": (0.75, True),
    "judge: be brief, both orders": (0.75, True),
    "SFT: completions finished": (0.99, True),
    "RM: pairs ordered as gold's": (0.80, True),
    "DPO: gold less SFT's, between the nearer ends of the 95 % intervals": (0.0, True),
    "DPO: win rate against SFT, by gold": (0.75, True),
    "PPO: gold reward": (1.2, True),
    "PPO: win rate against SFT, by gold": (0.80, True),
    "PPO: KL to SFT, nats per completion": (6.0, False),
    "PPO, GRPO: sampled sums right": (0.90, True),
    "PPO, GRPO: gold reward": (1.65, True),
    "AI feedback: share of SFT's rude phrases left": (0.5, False),
    "AI feedback: SFT's rude phrases less what is left, between the nearer ends of the 95 % intervals": (0.0, True),
    "seconds of pretraining": (150, False),
    "seconds of everything": (600, False),
    "rows that do not": (0, False),
}


@dataclass
class Config:
    # 0, 1, 2, ...
    seeds: int = 5
    # one quick start a seed below it
    out: str = "out/bench_world"


def order_by_manners(pairs):
    """How many of the pairs that gold tells apart would be ordered as gold does by somebody who
    knows all of it but whether the sum is right; ties count half."""
    gold = [p["gold_chosen"] - p["gold_rejected"] for p in pairs]
    sums = [features(p["chosen"], p["answer"])["right"] - features(p["rejected"], p["answer"])["right"] for p in pairs]
    manners = [round(g - r, 6) for g, r in zip(gold, sums)]
    found = [0.5 if m == 0 else float((m > 0) == (g > 0)) for m, g in zip(manners, gold) if g]
    return sum(found) / len(found)


def figures(out):
    """{figure: value} of a finished quick start."""
    base, sft, dpo, ppo, grpo, ai = (
        read_json(f"{out}/{name}.json")["figures"] for name in ("base", "sft", "dpo", "ppo", "grpo", "ai_dpo")
    )
    world, rm = read_json(f"{out}/world/world.json"), read_json(find(f"{out}/rm") / INFO)["metrics"]["figures"]
    seconds = {done["stage"]: done["seconds"] for done in read_json(f"{out}/report.json")["stages"]}
    gold, right, rude = (
        f"reward data/{name}" for name in ("world.py:gold", "rules.py:final_number", "world.py:rudeness")
    )
    won, kl = "win rate by data/world.py:gold", "KL to the reference, nats per completion"
    return {
        "nats per token above the floor": (base["nats/document"]["value"] - world["story_floor"])
        / base["tokens/document"]["value"],
        "held-out sums right": base["completions right"]["value"],
        "judge: be kind, both orders": base["judge: be kind, both orders"]["value"],
        "judge: be brief, both orders": base["judge: be brief, both orders"]["value"],
        "judge: be right, both orders": base["judge: be right, both orders"]["value"],
        "SFT: completions finished": sft["completions finished"]["value"],
        "base: gold reward": base[gold]["value"],
        "SFT: gold reward": sft[gold]["value"],
        "RM: pairs ordered as labelled": rm["accuracy"]["value"],
        "RM: accuracy that noise allows (Bayes)": rm["accuracy that noise allows (Bayes)"]["value"],
        "RM: pairs ordered as gold's": rm["order as gold's"]["value"],
        "RM: the same by one who cannot add": order_by_manners(
            [row for _, row in read_jsonl(f"{out}/world/pairs_val.jsonl")]
        ),
        "DPO: gold reward": dpo[gold]["value"],
        "DPO: gold less SFT's, between the nearer ends of the 95 % intervals": dpo[gold]["low"] - sft[gold]["high"],
        "DPO: win rate against SFT, by gold": dpo[won]["value"],
        "DPO: KL to SFT, nats per completion": dpo[kl]["value"],
        "SFT: sampled sums right": sft[right]["value"],
        "PPO: gold reward": ppo[gold]["value"],
        "PPO: win rate against SFT, by gold": ppo[won]["value"],
        "PPO: KL to SFT, nats per completion": ppo[kl]["value"],
        "PPO: sampled sums right": ppo[right]["value"],
        "PPO, GRPO: sampled sums right": grpo[right]["value"],
        "PPO, GRPO: gold reward": grpo[gold]["value"],
        "PPO, GRPO: win rate against SFT, by gold": grpo[won]["value"],
        "PPO, GRPO: KL to SFT, nats per completion": grpo[kl]["value"],
        "SFT: rude phrases per completion": sft[rude]["value"],
        "AI feedback: rude phrases per completion": ai[rude]["value"],
        "AI feedback: share of SFT's rude phrases left": ai[rude]["value"] / sft[rude]["value"],
        "AI feedback: SFT's rude phrases less what is left, between the nearer ends of the 95 % intervals": sft[rude][
            "low"
        ]
        - ai[rude]["high"],
        "AI feedback: gold reward": ai[gold]["value"],
        "AI feedback: KL to SFT, nats per completion": ai[kl]["value"],
        **{
            f"seconds of {stage}": seconds[name]
            for stage, name in {
                "pretraining": "pretrain",
                "SFT": "sft",
                "RM": "reward",
                "DPO": "dpo",
                "PPO": "ppo",
                "GRPO": "grpo",
                "AI feedback": "rlaif",
            }.items()
        },
        "seconds of everything": sum(seconds.values()),
        "rows of the report that improve for sure": sum(
            f["improved"] is True for f in read_json(f"{out}/report.json")["figures"]
        ),
        "rows that do not": sum(f["improved"] is False for f in read_json(f"{out}/report.json")["figures"]),
    }


def main(config):
    found = []
    for seed in range(config.seeds):
        try:
            quickstart.main(quickstart.Config(out=f"{config.out}/{seed}", seed=seed))
        except UserError as e:
            if "no sure improvement" not in str(e):
                raise
            print(f"seed {seed}: {e}")
        found.append(figures(f"{config.out}/{seed}"))
    summary = {}
    for name in found[0]:
        values = [f[name] for f in found]
        target, more = TARGETS.get(name, (None, True))
        summary[name] = {
            "mean": round(sum(values) / len(values), 4),
            "low": round(min(values), 4),
            "high": round(max(values), 4),
        }
        if target is not None:
            summary[name] |= {"target": target, "reached": min(values) >= target if more else max(values) <= target}
    print(f"\n{config.seeds} seeds, {describe(torch.device('cpu'))}")
    print(
        quickstart.table(
            [
                ("figure", "mean", "low", "high", "target"),
                *(
                    (n, *(f"{s.get(k, ''):.4g}" if k in s else "" for k in ("mean", "low", "high", "target")))
                    for n, s in summary.items()
                ),
            ]
        )
    )
    print(json.dumps(summary))


if __name__ == "__main__":
    launch(main, Config)
