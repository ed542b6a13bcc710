"""Do the tests notice? The classic bugs of preference learning, of RLHF, of resuming and of
sharding, each planted alone into a copy of the sources, whose tests must then fail.

A mutant is (name, file, old, new, tests): `old` must be in the file exactly once, and becomes
`new`; `tests` are pytest's arguments. First the tests run on an unchanged copy: those that fail
there prove nothing and are left out. The table says which test caught each mutant, and after how
many seconds. The exit status is 1 if one survives.

    python -m bench.mutants                      all of them, about ten minutes on one core
    python -m bench.mutants --only=kl_sign,gae   those whose name contains one of these
"""

import os, re, shutil, subprocess, sys, tempfile, time
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import UserError
from runtime.process import launch

PPO, GRPO, DPO, RM = "tests/test_ppo.py", "tests/test_grpo.py", "tests/test_dpo.py", "tests/test_reward.py"
PRETRAIN, FAULTS, SHARD, MEMORY, SECURITY = (
    "tests/test_pretrain.py",
    "tests/test_faults.py",
    "tests/test_shard.py",
    "tests/test_memory.py",
    "tests/test_security.py",
)
MUTANTS = [
    # The critic and its advantages
    ("value_off_by_one", "ppo.py", "hidden, _ = before_learnt(critic, chats)", "hidden = torch.cat([critic(pack_chats([c])[0])[torch.from_numpy(c.learnt)] for c in chats])", PPO),
    ("value_past_the_end", "ppo.py", "following, next_value = torch.zeros_like(r), 0.0, 0.0", "following, next_value = torch.zeros_like(r), 0.0, v[:, -1]", PPO),
    ("gae_without_gamma", "ppo.py", "gamma * next_value", "next_value", PPO),
    ("center_of_the_critic", "ppo.py", ".float() - center", ".float()", PPO),
    ("critic_not_trained", "ppo.py", "norm, critic_norm = optimizer.step(rate, config.clip), critic_optimizer.step(rate, config.clip)", "norm, critic_norm = optimizer.step(rate, config.clip), torch.zeros(()); critic_optimizer.zero_grad()", PPO),
    ("value_clip_smaller", "ppo.py", "0.5 * torch.maximum(", "0.5 * torch.minimum(", PPO),
    ("whiten_per_micro_batch", "ppo.py", "policy_loss(logp, old_logp, advantages, config.clip_ratio)", "policy_loss(logp, old_logp, whiten(advantages), config.clip_ratio)", PPO),
    ("not_whitened", "ppo.py", "advantages = whiten(advantages)", "pass", PPO),
    # The reward
    ("score_on_the_wrong_token", "ppo.py", "np.cumsum(lengths) - 1", "np.maximum(np.cumsum(lengths) - 2, 0)", PPO),
    ("kl_sign", "ppo.py", "rewards = -beta * (logp - ref_logp)", "rewards = beta * (logp - ref_logp)", PPO),
    ("no_penalty_for_no_end", "ppo.py", "scores - config.unfinished_penalty * np", "scores - 0.0 * np", PPO),
    ("end_not_scored", "rollout.py", "chat.encode_answer(tok, t) if s.finished", "chat.encode_answer(tok, t)[:-1] if s.finished", f"{PPO} tests/test_evaluate.py"),
    ("center_of_the_reward", "rollout.py", 'info.get("center", 0.0))', "0.0)", f"{PPO} tests/test_evaluate.py"),
    ("judge_asked_in_one_order", "rollout.py", "np.stack([forward, 1 - backward]", "np.stack([forward, forward]", GRPO),
    # One distribution for sampler and trainer
    ("top_k_in_rollouts", "rollout.py", "stop={chat.end_of_turn(tok)}, seed=seed", "stop={chat.end_of_turn(tok)}, top_k=2, seed=seed", PPO),
    ("sampled_at_another_temperature", "rollout.py", "n=n, temperature=temperature, stop={chat", "n=n, temperature=1.0, stop={chat", PPO),
    ("trained_at_another_temperature", "ppo.py", "logp = learnt_logprobs(model, chats[first:last], config.temperature)", "logp = learnt_logprobs(model, chats[first:last], 1.0)", PPO),
    ("grpo_at_another_temperature", "grpo.py", "logp = learnt_logprobs(model, chats[first:last], config.temperature)", "logp = learnt_logprobs(model, chats[first:last], 1.0)", GRPO),
    ("disagreement_let_through", "rollout.py", "if gap > bound:", "if False:", PPO),
    ("kl_at_the_start_let_through", "rollout.py", "if not_zero:", "if False:", PPO),
    ("end_not_learnt", "data/chat.py", "np.arange(len(prompt) + len(answer)) >= len(prompt))", "(np.arange(len(prompt) + len(answer)) >= len(prompt)) & (np.arange(len(prompt) + len(answer)) < len(prompt) + len(answer) - 1))", PPO),
    ("same_numbers_for_every_rank", "ppo.py", "first=begin * config.group)", "first=0)", PPO),
    # The update
    ("ratio_to_itself", "ppo.py", "ratio = torch.exp(logp - old_logp)", "ratio = torch.exp(logp - logp.detach())", PPO),
    ("clipped_the_wrong_way", "ppo.py", "return torch.maximum(-advantages * ratio", "return torch.minimum(-advantages * ratio", PPO),
    ("mean_per_micro_batch", "ppo.py", "(losses.sum() / n_tokens).backward()", "losses.mean().backward()", PPO),
    ("early_stop_steps", "ppo.py", "optimizer.zero_grad(), critic_optimizer.zero_grad()\n", "[setattr(p, 'grad', torch.zeros_like(p)) for m in (model, critic) for p in m.parameters()], optimizer.step(rate), critic_optimizer.step(rate)\n", PPO),
    ("beta_steered_away", "ppo.py", "kl / target - 1", "1 - kl / target", PPO),
    ("resume_forgets_beta", "ppo.py", 'beta, usual, warned = counters["beta"]', "beta, usual, warned = config.beta", PPO),
    ("resume_forgets_critic", "ppo.py", 'checkpoint.read(run.resumed / "critic", device)[0]', "first_critic(config, model, tok)[0]", PPO),
    # GRPO
    ("std_without_a_guard", "grpo.py", "return torch.where(differs(rewards)[:, None], advantages, 0.0)", "return centred / (rewards.std(1, keepdim=True) + 1e-8) if kind == 'grpo' else advantages", GRPO),
    ("baseline_of_the_batch", "grpo.py", "centred = rewards - rewards.mean(1, keepdim=True)", "centred = rewards - rewards.mean()", GRPO),
    ("rloo_without_its_factor", "grpo.py", "centred * G / (G - 1)", "centred", GRPO),
    ("k3_sign", "grpo.py", "torch.exp(-d) - 1 + d", "torch.exp(d) - 1 - d", GRPO),
    ("k3_without_its_ratio", "grpo.py", "ratio * k3()", "ratio.detach() * k3()", GRPO),
    ("clips_swapped", "grpo.py", "ratio.clamp(max(0.0, 1 - clip_low), 1 + clip_high)", "ratio.clamp(max(0.0, 1 - clip_high), 1 + clip_low)", GRPO),
    ("sequence_of_this_micro_batch", "grpo.py", "1 / (n_answers * n)", "1 / (len(lengths) * n)", GRPO),
    ("constant_without_max_new", "grpo.py", "1 / (n_answers * max_new_tokens)", "1 / n_answers", GRPO),
    ("grpo_early_stop_steps", "grpo.py", "optimizer.zero_grad()\n", "[setattr(p, 'grad', torch.zeros_like(p)) for p in model.parameters()], optimizer.step(rate)\n", GRPO),
    ("refilled_with_the_same_numbers", "grpo.py", "first=(seen + begin) * G)", "first=begin * G)", GRPO),
    ("equal_groups_dilute", "grpo.py", "differs(scores).nonzero()[:, 0].tolist()", "range(len(scores))", GRPO),
    ("no_end_still_learnt", "grpo.py", 'if s.finished or config.overlong != "mask"', "if True", GRPO),
    ("reference_never_renewed", "grpo.py", "reference.load_state_dict(model.state_dict())", "pass", GRPO),
    ("resume_forgets_reference", "grpo.py", "renewed or (checkpoint", "(checkpoint", GRPO),
    ("grpo_ratio_to_itself", "grpo.py", "ratio = torch.exp(logp - old_logp)", "ratio = torch.exp(logp - logp.detach())", GRPO),
    # DPO and the reward model
    ("dpo_sign", "dpo.py", "h = beta * (ratio_chosen - ratio_rejected)", "h = beta * (ratio_rejected - ratio_chosen)", DPO),
    ("dpo_of_means", "dpo.py", '"dpo": lambda: dpo_loss(*ratio.unbind(1)', '"dpo": lambda: dpo_loss(*(ratio / lengths).unbind(1)', DPO),
    ("ipo_of_sums", "dpo.py", "ipo_loss(*(ratio / lengths).unbind(1)", "ipo_loss(*ratio.unbind(1)", DPO),
    ("simpo_of_sums", "dpo.py", "simpo_loss(*mean.unbind(1)", "simpo_loss(*logp.unbind(1)", DPO),
    ("kto_baseline_per_rank", "dpo.py", "reduce_sum(sum(ratios))[0]", "float(sum(ratios))", DPO),
    ("pairs_of_this_micro_batch", "dpo.py", "loss = losses.sum() / len(items)", "loss = losses.mean()", DPO),
    ("reward_sign", "reward.py", "found[::2] - found[1::2]", "found[1::2] - found[::2]", RM),
    ("reward_mean_per_micro_batch", "reward.py", ".sum() / len(batch)\n", ".mean()\n", RM),
    ("reward_read_before_the_end", "model.py", "pack.cu[1:].long() - 1", "pack.cu[1:].long() - 2", RM),
    # Resuming, faults, shards, memory, strangers' files
    ("lost_optimizer", "checkpoint.py", "optimizer.load_state({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})", "pass", FAULTS),
    ("lost_random_state", "checkpoint.py", "set_random_state(tensors, self.device)", "pass", PRETRAIN),
    ("lost_place_in_the_data", "sft.py", 'order.begin(counters["epoch"], counters["index"])', "pass", FAULTS),
    ("lost_lines_twice", "runtime/process.py", '.get("step", 0) <= step and line', '.get("step", 0) <= 10**9 and line', FAULTS),
    ("lost_in_a_damaged_file", "checkpoint.py", "if sha256(path) != digest:", "if False:", FAULTS),
    ("lost_to_a_second_run", "runtime/process.py", "fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", FAULTS),
    ("lost_to_a_full_disk", "checkpoint.py", "if step == self.steps or self.stop.leaving:", "if True:", FAULTS),
    ("lost_to_other_data", "checkpoint.py", 'if info["data"].get(name) != digest:', "if False:", FAULTS),
    ("lost_to_nan", "checkpoint.py", "if not whole(p.isfinite().all()):", "if False:", FAULTS),
    ("lost_in_a_reward", "rollout.py", "    if came:\n", "    if False:\n", FAULTS),
    ("shards_averaged", "optim.py", "float(dist.get_world_size()))", "1.0)", SHARD),
    ("shards_of_another_rank", "shard.py", "return tensor.full_tensor() if", "return tensor.full_tensor().flip(0) if", SHARD),
    ("plan_without_backward", "memory.py", '"backward": meter.peak - before - kept', '"backward": 0', MEMORY),
    ("plan_proposes_too_much", "memory.py", "1 << (fits - 1)", "1 << fits", MEMORY),
    ("sizes_believed", "checkpoint.py", "if claimed > held or c.layers > len(where):", "if False:", SECURITY),
    ("names_lead_outside", "data/read.py", ' or ".." in path.parts', "", SECURITY),
]  # fmt: skip


