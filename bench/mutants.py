"""Do the tests notice? The classic bugs of preference learning, of RLHF, of resuming and of
sharding, each planted alone into a copy of the sources, whose tests must then fail.

A mutant is (name, file, old, new, tests): `old` must be in the file exactly once, and becomes
`new`; `tests` are pytest's arguments. First the tests run on an unchanged copy: those that fail
there prove nothing and are left out. The table says which test caught each mutant, and after how
many seconds. The exit status is 1 if one survives.

    python -m bench.mutants                      all of them, about ten minutes on one core
    python -m bench.mutants --only=kl_sign,gae   those whose name contains one of these
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import UserError
from runtime.process import launch

PPO, GRPO, DPO, RM = "tests/test_ppo.py", "tests/test_grpo.py", "tests/test_dpo.py", "tests/test_reward.py"
PRETRAIN, SFT, FAULTS = "tests/test_pretrain.py", "tests/test_sft.py", "tests/test_faults.py"
SHARD, MEMORY, SECURITY = "tests/test_shard.py", "tests/test_memory.py", "tests/test_security.py"
MODEL, HUB, OPTIM, CLI, RUN = (f"tests/test_{name}.py" for name in ("model", "hub", "optim", "cli", "run"))
SCORING, PROCESS = "tests/test_scoring.py", "tests/test_process.py"
SERVE, FEEDBACK = "tests/test_serve.py", "tests/test_feedback.py"
MUTANTS = [
    # The critic and its advantages
    (
        "value_off_by_one",
        "model.py",
        "hidden, _ = hidden_before_targets(critic, chats)",
        "pack, targets = pack_chats(chats)\n    hidden = critic(pack)[(targets != IGNORE).roll(1)]",
        PPO,
    ),
    ("value_past_the_end", "ppo.py", "torch.zeros_like(r), 0.0, 0.0", "torch.zeros_like(r), 0.0, v[:, -1]", PPO),
    ("gae_without_gamma", "ppo.py", "delta = r[:, t] + gamma * next_value", "delta = r[:, t] + next_value", PPO),
    (
        "center_of_the_critic",
        "ppo.py",
        "value = state_values(critic, chats[part]) - center",
        "value = state_values(critic, chats[part])",
        PPO,
    ),
    (
        "critic_not_trained",
        "ppo.py",
        "for o in (optimizer, critic_optimizer)]",
        "for o in (optimizer,)]\n            critic_optimizer.zero_grad()",
        PPO,
    ),
    ("value_clip_smaller", "ppo.py", "0.5 * torch.maximum(", "0.5 * torch.minimum(", PPO),
    (
        "whiten_per_micro_batch",
        "ppo.py",
        "policy_loss(logp, old_logp, advantages, config.clip_ratio)\n        (losses",
        "policy_loss(logp, old_logp, whiten(advantages), config.clip_ratio)\n        (losses",
        PPO,
    ),
    ("not_whitened", "ppo.py", "advantages = whiten(advantages)", "pass", PPO),
    # The reward
    ("score_on_the_wrong_token", "ppo.py", "np.cumsum(lengths) - 1", "np.maximum(np.cumsum(lengths) - 2, 0)", PPO),
    ("kl_sign", "ppo.py", "rewards = -beta * (logp - ref_logp)", "rewards = beta * (logp - ref_logp)", PPO),
    ("no_penalty_for_no_end", "ppo.py", "scores - config.unfinished_penalty * np", "scores - 0.0 * np", PPO),
    (
        "end_not_scored",
        "scoring.py",
        "chat.encode_completion(tok, text) if sample.finished",
        "chat.encode_completion(tok, text)[:-1] if sample.finished",
        f"{PPO} {SCORING}",
    ),
    (
        "center_of_the_reward",
        "scoring.py",
        'micro_batch_tokens, info.get("center", 0.0))',
        "micro_batch_tokens, 0.0)",
        f"{PPO} {SCORING}",
    ),
    (
        "judge_asked_in_one_order",
        "scoring.py",
        "np.stack([in_order, 1 - swapped]",
        "np.stack([in_order, in_order]",
        f"{GRPO} {SCORING}",
    ),
    # One distribution for sampler and trainer
    (
        "top_k_in_rollouts",
        "rollout.py",
        "stop={chat.end_of_turn(tok)}, **options",
        "stop={chat.end_of_turn(tok)}, top_k=2, **options",
        PPO,
    ),
    ("sampled_at_another_temperature", "ppo.py", '"temperature": config.temperature', '"temperature": 1.0', PPO),
    (
        "trained_at_another_temperature",
        "ppo.py",
        "logp = completion_logprobs(policy, chats[part], config.temperature)",
        "logp = completion_logprobs(policy, chats[part], 1.0)",
        PPO,
    ),
    (
        "grpo_at_another_temperature",
        "grpo.py",
        "[c.chat for c in micro_batch], config.temperature)",
        "[c.chat for c in micro_batch], 1.0)",
        GRPO,
    ),
    ("disagreement_let_through", "rollout.py", "if gap > bound:", "if False:", PPO),
    ("kl_at_the_start_let_through", "rollout.py", "if kl_not_zero:", "if False:", PPO),
    (
        "end_not_trained",
        "data/pack.py",
        "loss_mask = [True] * len(completion_ids)",
        "loss_mask = [True] * (len(completion_ids) - 1) + [False]",
        DPO,
    ),
    ("same_numbers_for_every_rank", "ppo.py", '"first": first * config.group_size', '"first": 0', PPO),
    # The update
    ("ratio_to_itself", "ppo.py", "ratio = torch.exp(logp - old_logp)", "ratio = torch.exp(logp - logp.detach())", PPO),
    (
        "clipped_the_wrong_way",
        "ppo.py",
        "return torch.maximum(-advantages * ratio",
        "return torch.minimum(-advantages * ratio",
        PPO,
    ),
    ("mean_per_micro_batch", "ppo.py", "(losses.sum() / n_tokens).backward()", "losses.mean().backward()", PPO),
    (
        "early_stop_steps",
        "ppo.py",
        "                optimizer.zero_grad()  # leave out",
        "                for o in (optimizer, critic_optimizer):\n                    for p in "
        "o.named.values():\n                        p.grad = torch.zeros_like(p)\n               "
        "     o.step(lr_scale)\n                optimizer.zero_grad()  # leave out",
        PPO,
    ),
    ("beta_adapted_away", "ppo.py", "kl / self.target - 1", "1 - kl / self.target", PPO),
    ("resume_forgets_beta", "ppo.py", ', "beta": beta}', "}", PPO),
    (
        "resume_forgets_critic",
        "ppo.py",
        'checkpoint.read(run.resumed / "critic", run.device)[0]',
        "scoring.first_critic(config, policy, tok)[0]",
        PPO,
    ),
    # GRPO
    (
        "std_without_a_guard",
        "grpo.py",
        "return torch.where(differs(rewards)[:, None], advantages, 0.0)",
        "return advantages",
        GRPO,
    ),
    (
        "baseline_of_the_batch",
        "grpo.py",
        "advantages = rewards - rewards.mean(1, keepdim=True)",
        "advantages = rewards - rewards.mean()",
        GRPO,
    ),
    ("rloo_without_its_factor", "grpo.py", "advantages = advantages * G / (G - 1)", "pass", GRPO),
    ("k3_sign", "grpo.py", "torch.exp(-logratio) - 1 + logratio", "torch.exp(logratio) - 1 - logratio", GRPO),
    ("k3_without_its_ratio", "grpo.py", "return ratio * k3 if", "return ratio.detach() * k3 if", GRPO),
    (
        "clips_swapped",
        "grpo.py",
        "ratio.clamp(max(0.0, 1 - clip_low), 1 + clip_high)",
        "ratio.clamp(max(0.0, 1 - clip_high), 1 + clip_low)",
        GRPO,
    ),
    ("sequence_of_this_micro_batch", "grpo.py", "1 / (n_completions * length)", "1 / (len(lengths) * length)", GRPO),
    (
        "constant_without_max_new_tokens",
        "grpo.py",
        "[1 / (n_completions * max_new_tokens) for",
        "[1 / n_completions for",
        GRPO,
    ),
    (
        "grpo_early_stop_steps",
        "grpo.py",
        "                optimizer.zero_grad()  # a loss of 0",
        "                for p in model.parameters():\n                    p.grad = "
        "torch.zeros_like(p)\n                optimizer.step(lr_scale)\n                "
        "optimizer.zero_grad()  # a loss of 0",
        GRPO,
    ),
    ("refilled_with_the_same_numbers", "grpo.py", "(n_prompts + begin) * G", "begin * G", GRPO),
    (
        "equal_groups_dilute",
        "grpo.py",
        "differ = differs(scores).repeat_interleave(config.group_size).tolist()",
        "differ = [True] * scores.numel()",
        GRPO,
    ),
    (
        "no_end_still_trained",
        "grpo.py",
        'if teaches and (c.sample.finished or config.overlong != "mask"):',
        "if teaches:",
        GRPO,
    ),
    ("reference_never_renewed", "grpo.py", "reference.load_state_dict(model.state_dict())", "pass", GRPO),
    (
        "resume_forgets_reference",
        "grpo.py",
        'if run.resumed and (run.resumed / "reference").exists():',
        "if False:",
        GRPO,
    ),
    (
        "grpo_ratio_to_itself",
        "grpo.py",
        "ratio = torch.exp(logp - old_logp)",
        "ratio = torch.exp(logp - logp.detach())",
        GRPO,
    ),
    # DPO and the reward model
    (
        "dpo_sign",
        "dpo.py",
        "    h = beta * (chosen - rejected)\n    return -label_probs * F.logsigmoid(h) -",
        "    h = beta * (rejected - chosen)\n    return -label_probs * F.logsigmoid(h) -",
        DPO,
    ),
    ("dpo_of_means", "dpo.py", 'Loss(dpo_loss, 0.1, "logratio")', 'Loss(dpo_loss, 0.1, "mean_logratio")', DPO),
    ("ipo_of_sums", "dpo.py", 'Loss(ipo_loss, 0.1, "mean_logratio")', 'Loss(ipo_loss, 0.1, "logratio")', DPO),
    (
        "simpo_with_a_reference",
        "dpo.py",
        'compared = logps - ref_logps if "ratio" in loss.compares else logps',
        "compared = logps - ref_logps",
        DPO,
    ),
    (
        "accuracy_of_something_else",
        "dpo.py",
        "return losses, compared.detach(), chosen > rejected",
        "return losses, compared.detach(), logps[:, 0] > logps[:, 1]",
        DPO,
    ),
    ("reference_for_nothing", "dpo.py", 'if "ratio" in LOSSES[config.loss].compares:', "if True:", DPO),
    (
        "kto_kl_per_rank",
        "dpo.py",
        "max(0.0, reduce_sum(total)[0] / len(items))",
        "max(0.0, float(total) / len(items))",
        DPO,
    ),
    ("pairs_of_this_micro_batch", "dpo.py", "loss = losses.sum() / len(items)", "loss = losses.mean()", DPO),
    ("reward_sign", "reward.py", "return scores[::2] - scores[1::2]", "return scores[1::2] - scores[::2]", RM),
    ("reward_mean_per_micro_batch", "reward.py", "loss = losses.sum() / len(items)", "loss = losses.mean()", RM),
    ("reward_read_before_the_end", "model.py", "pack.cu_seqlens[1:].long() - 1", "pack.cu_seqlens[1:].long() - 2", RM),
    # The model, its parameters and its optimizer
    (
        "late_layer",
        "model.py",
        "return attention(q, k, v, self.layout, attn.window)",
        "return attention(q, k, v, self.layout, 0)",
        MODEL,
    ),
    (
        "window_not_in_decoding",
        "model.py",
        "return decode_attention(q, k, v, self.cache.lengths, attn.window)",
        "return decode_attention(q, k, v, self.cache.lengths)",
        MODEL,
    ),
    (
        "window_not_exported",
        "runtime/hub.py",
        '"use_sliding_window": c.window > 0,',
        '"use_sliding_window": False,',
        HUB,
    ),
    (
        "nameless_parameter_saved_too_late",
        "runtime/run.py",
        "        hub.check_parameters(model)\n",
        "",
        f"{HUB} {RUN}",
    ),
    (
        "norm_of_one_rank",
        "optim.py",
        "        sync_gradients(list(self.named.values()))\n        with_grad",
        "        with_grad",
        OPTIM,
    ),
    # Resuming, faults, shards, memory, untrusted files
    (
        "lost_optimizer",
        "runtime/run.py",
        "saved.load_state(own | counters.get(name, {}))",
        'saved.load_state(own | counters.get(name, {})) if name == "order" else None',
        FAULTS,
    ),
    ("lost_random_state", "runtime/run.py", "set_random_state(tensors, self.device)", "pass", PRETRAIN),
    (
        "lost_place_in_the_data",
        "runtime/batches.py",
        "        self.begin_epoch(epoch, index)\n\n\ndef index_order",
        "        self.begin_epoch(0, 0)\n\n\ndef index_order",
        FAULTS,
    ),
    (
        "lost_lines_twice",
        "runtime/run.py",
        '.get("step", 0) <= step and line',
        '.get("step", 0) <= 10**9 and line',
        FAULTS,
    ),
    ("lost_in_a_damaged_file", "runtime/checkpoint.py", "if sha256(path) != digest:", "if False:", FAULTS),
    ("lost_to_a_second_run", "runtime/files.py", "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", FAULTS),
    ("lost_to_a_full_disk", "runtime/run.py", "if step == self.total_steps or self.stop.leaving:", "if True:", FAULTS),
    ("lost_to_other_data", "runtime/checkpoint.py", 'if info["data"].get(name) != digest:', "if False:", FAULTS),
    ("lost_to_nan", "runtime/run.py", "if not full_tensor(p.isfinite().all()):", "if False:", FAULTS),
    ("lost_in_a_reward", "scoring.py", "    if expired:\n", "    if False:\n", FAULTS),
    ("old_run_continued", "runtime/run.py", 'if self.info.get("format") != FORMAT:', "if False:", RUN),
    ("renamed_flag_unsaid", "runtime/cli.py", "    if renamed:\n", "    if False:\n", CLI),
    ("range_unchecked", "runtime/cli.py", "if not COMPARE[sign](value, bound):", "if False:", CLI),
    (
        "gpu_without_an_index",
        "runtime/process.py",
        'if device.type == "cuda" and device.index is None:',
        "if False:",
        PROCESS,
    ),
    ("shards_averaged", "optim.py", "float(dist.get_world_size()))", "1.0)", SHARD),
    (
        "shards_of_another_rank",
        "runtime/shard.py",
        "return tensor.full_tensor() if",
        "return tensor.full_tensor().flip(0) if",
        SHARD,
    ),
    ("plan_without_backward", "runtime/memory.py", '"backward": meter.peak - before - kept', '"backward": 0', MEMORY),
    (
        "plan_of_another_loss",
        "runtime/memory.py",
        "value = loss(model, batch)",
        "value = model(fake_pack([8], 64, device)).float().sum()",
        MEMORY,
    ),
    ("plan_proposes_too_much", "runtime/memory.py", "1 << (count - 1)", "1 << count", MEMORY),
    ("sizes_believed", "runtime/hub.py", "if claimed > held or c.layers > len(where):", "if False:", SECURITY),
    ("names_lead_outside", "data/read.py", ' or ".." in path.parts', "", SECURITY),
    # People in the loop
    (
        "winner_reversed",
        "data/feedback.py",
        'order = 1 if vote == "left" else -1',
        'order = -1 if vote == "left" else 1',
        FEEDBACK,
    ),
    ("voter_forgotten", "data/feedback.py", 'json.dumps([about, row.get("by", "")])', "json.dumps([about])", FEEDBACK),
    ("torn_line_kept", "data/feedback.py", "    if position < size:\n", "    if False:\n", FEEDBACK),
    (
        "no_fsync",
        "data/feedback.py",
        "                left = left[os.write(file, left) :]\n            os.fsync(file)\n",
        "                left = left[os.write(file, left) :]\n",
        FEEDBACK,
    ),
    ("half_line_left", "data/feedback.py", "            os.ftruncate(file, size)\n", "            pass\n", FEEDBACK),
    ("round_repeats_votes", "data/feedback.py", "if json.dumps(row) not in known", "if known", FEEDBACK),
    ("stop_string_shown", "data/openai.py", "return max(begun, default=0)", "return 0", SERVE),
    ("field_ignored", "data/openai.py", "if not known and value is not None", "if False and value is not None", SERVE),
    ("draws_for_nobody", "serve.py", "self.thread.inbox.put((self.thread.cancel, job, going))", "pass", SERVE),
    (
        "any_key",
        "runtime/http.py",
        'if not hmac.compare_digest(given.encode("latin-1"), key.encode()):',
        "if False:",
        SERVE,
    ),
    ("any_host", "runtime/http.py", "if not self.is_ours(host):", "if False:", SERVE),
    ("any_origin", "runtime/http.py", "if origin is not None and origin not in", "if False and origin not in", SERVE),
    (
        "slow_heads",
        "runtime/http.py",
        "self.head_timer = self.loop.call_later(PATIENCE, transport.close)",
        "self.head_timer = self.loop.call_later(1e6, transport.close)",
        SERVE,
    ),
    ("served_in_mid_training", "runtime/checkpoint.py", ' and info["step"] == info.get("total_steps")', "", SERVE),
    (
        "markup_runs",
        "web/app.js",
        'document.querySelector(`[data-answer="${n}.${i}"]`).textContent = one.text',
        'document.querySelector(`[data-answer="${n}.${i}"]`).innerHTML = one.text',
        SERVE,
    ),
]


@dataclass
class Config:
    # mutants whose name contains one of these, comma-separated; "": all
    only: str = ""
    # that the tests of one mutant may take; longer counts as caught
    seconds: float = 300.0
    # mutants at a time
    jobs: int = 2


def copy(where):
    """The sources and their tests in a fresh directory."""
    here = Path(__file__).parents[1]
    for folder in (".", "data", "kernels", "runtime", "tests", "bench"):
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
        skip = [f"--deselect={test}" for test in broken]

        def caught_by(i):
            """(exit status, the test that failed, seconds) of mutant i."""
            words = ["-x", *chosen[i][4].split(), *skip]
            status, failed, seconds = run_tests(Path(folder) / f"{i}", words, config.seconds)
            return status, failed[0].removeprefix("tests/") if failed else "(does not import)", seconds

        survivors = []
        print(f"{'mutant':<32} {'caught by':<110} seconds")
        with ThreadPoolExecutor(config.jobs) as pool:
            for (name, *_), (status, test, seconds) in zip(chosen, pool.map(caught_by, range(len(chosen)))):
                survivors += [name] if status == 0 else []
                print(f"{name:<32} {test if status else 'NOBODY':<110} {seconds:7.1f}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants caught")
    if survivors:
        raise UserError(f"the tests did not notice: {', '.join(survivors)}")


if __name__ == "__main__":
    launch(main, Config)
