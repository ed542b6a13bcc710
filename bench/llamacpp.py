"""Does llama.cpp read what export.py writes? The same ids for fuzzed strings, and the same greedy
text after each of `prompts` prompts.

llama-cpp-python builds llama.cpp in minutes, in an environment of its own:

    python -m venv /tmp/llama; /tmp/llama/bin/pip install llama-cpp-python
    python -m bench.llamacpp --model=out/quickstart/sft --python=/tmp/llama/bin/python

A greedy text may part where two tokens are within rounding of each other: at such a place both
log-probabilities are printed, and within 1e-3 of each other it counts as the same.
"""

import json
import random
import subprocess
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import export
from data import chat
from data.pack import make_completion
from model import completion_logprobs
from rollout import rollout
from runtime import checkpoint
from runtime.errors import UserError
from runtime.process import launch


@dataclass
class Config:
    # a run, a checkpoint or a downloaded directory
    model: str
    # the Python that has llama_cpp
    python: str
    # strings whose ids are compared
    strings: int = 3000
    # prompts that are continued
    prompts: int = 100
    # longest continuation
    max_new_tokens: int = 60
    # of strings and prompts
    seed: int = 0


# Runs under --python: reads {"gguf", "strings", "prompts", ...}, writes the ids of each.
OTHER_SIDE = """
import json, sys
import llama_cpp
job = json.load(open(sys.argv[1]))
model = llama_cpp.Llama(job["gguf"], n_ctx=job["context"], n_threads=1, n_batch=512, logits_all=False, verbose=False)
ids = [model.tokenize(s.encode("utf-8"), add_bos=False, special=False) for s in job["strings"]]
bos = model.tokenize(b"", add_bos=True, special=False)
stops = set(job["stops"])
texts = []
for prompt in job["prompts"]:
    model.reset()
    found = []
    for token in model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
        found.append(token)
        if token in stops or len(found) >= job["max_new_tokens"]:
            break
    texts.append(found)
meta = {name: model.metadata.get(name) for name in ("tokenizer.ggml.pre", "tokenizer.ggml.eos_token_id")}
json.dump({"ids": ids, "bos": bos, "texts": texts, "meta": meta}, open(sys.argv[2], "w"))
"""


def fuzzed(n, seed):
    """Strings of every kind: characters of all planes, words, code, white space, numbers."""
    draw, source = random.Random(seed), Path(__file__).read_text(encoding="utf-8")
    pieces = ["😀", "👩‍👩‍👧", "🇩🇪", "é", "e\u0301", "ß", "日本", "ﷺ", "\u200d", "\ufeff", "หน้า", "हिन्दी", "ⅷ", "²"]
    pieces += [" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", " \n ", "\x85", "\u2028"]
    pieces += ["don't", "I'LL", "'Ve", "12345", "3.14", "x_1", "HTTPServer", "<|", "|>", "--", "...", "    return"]
    pieces += ["<|im_end|>", "<|endoftext|>", "<think>"]
    strings = []
    for _ in range(n):
        parts = []
        for _ in range(draw.randrange(1, 12)):
            kind = draw.randrange(4)
            if kind == 0:
                parts.append(chr(draw.choice([draw.randrange(0x20, 0xD800), draw.randrange(0xE000, 0x30000)])))
            elif kind == 1:
                begin = draw.randrange(len(source) - 20)
                parts.append(source[begin : begin + draw.randrange(20)])
            else:
                parts.append(draw.choice(pieces))
        strings.append("".join(parts))
    return strings


def prompts_of(config, tok, has_turns):
    """Ids of prompts: questions to a chat model, beginnings of texts to a base model."""
    draw = random.Random(config.seed)
    words = "the a of and old map red door what is how many two plus three tell me about why stone river 5 7".split()
    texts = [" ".join(draw.choices(words, k=draw.randrange(2, 9))) for _ in range(config.prompts)]
    if has_turns:
        return [chat.encode_prompt(tok, [{"role": "user", "content": text}]) for text in texts]
    return [[tok.bos, *tok.encode_ordinary(text)] for text in texts]


def gap_where_they_part(model, prompt, ours, theirs):
    """|log p| difference of the two tokens at the first place where two continuations differ."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
    if at is None:
        return 99.0  # one is longer: it stopped elsewhere
    both = [make_completion([*prompt, *ours[:at]], [token]) for token in (ours[at], theirs[at])]
    a, b = completion_logprobs(model, both).tolist()
    return abs(a - b)


def main(config):
    folder = checkpoint.find(config.model)
    model, tok, info = checkpoint.read(folder)
    model.eval()
    stops = export.stop_ids(tok, info)
    prompts = prompts_of(config, tok, chat.is_chat_model(tok, info))
    strings = fuzzed(config.strings, config.seed)
    if tok.nfc:  # export.py says so: llama.cpp does not normalise
        strings = [unicodedata.normalize("NFC", s) for s in strings]
    ours = rollout(model, prompts, max_new_tokens=config.max_new_tokens, temperature=0, stop=set(stops))
    with tempfile.TemporaryDirectory() as where:
        gguf, job, result = (str(Path(where) / name) for name in ("model.gguf", "job.json", "result.json"))
        export.main(export.Config(model=str(folder), gguf=gguf, dtype="f32"))
        work = {"gguf": gguf, "strings": strings, "prompts": prompts, "stops": stops}
        work |= {"context": model.config.context, "max_new_tokens": config.max_new_tokens}
        Path(job).write_text(json.dumps(work))
        done = subprocess.run([config.python, "-c", OTHER_SIDE, job, result], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"--python={config.python}: {done.stderr.strip()[-500:]}")
        found = json.loads(Path(result).read_text())
    wrong = [s for s, ids in zip(strings, found["ids"], strict=True) if tok.encode_ordinary(s) != ids]
    print(f"{len(strings) - len(wrong):,} of {len(strings):,} strings have the same ids; {found['meta']}")
    for text in wrong[:5]:
        print(f"  differs: {text!r}")
    same, near = 0, 0
    for prompt, sample, theirs in zip(prompts, ours, found["texts"], strict=True):
        if sample.tokens == theirs:
            same += 1
        else:
            gap = gap_where_they_part(model, prompt, sample.tokens, theirs)
            near += gap < 1e-3
            print(f"  parts where the two log-probabilities differ by {gap:.1e}: {tok.decode(theirs)!r}")
    tokens = sum(len(s.tokens) for s in ours)
    print(f"{same} of {len(prompts)} greedy texts are the same ({tokens} tokens), {near} part within rounding")
    if wrong or same + near < len(prompts):
        raise UserError("llama.cpp gives other ids or texts")


if __name__ == "__main__":
    launch(main, Config)