@dataclass
class Config:
    only: str = ""  # mutants whose name contains one of these, comma-separated; "": all
    seconds: float = 300.0  # that the tests of one mutant may take; longer counts as caught


def copy(where):
    """The sources and their tests in a fresh directory."""
    here = Path(__file__).parents[1]
    for folder in (".", "data", "kernels", "tests", "bench"):
        (where / folder).mkdir(parents=True, exist_ok=True)
        for path in [p for pattern in ("*.py", "*.txt", "pyproject.toml") for p in (here / folder).glob(pattern)]:
            shutil.copy(path, where / folder)
    return where


def plant(where, file, old, new):
    """Replace `old` by `new` in a file of the copy. UserError unless it is there exactly once."""
    text = (where / file).read_text()
    if text.count(old) != 1:
        raise UserError(f"bench/mutants.py: {old!r} is {text.count(old)} times in {file}; once was expected")
    (where / file).write_text(text.replace(old, new))


def run_tests(where, words, seconds):
    """(exit status of pytest, the tests that failed, seconds)"""
    begin, environment = (
        time.monotonic(),
        os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=no",
        f"--basetemp={where}/tmp",
        *words,
    ]
    try:
        done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return 1, ["(took too long)"], seconds
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+?::\S+|\S+\.py)", done.stdout, flags=re.M)
    if done.returncode not in (0, 1, 2):
        raise UserError(f"pytest {' '.join(words)}: {(done.stdout + done.stderr).strip()[-500:]}")
    return done.returncode, failed, time.monotonic() - begin


