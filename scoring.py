"""What a completion is worth: rule functions, reward models and judges.

A reward on the command line is FILE.py:FUNCTION, the directory of a reward model, or judge:DIR, a
chat model that compares completions by the principles of a constitution. `load_rewards` turns each
into a function(conversations, rows, samples, texts) -> float64 [n]: sample i answers conversation
i, whose row of the data is rows[i], and says texts[i]. `score_completions` adds them up by weight.
"""

import ast
import contextlib
import copy
import dataclasses
import importlib.util
import inspect
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from data import chat
from data.judge import judge_prompt, question, transcript
from data.pack import make_completion, pack, rank_span, token_slices
from data.read import read_lines
from data.rows import random_rows
from data.rules import final_number
from model import GPT, logprobs_no_grad, score
from rollout import sample_completions
from runtime import checkpoint
from runtime.cli import print0
from runtime.errors import UserError
from runtime.files import sha256
from runtime.guard import KEPT_BY_IMPORT, guard, guard_batch, kept, own_random, time_limit
from runtime.hub import config_from_hf
from runtime.process import rank, reduce_sum, world_size
from runtime.run import WARNED

LARGEST_REWARD = 1e15  # squares of them are added up in fp32, which ends at 3e38

# -------------------------------------------------------------------------------------------------
# Rewards of a command line


def reward_names(text, flag="reward"):
    """[(name, weight)] of a --reward flag: comma-separated names, each with or without *WEIGHT.

    Raises UserError if a weight is no finite number, or there are only commas.
    """
    names = []
    for piece in [piece.strip() for piece in text.split(",") if piece.strip()]:
        name, star, weight = piece.rpartition("*")
        try:
            factor = float(weight) if star else 1.0
        except ValueError:
            factor = math.nan
        if not abs(factor) <= LARGEST_REWARD:
            raise UserError(
                f"--{flag}={piece}: {weight!r} is not a number of at most {LARGEST_REWARD:g}; write NAME*0.5"
            )
        names.append((name if star else piece, factor))
    if text and not names:
        raise UserError(f"--{flag}={text}: there is no name in it")
    return names


def is_function(name):
    """Whether a reward is FILE.py:FUNCTION."""
    return name.rpartition(":")[0].endswith(".py")


def is_model(name):
    """Whether a reward is the directory of a reward model."""
    return not name.startswith("judge:") and not is_function(name)


def load_rewards(names, device, micro_batch_tokens, constitution="", timeout=60.0, monitor="", flag="reward"):
    """The rewards of a command line -> [(name, weight, function)].

    names: of --`flag`; constitution: a file with the principles of judges; timeout: seconds that a
    FUNCTION may take over one completion; monitor: more rewards, which are logged and weigh 0.
    Raises UserError if a reward is named twice or cannot be loaded.
    """
    named = reward_names(names, flag)
    weights = dict(named)
    if len(weights) < len(named):
        raise UserError(f"--{flag}={names}: a reward is named twice; give it one weight")
    flags = dict.fromkeys(weights, flag)  # what an error of each names
    for name, weight in reward_names(monitor, "monitor"):
        if weight != 1:
            raise UserError(f"--monitor={name}*{weight:g}: what is only logged has no weight; leave it out")
        weights.setdefault(name, 0.0)
        flags.setdefault(name, "monitor")
    rewards = []
    for name, weight in weights.items():
        if is_function(name):
            reward = function_reward(name, timeout, flags[name])
        elif is_model(name):
            reward = model_reward(name, device, micro_batch_tokens, flags[name])
        else:
            reward = judge_reward(name, device, micro_batch_tokens, constitution, flags[name])
        rewards.append((name, weight, reward))
    return rewards


def rewards_of(config, device):
    """(the rewards of a RolloutConfig, the hashes of their files)."""
    names = [name for name, _ in [*reward_names(config.reward), *reward_names(config.monitor, "monitor")]]
    if config.constitution and not any(name.startswith("judge:") for name in names):
        raise UserError(f"--constitution={config.constitution}: no judge:DIR in --reward or --monitor reads it")
    rewards = load_rewards(
        config.reward,
        device,
        config.micro_batch_tokens,
        config.constitution,
        config.reward_timeout,
        config.monitor,
    )
    return rewards, reward_hashes(config.reward, config.constitution)


def reward_hashes(names, constitution=""):
    """{name: SHA-256} of the rewards' files: a resumed run must have the same ones."""
    hashes = {constitution: sha256(constitution)} if constitution else {}
    for name, _ in reward_names(names):
        if is_function(name):
            hashes[name] = sha256(name.rpartition(":")[0])
        else:
            hashes[name] = checkpoint.fingerprint(checkpoint.find(name.removeprefix("judge:")))
    return hashes


