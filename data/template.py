"""A downloaded model's chat template, rendered as `transformers` renders it.

A template is a program in Jinja that came with the weights, so it is not trusted. Jinja's sandbox
keeps it from the interpreter, but not from an endless loop or 'a' * 300000000, and no timer within
a process stops a call in C. So templates run in one child process, without torch, which the kernel
limits: MEMORY by RLIMIT_AS, SECONDS of the processor per text by ITIMER_PROF and RLIMIT_CPU. The
child is kept for the run and ends with it, for then its input ends.

macOS does not enforce RLIMIT_AS, so that a template may take memory for SECONDS. Windows has none
of these limits: there a template is ended after WAIT seconds.
"""

import atexit
import contextlib
import datetime
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from data.read import read_json, read_text
from runtime.errors import UserError

MEMORY = 160 * 2**20  # bytes of the child's address space, of which Python and Jinja take 25 million
SECONDS = 0.5  # of the processor, for one text; Qwen3's template takes 0.0002
WAIT = 30  # seconds that a reply may take on a busy machine
LONGEST_SOURCE = 2**20  # characters of a template; the longest in use have 20,000
LONGEST_TEXT = 2**24  # characters that a template may make
# What `strftime_now` shows. Fixed for a run and kept on resume: the ids of Llama 3's prompts, which
# state the date, would change overnight.
run_start = datetime.datetime.now()


class Template(NamedTuple):
    """A chat template as a directory has it."""

    source: str
    file: str  # where it stands, for errors
    tokens: tuple  # ((name, text), ...), for example ("bos_token", "<s>")

    def render(self, messages, add_generation_prompt):
        """The text of a conversation, with the beginning of the assistant's next turn if asked.

        Raises UserError in one line if the template refuses the messages, has an error, or takes
        more than it may.
        """
        variables = {"messages": messages, "add_generation_prompt": add_generation_prompt, **dict(self.tokens)}
        request = {"source": self.source, "now": run_start.isoformat(), "variables": variables}
        return ask(json.dumps(request), self.file)

    def source_under(self, eos_token):
        """The source for a directory with another eos_token: what the template writes stays."""
        known = dict(self.tokens).get("eos_token")
        if known in (None, eos_token) or "eos_token" not in self.source:
            return self.source
        return f"{{%- set eos_token = {json.dumps(known)} +%}}{self.source}"


def fix_time(text):
    """Have `strftime_now` show this time, in ISO format, from now on.

    Raises UserError if it is none.
    """
    global run_start
    try:
        run_start = datetime.datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise UserError(f"started={text!r} in feinschliff.json is no time; take another checkpoint") from None


# -------------------------------------------------------------------------------------------------
# What a directory says of its turns


def token_text(token):
    """The text of a token in tokenizer_config.json, which may be a dict; None if there is none."""
    return token["content"] if isinstance(token, dict) else token


def read_template(folder, config):
    """The Template of a directory, None if it has none or a blank one.

    config: its tokenizer_config.json.

    As in transformers, chat_template.jinja comes first, and of several templates the one named
    "default". Raises UserError if there is none of that name.
    """
    path = Path(folder) / "chat_template.jinja"
    if path.exists():
        if not path.is_file() or path.stat().st_size > 4 * LONGEST_SOURCE:
            raise UserError(f"{path}: no plain file of at most {4 * LONGEST_SOURCE} bytes, so it is not read")
        source = read_text(path)
    else:
        path, source = Path(folder) / "tokenizer_config.json", config.get("chat_template")
    if isinstance(source, list):
        source = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
    if isinstance(source, dict):
        named = source
        if "default" not in named:
            raise UserError(f"{path}: of the chat templates {', '.join(map(str, named))[:200]} none is named default")
        source = named["default"]
    if source is None or isinstance(source, str) and not source.strip():
        return None
    if not isinstance(source, str) or len(source) > LONGEST_SOURCE:
        raise UserError(f"{path}: the chat template is no text of at most {LONGEST_SOURCE} characters: damaged")
    return Template(source, str(path), named_tokens(folder, config))


