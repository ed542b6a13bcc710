r"""Talk to any checkpoint: continue a prompt, or chat with a model that was trained to.

    p(token) ~ exp(logit / temperature), cut to the likeliest tokens that hold top_p in all

    python sample.py --model=out/base --prompt="ROMEO:" --max_new_tokens=300 --temperature=0.8
    python sample.py --model=out/dpo --system="Be brief."        # no --prompt: a chat
    printf 'What is 2 + 3?\n/retry\n' | python sample.py --model=out/dpo > answers.txt

In a chat:

    /undo                take back the last exchange
    /retry               draw another answer to the last message
    /system TEXT         set the system message, from the next answer on; alone: none
    /compare CHECKPOINT  have another model answer too, from its own answers; alone: no longer
    /save FILE           append the conversation with --model to a JSONL file that sft.py reads;
                         answers that were cut are marked, and not trained on
    /help                this list
    /quit                leave, as Ctrl-D does

Ctrl-C stops an answer, which stays as it stands; at the prompt it leaves. Only answers go to
stdout, everything about the chat goes to stderr.
"""

import codecs
import contextlib
import importlib
import os
import sys
from dataclasses import dataclass

import tiktoken

from data import chat, rows
from model import GPT
from rollout import stream
from runtime import checkpoint
from runtime.cli import check_ranges
from runtime.errors import UserError
from runtime.files import append, json_lines
from runtime.process import launch, setup


@dataclass
class Config:
    # -- What you will set --
    # a run, a checkpoint, or a downloaded Llama/Qwen2/Qwen3 directory
    model: str
    # text to continue or to answer; "": chat with a chat model, else begin a document
    prompt: str = ""
    # the system message, for a chat model
    system: str = ""

    # -- What you may set --
    # 0: always the likeliest token [>= 0]
    temperature: float = 1.0
    # draw from the k likeliest tokens only; 0: from all
    top_k: int = 0
    # draw from the fewest tokens that hold this much probability [> 0; <= 1]
    top_p: float = 1.0
    # longest completion, in tokens [>= 1]
    max_new_tokens: int = 200
    # the same seed gives the same text; in a chat each answer adds 1 to it
    seed: int = 0
    # auto, cpu, cuda, cuda:1, mps
    device: str = "auto"


@dataclass
class Speaker:
    """A checkpoint that writes."""

    name: str
    model: GPT
    tok: tiktoken.Encoding
    is_chat_model: bool  # trained on conversations, so that it ends its turns
    context_was_full: bool = False  # which the user has been told


def load(name, device):
    """The Speaker of a checkpoint; raises UserError if it is a reward model."""
    model, tok, info = checkpoint.load(os.path.expanduser(name), device)
    if model.config.scalar_head:
        raise UserError(f"{name}: a reward model, which writes nothing; evaluate.py measures it")
    return Speaker(name, model, tok, chat.is_chat_model(tok, info))


def notice(text):
    print(text, file=sys.stderr, flush=True)


def write(config, speaker, prompt, tokens, max_new_tokens, stop, hidden, seed):
    """Stream what follows `prompt` to stdout.

    Its ids go into the list `tokens`, where they are even if Ctrl-C ends it. hidden: ids not shown.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span several tokens
    sampling = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p, "seed": seed}
    for token in stream(speaker.model, prompt, max_new_tokens=max_new_tokens, stop=stop, **sampling):
        tokens.append(token)
        if token not in hidden:
            text = decoder.decode(speaker.tok.decode_single_token_bytes(token))
            print(text, end="", flush=True)
    print(decoder.decode(b"", final=True), flush=True)


# --------------------------------------------------------------------------------------------------
# A chat: a system message and exchanges [(text of the user, [message of each speaker])]


def conversation(system, exchanges, i=0):
    """The messages as speaker i knows them: its own answers, or --model's from before it joined."""
    messages = [rows.message("system", system)] if system.strip() else []
    for question, answers in exchanges:
        messages.append(rows.message("user", question))
        if answers:
            messages.append(answers[min(i, len(answers) - 1)])
    return messages


