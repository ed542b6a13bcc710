"""What every stage uses unchanged: the command line, process set-up, the log, signals.

A script is a `Config` dataclass (one commented line a field; every field is a flag), pure functions, and `main(config)`; it ends in
`launch(main, Config)`.
"""
import dataclasses, inspect, re, sys


class UserError(Exception):
    """Something the user can mend. The message names the file, line, flag or tensor, and what to do next; `launch` prints it without a traceback."""


# ---------------------------------------------------------------------------------------------------------------------------------
# The command line


def field_comments(Config):
    """The trailing comment of every field of a dataclass, read from its source: {name: comment}."""
    found = re.findall(r"^    (\w+)\s*:[^#\n]*#\s*(.*)$", inspect.getsource(Config), flags=re.M)
    return {name: comment.strip() for name, comment in found}


def parse_cli(Config, argv=None):
    """Read `--name=value` or `--name value` for every field of the dataclass `Config`; a bool may stand bare. Returns a Config.

    Fields are int, float, str or bool. Raises UserError naming the flag where it is unknown, given twice, lacks a value or has one of the wrong type.
    `--help` prints each field with its comment and default, and exits.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    fields = {f.name: f for f in dataclasses.fields(Config)}
    values = {}
    while argv:
        word = argv.pop(0)
        if word in ("-h", "--help"):
            print_help(Config)
            raise SystemExit(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r}: a flag was expected (--name=value); --help lists them")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in fields:
            raise UserError(f"--{name}: no such flag; --help lists them")
        if name in values:
            raise UserError(f"--{name}: given twice")
        if not equals:
            bare = not argv or argv[0].startswith("--")
            if bare and fields[name].type is not bool:
                raise UserError(f"--{name}: needs a value ({fields[name].type.__name__})")
            text = "True" if bare else argv.pop(0)
        values[name] = convert(name, text, fields[name].type)
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
    if missing:
        raise UserError(f"--{missing[0]}: must be given; --help lists the flags")
    return Config(**values)


def convert(name, text, kind):
    """The text of flag `name` as int, float, str or bool; UserError names the flag where it is not one."""
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise UserError(f"--{name}={text}: expected True or False")
        return text.lower() in ("true", "1")
    try:
        value = kind(text)
    except ValueError:
        raise UserError(f"--{name}={text}: expected {kind.__name__}") from None
    if kind is float and value != value:
        raise UserError(f"--{name}={text}: not a number")
    return value


def print_help(Config):
    comments = field_comments(Config)
    print((inspect.getmodule(Config).__doc__ or "").strip(), "\n\nflags:")
    for f in dataclasses.fields(Config):
        default = "" if f.default is dataclasses.MISSING else f" (default: {f.default!r})"
        print(f"  --{f.name:<16} {f.type.__name__:<6} {comments.get(f.name, '')}{default}")


def launch(main, Config):
    """Run a script: parse its flags, call `main(config)`, turn a UserError into one line on stderr and exit status 1."""
    try:
        main(parse_cli(Config))
    except UserError as e:
        sys.exit(f"error: {e}")