def reward_configs(*flags):
    """{directory: GPTConfig} of the reward models and judges of --reward and --monitor."""
    names = [name for flag in flags for name, _ in reward_names(flag)]
    folders = {name.removeprefix("judge:") for name in names if not is_function(name)}
    return {folder: config_from_hf(checkpoint.find(folder) / "config.json") for folder in sorted(folders)}


def score_completions(rewards, rows, samples, texts, unfinished_penalty=0.0):
    """Score samples -> (weighted sum float64 [n], {name: float64 [n]}).

    rewards: of `load_rewards`; rows: [(messages, row)], one for each prompt_index of the samples;
    unfinished_penalty: subtracted from the sum of an unfinished sample.
    """
    total, parts = np.zeros(len(samples)), {}
    conversations = [rows[s.prompt_index][0] for s in samples]
    data = [rows[s.prompt_index][1] for s in samples]
    for name, weight, reward in rewards:
        # A rank's share may be empty
        parts[name] = reward(conversations, data, samples, texts) if samples else total
        total = total + weight * parts[name]
    return total - unfinished_penalty * np.array([not s.finished for s in samples], dtype=float), parts


def score_batch(rewards, completions, unfinished_penalty=0.0):
    """Set `score` and `parts` of a step's rollout.Completions, by `score_completions`. Raises
    UserError if a score exceeds 1e15."""
    rows = {c.sample.prompt_index: c.row for c in completions}
    samples, texts = [c.sample for c in completions], [c.text for c in completions]
    total, parts = score_completions(rewards, rows, samples, texts, unfinished_penalty)
    for i, c in enumerate(completions):
        c.score, c.parts = total[i], {name: values[i] for name, values in parts.items()}
        if abs(c.score) > LARGEST_REWARD:
            raise UserError(
                f"--reward: {c.score:.3g} for the completion {c.text[:200]!r}; more than {LARGEST_REWARD:g} "
                "cannot be learned from: give the reward a smaller scale"
            )


def warn_once(name, text):
    """Print a warning about a reward the first time in a run only, not at every step."""
    if f"reward {name}" not in WARNED:
        WARNED.append(f"reward {name}")
        print0(f"warning: {name}: {text} (said once)")


# -------------------------------------------------------------------------------------------------
# Functions


def function_reward(name, timeout, flag):
    """The reward of --`flag` that calls a user's function(prompt, completion, row) for each
    sample."""
    function = load_function(name, flag)

    def reward(conversations, rows, samples, texts):
        rows = [row | {"finished": sample.finished} for row, sample in zip(rows, samples, strict=True)]
        with guard_batch():
            calls = zip(conversations, rows, texts, strict=True)
            return np.array([call_function(name, function, timeout, *call, flag) for call in calls])

    return reward


def call_function(name, function, timeout, messages, row, text, flag="reward"):
    """What a user's function says of a completion, as a float; it gets copies, which it may change.

    Raises UserError naming --`flag`, the completion and the row if it raises anything, takes longer
    than `timeout` seconds, or returns what is no reward. See runtime/guard.py.
    """
    prompt, own_row = copy.deepcopy((question(messages), row))
    try:
        with guard(name), time_limit(timeout):
            return read_value(function(prompt, text, own_row))
    except UserError as e:
        raise UserError(
            f"--{flag}={name}: {e}, for the completion {text[:200]!r} and the row {str(row)[:200]}"
        ) from None


def read_value(value):
    """A user's reward as a float: of a bool 0 or 1; of a tensor or array its only element.

    Raises UserError if it is no number (text and None are none) or not finite, or exceeds 1e15.
    """
    number = value.item() if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) else value
    if inspect.iscoroutine(value):
        value.close()  # or Python prints that nobody awaited it
        raise UserError("is an `async def`; make it a `def` that returns a number, for example by asyncio.run")
    if not hasattr(type(number), "__float__") or np.ma.is_masked(value):
        raise UserError(f"returned {repr(value)[:100]} of the type {type(value).__name__}; a number was expected")
    number = float(number)
    if not abs(number) <= LARGEST_REWARD:
        raise UserError(
            f"returned {number:.3g}; a finite number was expected, at most {LARGEST_REWARD:g} in size: more cannot be "
            "learned from"
        )
    return number


