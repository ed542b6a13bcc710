r"""Talk to any checkpoint: streams a continuation of a prompt, or, from a model that sft.py taught turns, its answers in a chat.

    p(token) ~ exp(logit / temperature), cut to the likeliest tokens that hold top_p of the probability

    python sample.py --model=out/shakespeare --prompt="ROMEO:" --max_new=300 --temperature=0.8
    python sample.py --model=out/dpo --system="Be brief."                                   # a chat, for there is no --prompt
    printf 'What is 2 + 3?\n/retry\n' | python sample.py --model=out/dpo > answers.txt      # the same from a file or a pipe

In a chat:

    /undo                take back the last exchange
    /retry               draw another answer to the last message
    /system TEXT         set the system message; it stands before the whole conversation from the next answer on; alone: none
    /compare CHECKPOINT  have another model answer too, by its own answers from then on; alone: no more
    /save FILE           append the conversation with --model to a JSONL file that sft.py reads
    /help                this list
    /quit                leave, as Ctrl-D does

Ctrl-C stops the answer being written, which stays as it stands; where a message is due it leaves. Answers go to stdout and nothing else does; what is said
about the chat goes to stderr.
"""
import codecs, contextlib, json, os, sys
from dataclasses import dataclass

import checkpoint
from common import UserError, check, launch, setup
from data import chat
from rollout import stream


@dataclass
class Config:
    model: str  # a run, a checkpoint, or a downloaded Llama/Qwen2/Qwen3 directory
    prompt: str = ""  # text to continue or to answer; "": chat if the model has learnt turns, else begin a document
    system: str = ""  # the system message, for a model that has learnt turns
    seed: int = 0  # the same seed gives the same text; in a chat each answer adds 1 to it
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int = 0  # draw from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # draw from the fewest tokens that hold this much probability
    max_new: int = 200  # at most so many tokens
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


def notice(text):
    print(text, file=sys.stderr, flush=True)


def load(where, device):
    """(model, tokenizer, whether it has learnt turns) of a checkpoint that writes."""
    model, tok, info = checkpoint.load(os.path.expanduser(where), device)
    if model.config.scalar_head:
        raise UserError(f"{where}: a reward model, which writes nothing; evaluate.py measures it")
    return model, tok, info.get("stage", "pretrain") != "pretrain"


def write(config, model, tok, prompt, tokens, *, max_new, stop, hidden, seed):
    """Stream what follows `prompt` to stdout, and its ids into the list `tokens`: they are there even when Ctrl-C ends it. hidden: ids not shown."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be spread over several tokens
    how = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    for token in stream(model, prompt, max_new=max_new, stop=stop, seed=seed, **how):
        tokens.append(token)
        if token not in hidden:
            print(utf8.decode(tok.decode_single_token_bytes(token)), end="", flush=True)
    print(utf8.decode(b"", final=True), flush=True)


# ---------------------------------------------------------------------------------------------------------------------------------
# A chat: a system message and exchanges [(question, [the answer of --model, that of the model compared with it])]


def conversation(system, exchanges, speaker=0):
    """The messages as a speaker knows them: with its own answers, and those of --model from before it joined."""
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for question, answers in exchanges:
        messages += [{"role": "user", "content": question}, *({"role": "assistant", "content": said} for said in answers[: speaker + 1][-1:])]
    return messages


def fit(tok, context, max_new, system, exchanges, speaker=0):
    """(the ids of a prompt that leaves room for an answer, how many of the oldest exchanges it lacks for that). The system message always stays.

    Room is --max_new, but at most half the context: a long answer may be cut, but must not push out the whole conversation.
    """
    for left_out in range(len(exchanges)):
        ids = chat.encode_prompt(tok, conversation(system, exchanges[left_out:], speaker))
        if len(ids) + min(max_new, context // 2) <= context:
            break
    if len(ids) >= context:
        raise UserError(f"this message takes {len(ids)} tokens with what frames it, the model's context holds {context}; shorten it or the system message")
    return ids, left_out


def reply(config, speakers, system, exchanges, seed, told):
    """Stream each speaker's answer to the last of `exchanges` -> their texts. told: the names of those whose context has been said to be full."""
    prompts = [fit(tok, model.config.context, config.max_new, system, exchanges, i) for i, (_, model, tok) in enumerate(speakers)]
    answers = []
    for (name, model, tok), (prompt, left_out) in zip(speakers, prompts):
        if left_out and name not in told:
            notice(f"(the context of {name}, {model.config.context} tokens, cannot hold all this: the oldest exchanges are left out from here on)")
            told.add(name)
        stop, tokens, room = {tok.eot, chat.end_of_turn(tok)}, [], model.config.context - len(prompt)
        try:
            print(f"[{name}] " if len(speakers) > 1 else "", end="", flush=True)
            write(config, model, tok, prompt, tokens, max_new=min(config.max_new, room), stop=stop, hidden=tok._special_tokens.values(), seed=seed)
            if tokens[-1] not in stop:
                notice(f"(cut after {len(tokens)} tokens: " + ("the context is full)" if room < config.max_new else "--max_new allows no more)"))
        except KeyboardInterrupt:
            print(flush=True)
            notice("(stopped; the answer stays in the conversation as it stands, /undo takes it back)")
        answers.append(chat.decode_answer(tok, tokens))
    return answers