def newest_exchanges(speaker, max_new_tokens, system, exchanges, i=0):
    """(ids of a prompt with room for an answer, how many of the oldest exchanges it leaves out).

    The system message always stays. Room is --max_new_tokens, but at most half the context: a long
    answer may be cut, but must not push out the conversation. Raises UserError if even the last
    message is too long.
    """
    context = speaker.model.config.context
    for left_out in range(len(exchanges)):
        ids = chat.encode_prompt(speaker.tok, conversation(system, exchanges[left_out:], i))
        if len(ids) + min(max_new_tokens, context // 2) <= context:
            break
    if len(ids) >= context:
        raise UserError(
            f"this message takes {len(ids)} tokens as a prompt, the model's context holds {context}; "
            "shorten it or the system message"
        )
    return ids, left_out


def answer(config, speakers, system, exchanges, seed):
    """Stream each speaker's answer to the last of `exchanges` -> their messages."""
    limit, answers = config.max_new_tokens, []
    prompts = [newest_exchanges(speaker, limit, system, exchanges, i) for i, speaker in enumerate(speakers)]
    for speaker, (prompt, left_out) in zip(speakers, prompts, strict=True):
        tok, context, tokens = speaker.tok, speaker.model.config.context, []
        if left_out and not speaker.context_was_full:
            speaker.context_was_full = True
            notice(f"(the context of {speaker.name} holds {context} tokens: the oldest exchanges are left out now)")
        stop, room = {tok.eot} | chat.stop_ids(tok), context - len(prompt)
        try:
            print(f"[{speaker.name}] " if len(speakers) > 1 else "", end="", flush=True)
            write(config, speaker, prompt, tokens, min(limit, room), stop, tok.special_ids, seed)
            if tokens[-1] not in stop:
                reason = "the context is full" if room < limit else "--max_new_tokens allows no more"
                notice(f"(cut after {len(tokens)} tokens: {reason})")
        except KeyboardInterrupt:
            print(flush=True)
            notice("(stopped; the answer stays in the conversation as it stands, /undo takes it back)")
        message = rows.message("assistant", chat.decode_completion(tok, tokens))
        ended = tokens and tokens[-1] in stop
        answers.append(message if ended else message | {"train": False})  # half an answer teaches to stop anywhere
    return answers


def save(name, messages):
    """Append a conversation to a JSONL file, for sft.py -> what was done, in words."""
    try:
        rows.conversation({"messages": [rows.message(m["role"], m["content"]) for m in messages]})
    except ValueError as e:  # an empty answer
        raise UserError(f"not saved, sft.py could not read it: {e}; /undo or /retry the last exchange") from None
    line = json_lines([{"messages": messages}]).encode(errors="replace")
    path, size, cut = os.path.expanduser(name), 0, sum("train" in m for m in messages)
    try:
        if os.path.isfile(path):
            size = os.path.getsize(path)
        if size:
            with open(path, "rb") as f:
                f.seek(-1, os.SEEK_END)
                if f.read() != b"\n":  # the last line of what was there has no end
                    line = b"\n" + line
        append(path, line)
    except (OSError, ValueError) as e:
        if os.path.isfile(path):  # opening a pipe would wait for a reader
            with contextlib.suppress(OSError):
                append(path, b"", size)  # without the half of a row that a full disk took
        raise UserError(f"not saved: {e}") from None
    not_trained = f"; answers that were cut, and so not to be trained on: {cut}" if cut else ""
    return (f"appended to {name}" if size else f"saved in {name}") + not_trained


def converse(config, speaker, device):
    """Read messages and commands until the input ends, and answer."""
    speakers, system, exchanges, drawn = [speaker], config.system, [], 0
    if sys.stdin is None:  # closed by who started it
        return
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # Windows has none; in a pipe it may print escape codes
            importlib.import_module("readline")  # gives input() arrow keys and a history
        notice(f"{config.model}: /help lists the commands, Ctrl-D leaves")
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return print() if interactive else None
        except KeyboardInterrupt:
            return notice("\nleft")
        command, _, argument = line.rstrip().partition(" ")
        argument, message, history = argument.strip(), "", exchanges
        try:
            match command:
                case "/quit":
                    return
                case "/help":
                    notice(__doc__[__doc__.index("    /undo") :].rstrip())
                case "/system":
                    system = argument
                    notice("system message set, from the next answer on" if system else "no system message now")
                case "/compare" if not argument:
                    speakers = speakers[:1]
                    notice(f"only {config.model} answers from now on")
                case "/compare":
                    other = load(argument, device)
                    # UserError if it cannot; many templates want a message of a user
                    chat.encode_prompt(other.tok, conversation(system, [*exchanges, ("Hello", [])]))
                    speakers = [speaker, other]
                    exchanges = [(question, answers[:1]) for question, answers in exchanges]
                    but = "" if other.is_chat_model else ", though it is not a chat model"
                    notice(f"{argument} answers too from now on{but}")
                case "/undo" | "/retry" | "/save" if not exchanges:
                    notice(f"{command}: there is no exchange yet")
                case "/undo":
                    notice(f"taken back: {exchanges.pop()[0]}")
                case "/retry":
                    history, message = exchanges[:-1], exchanges[-1][0]
                case "/save" if argument:
                    notice(save(argument, conversation(system, exchanges)))
                case _ if command.startswith("/"):
                    notice(f"{line}: no such command; /help lists them. A message may begin with a space, then /")
                case _:
                    message = line.strip()
            if message:
                answers = answer(config, speakers, system, [*history, (message, [])], config.seed + drawn)
                exchanges, drawn = [*history, (message, answers)], drawn + 1
        except UserError as e:
            notice(f"error: {e}")
        except KeyboardInterrupt:
            notice("(stopped; the conversation is as it was)")


def main(config):
    check_ranges(config)
    device = setup(config.device, config.seed)
    speaker = load(config.model, device)
    tok = speaker.tok
    if config.system and not speaker.is_chat_model:
        raise UserError(
            f"--system={config.system}: {config.model} is not a chat model and has no system message; "
            "put the text into --prompt"
        )
    if speaker.is_chat_model and not config.prompt:
        converse(config, speaker, device)
    elif speaker.is_chat_model:
        answer(config, [speaker], config.system, [(config.prompt, [])], config.seed)
    else:
        prompt, stop = [tok.bos, *tok.encode_ordinary(config.prompt)], chat.text_stop_ids(tok)
        print(config.prompt, end="", flush=True)
        write(config, speaker, prompt, [], config.max_new_tokens, stop, stop, config.seed)


if __name__ == "__main__":
    launch(main, Config)
