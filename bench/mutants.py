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
BATCHES, KTO, FIGURES = (f"tests/test_{name}.py" for name in ("batches", "kto", "figures"))
FILES, PORTABLE, RLAIF, ROLLOUT = (f"tests/test_{name}.py" for name in ("files", "portable", "rlaif", "rollout"))
PREPARE, CORPUS = "tests/test_prepare.py", "tests/test_corpus.py"
REPORT = "tests/test_report.py"
ROWS, READ, CHAT = "tests/test_rows.py", "tests/test_read.py", "tests/test_chat.py"
EXPORT, EVALUATE = "tests/test_export.py", "tests/test_evaluate.py"
TEMPLATES = "tests/test_template.py"
SERVE, FEEDBACK = "tests/test_serve.py", "tests/test_feedback.py"
WEBUI = f"{FEEDBACK}::test_ratings_of_open_webui_become_pairs_and_ratings"
ROUNDS = f"{FEEDBACK}::test_a_round_trains_on_the_new_votes_from_the_newest_model"
SIGNALS = f"{FEEDBACK}::test_a_signal_lets_a_step_save_and_no_other_round_begins_beside_one"
NEWEST = f"{FEEDBACK}::test_the_newest_finished_run_is_found"
DISTILL, KL = "tests/test_distill.py", "tests/test_kl.py"
PUZZLES = "tests/test_puzzles.py"
KEPT = f"{EVALUATE}::test_the_right_answers_are_kept_as_conversations_for_sft"
GUARD = "tests/test_guard.py"
CUDA = "tests/test_emulated_cuda.py"
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
        "value = state_values(critic, chats) - center",
        "value = state_values(critic, chats)",
        PPO,
    ),
    (
        "critic_not_trained",
        "ppo.py",
        "for optimizer in optimizers]",
        "for optimizer in optimizers[:1]] + [torch.zeros(())]\n        optimizers[1].zero_grad()",
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
    (
        "no_penalty_for_no_end",
        "ppo.py",
        "(scorers, completions, config.unfinished_penalty)",
        "(scorers, completions)",
        PPO,
    ),
    (
        "end_not_scored",
        "scoring.py",
        "chat.encode_completion(tok, text, messages) if sample.finished",
        "chat.encode_completion(tok, text, messages)[:-1] if sample.finished",
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
        "stop=chat.stop_ids(tok), **options",
        "stop=chat.stop_ids(tok), top_k=2, **options",
        PPO,
    ),
    (
        "sampled_at_another_temperature",
        "rollout.py",
        "temperature=config.temperature,\n        n=config.group_size",
        "temperature=1.0,\n        n=config.group_size",
        PPO,
    ),
    (
        "trained_at_another_temperature",
        "ppo.py",
        "logp = completion_logprobs(policy, chats, config.temperature)",
        "logp = completion_logprobs(policy, chats, 1.0)",
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
    (
        "tail_of_the_vocabulary_lost",
        "kernels/draw.py",
        "[:, 0] / total).log().float()",
        "[:, 0]).log().float()",
        "tests/test_rollout.py",
    ),
    (
        "a_real_models_rounding_refused",
        "rollout.py",
        "torch.float32: 1e-4",
        "torch.float32: 1e-5",
        "tests/test_rollout.py",
    ),
    ("kl_at_the_start_let_through", "rollout.py", "if kl_not_zero:", "if False:", PPO),
    (
        "end_not_trained",
        "data/pack.py",
        "trained = np.arange(len(ids)) >= len(prompt_ids)",
        "trained = (np.arange(len(ids)) >= len(prompt_ids)) & (np.arange(len(ids)) < len(ids) - 1)",
        DPO,
    ),
    (
        "same_numbers_for_every_rank",
        "rollout.py",
        "(first + begin) * config.group_size",
        "first * config.group_size",
        PPO,
    ),
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
        "                optimizer.zero_grad()  # neither",
        "                for p in optimizer.named.values():\n                    p.grad = torch.zeros_like(p)\n"
        "                optimizer.step(lr_scale)\n                optimizer.zero_grad()  # neither",
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
        "rewards - rewards.mean(1, keepdim=True)",
        "rewards - rewards.mean()",
        GRPO,
    ),
    ("rloo_without_its_factor", "grpo.py", "advantages *= rewards.shape[1] / (rewards.shape[1] - 1)", "pass", GRPO),
    ("k3_sign", "grpo.py", "torch.exp(-logratio) - 1 + logratio", "torch.exp(logratio) - 1 - logratio", GRPO),
    ("k3_without_its_ratio", "grpo.py", "return ratio * k3 if", "return ratio.detach() * k3 if", GRPO),
    (
        "clips_swapped",
        "grpo.py",
        "clipped_ratio = ratio.clamp(max(0.0, 1 - clip_low), 1 + clip_high)",
        "clipped_ratio = ratio.clamp(max(0.0, 1 - clip_high), 1 + clip_low)",
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
    (
        "refilled_with_the_same_numbers",
        "rollout.py",
        "(first + begin) * config.group_size",
        "begin * config.group_size",
        GRPO,
    ),
    (
        "equal_groups_dilute",
        "grpo.py",
        "    equal = ~differs(scores)",
        "    equal = differs(scores) & False",
        GRPO,
    ),
    (
        "no_end_still_trained",
        "grpo.py",
        'if not zero_variance and (c.sample.finished or config.overlong != "mask"):',
        "if not zero_variance:",
        GRPO,
    ),
    ("reference_never_renewed", "grpo.py", "reference.load_state_dict(model.state_dict())", "pass", GRPO),
    (
        "resume_forgets_reference",
        "runtime/run.py",
        'if self.resumed and (self.resumed / "reference").exists():',
        "if False:",
        GRPO,
    ),
    (
        "grpo_ratio_to_itself",
        "grpo.py",
        "ratio = torch.exp(logp - old_logp)\n    clipped_ratio",
        "ratio = torch.exp(logp - logp.detach())\n    clipped_ratio",
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
        'compared = logps - ref_logps if "ratio" in row.compares else logps',
        "compared = logps - ref_logps",
        DPO,
    ),
    (
        "accuracy_of_something_else",
        "dpo.py",
        "return losses, compared.detach(), (chosen - rejected).detach()",
        "return losses, compared.detach(), (logps[:, 0] - logps[:, 1]).detach()",
        DPO,
    ),
    ("reference_for_nothing", "dpo.py", '    if "ratio" in row.compares:', "    if True:", DPO),
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
        "return rope_attention(qkv, *rope, self.layout, attn.window)",
        "return rope_attention(qkv, *rope, self.layout, 0)",
        MODEL,
    ),
    (
        "window_not_in_decoding",
        "model.py",
        "return decode_attention(q, k, v, self.cache.lengths, attn.window, self.biases[attn.window])",
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
    (
        "lost_in_a_reward",
        "runtime/guard.py",
        "    if expired or time.monotonic() - began > seconds:\n",
        "    if False:\n",
        FAULTS,
    ),
    ("old_run_continued", "runtime/run.py", 'if self.info.get("format") != FORMAT:', "if False:", RUN),
    ("renamed_flag_unsaid", "runtime/cli.py", "    if renamed:\n", "    if False:\n", CLI),
    ("words_given_twice", "runtime/cli.py", "if fields[name].type is list:", "if False:", CLI),
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
        "value = model(pack([[0] * 8] * 8)).float().sum()",
        MEMORY,
    ),
    ("plan_proposes_too_much", "runtime/memory.py", "sizes[first]}", "sizes[first - 1]}", MEMORY),
    ("sizes_believed", "runtime/hub.py", "if claimed > held or c.layers > len(where):", "if False:", SECURITY),
    ("names_lead_outside", "data/read.py", ' or ".." in path.parts', "", SECURITY),
    # Rows and counts, and logs that explain themselves
    (
        "rows_held_out_not_prompts",
        "data/rows.py",
        "by_question.setdefault(question, [])",
        "by_question.setdefault((i, question), [])",
        ROWS,
    ),
    ("prompts_all_of_a_conversation", "data/rows.py", 'm["role"] != "assistant", messages', "True, messages", ROWS),
    (
        "answers_in_the_prompts_of_distillation",
        "data/rows.py",
        """    if messages[-1]["role"] == "assistant":
        messages = itertools""",
        """    if messages is row and messages[-1]["role"] == "assistant":
        messages = itertools""",
        ROWS,
    ),
    ("questions_told_apart_by_their_system", "data/rows.py", "return asked if", "return prompts if", ROWS),
    ("an_example_of_the_form_is_the_question", "data/rows.py", "times[message] >= common", "False", ROWS),
    ("few_prompts_unsaid", "data/rows.py", "if prompts < FEW_PROMPTS:", "if False:", ROWS),
    ("shared_prompts_unsaid", "data/rows.py", "    if exact + similar:\n", "    if False:\n", ROWS),
    ("shared_prompts_but_for_case", "data/rows.py", '" ".join(content.casefold().split())', "content", ROWS),
    ("validated_on_nothing", "data/rows.py", "if prompts < 2 and parse is not prompt_only:", "if False:", ROWS),
    ("validated_on_no_text", "pretrain.py", "if n_val < MIN_VAL_TOKENS:", "if False:", PRETRAIN),
    ("cut_answers_trained", "data/rows.py", "    if said:\n", "    if False:\n", f"{ROWS} {SFT}"),
    ("batches_of_one_less", "runtime/batches.py", 'limit, side="right")', 'limit, side="left")', BATCHES),
    (
        "steps_of_one_epoch",
        "runtime/batches.py",
        "self.epoch + self.index / len(self.items) < epochs)",
        "self.epoch + self.index / len(self.items) < 1)",
        BATCHES,
    ),
    ("sft_counts_tokens", "sft.py", "order.epoch_batch(batch_tokens", "order.batch(batch_tokens", SFT),
    ("reward_sees_pairs_again", "reward.py", "order.epoch_batch(", "order.batch(", RM),
    ("dpo_sees_pairs_again", "dpo.py", "order.epoch_batch(", "order.batch(", DPO),
    (
        "epochs_of_full_batches",
        "pretrain.py",
        "epochs = steps / order.plan(batch_tokens, 1)[0]",
        "epochs = steps * batch_tokens / n_train",
        PRETRAIN,
    ),
    (
        "kto_same_prompt",
        "data/kto.py",
        "others[i] = order[(k + size) % len(order)]",
        "others[i] = order[(k + 2) % len(order)]",
        KTO,
    ),
    (
        "kto_by_the_order_of_rows",
        "data/kto.py",
        "key=lambda i: (place[keys[i][0]], keys[i][1])",
        "key=lambda i: place[keys[i][0]]",
        KTO,
    ),
    (
        "kto_dropped_for_a_stranger",
        "data/kto.py",
        "make_completion(prompt, other[: context - len(prompt)])",
        "make_completion(prompt, other)",
        KTO,
    ),
    ("kto_one_sided_unsaid", "data/kto.py", "if labels.min() == labels.max():", "if False:", KTO),
    (
        "draws_at_once",
        "figures.py",
        "1 + 100_000 // len(rows)",
        "1000",
        FIGURES,
    ),
    (
        "ties_are_wrong",
        "figures.py",
        "np.where(margins == 0, 0.5, ",
        "np.where(margins == 0, 0.0, ",
        FIGURES,
    ),
    (
        "judge_ties_are_wrong",
        "figures.py",
        "agrees = agreement(probability - 0.5, margin > 0)",
        "agrees = (probability > 0.5) == (margin > 0)",
        FIGURES,
    ),
    (
        "accuracy_of_certain_labels",
        "reward.py",
        "agreement(margins, label_probs[batch].numpy())",
        "agreement(margins, np.ones(len(batch)))",
        RM,
    ),
    ("differences_of_one_millionth", "grpo.py", "> 1e-12 * rewards.abs().amax(1)", "> 1e-6", GRPO),
    (
        "scores_in_fp32",
        "grpo.py",
        "torch.tensor(scores, dtype=torch.float64)",
        "torch.tensor(scores).float()",
        GRPO,
    ),
    ("std_with_a_floor", "grpo.py", "std(1, keepdim=True).clamp(min=1e-300)", "std(1, keepdim=True) + 1e-4", GRPO),
    ("rounding_teaches", "grpo.py", "text = c.index //", "text = c.score, c.index //", GRPO),
    ("epochs_beside_steps", "sft.py", "    if config.steps:\n        refuse", "    if False:\n        refuse", RUN),
    ("another_jobs_request_cancelled", "engine.py", "get(request) == (job, i)", "get(request)", SERVE),
    ("unread_stage_of_a_round", "sharpen.py", "    refuse_unread(config", "    print(config", FEEDBACK),
    ("replayed_pieces_of_any_length", "sft.py", "min(context - 1, replayed)", "context - 1", SFT),
    ("newcomers_never_read", "rollout.py", " or self.put_off > PATIENCE)", ")", ROLLOUT),
    (
        "every_prompt_read_alone",
        "rollout.py",
        "if ready and (8 * ready >= len(self.live)",
        "if ready and (True",
        ROLLOUT,
    ),
    ("unread_flag_taken", "runtime/cli.py", "if value != defaults[flag]:", "if False:", GRPO),
    ("val_fraction_beside_val", "data/rows.py", 'refuse_unread(config, {"val_fraction"', "dict({0", ROWS),
    ("nothing_sampled_of_flags", "rlaif.py", "elif not config.policy:\n", "elif False:\n", RLAIF),
    ("unsampled_of_flags", "distill.py", "if config.offline:\n        refuse", "if 0:\n        refuse", DISTILL),
    ("huge_rewards_taken", "scoring.py", "if abs(c.score) > LARGEST_REWARD:", "if False:", SCORING),
    ("squares_beyond_fp32", "scoring.py", "LARGEST_REWARD = 1e15", "LARGEST_REWARD = 1e30", PPO),
    ("offset_unsaid", "scoring.py", "if 0 < spread < 1e-4 * size:", "if False:", PPO),
    ("squares_of_tiny_rewards", "grpo.py", "advantages.abs().amax(1, keepdim=True).clamp(min=1e-300)", "1.0", GRPO),
    ("tiny_gradient_unsaid", "runtime/run.py", 'metrics["grad_norm"] < 1e-8', "False", RUN),
    ("constitution_unread", "scoring.py", "if config.constitution and not any", "if False and not any", GRPO),
    ("masked_is_a_reward", "scoring.py", " or np.ma.is_masked(value)", "", GUARD),
    ("inference_mode_stays", "runtime/guard.py", "    INFERENCE[-1].__enter__()\n", "", GUARD),
    ("device_of_an_import_stays", "scoring.py", "kept(KEPT_BY_IMPORT), ", "", GUARD),
    ("lock_of_an_orphan", "runtime/files.py", "os.register_at_fork(after_in_child=close_locks)", "pass", RUN),
    (
        "retries_for_ever",
        "runtime/guard.py",
        "raise late if expired == 1 else Overdue",
        "raise late",
        f"{SCORING}::test_a_loop_that_retries_ends_with_its_time",
    ),
    ("endless_limit_overflows", "runtime/guard.py", "timer = min(seconds, 1e9)", "timer = seconds", SCORING),
    ("key_stripped_within_a_letter", "runtime/http.py", 'given.strip(" \\t")', "given.strip()", SERVE),
    ("host_in_capitals", "runtime/http.py", "self.config.host.lower()", "self.config.host", SERVE),
    ("standstill_unsaid", "runtime/run.py", "if self.idle_steps >= min(10, self.total_steps):", "if False:", RUN),
    ("standstill_forgotten_on_resume", "runtime/run.py", 'int(counters["idle_steps"])', "0", RUN),
    ("entropy_falls_unsaid", "runtime/run.py", 'if entropy < first["entropy"] / 10:', "if False:", RUN),
    ("cut_endings_unsaid", "runtime/run.py", "elif finished < 0.5:", "elif False:", RUN),
    ("zero_loss_unsaid", "runtime/run.py", 'if metrics["updates"] and abs(metrics["loss"]) < 1e-6:', "if False:", RUN),
    ("longer_run_unsaid", "runtime/run.py", "if self.total_steps != old_steps:", "if False:", PRETRAIN),
    ("falling_unsaid_without_reference", "dpo.py", "else metrics[name])", "else -1e9)", DPO),
    ("all_right_is_all_equal", "grpo.py", '"all_right": equal & right[:, 0]', '"all_right": equal', GRPO),
    ("critic_norm_unlogged", "ppo.py", '"critic_grad_norm": critic_grad_norm', '"critic_grad_norm": 0.0', PPO),
    # Files, and the edges of flags and machines
    (
        "device_replaced_by_a_file",
        "runtime/files.py",
        "if str(path) in STREAMS or os.path.exists(path) and not os.path.isfile(path):",
        "if False:",
        FILES,
    ),
    ("output_over_its_input", "runtime/files.py", "if temporary_name(path) and os.path", "if False and os.path", FILES),
    (
        "output_over_another",
        "evaluate.py",
        "            check_apart(flag,",
        "            (lambda *_: 0)(flag,",
        EVALUATE,
    ),
    ("resume_ends_at_a_foreign_line", "runtime/run.py", "except (AttributeError, TypeError, V", "except (V", RUN),
    ("deleted_log_filled_with_zeros", "runtime/files.py", " and file.tell() > size", "", FILES),
    ("ties_right_by_their_place", "evaluate.py", "best[answer] / best.sum()", "scores.argmax() == answer", EVALUATE),
    ("stdout_emptied", "runtime/files.py", "target = os.dup(STREAMS[str(path)])", "pass", FILES),
    (
        "link_replaced_by_a_file",
        "runtime/files.py",
        "os.replace(temporary, os.path.realpath(path))",
        "os.replace(temporary, path)",
        FILES,
    ),
    ("renamed_before_the_disk_has_it", "runtime/files.py", "            flush(temporary)\n", "", FILES),
    (
        "half_a_file_left",
        "runtime/files.py",
        "                temporary.unlink()\n        raise",
        "                pass\n        raise",
        FILES,
    ),
    (
        "checked_by_opening",
        "runtime/files.py",
        "if temporary := temporary_name(path):",
        "if temporary := Path(path):",
        FILES,
    ),
    ("half_a_line_kept", "runtime/files.py", "            file.truncate(size)  #", "            pass  #", FILES),
    (
        "written_elsewhere",
        "evaluate.py",
        "write_json(config.out, ",
        "(lambda p, v: open(p, 'w').write(str(v)))(config.out, ",
        FILES,
    ),
    ("device_resumed_from", "runtime/output.py", "if out.exists() and not out.is_file():", "if False:", RLAIF),
    ("any_seed", "runtime/cli.py", "not 0 <= value < 2**63:", "value < 0:", CLI),
    ("any_float", "runtime/cli.py", "value and not TINY <= abs(value) <= HUGE:", "value != value:", CLI),
    ("seeds_unchecked_in_a_script", "data/world.py", "    check_ranges(config)\n", "", PORTABLE),
    ("apples_gpu_by_default", "runtime/process.py", 'else "cpu"  # MPS', 'else "mps"  # MPS', PROCESS),
    (
        "bound_of_every_temperature",
        "rollout.py",
        "bound = limit / min(temperature, 1)",
        "bound = limit",
        ROLLOUT,
    ),
    ("needs_triton", "optim.py", "import torch\n", "import torch\nimport triton\n", PORTABLE),
    ("one_bad_file_and_no_report", "report.py", "except (ArithmeticError, ", "except (", REPORT),
    ("cut_log_and_no_report", "report.py", "read_jsonl(log, skip_bad=True)", "read_jsonl(log)", REPORT),
    # Preparing data
    ("shard_of_an_earlier_run", "data/prepare.py", "        path.unlink()\n", "        pass\n", PREPARE),
    (
        "shard_without_an_end",
        "data/prepare.py",
        "np.array([tok.eot], dtype))  # ends",
        "np.array([], dtype))  # ends",
        PREPARE,
    ),
    ("short_window_lost", "data/corpus.py", "np.maximum(a, begin[document])", "a", CORPUS),
    (
        "last_duplicate_kept",
        "data/clean.py",
        "np.unique(keys, return_index=True)[1]",
        "len(keys) - 1 - np.unique(keys[::-1], return_index=True)[1]",
        PREPARE,
    ),
    # Reading: fields with a meaning, one reader for all scripts, places, paths, indentation
    ("nulls_read", "data/rows.py", "    row = without_nulls(row)\n", "    row = dict(row)\n", ROWS),
    (
        "system_column_ignored",
        "data/rows.py",
        'messages = [message("system", system), *messages]',
        "messages = [*messages]",
        ROWS,
    ),
    ("history_ignored", "data/rows.py", "messages = [*earlier, *messages]", "messages = [*messages]", ROWS),
    (
        "history_by_one_name",
        "data/rows.py",
        "    for name in earlier_columns(row):\n",
        '    for name in {"history"}.intersection(row):\n',
        f"{ROWS}::test_earlier_turns_and_system_messages_have_many_names",
    ),
    (
        "system_by_one_word",
        "data/rows.py",
        'SYSTEM = {"system", "sys", "developer"}',
        'SYSTEM = {"system"}',
        f"{ROWS}::test_earlier_turns_and_system_messages_have_many_names",
    ),
    ("tools_ignored", "data/rows.py", 'set("tool tools function', 'set("function', ROWS),
    (
        "reasoning_ignored",
        "data/rows.py",
        'check_read(m, UNREAD | REASONING, MESSAGE_UNREAD, f"{where}.")',
        'check_read(m, UNREAD, MESSAGE_UNREAD, f"{where}.")',
        ROWS,
    ),
    ("context_ignored", "data/rows.py", 'MATERIAL = ("context", ', "MATERIAL = (", ROWS),
    ("parts_dropped", "data/rows.py", "part_text(part, where) for part in value", "part_text(value[0], where)", ROWS),
    ("weight_of_a_message_ignored", "data/chat.py", ' and message.get("train", True)', "", ROWS),
    ("weight_dropped", "data/rows.py", "return all(flags.values())", "return True", ROWS),
    ("bad_answer_trained", "data/rows.py", '["label"] if flag_of(row.get("label")) is False else []', "[]", ROWS),
    (
        "labels_in_quotes_unread",
        "data/rows.py",
        "LABELS.get(str(value).lower()",
        "LABELS.get(repr(value).lower()",
        ROWS,
    ),
    ("masks_ignored", "data/rows.py", "if MASKS.intersection(words_of(name)) and", "if not MASKS and", ROWS),
    ("text_beside_ignored", "data/rows.py", 'name == "text" and begin in text', 'name == "text"', ROWS),
    (
        "beginning_of_an_answer_dropped",
        "data/rows.py",
        """    if messages[-1]["role"] == "assistant":
        raise ValueError(""",
        """    if False:
        raise ValueError(""",
        ROWS,
    ),
    ("prompt_in_answer", "data/rows.py", "return not short and squeezed", "return False and squeezed", ROWS),
    ("unread_not_counted", "data/rows.py", "unread[e.field] += 1", "pass", ROWS),
    ("question_is_no_prompt", "data/rows.py", '("prompt", "question", "query"', '("prompt", "query"', ROWS),
    ("rows_as_text", "data/read.py", " and holds_objects(name)", " and False", READ),
    (
        "refused_rows_go_on",
        "data/read.py",
        """        GRAMMAR.decode(raw.decode("utf-8", "replace").strip())
    except json.JSONDecodeError:
""",
        """        decode_json(raw.decode("utf-8").strip())
    except ValueError:
""",
        READ,
    ),
    (
        "first_value_reads_all",
        "data/read.py",
        "    lines, size, due = [], 0, LOOK",
        "    lines, size, due = [], 0, 1e99",
        READ,
    ),
    ("first_value_ends_early", "data/read.py", "            if text[e.pos :].strip():", "            if text:", READ),
    ("autocast_of_a_reward_stays", "runtime/guard.py", "    (autocast, set_autocast),\n", "", GUARD),
    ("limits_of_a_reward_stay", "runtime/guard.py", "    KEPT += [(limits, set_limits)]\n", "", GUARD),
    ("print_of_a_reward_stays", "runtime/guard.py", "    (hooks, set_hooks),\n", "", GUARD),
    ("user_of_a_reward_stays", "runtime/guard.py", "(os.geteuid, os.seteuid), ", "", GUARD),
    (
        "lasting_change_a_traceback",
        "runtime/guard.py",
        "except (OSError, ValueError) as e:",
        "except KeyError as e:",
        GUARD,
    ),
    ("print_that_cannot_be_encoded", "runtime/guard.py", '"backslashreplace")', '"strict")', GUARD),
    ("input_of_the_run_eaten", "runtime/guard.py", "    os.dup2(nothing, 0)\n", "", GUARD),
    ("module_without_its_name", "scoring.py", "sys.modules[spec.name] = ", "", GUARD),
    ("held_up_by_a_thread", "runtime/process.py", "        timer.start()\n", "", PROCESS),
    ("weight_that_is_no_number", "scoring.py", "if not abs(factor) <= LARGEST_REWARD:", "if factor is None:", SCORING),
    (
        "input_closed_by_a_reward",
        "runtime/guard.py",
        "for number in (0, 1, 2) if is_open(number)}\n    marked",
        "for number in (1, 2) if is_open(number)}\n    marked",
        GUARD,
    ),
    ("tensor_there_twice", "runtime/hub.py", 'if name.endswith(f".{other}"):', "if False:", HUB),
    ("adapter_without_its_config", "runtime/hub.py", ', *folder.glob("adapter_model*"))', ",)", HUB),
    ("binary_as_text", "data/read.py", 'if b"\\0" in head[:LOOK]:', "if False:", READ),
    ("key_twice", "data/read.py", "if len(found) < len(pairs):", "if False:", READ),
    ("system_by_two_names", "data/rows.py", "SYSTEM_WORDS.issuperset(words_of(name))]", "len(name) == 6]", ROWS),
    (
        "flags_by_three_names",
        "data/rows.py",
        "    return FLAG.issuperset",
        "    return len(name) < 7 and FLAG.issuperset",
        ROWS,
    ),
    ("columns_unsaid", "data/rows.py", "columns |= unknown_columns(row)", "columns |= set()", ROWS),
    ("cut_by_our_word_only", "data/rows.py", "str(x).lower() in CUT for", "False for", ROWS),
    (
        "indentation_lost_in_feedback",
        "data/feedback.py",
        'f"answers[{i}]").rstrip() for',
        'f"answers[{i}]").strip() for',
        FEEDBACK,
    ),
    (
        "texts_with_a_weight",
        "data/read.py",
        "        if weight:\n            raise",
        "        if False:\n            raise",
        READ,
    ),
    ("pointer_as_text", "data/read.py", "if head.startswith(POINTER):", "if False:", READ),
    ("home_is_a_folder", "runtime/cli.py", "if kind is str and name not in TEXTS:", "if False:", CLI),
    (
        "characters_of_the_corpus_at_once",
        "data/tokenizer.py",
        "        for text in read_documents(names, config.skip_bad):\n",
        "        for text in list(read_documents(names, config.skip_bad)):\n",
        "tests/test_tokenizer.py",
    ),
    ("processor_ignored", "data/tokenizer.py", 'not in ("ByteLevel", "Template', 'in ("None", "Template', TEMPLATES),
    ("types_ignored", "data/rows.py", '.intersection(words_of(str(m.get("type", ""))))', ".intersection(())", ROWS),
    (
        "constitution_by_another_reader",
        "scoring.py",
        "for _, line in read_lines(path)]",
        'for line in Path(path).read_text(encoding="utf-8").splitlines()]',
        SCORING,
    ),
    ("token_names_of_transformers_5", "data/template.py", ', "model_specific_special_tokens"', ", ", TEMPLATES),
    ("space_after_a_token_kept", "data/chat.py", "if match[0] in self.structure.rstrip:", "if False:", TEMPLATES),
    ("suffix_in_small_letters_only", "data/read.py", "str(name).lower()", "str(name)", READ),
    ("reader_by_suffix", "data/corpus.py", 'if file_kind(path) == "text":', 'if not path.endswith(".jsonl"):', READ),
    ("array_without_lines", "data/read.py", 'line + text.count("\\n", at, begin)', "line", READ),
    (
        "weight_after_first_colon",
        "data/read.py",
        'removeprefix(hub).rpartition(":")',
        'removeprefix(hub).partition(":")',
        READ,
    ),
    ("place_not_named", "data/read.py", 'f"{text.place}: {error}" if', "str(error) if", READ),
    ("document_ends_the_run", "data/prepare.py", "            if not skip_bad:\n", "            if True:\n", READ),
    ("left_out_not_counted", "data/prepare.py", 'VERDICTS.index("bad_line"), 0', "verdict[bad], copies[bad]", READ),
    (
        "indentation_lost",
        "data/chat.py",
        "tok.encode_ordinary(text), end_of_turn",
        "tok.encode_ordinary(text.strip()), end_of_turn",
        CHAT,
    ),
    (
        "indentation_unread",
        "data/chat.py",
        "if i not in tok.special_ids])",
        "if i not in tok.special_ids]).strip()",
        CHAT,
    ),
    # Checkpoints that contradict themselves, a padded vocabulary, GGUF, choices and pass@k
    (
        "own_head_ignored",
        "runtime/hub.py",
        "    if c.tied and not c.scalar_head:\n        check_tied(where)\n",
        "",
        HUB,
    ),
    (
        "own_head_of_any_shape",
        "runtime/hub.py",
        "embedding.shape != head.shape or not torch.equal(",
        "len(embedding) == len(head) and not torch.equal(",
        HUB,
    ),
    (
        "rope_scaling_loses",
        "runtime/hub.py",
        "    if found.setdefault(name, value) != value:\n",
        "    if found.setdefault(name, value) is None:\n",
        HUB,
    ),
    ("rope_factor_without_a_type", "runtime/hub.py", "if name not in read and value != 1:", "if False:", HUB),
    ("adapter_left_in", "runtime/hub.py", "        if ADAPTER.search(name):\n", "        if False:\n", HUB),
    (
        "further_layers_left_in",
        "runtime/hub.py",
        'if name.startswith("model.") or name.endswith(".bias"):',
        'if name.endswith(".bias"):',
        HUB,
    ),
    (
        "head_bias_left_in",
        "runtime/hub.py",
        'if name.startswith("model.") or name.endswith(".bias"):',
        'if name.startswith("model."):',
        HUB,
    ),
    ("leftovers_not_said", "runtime/hub.py", "    if left_over:\n", "    if False:\n", HUB),
    (
        "index_before_the_file",
        "runtime/hub.py",
        "if (folder / WEIGHTS).exists() or not index.exists():",
        "if not index.exists():",
        HUB,
    ),
    (
        "tensor_in_two_shards",
        "runtime/hub.py",
        "                if name in where:\n",
        "                if False:\n",
        HUB,
    ),
    (
        "index_not_believed",
        "runtime/hub.py",
        "        if where.get(name) != inside(index, file):\n",
        "        if name not in where:\n",
        HUB,
    ),
    ("scales_not_quantised", "runtime/hub.py", "        if QUANTISED.search(name):\n", "        if False:\n", HUB),
    (
        "padding_is_drawn",
        "model.py",
        "return matrix[: -self.config.padding] if self.config.padding else matrix",
        "return matrix",
        HUB,
    ),
    (
        "padding_forgotten",
        "runtime/checkpoint.py",
        "    model.config.padding = model.config.vocab_size - tok.n_vocab\n",
        "",
        HUB,
    ),
    (
        "gguf_halves_not_interleaved",
        "export.py",
        "    return halves.transpose(1, 2).reshape(weight.shape)",
        "    return halves.reshape(weight.shape)",
        EXPORT,
    ),
    (
        "gguf_keys_as_queries",
        "export.py",
        "weight = interleaved(weight, c.kv_heads)",
        "weight = interleaved(weight, c.heads)",
        EXPORT,
    ),
    (
        "gguf_bos_twice",
        "export.py",
        "return tok.bos != tok.eot and tok.decode([tok.bos]) not in chat.example(tok)",
        "return tok.bos != tok.eot",
        EXPORT,
    ),
    (
        "gguf_base_without_bos",
        "export.py",
        "    return tok.bos != tok.eot or bool(info)\n",
        "    return tok.bos != tok.eot\n",
        EXPORT,
    ),
    (
        "gguf_ends_with_the_document",
        "export.py",
        "    writer.add_eos_token_id(stops[0])\n",
        "    writer.add_eos_token_id(tok.eot)\n",
        EXPORT,
    ),
    (
        "gguf_added_text_is_control",
        "export.py",
        "TokenType.CONTROL if i in tok.special_ids else TokenType.USER_DEFINED",
        "TokenType.CONTROL",
        EXPORT,
    ),
    (
        "gguf_any_split",
        "export.py",
        "LLAMA_CPP_NAMES.get(tok._pat_str)",
        'LLAMA_CPP_NAMES.get(tok._pat_str, "default")',
        EXPORT,
    ),
    ("gguf_scaling_upside_down", "export.py", "return angles[0] / angles[1]", "return angles[1] / angles[0]", EXPORT),
    (
        "gguf_over_a_device",
        "export.py",
        "not (config.overwrite and is_gguf)",
        "not config.overwrite",
        EXPORT,
    ),
    (
        "pass_at_k_with_replacement",
        "figures.py",
        "return 1 - math.comb(n - right, k) / math.comb(n, k)",
        "return 1 - (1 - right / n) ** k",
        EVALUATE,
    ),
    (
        "choices_per_token",
        "evaluate.py",
        'sizes = np.array([len(choice.encode()) for choice in row["choices"]])',
        'sizes = np.ones(len(row["choices"]))',
        EVALUATE,
    ),
    (
        "choice_at_the_prefix_end",
        "evaluate.py",
        "shared = min(len(os.path.commonprefix([alone, ids])) for ids in whole)",
        "shared = len(alone)",
        EVALUATE,
    ),
    # Chat templates and conventions of downloaded models
    (
        "text_spells_turns",
        "data/chat.py",
        '[self.disguise(m["content"]) for m in messages]',
        '[m["content"] for m in messages]',
        TEMPLATES,
    ),
    (
        "joined_special",
        "data/chat.py",
        "if self.structure.pattern.findall(text) != self.structure.pattern.findall(neutral):",
        "if False:",
        TEMPLATES,
    ),
    ("rewritten_in_the_mask", "data/chat.py", "if whole[:end] == ids[:end]:", "if True:", TEMPLATES),
    ("prompt_not_continued", "data/chat.py", "if not text.startswith(prompt):", "if False:", TEMPLATES),
    (
        "one_stop_id",
        "data/chat.py",
        "stops = frozenset([*tok.eos_ids, *([] if end is None else [end])])",
        "stops = frozenset([] if end is None else [end])",
        TEMPLATES,
    ),
    ("text_ends_with_a_document_only", "data/chat.py", "{tok.eot, *tok.eos_ids}", "{tok.eot}", TEMPLATES),
    ("train_false_trained", "data/chat.py", ' and message.get("train", True)', "", TEMPLATES),
    (
        "base_chats",
        "data/chat.py",
        "return tok.template is not None and end_of_turn(tok) in tok.eos_ids",
        "return tok.template is not None",
        TEMPLATES,
    ),
    ("think_is_spelled", "data/tokenizer.py", "if not self.text_tokens:", "if True:", TEMPLATES),
    (
        "think_hidden",
        "data/tokenizer.py",
        "self.special_ids = frozenset(special_tokens.values()) - text_ids",
        "self.special_ids = frozenset(special_tokens.values())",
        TEMPLATES,
    ),
    ("white_space_stays", "data/tokenizer.py", 'if row.get("lstrip"):', "if False:", TEMPLATES),
    (
        "bos_is_eot",
        "data/tokenizer.py",
        "self.bos = self.eot if bos is None else bos",
        "self.bos = self.eot",
        TEMPLATES,
    ),
    (
        "bos_not_kept",
        "data/tokenizer.py",
        '"post_processor": None if tok.bos == tok.eot else',
        '"post_processor": None if True else',
        TEMPLATES,
    ),
    ("template_takes_time", "data/template.py", "signal.setitimer(signal.ITIMER_PROF, SECONDS)", "pass", TEMPLATES),
    (
        "template_takes_memory",
        "data/template.py",
        "resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))",
        "pass",
        TEMPLATES,
    ),
    (
        "no_sandbox",
        "data/template.py",
        "jinja2.sandbox.ImmutableSandboxedEnvironment(",
        "jinja2.Environment(",
        TEMPLATES,
    ),
    ("jinjas_own_tojson", "data/template.py", 'environment.filters["tojson"] = to_json', "pass", TEMPLATES),
    (
        "child_shared_by_a_fork",
        "data/template.py",
        "child = children.get(os.getpid())",
        "child = next(iter(children.values()), None)",
        TEMPLATES,
    ),
    ("eos_token_changes", "data/template.py", "if known in (None, eos_token) or", "if True or", TEMPLATES),
    ("date_of_today", "runtime/run.py", "template.fix_time(self.started)", "pass", TEMPLATES),
    (
        "date_not_kept",
        "runtime/run.py",
        'self.started = (self.resumed and self.info.get("started")) or agreed_time()',
        "self.started = agreed_time()",
        TEMPLATES,
    ),
    (
        "template_lost",
        "runtime/checkpoint.py",
        "source = tok.template.source_under(tok.decode(eos_ids[:1])) if tok.template else chat.TEMPLATE",
        "source = chat.TEMPLATE",
        TEMPLATES,
    ),
    (
        "eos_of_documents",
        "runtime/checkpoint.py",
        "tokenizer.save(tok, folder, source, eos_ids[0])",
        "tokenizer.save(tok, folder, source)",
        TEMPLATES,
    ),
    # Sampling's cache, and prompts that completions share
    (
        "stream_caches_the_context",
        "rollout.py",
        "min(context + 1, len(prompt) + max_new_tokens)",
        "context + 1",
        "tests/test_rollout.py",
    ),
    ("sampler_shares_the_layout", "rollout.py", "p.T.contiguous().T", "p", "tests/test_rollout.py"),
    (
        "prompts_of_one_length",
        "data/pack.py",
        "setdefault(chat.ids[:n].tobytes(), begin)",
        "setdefault(n, begin)",
        "tests/test_pack.py",
    ),
    ("targets_of_the_whole_pack", "model.py", "        rows = pack.stored_row[rows]\n", "        pass\n", MODEL),
    (
        "another_copy_of_a_prompt",
        "model.py",
        "out.index_select(0, self.pack.first_copy)",
        "out[: len(self.pack.first_copy)]",
        MODEL,
    ),
    # People in the loop
    (
        "winner_reversed",
        "data/feedback.py",
        "order = 1 if first_wins else -1",
        "order = -1 if first_wins else 1",
        FEEDBACK,
    ),
    ("voter_forgotten", "data/feedback.py", 'json.dumps([about, row.get("by", "")])', "json.dumps([about])", FEEDBACK),
    ("torn_line_kept", "data/feedback.py", "path.stat().st_size - len(torn)", "path.stat().st_size", FEEDBACK),
    ("no_fsync", "data/feedback.py", "return append(path, data)", "return append(path, data, sync=False)", FEEDBACK),
    ("half_line_left", "data/feedback.py", 'append(path, b"", size)  #', "pass  #", FEEDBACK),
    ("round_repeats_votes", "data/feedback.py", "if json.dumps(row) not in known", "if known", FEEDBACK),
    ("stop_string_shown", "data/openai.py", "return max(begun, default=0)", "return 0", SERVE),
    ("other_tokens_promised", "data/openai.py", "if type(value) is not int or value != 0:", "if value < 0:", SERVE),
    ("field_ignored", "data/openai.py", "if not known and value is not None", "if False and value is not None", SERVE),
    ("draws_for_nobody", "serve.py", "self.thread.inbox.put((self.thread.cancel, job, pending))", "pass", SERVE),
    ("any_key", "runtime/http.py", 'if scheme.lower() != "bearer" or not right:', "if False:", SERVE),
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
    # Distillation
    ("kl_turned_round", "distill.py", 'reverse=direction == "reverse"', 'reverse=direction != "reverse"', DISTILL),
    ("kl_without_temperature", "distill.py", "temperature=temperature)", "temperature=1.0)", DISTILL),
    (
        "oneDNN_compiles_for_every_length",
        "kernels/linear.py",
        "-n % (64 if n > 64 else 8)",
        "0",
        "tests/test_kernels.py::test_products_of_many_lengths_keep_no_memory",
    ),
    ("kl_gradient_not_centred", "kernels/kl.py", "p * (log_ratio - kl)", "p * log_ratio", KL),
    ("kl_kernel_not_centred", "kernels/kl.py", "p * (log_p - log_q - kl)", "p * (log_p - log_q)", KL),
    (
        "single_prompt_of_distillation_refused",
        "data/chat.py",
        "rows.read_split(config, rows.prompt_only, encoder(tok, length), fit)",
        "rows.read_split(config, lambda row: rows.prompt_only(row), encoder(tok, length), fit)",
        f"{DISTILL}::test_a_single_prompt_may_be_validated_on",
    ),
    ("every_row_the_first_teacher", "distill.py", "if its_teacher == number", "if number == 0", DISTILL),
    ("mean_of_this_micro_batch", "distill.py", "/ n_tokens\n", "/ count_trained(items[:1])\n", DISTILL),
    # GRPO's variants
    (
        "cispo_stops_tokens",
        "grpo.py",
        "ratio = torch.exp(logp - old_logp).detach()",
        "ratio = torch.exp(logp - old_logp)",
        GRPO,
    ),
    ("gspo_sums", "grpo.py", "part.mean().expand", "part.sum().expand", GRPO),
    (
        "mask_of_the_good",
        "grpo.py",
        "(advantages >= 0) | (drift <= limit)",
        "(advantages < 0) | (drift <= limit)",
        GRPO,
    ),
    # A user's reward
    (
        "exit_ends_the_run",
        "runtime/guard.py",
        "        except BaseException as e:\n            error",
        "        except Exception as e:\n            error",
        GUARD,
    ),
    (
        "reward_gets_the_data",
        "scoring.py",
        "copy.deepcopy((question(messages), row))",
        "question(messages), row",
        GUARD,
    ),
    (
        "shallow_copies",
        "scoring.py",
        "copy.deepcopy((question(messages), row))",
        "copy.copy(question(messages)), copy.copy(row)",
        GUARD,
    ),
    ("directory_changed", "runtime/guard.py", "    (working_directory, set_working_directory),\n", "", f"{GUARD}"),
    ("random_state_changed", "runtime/guard.py", "        set_random_states(before)\n\n\n", "\n\n", GUARD),
    ("same_draws_in_every_batch", "runtime/guard.py", "        USERS_RANDOM[:] = random_states()\n", "", GUARD),
    ("child_goes_on", "runtime/guard.py", "if os.getpid() != process:", "if False:", GUARD),
    ("child_says_stop", "runtime/process.py", "if os.getpid() != self.process:", "if False:", GUARD),
    ("ctrl_c_blamed_on_a_reward", "runtime/guard.py", "    if interrupts:\n", "    if False:\n", GUARD),
    ("prints_unmarked", "runtime/guard.py", 'write(f"{self.mark} {line}', 'write(f"{line}', GUARD),
    (
        "half_line_of_a_reward",
        "runtime/guard.py",
        "        for stream in marked:\n            stream.end()\n",
        "",
        GUARD,
    ),
    ("stdout_led_elsewhere", "runtime/guard.py", "            os.dup2(copy, number)\n", "", GUARD),
    (
        "low_recursion_limit",
        "runtime/guard.py",
        "sys.setrecursionlimit(recursion_limit)  # first",
        "pass  # first",
        GUARD,
    ),
    (
        "late_behind_its_own_alarm",
        "runtime/guard.py",
        "if expired or time.monotonic() - began > seconds:",
        "if expired:",
        GUARD,
    ),
    ("text_is_a_reward", "scoring.py", 'if not hasattr(type(number), "__float__") or', "if number is None or", GUARD),
    (
        "huge_reward_of_a_function",
        "scoring.py",
        "if not abs(number) <= LARGEST_REWARD:",
        'if not abs(number) < float("inf"):',
        GUARD,
    ),
    (
        "exit_at_import",
        "scoring.py",
        "kept(KEPT_BY_IMPORT), guard(name):\n                spec",
        "kept(KEPT_BY_IMPORT):\n                spec",
        GUARD,
    ),
    ("validations_in_a_curve", "report.py", 'and ("val_loss" in r) == (y == "val_loss")', "", REPORT),
    ("compared_runs_on_plots_of_their_own", "report.py", 'if run["title"] != name:', "if False:", REPORT),
    ("comparison_over_the_report", "report.py", '"comparison.html" if', '"report.html" if', REPORT),
    ("long_curve_whole", "report.py", "len(values), MAX_POINTS, dtype", "len(values), len(values), dtype", REPORT),
    (
        "slow_readers",
        "runtime/http.py",
        "self.read_timer = self.loop.call_later(PATIENCE, self.transport.abort)",
        "self.read_timer = self.loop.call_later(1e6, self.transport.abort)",
        SERVE,
    ),
    ("stream_repeats", "engine.py", "columns = (starts + torch", "columns = (0 * starts + torch", SERVE),
    ("stream_runs_ahead", "engine.py", "(t[:n], logp[:n])", "(t, logp)", SERVE),
    # CUDA, on an emulated GPU
    (
        "device_without_index",
        "runtime/process.py",
        'if device.type == "cuda" and device.index is None:',
        'if device.type == "cuda" and device.index == 99:',
        f"{CUDA}::test_below_sm_80_the_references_run_and_it_is_said",
    ),
    (
        "kernels_on_old_gpus",
        "kernels/proof.py",
        "if capability < (8, 0):",
        "if capability < (7, 0):",
        f"{CUDA}::test_below_sm_80_the_references_run_and_it_is_said",
    ),
    (
        "cache_is_used_memory_in_the_plan",
        "runtime/memory.py",
        "+ cached - optimizer) // 2",
        "- optimizer) // 2",
        f"{CUDA}::test_memory_that_the_allocator_keeps_is_free_memory",
    ),
    (
        "cache_is_used_memory_in_rollouts",
        "rollout.py",
        "[0] + cached) // 2",
        "[0]) // 2",
        f"{CUDA}::test_memory_that_the_allocator_keeps_is_free_memory",
    ),
    (
        "logprobs_of_bf16_logits",
        "kernels/head.py",
        "wide_logits(hidden[part], w, wide).div_(temperature)",
        "product(hidden[part], w).to(wide).div_(temperature)",
        f"{CUDA}::test_log_probabilities_come_from_fp32_logits",
    ),
    (
        "pageable_copies",
        "data/pack.py",
        "return x.pin_memory().to(device, non_blocking=True)",
        "return x.to(device, non_blocking=True)",
        f"{CUDA}::test_a_training_micro_batch_never_waits",
    ),
    (
        "margins_read_per_micro_batch",
        "reward.py",
        "found[part] = margins.detach()",
        "found[part] = margins.detach().cpu()",
        f"{CUDA}::test_a_training_micro_batch_never_waits",
    ),
    (
        "wait_while_capturing",
        "rollout.py",
        "hidden = self.model.step(self.last[:width], self.cache.first(width))",
        "hidden = self.model.step(self.last[:width], self.cache.first(int(self.rows[width - 1]) + 1))",
        f"{CUDA}::test_decoding_waits_once_in_sixteen_steps",
    ),
    (
        "captured_tensor_freed",
        "rollout.py",
        "drawn, left = self.drawn.tolist(), self.left.tolist()",
        "self.rows = self.rows.clone()\n        drawn, left = self.drawn.tolist(), self.left.tolist()",
        f"{CUDA}::test_decoding_waits_once_in_sixteen_steps",
    ),
    (
        "tables_on_the_cpu",
        "rollout.py",
        "copy.cos, copy.sin, copy.exact = model.cos, model.sin, model.exact",
        "copy.cos, copy.sin, copy.exact = model.cos.cpu(), model.sin.cpu(), model.exact",
        f"{CUDA}::test_decoding_waits_once_in_sixteen_steps",
    ),
    (
        "sorted_writes_in_rollouts",
        "rollout.py",
        'torch.set_deterministic_debug_mode("default")',
        "pass",
        f"{CUDA}::test_a_rollout_writes_without_sorting",
    ),
    (
        "device_generator_not_saved",
        "runtime/process.py",
        'state["random/cuda"] = torch.cuda.get_rng_state(device)',
        "pass",
        f"{CUDA}::test_a_resumed_run_is_the_same_on_cuda[pretrain]",
    ),
    # The sampler's kernel, the optimizer's groups, attention's gradients
    (
        "nucleus_of_all_tokens",
        "kernels/draw.py",
        "tl.where(top_k < V, mass_above + mass, total)",
        "total",
        "tests/test_draw.py",
    ),
    (
        "one_token_too_many",
        "kernels/draw.py",
        "above + count >= top_k",
        "above + count > top_k",
        "tests/test_draw.py",
    ),
    (
        "colder_than_levels_go",
        "kernels/draw.py",
        "tl.maximum(temperature, COLDEST)",
        "temperature",
        "tests/test_draw.py",
    ),
    (
        "gradient_of_other_logits",
        "kernels/head.py",
        "chunk_mb, torch.float32):\n        rows = [x[part] for x in (targets, d_logp",
        "chunk_mb):\n        rows = [x[part] for x in (targets, d_logp",
        "tests/test_kernels.py::test_head_kernels_of_huge_logits",
    ),
    (
        "levels_never_make_way",
        "kernels/draw.py",
        "counts, masses = tl.where(gone, 0, counts), tl.where(gone, 0.0, masses)",
        "masses = tl.where(gone, 0.0, masses)",
        "tests/test_draw.py",
    ),
    (
        "draws_from_the_row_in_its_block",
        "kernels/draw.py",
        "rest = target - tl.max(tl.where(part < block, up_to, 0.0), 0)",
        "rest = target",
        "tests/test_draw.py",
    ),
    (
        "draws_by_fused_operations",
        "kernels/draw.py",
        "max(4, block // 512),\n        **UNFUSED,",
        "max(4, block // 512),",
        "tests/test_sass.py::test_every_kernel_compiles_and_no_rule_is_broken",
    ),
    (
        "long_answers_count_as_wrong",
        "grpo.py",
        "c.score > c.penalty for c",
        "c.score > 0 for c",
        "tests/test_grpo.py",
    ),
    (
        "maximum_of_masked_scores",
        "kernels/attention.py",
        "m_i = tl.full([BLOCK_M], -1e20, tl.float32)",
        "m_i = tl.full([BLOCK_M], -1e30, tl.float32)",
        "tests/test_attention.py::test_rows_without_a_key_in_a_block_bear_fused_arithmetic",
    ),
    (
        "proof_asks_what_no_pytorch_has",
        "kernels/proof.py",
        "versions += [torch.cuda.get_device_name(device)]",
        "versions += [torch.cuda.get_device_name(device), torch._C._cuda_getDriverVersion()]",
        f"{CUDA}::test_every_stage_runs_on_cuda",
    ),
    (
        "drawn_past_its_stop",
        "kernels/draw.py",
        "left = tl.where(stop, 0, left - 1)",
        "left = left - 1",
        "tests/test_draw.py",
    ),
    (
        "gradients_of_queries_and_keys_swapped",
        "kernels/attention.py",
        "else d_weights.to(q_weight.dtype)",
        "else d_weights.flip(0).to(q_weight.dtype)",
        "tests/test_attention.py",
    ),
    (
        "determinism_lost_by_sampling",
        "rollout.py",
        "        torch.set_deterministic_debug_mode(mode)",
        "        pass",
        "tests/test_rollout.py",
    ),
    (
        "one_group_for_all_rates",
        "optim.py",
        "groups.setdefault((peak_lr.get(name, lr), decay), [])",
        "groups.setdefault((lr, decay), [])",
        "tests/test_optim.py",
    ),
    (
        "half_of_what_fits",
        "runtime/memory.py",
        "if total(largest) <= 0.9 * available_memory(device, largest):",
        "if total(largest) <= 0.45 * available_memory(device, largest):",
        "tests/test_memory.py",
    ),
    # Learning to reason
    (
        "pass_at_k_if_all_are",
        "grpo.py",
        "right.any(1)",
        "right.all(1)",
        f"{GRPO}::test_the_shares_of_groups_say_why_they_teach_nothing",
    ),
    ("dpo_norm_of_sums", "dpo.py", 'Loss(dpo_loss, 5.0, "mean_logratio")', 'Loss(dpo_loss, 5.0, "logratio")', DPO),
    ("kept_twice", "evaluate.py", " and text not in mine", "", KEPT),
    (
        "kept_without_an_end",
        "evaluate.py",
        "if is_right and sample.finished and",
        "if is_right and",
        KEPT,
    ),
    ("kept_without_a_limit", "evaluate.py", " and len(mine) < config.keep_per_prompt", "", KEPT),
    (
        "groups_of_the_last_field",
        "evaluate.py",
        'label += f", {field}',
        'label = f", {field}',
        f"{EVALUATE}::test_problems_are_judged_by_a_checker_and_told_apart_by_fields",
    ),
    ("target_not_checked", "data/puzzles.py", "value(found) == int(target)", "True", PUZZLES),
    ("numbers_used_twice", "data/puzzles.py", "sorted(used) == sorted(numbers)", "set(used) == set(numbers)", PUZZLES),
    ("steps_not_checked", "data/puzzles.py", "bool(steps) and all(", "bool(steps) or all(", PUZZLES),
    ("held_out_in_training", "data/puzzles.py", "is_held_out(question) == held_out", "True", PUZZLES),
    ("watched_norm_is_no_json", "optim.py", "if watched in name]).item()", "if watched in name])", OPTIM),
    # Strangers at the server and in its files
    ("carriage_returns", "data/feedback.py", "whole.splitlines(keepends=True)", 'whole.split(b"\\n")', FEEDBACK),
    ("edit_overwritten", "data/feedback.py", "if path.stat().st_size != size:", "if False:", FEEDBACK),
    ("torn_line_deleted", "data/feedback.py", 'append(path.with_suffix(".torn"), torn + b"\\n")', "pass", FEEDBACK),
    ("lines_run_together", "data/feedback.py", 'path.read_bytes()[-1:] in (b"", b"\\n")', "True", FEEDBACK),
    ("vote_stops_all_rounds", "data/feedback.py", "    if kind in PARSE:\n", "    if False:\n", FEEDBACK),
    (
        "import_beside_a_server",
        "data/feedback.py",
        'lock_file(Path(config.out) / ".lock", config.out)',
        "pass",
        f"{FEEDBACK}::test_an_import_leaves_what_is_there",
    ),
    ("arena_model_unknown", "data/feedback.py", 'other.get("selectedModelId") or other', "other", WEBUI),
    ("unfinished_sibling", "data/feedback.py", ' and other.get("done") is not False', "", WEBUI),
    (
        "image_ignored",
        "data/feedback.py",
        ', "files": parent.get("files")}',
        "}",
        f"{FEEDBACK}::test_a_damaged_export_is_refused",
    ),
    ("round_of_too_few", "sharpen.py", 'any(folder.glob("*/step_*"))', '(folder / "pairs.jsonl").exists()', ROUNDS),
    ("round_beside_a_round", "sharpen.py", 'lock_file(rounds / ".lock", rounds, "rounds")', "pass", SIGNALS),
    ("step_not_told", "sharpen.py", "process.terminate()", "pass", SIGNALS),
    ("step_killed", "sharpen.py", "in (signal.SIGINT, signal.SIGTERM):", "in (signal.SIGTERM,):", SIGNALS),
    (
        "base_model_followed",
        "runtime/checkpoint.py",
        'not in (None, "pretrain", "reward")',
        'not in (None, "reward")',
        NEWEST,
    ),
    ("deleted_run_ends_following", "runtime/checkpoint.py", 'info.get("stage")', 'info["stage"]', NEWEST),
    ("second_limit_wins", "data/openai.py", "limit = min(limit, number(", "limit = (number(", SERVE),
    ("retried_for_ever", "serve.py", "        if n > room:\n", "        if False:\n", SERVE),
    ("strangers_fill_the_log", "runtime/http.py", "except ClientDisconnect:", "except ZeroDivisionError:", SERVE),
    ("rates_of_all_models", "serve.py", "votes.most_common(MOST_MODELS)", "votes.most_common()", SERVE),
    # What the field's bug reports tell of
    (
        "template_twice",
        "data/rows.py",
        "check_plain(BEGUN.match(parts[0]), field)",
        "pass",
        f"{ROWS}::test_what_is_written_in_a_template_already_is_refused",
    ),
    (
        "end_spelled",
        "data/rows.py",
        "        check_plain(mark, field)",
        "        pass",
        f"{ROWS}::test_what_is_written_in_a_template_already_is_refused",
    ),
    (
        "cut_side",
        "data/rows.py",
        "if isinstance(m, dict):\n            check_whole(m)",
        "pass",
        f"{ROWS}::test_whatever_says_that_an_answer_was_cut_is_read",
    ),
    (
        "earlier_turns_dropped",
        "data/rows.py",
        "if first not in said and asked not in first:",
        "if False:",
        f"{ROWS}::test_earlier_turns_beside_a_prompt_are_not_dropped",
    ),
    (
        "reversed_rating",
        "data/rows.py",
        "number_of(value) < number_of(other)",
        "False",
        f"{ROWS}::test_a_bad_row_is_named_or_counted",
    ),
    (
        "nan_is_said",
        "data/read.py",
        "value is None or isinstance(value, float) and math.isnan(value)",
        "value is None",
        f"{ROWS}::test_nan_of_a_table_is_null",
    ),
    (
        "bad_answer_flag",
        "data/rows.py",
        "if value is False and GOOD.intersection(words_of(name))",
        "if False",
        f"{ROWS}::test_a_bad_answer_is_no_conversation",
    ),
    (
        "unencoded_row_without_line",
        "data/rows.py",
        "except (ValueError, RecursionError, UserError) as e:",
        "except (ValueError, RecursionError) as e:",
        f"{ROWS}::test_a_row_that_cannot_be_encoded_costs_itself",
    ),
    (
        "passage_of_choices",
        "evaluate.py",
        "return rows.prompt(rest)",
        "return [rows.message('user', rest['question'])]",
        f"{EVALUATE}::test_rows_that_are_no_choices_are_named",
    ),
    (
        "blank_completion_is_right",
        "evaluate.py",
        "rows.text_of(row.get(field), field)",
        "str(row[field])",
        f"{EVALUATE}::test_rows_without_their_fields_are_named",
    ),
    (
        "tie_is_b",
        "evaluate.py",
        'row["better"] not in ("A", "B")',
        "False",
        f"{EVALUATE}::test_a_comparison_has_a_better_reply",
    ),
    (
        "answer_in_its_prompt",
        "data/rows.py",
        "if other and answer and is_whole(value, row[other], row[answer]):",
        "if False:",
        f"{ROWS}::test_a_prompt_that_ends_with_its_answer_is_refused",
    ),
    (
        "echo_is_refused",
        "data/rows.py",
        "return squeezed(prompt) in squeezed(text) and",
        "return",
        f"{ROWS}::test_a_prompt_that_ends_with_its_answer_is_refused",
    ),
    (
        "choices_in_columns",
        "data/rows.py",
        """, *"ABCDE", *(f"option_{letter}" for letter in "abcde"))""",
        ",)",
        f"{ROWS}::test_no_column_that_says_something_is_ignored",
    ),
    (
        "reason_is_a_string",
        "data/rows.py",
        "value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]",
        "[value]",
        f"{ROWS}::test_whatever_says_that_an_answer_was_cut_is_read",
    ),
    (
        "cut_in_quotes",
        "data/rows.py",
        "cut and flag_of(value) or",
        "cut and value in (True,) or",
        f"{ROWS}::test_whatever_says_that_an_answer_was_cut_is_read",
    ),
    (
        "thought_folded_in",
        "data/feedback.py",
        """folded := re.search(r'<details type="(\\w+)"', content or "")""",
        "folded := None",
        f"{FEEDBACK}::test_a_thought_that_open_webui_folds_into_a_message_is_refused",
    ),
    (
        "thought_left_out",
        "data/chat.py",
        "if leaves_out(self.contents[i], answer):",
        "if False:",
        f"{TEMPLATES}::test_an_answer_whose_thought_is_left_out_is_refused",
    ),
    (
        "column_twice",
        "data/read.py",
        "if len(set(names)) < len(names):",
        "if False:",
        f"{READ}::test_parquet_that_would_lose_a_column_or_cannot_be_converted_is_named",
    ),
    (
        "parquet_raises",
        "data/read.py",
        "except Exception as e:  # a date",
        "except (OSError, ValueError) as e:  # a date",
        f"{READ}::test_parquet_that_would_lose_a_column_or_cannot_be_converted_is_named",
    ),
    (
        "hub_raises",
        "data/read.py",
        "except Exception as e:  # for one",
        "except (OSError, ValueError, KeyError) as e:  # for one",
        f"{READ}::test_whatever_a_hub_reader_raises_is_one_line",
    ),
    (
        "error_of_two_lines",
        "data/read.py",
        'return " ".join(f"{type(error).__name__}: {error}".split())',
        'return f"{type(error).__name__}: {error}"',
        f"{READ}::test_whatever_a_hub_reader_raises_is_one_line",
    ),
    (
        "stereotypes_are_sums",
        "data/rows.py",
        'r"<<[^<>]*=[^<>]*>>"',
        'r"<<[^<>]*>>"',
        f"{ROWS}::test_conversations_in_every_format",
    ),
    (
        "flags_are_content",
        "data/rows.py",
        "content = not flags and not",
        "content = not",
        f"{ROWS}::test_conversations_in_every_format",
    ),
    (
        "off_is_content",
        "data/rows.py",
        '"None", "on", "off")',
        '"None")',
        f"{ROWS}::test_conversations_in_every_format",
    ),
    (
        "rewards_are_no_ratings",
        "data/rows.py",
        '"reward", "rewards"}',
        "}",
        f"{ROWS}::test_a_bad_row_is_named_or_counted",
    ),
    (
        "latex_is_a_unit",
        "data/rules.py",
        "(?!text|mathrm|",
        "(?!",
        "tests/test_rules.py::test_the_number_after_the_mark",
    ),
    (
        "latex_ends_a_number",
        "data/rules.py",
        'r"(?![ ,]{0,2}\\\\(?!text',
        'r"(?!Q(?!text',
        "tests/test_rules.py::test_the_number_after_the_mark",
    ),
    (
        "algebra_ends_a_number",
        "data/rules.py",
        "(?![ixynk]\\b|[A-Za-z]{1,2} ?[-+*/^] ?[\\d({])",
        "",
        "tests/test_rules.py::test_the_number_after_the_mark",
    ),
    ("a_list_is_its_head", "data/rules.py", "|, \\d|", "|", "tests/test_rules.py::test_the_number_after_the_mark"),
    ("thousands_by_a_space", "data/rules.py", ":'_xXeE \\u00a0", ":'_xXeE\\u00a0", "tests/test_rules.py"),
    (
        "tokens_added_beside",
        "data/tokenizer.py",
        "if content not in specials:",
        "if False:",
        f"{TEMPLATES}::test_a_token_that_another_file_adds_is_refused",
    ),
    (
        "system_asked_for",
        "data/chat.py",
        '[rows.message("system", "Be brief."), *messages]',
        "messages",
        f"{TEMPLATES}::test_a_template_may_ask_for_a_system_message",
    ),
    (
        "kto_without_its_prompt",
        "data/kto.py",
        "chat.encode_completion(tok, text, messages)",
        "chat.encode_completion(tok, text)",
        f"{TEMPLATES}::test_a_template_may_ask_for_a_system_message",
    ),
    (
        "not_causal",
        "runtime/hub.py",
        '"is_causal": not h.get("is_causal", True),',
        "",
        f"{HUB}::test_configs_this_gpt_cannot_be_are_named",
    ),
    (
        "switch_of_another_architecture",
        "runtime/hub.py",
        "h[key] is True or h[key] not in",
        "h[key] not in",
        f"{HUB}::test_configs_this_gpt_cannot_be_are_named",
    ),
    (
        "softcap",
        "runtime/hub.py",
        'r"softcap|_multiplier$',
        'r"_multiplier$',
        f"{HUB}::test_configs_this_gpt_cannot_be_are_named",
    ),
    (
        "head_alone",
        "runtime/hub.py",
        "name == EMBEDDING and name not in where and c.tied",
        "False",
        f"{HUB}::test_of_a_tied_model_the_head_alone_may_be_stored",
    ),
    (
        "export_over_weights",
        "export.py",
        'target.is_file() and target.suffix == ".gguf"',
        "target.is_file()",
        f"{EXPORT}::test_what_llama_cpp_could_not_do_is_refused",
    ),
    (
        "bos_in_a_comment",
        "export.py",
        "not in chat.example(tok)",
        "not in tok.template.source and 'bos_token' not in tok.template.source",
        f"{EXPORT}::test_a_downloaded_models_conventions_are_kept",
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
    for folder in (".", "data", "kernels", "runtime", "tests", "bench", "web"):
        (where / folder).mkdir(parents=True, exist_ok=True)
        kinds = ["*.py", "*.txt", "*.md", "*.html", "*.js", "*.css", "pyproject.toml"]
        for path in [p for kind in kinds for p in (here / folder).glob(kind)]:
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