def save(name, messages):
    """Append a conversation to a JSONL file as a row that sft.py reads -> what was done, in words."""
    try:
        row = {"messages": chat.conversation({"messages": messages})}
    except ValueError as e:  # an answer of nothing, which sft.py would refuse
        raise UserError(f"not saved, for sft.py could not read it: {e}; /undo or /retry mends the last exchange") from None
    try:
        with open(os.path.expanduser(name), "ab+") as f:
            size = f.seek(0, 2)
            f.seek(max(0, size - 1))
            unfinished = f.read(1) not in (b"", b"\n")  # the last line of what was there
            f.write(b"\n" * unfinished + json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n")
    except (OSError, ValueError) as e:
        raise UserError(f"not saved: {e}") from None
    return f"appended to {name}, after what was there" if size else f"saved in {name}"


def converse(config, device, model, tok):
    """Read messages and commands until the input ends, and answer."""
    speakers, system, exchanges, drawn, told = [(config.model, model, tok)], config.system, [], 0, set()
    by_hand = sys.stdin.isatty() and sys.stdout.isatty()
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if by_hand:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  gives input() arrow keys and a history; not in a pipe, where it may print escape codes
        notice(f"{config.model}: /help lists the commands, Ctrl-D leaves")
    while True:
        try:
            line = input("> " if by_hand else "")
        except EOFError:
            return print() if by_hand else None
        except KeyboardInterrupt:
            return notice("\nleft")
        command, _, rest = line.rstrip().partition(" ")
        rest, question, kept = rest.strip(), line.strip(), exchanges
        try:
            if command == "/quit":
                return
            elif command == "/help":
                notice(__doc__[__doc__.index("    /undo") :].rstrip())
            elif command == "/system":
                system = rest
                notice("system message set; it stands before the whole conversation from the next answer on" if rest else "no system message any more")
            elif command == "/compare" and not rest:
                notice(f"{config.model} alone answers from now on")
                speakers = speakers[:1]
            elif command == "/compare":
                model, tok, turns = load(rest, device)
                chat.encode_prompt(tok, conversation(system, exchanges))  # UserError where its tokenizer cannot write it
                speakers = [*speakers[:1], (rest, model, tok)]
                exchanges = [(asked, answers[:1]) for asked, answers in exchanges]  # what another one said is not the new one's
                notice(f"{rest} answers too from now on" + ("" if turns else ", though it has learnt no turns"))
            elif command in ("/undo", "/retry", "/save") and not exchanges:
                notice(f"{command}: there is no exchange yet")
            elif command == "/save" and rest:
                notice(save(rest, conversation(system, exchanges)))
            elif command == "/undo":
                notice(f"taken back: {exchanges.pop()[0]}")
            elif command.startswith("/") and command != "/retry":
                notice(f"{line}: no such command; /help lists them. Put a space before a message that begins with /")
            elif question:
                if command == "/retry":
                    (question, _), kept = exchanges[-1], exchanges[:-1]
                answers = reply(config, speakers, system, [*kept, (question, [])], config.seed + drawn, told)
                exchanges, drawn = [*kept, (question, answers)], drawn + 1
        except UserError as e:
            notice(f"error: {e}")
        except KeyboardInterrupt:
            notice("(stopped; the conversation is as it was)")


def main(config):
    good = {"temperature": config.temperature >= 0, "top_k": config.top_k >= 0, "top_p": 0 < config.top_p <= 1, "max_new": config.max_new > 0}
    check(config, good)
    device = setup(config.device, config.seed)
    model, tok, turns = load(config.model, device)
    if config.system and not turns:
        raise UserError(f"--system={config.system}: {config.model} has learnt no turns, so no system message; put the text into --prompt")
    if turns and not config.prompt:
        return converse(config, device, model, tok)
    prompt = chat.encode_prompt(tok, conversation(config.system, [(config.prompt, [])])) if turns else [tok.eot, *tok.encode_ordinary(config.prompt)]
    stop = {tok.eot, chat.end_of_turn(tok)} if turns else {tok.eot}
    print("" if turns else config.prompt, end="", flush=True)
    write(config, model, tok, prompt, [], max_new=config.max_new, stop=stop, hidden=stop, seed=config.seed)


if __name__ == "__main__":
    launch(main, Config)
