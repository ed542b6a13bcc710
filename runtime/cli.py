"""The command line: a script is a `Config` dataclass, pure functions and `main(config)`.

Every field of Config is a flag. Its help stands on the comment lines above it, and ends in brackets
where the value has a range or may change when a run is resumed:

    # -- What you may set --
    # peak learning rate of AdamW [>= 0; < 1]
    lr: float = 0.001
    # which loss to minimise [one of dpo, ipo]
    loss: str = "dpo"
    # steps between checkpoints; 0: only at the end [may change on resume]
    save_every: int = 500
"""

import dataclasses
import inspect
import io
import operator
import os
import re
import signal
import sys
import textwrap

from runtime.errors import UserError

RENAMED = {  # flags of earlier versions -> what to use instead; of several, the one that the script has
    "max_new": ["max_new_tokens"],
    "micro_tokens": ["micro_batch_tokens"],
    "clip": ["max_grad_norm"],
    "polar": ["muon_dtype"],
    "gain_lr": ["norm_lr"],
    "kl_target": ["adaptive_kl"],
    "kl_horizon": ["adaptive_kl_horizon"],
    "target_kl": ["stop_kl"],
    "prompts": ["prompts_per_step"],
    "batch": ["prompts_per_step", "batch_size", "rows_per_write"],
    "group": ["group_size"],
    "n": ["group_size"],
    "loss": ["loss_aggregation"],
}
TEXTS = {"prompt", "system"}  # flags that are said to a model, and hold no paths
GROUPS = ["What you will set", "What you may set", "What you will rarely set", ""]
TINY, HUGE = 1e-30, 1e38  # of a flag that is not 0; it and the reciprocal of a temperature are finite in fp32
COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def print0(*args, **kwargs):
    """print, on the first of torchrun's ranks only. That the disk behind it is full ends nothing:
    what matters is also in log.jsonl."""
    if os.environ.get("RANK", "0") == "0":
        try:
            print(*args, flush=True, **kwargs)
        except BrokenPipeError:  # nobody reads any more
            raise
        except OSError:
            pass


def refuse_unread(config, unread):
    """Raises UserError for a flag that was given and that nothing reads. unread: {flag: why}."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for flag, reason in unread.items():
        value = vars(config)[flag]
        if value != defaults[flag]:
            raise UserError(f"--{flag}={value}: {reason}; leave it out")


@dataclasses.dataclass
class Flag:
    """What the comment above a field says about it."""

    help: str = ""
    group: str = ""
    bounds: list = dataclasses.field(default_factory=list)  # [(">=", 0.0), ...]
    choices: list = dataclasses.field(default_factory=list)  # ["dpo", "ipo"]; empty: any value
    may_change_on_resume: bool = False


def read_flags(Config):
    """{field name: Flag}, read from the comments in the source of the dataclass `Config` and of
    those it extends; a field without a comment of its own (another default, say) keeps the one it
    had."""
    flags = {}
    for cls in reversed(Config.__mro__[:-1]):
        comment, group = [], ""
        for line in inspect.getsource(cls).splitlines():
            line = line.strip()
            if heading := re.fullmatch(r"# -- (.*) --", line):
                group = heading[1]
            elif line.startswith("#"):
                comment.append(line[1:].strip())
            elif field := re.match(r"(\w+)\s*:", line):
                if comment or field[1] not in flags:
                    flags[field[1]] = read_comment(" ".join(comment), group)
                comment = []
    return flags


def read_comment(comment, group):
    """The Flag that a field's comment describes."""
    flag = Flag(comment, group)
    if brackets := re.search(r"\[([^\[\]]*)\]$", comment):
        for part in brackets[1].split(";"):
            part = part.strip()
            if part == "may change on resume":
                flag.may_change_on_resume = True
            elif part.startswith("one of "):
                flag.choices = part.removeprefix("one of ").split(", ")
            else:
                sign, bound = part.split()
                flag.bounds.append((sign, float(bound)))
    return flag


