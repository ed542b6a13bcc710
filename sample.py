"""Talk to any checkpoint: streams a continuation of a prompt, or, from a model that sft.py taught turns, the answer to it.

    p(token) ~ exp(logit / temperature), cut to the likeliest tokens that hold top_p of the probability

    python sample.py --model=out/shakespeare --prompt="ROMEO:" --max_new=300 --temperature=0.8
"""
import codecs
from dataclasses import dataclass

import checkpoint
from common import UserError, check, launch, setup
from data import chat
from rollout import stream


@dataclass
class Config:
    model: str  # a run, a checkpoint, or a downloaded Llama/Qwen2/Qwen3 directory
    prompt: str = ""  # text to continue; "": begin a document
    seed: int = 0  # the same seed gives the same text
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int = 0  # draw from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # draw from the fewest tokens that hold this much probability
    max_new: int = 200  # at most so many tokens
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


def main(config):
    good = {"temperature": config.temperature >= 0, "top_k": config.top_k >= 0, "top_p": 0 < config.top_p <= 1, "max_new": config.max_new > 0}
    check(config, good)
    device = setup(config.device, config.seed)
    model, tok, info = checkpoint.load(config.model, device)
    if model.config.scalar_head:
        raise UserError(f"--model={config.model}: a reward model, which writes nothing; evaluate.py measures it")
    talks = info.get("stage", "pretrain") != "pretrain" and config.prompt
    prompt = chat.encode_prompt(tok, [{"role": "user", "content": config.prompt}]) if talks else [tok.eot, *tok.encode_ordinary(config.prompt)]
    stop = {tok.eot, chat.end_of_turn(tok)} if talks else {tok.eot}
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be spread over several tokens
    print("" if talks else config.prompt, end="", flush=True)
    how = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed)
    for token in stream(model, prompt, max_new=config.max_new, stop=stop, **how):
        if token not in stop:
            print(utf8.decode(tok.decode_single_token_bytes(token)), end="", flush=True)
    print(utf8.decode(b"", final=True))


if __name__ == "__main__":
    launch(main, Config)
