"""Sampling: next tokens drawn from the model through a cache of keys and values; and what is made of samples: answers to conversations, and their rewards.

    p(token) = softmax(logits / temperature), cut to the `top_k` likeliest or to the fewest that hold `top_p`; its log is what Sample.logprobs has

`rollout` is continuous batching: B slots, each writing one sample. Prompts of any length are read as one pack; samples of one prompt share that reading, its
keys are copied. Slots that finish are given to waiting samples, and where none wait the live ones close up, so that no step works for the dead. On CUDA
a step is one captured graph that holds the drawing too, and the CPU looks at what has finished every 16 steps only.

`stream` writes one text for a reader. `answers` and `load_rewards` are used by evaluate, reward, rlaif, ppo and grpo.
"""
import contextlib, dataclasses, importlib.util, signal, sys, traceback
from collections import deque
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
from common import UserError, rank, reduce_sum, world_size
from data import chat
from data.chat import learnt_logprobs
from data.pack import pack, share, split
from data.world import judge_prompt
from kernels._lib import use
from kernels.attention import WIDTHS
from kernels.linear import linear
from model import GPT, KVCache, score


@dataclasses.dataclass
class Sample:
    prompt_index: int
    tokens: list  # the new token ids, with the stop token if it came
    logprobs: list  # of each token, under the very distribution it was drawn from
    finished: bool  # ended by a stop token, not by `max_new` or the model's context


# ---------------------------------------------------------------------------------------------------------------------------------
# Drawing


def draw(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Draw one token a row. logits [B, V], u [B] uniform in [0, 1) -> (tokens int64 [B], logp fp32 [B] under the tempered, cut-off distribution).

    temperature 0 takes the likeliest token (logp 0: it was certain). top_k keeps the k likeliest; top_p the fewest tokens that hold that much
    probability (Holtzman et al. 2020, arXiv 1904.09751). The draw inverts the cumulative distribution, so a row depends on its own u alone.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True, stable=True)
        before = running_sum(ordered) - ordered  # probability of everything likelier
        logits = logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, (before >= top_p) & (before > 0)), -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    tokens = invert((logits - lse).exp_(), u)
    return tokens, logits.gather(1, tokens[:, None])[:, 0] - lse[:, 0]


def running_sum(x):
    """cumsum over the last dimension, in fp64 (fp32 on Apple's GPUs, which have no fp64), by products: CUDA's cumsum does not promise the same bits twice."""
    x = x if x.device.type == "mps" else x.double()
    width = int(x.shape[-1] ** 0.5) + 1
    blocks = F.pad(x, (0, -x.shape[-1] % width)).unflatten(-1, (-1, width))
    inside = blocks @ x.new_ones(width, width).triu()
    before = blocks.sum(-1) @ x.new_ones(blocks.shape[-2], blocks.shape[-2]).triu(1)
    return (inside + before[..., None]).flatten(-2)[..., : x.shape[-1]]