def main(config):
    chosen = [m for m in MUTANTS if not config.only or any(part in m[0] for part in config.only.split(","))]
    with tempfile.TemporaryDirectory() as folder:
        clean = copy(Path(folder) / "clean")
        for i, (_, file, old, new, _) in enumerate(chosen):  # every replacement, before the first test costs time
            plant(copy(Path(folder) / f"{i}"), file, old, new)
        files = sorted({word for *_, tests in chosen for word in tests.split()})
        _, broken, seconds = run_tests(clean, files, 10 * config.seconds)
        print(
            f"unchanged: {' '.join(files)} in {seconds:.0f} s"
            + "".join(f"\n  fails without a mutant, and so is left out: {name}" for name in broken),
            flush=True,
        )
        survivors = []
        print(f"{'mutant':<32} {'caught by':<110} seconds")
        for i, (name, _, _, _, tests) in enumerate(chosen):
            status, failed, seconds = run_tests(
                Path(folder) / f"{i}",
                ["-x", *tests.split(), *(f"--deselect={test}" for test in broken)],
                config.seconds,
            )
            survivors += [name] if status == 0 else []
            print(
                f"{name:<32} {failed[0].removeprefix('tests/') if status and failed else 'NOBODY' if status == 0 else '(does not import)':<110} {seconds:7.1f}",
                flush=True,
            )
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught")
    if survivors:
        raise UserError(f"the tests did not notice: {', '.join(survivors)}")


if __name__ == "__main__":
    launch(main, Config)