def load_function(name, flag="reward"):
    """The function of FILE.py:FUNCTION, which --`flag` names.

    The file is run: it is the user's own code, with all the user's rights. Raises UserError if it
    cannot be imported, for which leaving the process counts, or has no such function.
    """
    file, _, function = name.rpartition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise UserError(f"--{flag}={name}: {file} does not exist")
    if str(path) not in sys.modules:  # two functions of one file share its module
        refuse_shadowed(path, f"--{flag}={name}")
        spec = importlib.util.spec_from_file_location(module_name(path), path)
        module = sys.modules[spec.name] = sys.modules[str(path)] = importlib.util.module_from_spec(spec)
        sys.path.append(str(path.parent))  # it may import the files next to it
        try:
            with own_random(), kept(KEPT_BY_IMPORT), guard(name):
                spec.loader.exec_module(module)
        except UserError as e:
            del sys.modules[str(path)], sys.modules[spec.name]
            raise UserError(f"--{flag}={name}: {file} cannot be imported: {e}") from None
    found = vars(sys.modules[str(path)]).get(function)
    if not callable(found):
        raise UserError(f"--{flag}={name}: {file} has no function {function}")
    return found


def module_name(path):
    """The name of a user's file as a module: its stem, by which processes that it spawns import it;
    if another module has that, its path, of which a dot would make two modules."""
    name = path.stem
    if name.isidentifier() and name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin == str(path):
            return name
    return str(path).replace(".", "_")


def imported_names(path):
    """The dotted names that a file imports; of `from a import b` both a and a.b."""
    names = []
    with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError):  # its import says so
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def refuse_shadowed(path, flag):
    """Raises UserError if a file, or one next to it that it imports, imports one next to it that is
    called as a module of this folder is: it would get ours."""
    here, files = Path(__file__).resolve().parent, [path]
    if path.resolve().is_relative_to(here):  # it is one of ours, and means ours
        return
    for file in files:
        for name in imported_names(file):
            module, top = path.parent / name.replace(".", "/"), here / name.partition(".")[0]
            beside = [p for p in (module.with_suffix(".py"), module / "__init__.py") if p.is_file()]
            ours = [p for p in (top.with_suffix(".py"), top / "__init__.py") if p.is_file()]
            if beside and ours:
                raise UserError(f"{flag}: {file.name} imports {name}, which is {ours[0]} here; rename {beside[0]}")
            files += [p for p in beside if p not in files]


# -------------------------------------------------------------------------------------------------
# Reward models


def model_reward(name, device, micro_batch_tokens, flag):
    """The reward of --`flag` that is a reward model's score at the end of a conversation."""
    model, tok, info = checkpoint.load(name, device)
    if not model.config.scalar_head:
        raise UserError(f"--{flag}={name}: not a reward model (it has no scalar head); reward.py trains one")
    model.eval()
    context = model.config.context

    def reward(conversations, rows, samples, texts):
        documents = []
        for messages, text, sample in zip(conversations, texts, samples, strict=True):
            # An unfinished completion is scored as it stands, without an end of turn
            ids = chat.encode_completion(tok, text, messages) if sample.finished else tok.encode_ordinary(text)
            documents.append(chat.encode_prompt(tok, messages) + ids)
        long = sum(len(d) > context for d in documents)
        if long:
            warn_once(
                name,
                f"{long} of {len(documents)} conversations exceed its context of {context} tokens; it reads their ends",
            )
        documents = [d[-context:] for d in documents]
        return reward_scores(model, documents, micro_batch_tokens, info.get("center", 0.0))

    return reward


@torch.no_grad()
def reward_scores(model, documents, micro_batch_tokens, center=0.0):
    """float64 [D]: the reward model's score at each document's last token, less `center`.

    documents: token ids. Raises UserError if one is longer than the model's context or a score is
    not finite.
    """
    packs = packs_within_context(model, documents, micro_batch_tokens, "conversation")
    return finite(torch.cat([score(model, p) for p in packs]), "reward model's scores") - center


def packs_within_context(model, documents, micro_batch_tokens, what):
    """Packs of at most `micro_batch_tokens` tokens on the model's device, in order."""
    longest, context = max(map(len, documents)), model.config.context
    if longest > context:
        raise UserError(f"a {what} of {longest} tokens exceeds the model's context of {context}")
    parts = token_slices([len(d) for d in documents], micro_batch_tokens)
    return [pack(documents[part]).to(model.embed.device) for part in parts]


def finite(values, what):
    """float64 [n] of a tensor on any device. Raises UserError if one is not finite."""
    if not values.isfinite().all():
        raise UserError(f"the {what} are not finite: its weights are damaged; use another checkpoint")
    return values.cpu().double().numpy()