def invert(p, u):
    """The first token whose cumulative probability exceeds u: p fp32 [B, V], u [B] -> int64 [B]. In two levels, blocks and then tokens, for p is read once."""
    width = int(p.shape[-1] ** 0.5) + 1
    blocks = F.pad(p, (0, -p.shape[-1] % width)).unflatten(-1, (-1, width))  # [B, blocks, width]
    upto = running_sum(blocks.sum(-1, dtype=p.dtype if p.device.type == "mps" else torch.float64))
    target = u.to(upto.dtype) * upto[:, -1]
    block = (upto <= target[:, None]).sum(-1).clamp(max=upto.shape[1] - 1)
    inside = running_sum(blocks[torch.arange(len(p), device=p.device), block])  # [B, width]
    before = torch.where(block > 0, upto.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    rest = torch.minimum(target - before, inside[:, -1] * (1 - torch.finfo(upto.dtype).eps * 4))  # a rounding must not carry it past the block's last token
    return block * width + (inside <= rest[:, None]).sum(-1)


def logits_of(model, hidden):
    """fp32 [B, V]. On CUDA bf16 is multiplied and fp32 comes out, as in the head that trains."""
    if hidden.is_cuda:
        return torch.mm(hidden, model.head.T.to(hidden.dtype), out_dtype=torch.float32)
    return linear(hidden, model.head)


def sampling_weights(model):
    """The model with its matrices in the dtype it computes in: the numbers `linear` makes of them at every use, made once. A step is as fast as weights are read."""
    if model.compute_dtype == model.embed.dtype:
        return model
    with torch.device("meta"):
        lean = GPT(model.config)
    lean.load_state_dict({name: p.to(model.compute_dtype) if p.dim() > 1 else p for name, p in model.state_dict().items()}, assign=True)
    lean.cos, lean.sin = model.cos, model.sin
    return lean.eval()


def rooms(model, prompts, max_new):
    """The tokens that each prompt leaves for its sample, at most `max_new`. UserError where one leaves none."""
    longest = max(map(len, prompts), default=0)
    if longest >= model.config.context:
        raise UserError(f"a prompt of {longest} tokens fills the model's context of {model.config.context}; leave it out of the data")
    return [min(max_new, model.config.context - len(p)) for p in prompts]


def affordable_slots(model, length):
    """How many slots of `length` tokens fit into half of a GPU's free memory, at least one. On a CPU any number."""
    if not model.embed.is_cuda:
        return 2**31
    c = model.config
    return max(1, torch.cuda.mem_get_info(model.embed.device)[0] // 2 // (2 * c.layers * length * c.kv_heads * c.head_dim * 2))


@torch.no_grad()
def rollout(model, prompts, *, max_new, n=1, temperature=1.0, top_k=0, top_p=1.0, stop=(), seed=0, slots=128, first=0):
    """Sample `n` continuations of every prompt -> list of Sample, ordered by prompt and then by sample.

    prompts: lists of token ids, each of at least one; stop: ids that end a sample. A sample has at most `max_new` tokens, or as many as its prompt leaves
    in the model's context. The same seed gives the same samples whatever `slots`: sample j's t-th draw uses the t-th number of its own stream, that of
    (seed, first + j); `first` lets ranks share the prompts. UserError where a prompt leaves no room.
    """
    if not prompts:
        return []
    room = rooms(model, prompts, max_new)
    model.eval()
    model, device = sampling_weights(model), model.embed.device
    jobs = [i for i in range(len(prompts)) for _ in range(n)]
    longest = max(len(p) + r for p, r in zip(prompts, room))
    J, B = len(jobs), min(slots, len(jobs), affordable_slots(model, longest))
    # One row a sample, and a last one for whatever dead slots draw.
    u = torch.from_numpy(np.stack([np.random.default_rng([seed, first + j]).random(max_new, dtype=np.float32) for j in range(J)] + [np.zeros(max_new, dtype=np.float32)])).to(device)
    tokens, logps = torch.zeros(J + 1, max_new, dtype=torch.int64, device=device), torch.zeros(J + 1, max_new, device=device)
    limit = torch.tensor([room[i] for i in jobs] + [max_new], device=device)
    is_stop = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
    is_stop[list(stop)] = True
    # One entry a slot: the row of the sample it writes, how many tokens that has, the last of them, and whether it goes on.
    row, drawn, last = (torch.zeros(B, dtype=torch.int64, device=device) for _ in range(3))
    alive = torch.zeros(B, dtype=torch.bool, device=device)
    cache = KVCache(model, B, longest)
    waiting, job_of, starts = deque(range(J)), [None] * B, {}  # starts: what the model has after each prompt

    def draw_next(hidden, at):
        """Draw a token for each of the slots `at`, which may be some that have finished, from what the model has after their last."""
        mine, t = torch.where(alive[at], row[at], J), drawn[at].clamp(max=max_new - 1)
        token, logp = draw(logits_of(model, hidden), u[mine, t], temperature, top_k, top_p)
        tokens[mine, t], logps[mine, t] = token, logp
        drawn[at] += alive[at]
        last[at] = token
        alive[at] &= ~is_stop[token] & (drawn[at] < limit[mine])

    def admit(free):
        """Give the slots `free` to the next samples. Their prompts are read, unless a live slot has done so: then its keys are copied."""
        taken = [(slot, waiting.popleft()) for slot, _ in zip(free, range(len(waiting)))]
        reader = {jobs[j]: slot for slot, j in enumerate(job_of) if j is not None}  # the slot that has a prompt's keys
        read = {jobs[j]: slot for slot, j in reversed(taken) if jobs[j] not in reader}  # reversed: the first of a prompt's slots
        index = lambda some: torch.tensor(list(some), dtype=torch.int64, device=device)  # noqa: E731
        for begin, end in split([len(prompts[i]) for i in read], 16384):
            here = list(read)[begin:end]
            p = pack([prompts[i] for i in here]).to(device)
            hidden = model.forward(p, cache, index(read[i] for i in here))[p.cu[1:].long() - 1]  # `forward`: a model compiled for training would be compiled anew
            starts.update(zip(here, hidden))
        copies = [(slot, (reader | read)[jobs[j]], jobs[j]) for slot, j in taken if read.get(jobs[j]) != slot]
        if copies:
            to, source, of = zip(*copies)
            cache.copy(index(source), index(to), index(len(prompts[i]) for i in of), max(len(prompts[i]) for i in of))
        for slot, j in taken:
            job_of[slot] = j
        at = index(slot for slot, _ in taken)
        row[at], drawn[at], alive[at] = index(j for _, j in taken), 0, True
        draw_next(torch.stack([starts[jobs[j]] for _, j in taken]), at)

    def close_up(live):
        """Move the last live slots into the holes before them, so that the live ones are the first len(live)."""
        holes = [slot for slot in range(len(live)) if job_of[slot] is None]
        if holes:
            moved = live[-len(holes) :]
            source, to = torch.tensor(moved, device=device), torch.tensor(holes, device=device)
            most = max(len(prompts[jobs[job_of[slot]]]) for slot in moved) + max_new
            cache.copy(source, to, cache.lengths[source], min(most, longest))
            for state in (row, drawn, last, alive):
                state[to] = state[source]
            alive[source] = False
            for a, b in zip(moved, holes):
                job_of[b], job_of[a] = job_of[a], None

    def step(B):
        draw_next(model.step(last[:B], cache.first(B)), slice(0, B))
        cache.lengths[:B] *= alive[:B]  # a dead slot stays short, and cheap

    # The references of these ops ask for the longest length, which no graph can hold; they stand in where a kernel is off or a head has an odd width.
    captured = device.type == "cuda" and model.config.head_dim in WIDTHS and use("decode_attention", cache.k) and use("append_rope", cache.k)
    width, graph = 0, None  # slots that a step works on, and the graph that does it
    while True:
        going = alive.tolist()
        for slot, j in enumerate(job_of):
            if j is not None and not going[slot]:
                job_of[slot] = None
        live = [slot for slot in range(B) if job_of[slot] is not None]
        if waiting and (not live or B - len(live) >= max(1, B // 8)):  # a few at a time, for reading one short prompt is hardly faster than reading ten
            admit([slot for slot in range(B) if job_of[slot] is None])
            continue
        if not live:
            break
        if not captured:
            close_up(live)
            step(len(live))
            continue
        if not width or len(live) <= width // 2 or max(live) >= width:
            close_up(live)
            width = len(live) if not waiting else B
            step(width)  # by hand, which compiles what is then captured
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step(width)
        for _ in range(16):
            graph.replay()
    if not logps.isfinite().all():
        raise UserError("the log-probabilities of what was sampled are not finite: the model's weights are damaged. " + checkpoint.ADVICE)
    ids, logprobs = tokens.tolist(), logps.tolist()
    samples = []
    for j, i in enumerate(jobs):
        end = next((t + 1 for t, token in enumerate(ids[j][: room[i]]) if token in stop), room[i])
        samples.append(Sample(i, ids[j][:end], logprobs[j][:end], ids[j][end - 1] in stop))
    return samples


@torch.no_grad()
def stream(model, prompt, *, max_new, temperature=1.0, top_k=0, top_p=1.0, stop=(), seed=0):
    """Yield the ids of one continuation as they are drawn, a stop token last. Past the model's context it goes on from the last half of it."""
    model.eval()
    device, context = model.embed.device, model.config.context
    generator = torch.Generator().manual_seed(seed)
    text, cache = list(prompt)[-context:], None
    for _ in range(max_new):
        if cache is None or cache.lengths[0] == context:
            text = text if cache is None and len(text) < context else text[-(context // 2) :]
            cache = KVCache(model, 1, context)
            hidden = model.forward(pack([text]).to(device), cache, torch.zeros(1, dtype=torch.int64, device=device))[-1:]
        else:
            hidden = model.step(torch.tensor(text[-1:], device=device), cache)
        token, _ = draw(logits_of(model, hidden), torch.rand(1, generator=generator).to(device), temperature, top_k, top_p)
        text.append(int(token))
        yield text[-1]
        if text[-1] in stop:
            return


# ---------------------------------------------------------------------------------------------------------------------------------
# Answers to conversations


def answers(model, tok, conversations, *, max_new, temperature=1.0, n=1, seed=0, slots=128, first=0):
    """Sample `n` answers to each conversation (lists of messages) -> (prompts, samples, texts): token ids, Samples, and what they say."""
    prompts = [chat.encode_prompt(tok, messages) for messages in conversations]
    samples = rollout(model, prompts, max_new=max_new, n=n, temperature=temperature, stop={chat.end_of_turn(tok)}, seed=seed, slots=slots, first=first)
    return prompts, samples, [chat.decode_answer(tok, s.tokens) for s in samples]


# ---------------------------------------------------------------------------------------------------------------------------------
# Rewards of answers. Each is function(conversations, rows, samples, texts) -> float64 [n], with sample i answering conversation i, whose data row is rows[i].


def packs(documents, micro_tokens):
    """Packs of at most `micro_tokens` tokens of the given token lists, in order."""
    for first, last in split([len(d) for d in documents], micro_tokens):
        yield pack(documents[first:last])


@torch.no_grad()
def scores(model, documents, micro_tokens, center=0.0):
    """float64 [D]: the reward model's score at the last token of each document (token ids), less `center`. UserError where it cannot read one whole."""
    longest = max(map(len, documents))
    if longest > model.config.context:
        raise UserError(f"a conversation of {longest} tokens exceeds the reward model's context of {model.config.context}")
    return finite(torch.cat([score(model, p.to(model.embed.device)) for p in packs(documents, micro_tokens)]), "reward model's scores") - center


def finite(found, what):
    """float64 [n] of a tensor on any device; UserError where one is not finite, which in a comparison would pass for a tie."""
    if not found.isfinite().all():
        raise UserError(f"the {what} are not finite: its weights are damaged; take another checkpoint")
    return found.cpu().double().numpy()


@torch.no_grad()
def prefer_first(model, tok, prompts, micro_tokens):
    """float64 [n]: the probability of " A" against " B" after each judge prompt."""
    labels = [tok.encode_ordinary(text) for text in (" A", " B")]
    if any(len(ids) != 1 for ids in labels):
        raise UserError('" A" and " B" are not single tokens of this tokenizer, so it cannot be a judge')
    head = model.head[[ids[0] for ids in labels]].float()
    documents = [[tok.eot, *tok.encode_ordinary(text)] for text in prompts]
    longest = max(map(len, documents))
    if longest > model.config.context:
        raise UserError(f"a judge prompt of {longest} tokens exceeds the model's context of {model.config.context}")
    hidden = torch.cat([model(p.to(model.embed.device))[p.cu[1:].long() - 1] for p in packs(documents, micro_tokens)])
    return finite(torch.softmax(hidden.float() @ head.T, dim=-1)[:, 0], "judge's probabilities")


def judge_score(model, tok, triples, principle, micro_tokens):
    """float64 [n, 2]: the probability that the first of two replies is the better by a principle, asked in this order and in the other. triples: (prompt, reply, reply)."""
    asked = [judge_prompt(p, a, b, principle) for p, a, b in triples] + [judge_prompt(p, b, a, principle) for p, a, b in triples]
    forward, backward = np.split(prefer_first(model, tok, asked, micro_tokens), 2)
    return np.stack([forward, 1 - backward], axis=1)


def read_constitution(path):
    """The principles of a constitution: a text file with one a line; empty lines and those that begin with # are left out."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--constitution={path}: {e}") from None
    principles = [line for line in lines if line and not line.startswith("#")]
    if not principles:
        raise UserError(f"--constitution={path}: no principle in it; one a line is expected")
    return principles


def question(messages):
    """What a reward or a judge is shown as the prompt: the user's text where that is all, else the messages."""
    return messages[-1]["content"] if len(messages) == 1 else messages


def transcript(messages):
    """A conversation as one text."""
    return messages[-1]["content"] if len(messages) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in messages)


def reward_names(text):
    """[(name, weight)] of a --reward flag. UserError where a weight is none."""
    found = []
    for piece in filter(None, text.split(",")):
        name, star, weight = piece.rpartition("*")
        try:
            found.append((name, float(weight)) if star else (piece, 1.0))
        except ValueError:
            raise UserError(f"--reward={piece}: {weight!r} is no weight; NAME*0.5 is one") from None
    return found


def is_model(name):
    """True for a reward that is a reward model's directory, neither a function nor a judge."""
    return not name.startswith("judge:") and not name.rpartition(":")[0].endswith(".py")


def load_rewards(names, device, micro_tokens, constitution="", timeout=60.0, monitor=""):
    """The rewards of a command line -> [(name, weight, function)].

    names: comma-separated, each with or without *WEIGHT: FILE.py:FUNCTION, a reward model's directory, or judge:DIR with a constitution's principles.
    timeout: seconds that a FUNCTION may take over one answer. monitor: further ones, to look at, that weigh 0.
    """
    found, known = [], set()
    for name, weight, counts in [*((*pair, True) for pair in reward_names(names)), *((*pair, False) for pair in reward_names(monitor))]:
        if name in known and counts:
            raise UserError(f"--reward={names}: {name} is there twice; give it one weight")
        if name in known:  # what is maximised is seen anyway
            continue
        known.add(name)
        file, colon, function = name.rpartition(":")
        if name.startswith("judge:"):
            reward = judge_reward(name, device, micro_tokens, constitution)
        elif colon and file.endswith(".py"):
            reward = function_reward(name, load_function(file, function), timeout)
        else:
            reward = model_reward(name, device, micro_tokens)
        found.append((name, weight if counts else 0.0, reward))
    return found


def reward_hashes(names, constitution=""):
    """{name: SHA-256} of what the rewards of a command line are made of, so that a run goes on with those it began with."""
    found = {constitution: checkpoint.sha256(constitution)} if constitution else {}
    for name, _ in reward_names(names):
        file, colon, function = name.rpartition(":")
        found[name] = checkpoint.sha256(file) if colon and file.endswith(".py") else checkpoint.fingerprint(checkpoint.find(name.removeprefix("judge:")))
    return found


def reward_shapes(names):
    """{name: GPTConfig} of the reward models and judges of a command line."""
    models = {name.removeprefix("judge:") for name, _ in reward_names(names) if is_model(name) or name.startswith("judge:")}
    return {name: checkpoint.config_from_hf(checkpoint.find(name) / "config.json") for name in sorted(models)}


def reward_answers(rewards, rows, samples, texts):
    """(weighted sum float64 [n], {name: float64 [n]}) of what `load_rewards` gave, for samples that answer the rows (messages, row) of their prompt_index."""
    if not samples:  # a rank's share may be empty
        return np.zeros(0), {name: np.zeros(0) for name, _, _ in rewards}
    asked = [rows[s.prompt_index] for s in samples]
    parts = {name: function([messages for messages, _ in asked], [row for _, row in asked], samples, texts) for name, _, function in rewards}
    return sum((weight * parts[name] for name, weight, _ in rewards), np.zeros(len(samples))), parts


SAID = set()  # the rewards that have been said to reach less far than what they are to read


def say_once(name, text):
    """Print a warning about a reward, the first time only: it would come at every step."""
    if name not in SAID:
        SAID.add(name)
        print(f"warning: {name}: {text} (said once)", flush=True)


def function_reward(name, function, timeout):
    def reward(conversations, rows, samples, texts):
        values = np.zeros(len(samples))
        for i, (messages, row, sample, text) in enumerate(zip(conversations, rows, samples, texts)):
            try:
                with time_limit(timeout):
                    values[i] = function(question(messages), text, row | {"finished": sample.finished})
            except Exception as e:
                where = traceback.extract_tb(e.__traceback__)[-1]
                raise UserError(f"--reward={name}: {type(e).__name__}: {e} ({where.filename}:{where.lineno}), for the completion {text[:200]!r} and the row {str(row)[:200]}") from None
            if not np.isfinite(values[i]):
                raise UserError(f"--reward={name}: {values[i]} for the completion {text[:200]!r}; a finite number was expected")
        return values

    return reward


def model_reward(name, device, micro_tokens):
    model, tok, info = checkpoint.load(name, device)
    if not model.config.scalar_head:
        raise UserError(f"--reward={name}: not a reward model (it has no scalar head); reward.py trains one")
    model.eval()

    def reward(conversations, rows, samples, texts):  # an unfinished answer is scored as it stands: it has no end-of-turn token to read at
        documents = [chat.encode_prompt(tok, m) + (chat.encode_answer(tok, t) if s.finished else tok.encode_ordinary(t)) for m, t, s in zip(conversations, texts, samples)]
        long = sum(len(d) > model.config.context for d in documents)
        if long:
            say_once(name, f"{long} of {len(documents)} conversations exceed its context of {model.config.context} tokens; it reads their ends")
        documents = [d[-model.config.context :] for d in documents]
        return scores(model, documents, micro_tokens, info.get("center", 0.0))

    return reward


def judge_reward(name, device, micro_tokens, constitution):
    """How often an answer is better than the next one to the same prompt, by the judge's own probability, over both orders and all principles (Lee et al. 2023, arXiv 2309.00267)."""
    if not constitution:
        raise UserError(f"--reward={name}: a judge needs principles, one a line of a file: --constitution=data/constitution.txt")
    principles = read_constitution(constitution)
    model, tok, _ = checkpoint.load(name.removeprefix("judge:"), device)
    if model.config.scalar_head:
        raise UserError(f"--reward={name}: a reward model, which says nothing; without judge: it is a reward itself")
    model.eval()

    def reward(conversations, rows, samples, texts):
        group = {}
        for i, s in enumerate(samples):
            group.setdefault(s.prompt_index, []).append(i)
        if any(len(own) < 2 for own in group.values()):
            raise UserError(f"--reward={name}: a judge compares the answers to one prompt, so there must be at least two of them (--group=2)")
        opponent = {i: own[(k + 1) % len(own)] for own in group.values() for k, i in enumerate(own)}
        triples = [(transcript(m), texts[i], texts[opponent[i]]) for i, m in enumerate(conversations)]
        room = model.config.context - 1 - max(len(tok.encode_ordinary(principle)) for principle in principles)
        fits = np.array([len(tok.encode_ordinary(judge_prompt(*triple, ""))) + 8 <= room for triple in triples])
        if not fits.all():
            say_once(name, f"{(~fits).sum()} of {len(triples)} comparisons exceed its context of {model.config.context} tokens and count as ties")
        found = np.full(len(triples), 0.5)
        if fits.any():
            asked = [triple for triple, fit in zip(triples, fits) if fit]
            found[fits] = np.mean([judge_score(model, tok, asked, principle, micro_tokens).mean(1) for principle in principles], axis=0)
        return found

    return reward


@contextlib.contextmanager
def time_limit(seconds):
    """TimeoutError if what is done within takes longer, even if it catches that. By a signal, so in the main thread and on POSIX only; elsewhere there is no limit."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    late, came, over = TimeoutError(f"took longer than {seconds:g} seconds"), False, False

    def expired(number, frame):
        nonlocal came
        came = True
        if not over:  # nothing may come between the end and switching this off
            raise late

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again and again, for what catches the first may go on
    try:
        yield
    finally:
        over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if came:
        raise late


def load_function(file, name):
    """A function of a Python file, which is run: the user's own code, with all the user's rights. UserError where there is none."""
    if not Path(file).is_file():
        raise UserError(f"--reward={file}:{name}: {file} does not exist")
    path = Path(file).resolve()
    if str(path) not in sys.modules:  # two functions of one file share it; and what lies beside it can be imported
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = sys.modules[str(path)] = importlib.util.module_from_spec(spec)
        sys.path.append(str(path.parent))
        try:
            spec.loader.exec_module(module)
        except Exception as e:
            del sys.modules[str(path)]
            raise UserError(f"--reward={file}:{name}: {file} cannot be imported ({type(e).__name__}: {e})") from None
    module = sys.modules[str(path)]
    if not callable(vars(module).get(name)):
        raise UserError(f"--reward={file}:{name}: {file} has no function {name}")
    return vars(module)[name]


# ---------------------------------------------------------------------------------------------------------------------------------
# What ppo.py and grpo.py ask of every policy


def check_one_distribution(model, chats, samples, logp, ref_logp, temperature, micro_tokens, repeat):
    """What is sampled from must be what is differentiated. -> mean |log p by the sampler - by the trainer| over the samples of all ranks.

    logp [M]: the trainer's, of the samples' tokens in `chats`; ref_logp [M]: the same, where the policy still is its own reference, else None. UserError
    where they differ from the reference's (KL != 0), where sampler and trainer lie further apart than rounding explains, or, with `repeat`, where the
    same pack does not give the same log-probabilities in training (ratio != 1 before the first update).
    """
    n = next((last for _, last in split([len(c.ids) for c in chats], micro_tokens)), 0) if repeat else 0
    model.train()
    again = learnt_logprobs(model, chats[:n], temperature).detach() if n else logp[:0]
    sampled = torch.tensor([x for s in samples for x in s.logprobs], device=logp.device)
    apart, gap = not torch.equal(again, logp[: len(again)]), (sampled - logp).abs().sum()
    gap, tokens, apart, not_zero = reduce_sum(gap, len(logp), apart, ref_logp is not None and not torch.equal(logp, ref_logp))
    bound = 1e-5 if model.compute_dtype == torch.float32 else 1e-2
    if apart:
        raise UserError("the same tokens had another probability in training than before the first update (ratio != 1): is there dropout, or an op that does not repeat itself?")
    if not_zero:
        raise UserError("policy and reference are the same checkpoint, yet their log-probabilities differ (KL != 0 before the first update)")
    gap /= max(1, tokens)
    if gap > bound:
        raise UserError(f"sampler and trainer disagree: mean |log p difference| {gap:.2e}, at most {bound:.0e} is rounding; what is learnt would not be what was sampled")
    return gap


def validate(model, reference, tok, rewards, rows, config, beta, penalty=0.0):
    """({"val_loss", "reward", "kl", "finished", "answer_tokens", ...}, an answer) to held-out rows, always with the same random numbers; the ranks share them.

    penalty: taken from the reward of an answer without an end. reference: None where there is none, and no "kl" then. val_loss: beta kl - reward.
    """
    begin, end = share([1] * len(rows), rank(), world_size()) if len(rows) >= world_size() else (0, len(rows))  # a few are answered by every rank: the means stay
    n = config.group if "judge:" in config.reward + config.monitor else 1
    prompts, samples, texts = answers(model, tok, [m for m, _ in rows[begin:end]], n=n, max_new=config.max_new, temperature=config.temperature, seed=config.seed, first=begin * n)
    score, parts = reward_answers(rewards, rows[begin:end], samples, texts)
    chats = [chat.answered(prompts[s.prompt_index], s.tokens) for s in samples]
    logp, ref_logp = (chat.constant_logprobs(m, chats, config.temperature, config.micro_tokens) if reference else torch.zeros(1) for m in (model, reference))
    score = score - penalty * np.array([not s.finished for s in samples])
    sums = reduce_sum(len(samples), score.sum(), (logp - ref_logp).sum(), sum(s.finished for s in samples), sum(len(s.tokens) for s in samples), *(v.sum() for v in parts.values()))
    reward, kl, finished, tokens, *others = (x / sums[0] for x in sums[1:])
    named = {f"reward {name}": value for name, value in zip(parts, others)} if len(parts) > 1 else {}
    held = {"kl": kl} if reference else {}
    return {"val_loss": beta * kl - reward, "reward": reward, **held, "finished": finished, "answer_tokens": tokens, **named}, texts[0]