def parse_cli(Config, argv=None):
    """Read `--name=value` or `--name value` for every field of `Config`; a bool may stand bare.

    Fields are int, float, str or bool; a field of type list takes the words that are no flags.
    Raises UserError naming a flag that is unknown, renamed, given twice, lacks a value or has one
    of the wrong type. `--help` prints the flags and exits.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    fields = {f.name: f for f in dataclasses.fields(Config)}
    values = {f.name: [] for f in fields.values() if f.type is list}
    words = next(iter(values.values()), None)
    while argv:
        word = argv.pop(0)
        if word in ("-h", "--help"):
            print_help(Config)
            raise SystemExit(0)
        if words is not None and not word.startswith("-"):
            words.append(word)
            continue
        if not word.startswith("--"):
            raise UserError(f"{word!r}: a flag was expected (--name=value); --help lists them")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in fields:
            raise UserError(unknown_flag(name, fields))
        if fields[name].type is list:
            raise UserError(f"--{name}: is no flag; give its values by themselves, as --help shows")
        if name in values:
            raise UserError(f"--{name}: given twice")
        if not equals:
            bare = not argv or argv[0].startswith("--")
            if bare and fields[name].type is not bool:
                raise UserError(f"--{name}: needs a value ({fields[name].type.__name__})")
            text = "True" if bare else argv.pop(0)
        values[name] = convert(name, text, fields[name].type)
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise UserError(f"--{name}: must be given; --help lists the flags")
    return Config(**values)


def unknown_flag(name, fields):
    """The message for a flag that the script does not have."""
    renamed = [new for new in RENAMED.get(name, []) if new in fields]
    if renamed:
        return f"--{name}: is called --{renamed[0]} now; --help says what it means"
    return f"--{name}: no such flag; --help lists them"


def convert(name, text, kind):
    """The text of flag `name` as int, float, str or bool; raises UserError naming the flag.

    A shell leaves the ~ of --data=~/a.jsonl as it is, so that a folder of this name would be made.
    """
    if kind is str and name not in TEXTS:
        return ",".join(map(os.path.expanduser, text.split(",")))
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise UserError(f"--{name}={text}: expected True or False")
        return text.lower() in ("true", "1")
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"--{name}={text}: expected {kind.__name__}") from None


def check_ranges(config):
    """Raises UserError naming the first flag whose value lies outside what its comment allows.

    Numbers must be finite and, unless they are 0, have a reciprocal in fp32. Counts and seeds must
    be 0 to 2^63 - 1. A default is always allowed.
    """
    flags = read_flags(type(config))
    for field in dataclasses.fields(config):
        name, value = field.name, vars(config)[field.name]
        if value == field.default:
            continue
        if fault := fault_of(value, field.type, flags[name]):
            raise UserError(f"--{name}={value}: {fault}")


def fault_of(value, kind, flag):
    """Why a flag may not have a value of type `kind`; "" if it may."""
    if flag.choices and value not in flag.choices:
        return f"expected one of {', '.join(map(repr, flag.choices))}"
    if kind is float and value and not TINY <= abs(value) <= HUGE:
        return f"a finite number was expected, 0 or {TINY:g} to {HUGE:g} in size"
    if kind is int and not 0 <= value < 2**63:
        return "a count was expected, not less than 0 and less than 2^63"
    for sign, bound in flag.bounds:
        if not COMPARE[sign](value, bound):
            return f"must be {sign} {bound:,.12g}; --help says what it means"
    return ""


def print_help(Config):
    """Print the module's docstring, then every flag with its type, help and default, by group. A
    default that the flag may not be given only marks that it was left out, and is not shown."""
    print((inspect.getmodule(Config).__doc__ or "").strip())
    flags = read_flags(Config)
    for group in sorted({flag.group for flag in flags.values()}, key=GROUPS.index):
        print(f"\n{group or 'Flags'}:")
        for field in dataclasses.fields(Config):
            flag = flags[field.name]
            if flag.group != group:
                continue
            name, default = f"--{field.name}", f" (default: {field.default!r})"
            if field.type is list:
                name, default = f"{field.name.upper()} ...", ""
            elif field.default is dataclasses.MISSING or fault_of(field.default, field.type, flag):
                default = ""
            line = f"  {name:<24} {field.type.__name__:<6} {flag.help}{default}"
            print(textwrap.fill(line, 100, subsequent_indent=" " * 34))


def launch(main, Config):
    """Run a script: parse its flags, call `main(config)`, print a UserError as one line."""
    if status := exit_status(main, Config):
        sys.exit(status)


def exit_status(main, Config):
    """What a script ends with: 0, another exit status, or an error as a line for stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not closed, and no notebook's
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show must end no run
    try:
        main(parse_cli(Config))
    except UserError as e:
        return f"error: {e}"
    except SystemExit as e:
        return e.code or 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except OSError as e:  # for example a path too long for a file name
        if e.filename is None:
            raise
        return f"error: {e.filename}: {e.strerror}"
    return 0