# -------------------------------------------------------------------------------------------------
# Judges


def judge_reward(name, device, micro_batch_tokens, constitution, flag):
    """The reward of --`flag` that is a judge's probability that a completion is better than the
    next one to the same prompt: the mean over both orders and all principles (Lee et al. 2023,
    arXiv 2309.00267)."""
    if not constitution:
        raise UserError(
            f"--{flag}={name}: a judge needs principles, one per line of a file: --constitution=data/constitution.txt"
        )
    principles = read_constitution(constitution)
    model, tok, _ = checkpoint.load(name.removeprefix("judge:"), device)
    if model.config.scalar_head:
        raise UserError(f"--{flag}={name}: a reward model, which writes no verdict; use it without judge:")
    model.eval()
    longest_principle = max(len(tok.encode_ordinary(principle)) for principle in principles)

    def reward(conversations, rows, samples, texts):
        opponents = next_of_group(samples, name, flag)
        triples = [(transcript(m), texts[i], texts[opponents[i]]) for i, m in enumerate(conversations)]
        lengths = np.array([len(tok.encode_ordinary(judge_prompt(*triple, ""))) for triple in triples])
        # The first token, and a few more in case the principle and the text around it split
        # otherwise
        fits = 1 + lengths + 8 + longest_principle <= model.config.context
        if not fits.all():
            warn_once(
                name,
                f"{(~fits).sum()} of {len(triples)} comparisons exceed its context of {model.config.context} tokens "
                "and count as ties",
            )
        values = np.full(len(triples), 0.5)
        if fits.any():
            fitting = [triples[i] for i in fits.nonzero()[0]]
            by_principle = [judge_score(model, tok, fitting, p, micro_batch_tokens).mean(1) for p in principles]
            values[fits] = np.mean(by_principle, axis=0)
        return values

    return reward


def next_of_group(samples, name, flag="reward"):
    """{index of a sample: index of the next one to its prompt}; the last is followed by the first.

    Raises UserError if a prompt has one sample only.
    """
    groups, following = defaultdict(list), {}
    for i, sample in enumerate(samples):
        groups[sample.prompt_index].append(i)
    for group in groups.values():
        if len(group) < 2:
            raise UserError(
                f"--{flag}={name}: a judge compares the completions of one prompt, so there must be at least two "
                "(--group_size=2)"
            )
        following |= dict(zip(group, [*group[1:], group[0]], strict=True))
    return following


def judge_score(model, tok, triples, principle, micro_batch_tokens):
    """float64 [n, 2]: the probability that the first of two replies is better by a principle.

    triples: (prompt, reply, reply). Column 0: the judge reads them in this order; 1: in the other.
    """
    prompts = [judge_prompt(prompt, a, b, principle) for prompt, a, b in triples]
    prompts += [judge_prompt(prompt, b, a, principle) for prompt, a, b in triples]
    in_order, swapped = np.split(prefer_first(model, tok, prompts, micro_batch_tokens), 2)
    return np.stack([in_order, 1 - swapped], axis=1)


@torch.no_grad()
def prefer_first(model, tok, prompts, micro_batch_tokens):
    """float64 [n]: the probability of " A" against " B" after each judge prompt.

    Raises UserError if these are not single tokens or a prompt is longer than the model's context.
    """
    labels = [tok.encode_ordinary(label) for label in (" A", " B")]
    if any(len(ids) != 1 for ids in labels):
        raise UserError('" A" and " B" are not single tokens of this tokenizer, so it cannot be a judge')
    documents = [[tok.bos, *tok.encode_ordinary(prompt)] for prompt in prompts]
    packs = packs_within_context(model, documents, micro_batch_tokens, "judge prompt")
    hidden = torch.cat([model(p)[p.cu_seqlens[1:].long() - 1] for p in packs])  # [n, C]
    logits = hidden.float() @ model.head[[ids[0] for ids in labels]].float().T  # [n, 2]
    return finite(logits.softmax(-1)[:, 0], "judge's probabilities")


def read_constitution(path):
    """The principles of a constitution: its lines, except empty ones and those that begin with #.

    Raises UserError if the file cannot be read or has none.
    """
    try:
        lines = [line.strip() for _, line in read_lines(path)]
    except UserError as e:
        raise UserError(f"--constitution={e}") from None
    principles = [line for line in lines if line and not line.startswith("#")]
    if not principles or principles[0][0] in "[{":  # JSON
        raise UserError(f"--constitution={path}: no principle in it; one per line is expected, as plain text")
    return principles