def named_tokens(folder, config):
    """((name, text), ...): the tokens that transformers passes to a template by their names."""
    older = Path(folder) / "special_tokens_map.json"
    if older.is_file() and "added_tokens_decoder" not in config:
        config = config | read_json(older)
    texts = {name: token_text(value) for name, value in config.items() if name.endswith("_token")}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        texts |= config[key] if isinstance(config.get(key), dict) else {}
    return tuple((name, text) for name, text in texts.items() if isinstance(text, str))


def read_eos_ids(folder):
    """All ids that end a text by config.json and generation_config.json, config.json's first.

    Raises UserError naming a file in which they are no ids.
    """
    found = []
    for name in ("config.json", "generation_config.json"):
        path = Path(folder) / name
        eos = read_json(path).get("eos_token_id") if path.is_file() else None
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        for i in ids:
            if type(i) is not int or not 0 <= i < 2**31:
                raise UserError(f"{path}: eos_token_id is {str(eos)[:100]}; an id or a list of ids was expected")
        found += ids
    return tuple(dict.fromkeys(found))


# -------------------------------------------------------------------------------------------------
# The parent's side

children = {}  # {process id: the child that renders for it}: a fork must not talk to its parent's


def start():
    """A child that renders, in a session of its own, so that Ctrl-C reaches the run alone."""
    command = [sys.executable, "-m", "data.template"]
    root = Path(__file__).parents[1]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=root, start_new_session=True, **pipes)


@functools.lru_cache(maxsize=64)  # both sides of a preference have one prompt
def ask(request, file):
    """The text that the child makes of a request; starts the child if there is none.

    Raises UserError naming `file` if it makes none. The kernel ends the child at its limits.
    """
    child = children.get(os.getpid())
    if child is None:
        child = children[os.getpid()] = start()
    timer = threading.Timer(WAIT, child.kill)
    timer.start()
    line = b""
    try:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(request.encode() + b"\n")
            child.stdin.flush()
            line = child.stdout.readline()
    finally:
        timer.cancel()
        if not line.endswith(b"\n"):  # it ended, or Ctrl-C came between request and reply
            stop()
    if not line.endswith(b"\n"):
        raise UserError(
            f"{file}: the chat template takes more than {SECONDS} seconds for one conversation; it is damaged or "
            "hostile: take the original of the model's author"
        )
    reply = json.loads(line)
    if "error" in reply:
        raise UserError(f"{file}: the chat template {reply['error'][:300]}")
    return reply["text"]


@atexit.register
def stop():
    """End this process's child, if it has one."""
    child = children.pop(os.getpid(), None)
    if child:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


# -------------------------------------------------------------------------------------------------
# The child


@functools.lru_cache(maxsize=8)
def compiled(source):
    """A template in the environment that transformers gives it (utils/chat_template_utils.py)."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}, around what an assistant says: its content."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("content"), [], [], body).set_lineno(line)

        def content(self, caller):
            return caller()

    extensions = [Generation, jinja2.ext.loopcontrols]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Jinja's own escapes the characters of HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    import jinja2

    raise jinja2.TemplateError(message)


def limit_memory():
    """Have the kernel refuse this process more than MEMORY."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows; macOS may refuse to set it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def limit_time():
    """Have the kernel end this process if the next text takes more than SECONDS of the processor.

    A signal's default action calls no handler of Python's, so a call in C ends as well. RLIMIT_CPU,
    the second guard, counts whole seconds of all texts together.
    """
    if not hasattr(signal, "setitimer"):
        return
    import resource

    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    used, most = resource.getrusage(resource.RUSAGE_SELF), resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 2, most))


def answer(line):
    """{"text"} of one request, or {"error"}."""
    try:
        request = json.loads(line)
        strftime_now = datetime.datetime.fromisoformat(request["now"]).strftime
        given = {"tools": None, "documents": None, "strftime_now": strftime_now} | request["variables"]
        text = compiled(request["source"]).render(given)
    except MemoryError:
        return {"error": f"takes more than {MEMORY >> 20} MB"}
    except Exception as e:
        kind = "says" if type(e).__name__ == "TemplateError" else f"fails with {type(e).__name__}"
        return {"error": f"{kind}: {e}"}
    return {"text": text} if len(text) <= LONGEST_TEXT else {"error": f"makes more than {LONGEST_TEXT} characters"}


def serve():
    """Answer requests, a line of JSON each, until the input ends."""
    limit_memory()
    for line in sys.stdin.buffer:
        limit_time()
        reply = answer(line)
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