# -------------------------------------------------------------------------------------------------
# A policy on held-out rows


def exact_match(model, tok, problems, max_new_tokens):
    """([1.0 or 0.0], [bool]) per problem (messages, row): whether the greedy answer has the right
    number, and whether it ended within the limit."""
    conversations = [messages for messages, _ in problems]
    _, samples, texts = sample_completions(model, tok, conversations, max_new_tokens=max_new_tokens, temperature=0)
    right = [
        final_number(messages[-1]["content"], text, row | {"finished": sample.finished})
        for (messages, row), sample, text in zip(problems, samples, texts, strict=True)
    ]
    return right, [sample.finished for sample in samples]


def validate_policy(model, reference, tok, rewards, rows, config, kl_coef, penalty=0.0):
    """Means over completions of held-out rows, always drawn with the same random numbers.

    Returns ({"val_loss", "reward", "kl", "finished", "completion_tokens", ...}, a question and its
    completion). The ranks share --eval_prompts of the rows. reference: None for no "kl";
    penalty: taken from the reward of an unfinished completion; val_loss: kl_coef kl - reward."""
    rows = random_rows(rows, config.eval_prompts, config.seed)
    begin, end = 0, len(rows)
    if end >= world_size():  # else every rank answers all rows, with the same means
        begin, end = rank_span([1] * end, rank(), world_size())
    rows = rows[begin:end]
    n = config.group_size if "judge:" in config.reward + config.monitor else 1
    prompts, samples, texts = sample_completions(
        model,
        tok,
        [messages for messages, _ in rows],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        n=n,
        seed=config.seed,
        first=begin * n,
    )
    total, parts = score_completions(rewards, rows, samples, texts, penalty)
    sums = {"reward": total.sum()}
    if reference:
        chats = [make_completion(prompts[s.prompt_index], s.tokens, s.loss_mask) for s in samples]
        logp = logprobs_no_grad(model, chats, config.temperature, config.micro_batch_tokens)
        ref_logp = logprobs_no_grad(reference, chats, config.temperature, config.micro_batch_tokens)
        sums["kl"] = (logp - ref_logp).sum()
    sums["finished"] = sum(s.finished for s in samples)
    sums["completion_tokens"] = sum(len(s.tokens) for s in samples)
    if len(parts) > 1:
        sums |= {f"reward {name}": values.sum() for name, values in parts.items()}
    count, *totals = reduce_sum(len(samples), *sums.values())
    means = {name: x / count for name, x in zip(sums, totals, strict=True)}
    sample = f"{rows[0][0][-1]['content']}\n--- completion:\n{texts[0]}"
    return {"val_loss": kl_coef * means.get("kl", 0.0) - means["reward"], **means}, sample


def refuse_weak_reward_models(names, min_accuracy):
    """Raises UserError if a reward model of a --reward flag ordered fewer than this share of its
    held-out pairs right: what it rewards would be noise."""
    for name, _ in reward_names(names):
        if not is_model(name):
            continue
        metrics = checkpoint.read_info(checkpoint.find(name)).get("metrics", {})
        accuracy = metrics.get("figures", {}).get("accuracy", {}).get("value", metrics.get("accuracy"))
        if accuracy is None:
            print0(f"{name}: its accuracy is not recorded; evaluate.py --model={name} --pairs=... measures it")
        elif accuracy < min_accuracy:
            raise UserError(
                f"--reward={name}: it ordered {accuracy:.1%} of its held-out pairs right, less than "
                f"--min_accuracy={min_accuracy}; train it on more or better pairs"
            )


def first_critic(config, policy, tok):
    """(critic, its center): the reward model of --critic or of --reward (scaled by its weight), or
    else the policy's trunk under a head of zeros.

    The reward model gives at a completion's end the very score that the critic is to predict before
    it."""
    named = [("critic", config.critic, 1.0)] if config.critic else []
    for flag, name, weight in [*named, *(("reward", *reward) for reward in reward_names(config.reward))]:
        if is_model(name):
            critic = checkpoint.load_matching(name, policy, tok, f"--{flag}={name}", scalar_head=True)
            critic.score.data *= weight
            return critic, checkpoint.read_info(checkpoint.find(name)).get("center", 0.0) * weight
    critic = GPT(dataclasses.replace(policy.config, scalar_head=True))
    trunk = {name: p for name, p in policy.state_dict().items() if name != "untied_head"}
    critic.load_state_dict(trunk | {"score": torch.zeros(1, policy.config.width)})
    return critic.to(policy.embed.device), 0.0
