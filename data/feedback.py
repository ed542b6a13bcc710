r"""What people say of a model's answers, as rows that the trainers read.

serve.py appends to four files of one directory, a JSON object a line:

    pairs.jsonl        two answers, one preferred: for reward.py and dpo.py
    ratings.jsonl      one answer, good or bad ("label"): for dpo.py --loss=kto
    corrections.jsonl  the conversation as it should have gone ("messages"): for sft.py
    ties.jsonl         two answers, "tie" or "both_bad": counted, trained by nobody

Each row also has the models and seeds that wrote the answers, the time, and the name that the voter
gave, if any. A training run refuses data that change under it, so what it reads is frozen first:

    python -m data.feedback --feedback=out/feedback --out=out/rounds/1/pairs.jsonl
    python -m data.feedback --feedback=out/feedback --kind=ratings --out=good_or_bad.jsonl

Votes that Open WebUI collected (Admin > Evaluations > Feedbacks > Export) become the same files:

    python -m data.feedback --open_webui=feedback-history-export.json --out=out/feedback
"""

import contextlib
import hashlib
import json
import queue
import re
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from data import rows
from data.read import parse_row, read_text, reason
from runtime.cli import check_ranges, launch, print0
from runtime.errors import UserError
from runtime.files import append, check_apart, flush, json_lines, lock_file, replace_text

KINDS = ["pairs", "ratings", "corrections", "ties"]
VOTES = ["left", "right", "tie", "both_bad"]
FIELDS = {"vote", "answers", "models", "seeds", "label", "correction", "answer", "model", "seed", "prompt", "by"}
PARSE = {"pairs": rows.preference, "ratings": rows.judged, "corrections": rows.conversation}
NEWEST = 20  # rows of a kind that are shown


@dataclass
class Config:
    # -- What you will set --
    # file to write; for --open_webui a directory
    out: str
    # directory that serve.py writes
    feedback: str = ""
    # what to freeze [one of pairs, ratings, corrections]
    kind: str = "pairs"
    # leave out the rows of these files, comma-separated: a round then learns from new votes alone
    after: str = ""
    # Open WebUI's export, to be read instead of --feedback
    open_webui: str = ""
    # -- What you may set --
    # replace --out
    overwrite: bool = False


# --------------------------------------------------------------------------------------------------
# One row, from what a page or a program sent. Each raises ValueError saying what is wrong.


def read_entry(entry):
    """(kind, row) of {"vote" | "label" | "correction", "prompt": messages, ...}.

    "vote" goes with "answers", "models" and "seeds", two each, left and right; "label" (true or
    false) and "correction" (a text) go with "answer", "model" and "seed"; "by" is optional.
    """
    unknown = [name for name, value in entry.items() if name not in FIELDS and value is not None]
    if unknown:
        raise ValueError(f'"{unknown[0]}" is not kept; leave it out')
    said = [name for name in ("vote", "label", "correction") if name in entry]
    if len(said) != 1:
        raise ValueError('one of "vote", "label" and "correction" was expected')
    kind, row = read_judgement(entry, said[0])
    if kind in PARSE:
        PARSE[kind](row)  # one row that no trainer reads would stop every round that comes
    return kind, row


def read_judgement(entry, said):
    """`read_entry` of an entry that says a vote, a label or a correction."""
    prompt = rows.ends_with(rows.check_messages(entry.get("prompt"), "prompt"), "user", "prompt")
    by = "" if entry.get("by") is None else entry["by"]
    if not isinstance(by, str) or len(by) > 64:
        raise ValueError('"by" is a name of at most 64 characters, or missing')
    end = {"time": round(time.time(), 3), "by": by}
    if said == "vote":
        return read_vote(entry, prompt, end)
    answer = rows.text_of(entry.get("answer"), "answer").rstrip()  # what it begins with may be indentation
    end = {"model": checked_name(entry.get("model")), "seed": checked_seed(entry.get("seed"))} | end
    if said == "label":
        if not isinstance(entry["label"], bool):
            raise ValueError('"label" is not true or false')
        return "ratings", {"prompt": prompt, "completion": answer, "label": entry["label"]} | end
    correction = rows.text_of(entry["correction"], "correction").rstrip()
    # Only the correction is trained: nobody has said that earlier answers are right, or whole
    earlier = [m | {"train": False} if m["role"] == "assistant" else m for m in prompt]
    return "corrections", {"messages": [*earlier, rows.message("assistant", correction)], "instead_of": answer} | end


def read_vote(entry, prompt, end):
    """(kind, row) of a vote between two answers."""
    answers, vote = two(entry, "answers"), entry["vote"]
    if vote not in VOTES:
        raise ValueError(f'"vote" is not one of {", ".join(VOTES)}')
    answers = [rows.text_of(answer, f"answers[{i}]").rstrip() for i, answer in enumerate(answers)]
    models, seeds = list(map(checked_name, two(entry, "models"))), list(map(checked_seed, two(entry, "seeds")))
    if vote in ("tie", "both_bad"):
        return "ties", {"prompt": prompt, "answers": answers, "vote": vote, "models": models, "seeds": seeds} | end
    if answers[0].strip() == answers[1].strip():
        raise ValueError('"answers" are the same text: only "tie" and "both_bad" say something of them')
    return "pairs", pair_row(prompt, answers, models, seeds, vote == "left") | end


def pair_row(prompt, answers, models, seeds, first_wins):
    """A row of pairs.jsonl, in every list of which the winner comes first."""
    order = 1 if first_wins else -1
    chosen, rejected = answers[::order]
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "models": models[::order],
        "seeds": seeds[::order],
    }


def two(entry, field):
    if not isinstance(entry.get(field), list) or len(entry[field]) != 2:
        raise ValueError(f'"{field}" is not a list of two')
    return entry[field]


def checked_name(model):
    if not isinstance(model, str) or len(model) > 1000:
        raise ValueError("the name of a model is not a string, or too long")
    return model


def checked_seed(number):
    if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
        raise ValueError("a seed is not an integer")
    return number


def identity(kind, row):
    """(key, said): two rows of one key are of the same voter on the same answers, and only one
    counts; `said` tells a repetition from a change of mind."""
    if kind in ("pairs", "ties"):
        about = "vote", row["prompt"], sorted(row.get("answers") or [row["chosen"], row["rejected"]])
        said = row.get("vote") or digest(row["chosen"])  # the text itself would fill a server's memory
    elif kind == "ratings":
        about, said = ("rating", row["prompt"], row["completion"]), row["label"]
    else:
        about, said = ("correction", row["messages"]), True
    return digest([about, row.get("by", "")]), said


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).digest()


# --------------------------------------------------------------------------------------------------
# The files, while a server writes them


class Journal:
    """The four files of a directory, and the thread that appends to them.

    A row is on the disk (fsync) before `append` says so; rows that wait together share the fsync.
    Raises UserError if a file holds what no server wrote, or another process writes here.
    """

    def __init__(self, folder):
        self.folder, self.waiting = Path(folder), queue.SimpleQueue()
        self.said, self.counts, self.matches = {}, Counter(), Counter()
        self.newest = {kind: deque(maxlen=NEWEST) for kind in KINDS}
        lock_file(self.folder / ".lock", folder, "feedback")
        self.sizes = {kind: self.take_over(kind) for kind in KINDS}
        flush(self.folder)
        threading.Thread(target=self.write_all, daemon=True).start()

    def path(self, kind):
        return self.folder / f"{kind}.jsonl"

    def stored(self, kind):
        """The bytes of a file that are on the disk: whole lines, while more may be written."""
        size = self.sizes[kind]
        with open(self.path(kind), "rb") as f:
            return f.read(size)

    def take_over(self, kind):
        """Count the rows of a file, which is made if it is not there -> its size.

        Part of a line at its end, which a kill may leave, was never acknowledged. It is moved to
        another file, in case that somebody has edited this one.
        """
        path = self.path(kind)
        try:
            append(path, b"")
            found, torn = read_rows(path)
            for number, row in found:
                try:
                    self.remember(kind, row)
                except (KeyError, TypeError, ValueError) as e:
                    raise UserError(f"{path}:{number}: not a row that serve.py wrote ({e!r}); remove it") from None
            if torn:
                append(path.with_suffix(".torn"), torn + b"\n")
                print0(f"warning: {path}: the part of a line at its end is moved to {path.with_suffix('.torn')}")
            size = append(path, b"", path.stat().st_size - len(torn))
            return size if path.read_bytes()[-1:] in (b"", b"\n") else append(path, b"\n")
        except OSError as e:
            raise UserError(f"{path}: {e.strerror}") from None

    def remember(self, kind, row):
        """Count a row that is on the disk. Raises KeyError, TypeError or ValueError for others."""
        key, said = identity(kind, row)
        if not isinstance(row.get("time") or 0, int | float):
            raise ValueError('"time" is not a number')
        if kind in ("pairs", "ties"):
            winner, loser = map(checked_name, row["models"])
            self.matches[winner, loser, row.get("vote", "win")] += 1
        self.said[key] = said
        self.counts[row.get("vote") or kind] += 1
        self.newest[kind].append({"kind": kind} | row)

    def append(self, kind, row):
        """A Future: True once the row is on the disk, False if the same voter had said the same.

        Its exceptions: ValueError if the voter said something else before; OSError if the disk
        takes no more, and then the file is as it was, or if somebody else has changed the file.
        """
        done = Future()
        self.waiting.put((kind, row, done))
        return done

    def write_all(self):
        while True:
            batch = [self.waiting.get()]
            while not self.waiting.empty():
                batch.append(self.waiting.get())
            for kind in KINDS:
                self.write(kind, [(row, done) for k, row, done in batch if k == kind])

    def write(self, kind, batch):
        """Append the new ones of [(row, Future)] to a file, with one fsync."""
        new = {}  # key: (row, Future)
        for row, done in batch:
            key, said = identity(kind, row)
            if key in new:  # the same voter twice at once: look at it after the first is on the disk
                self.waiting.put((kind, row, done))
            elif key not in self.said:
                new[key] = row, done
            elif self.said[key] == said:
                done.set_result(False)
            else:
                done.set_exception(ValueError("you have judged these answers already; the first word counts"))
        if not new:
            return
        path, size = self.path(kind), self.sizes[kind]
        lines = json_lines(row for row, _ in new.values()).encode()
        try:
            self.sizes[kind] = extend(path, lines, size)
        except OSError as e:
            for _, done in new.values():
                done.set_exception(e)
            return
        for row, done in new.values():
            self.remember(kind, row)
            done.set_result(True)


def extend(path, data, size):
    """Append to a file of so many bytes -> its new size.

    Raises OSError if the disk takes no more, or if the file has another size; it is then left as it
    was.
    """
    if path.stat().st_size != size:
        raise OSError(0, f"somebody else has changed {path}; the server must be started again")
    try:
        return append(path, data)
    except OSError:
        with contextlib.suppress(OSError):
            append(path, b"", size)  # whole lines may have been written: nobody was told so
        raise


def read_rows(path):
    """([(line number, row)], torn): the rows of a file that a server may be writing.

    torn: the bytes at its end that are no whole row. Raises OSError, or UserError naming a line
    that is no row.
    """
    whole, found, size = Path(path).read_bytes(), [], 0
    for number, line in enumerate(whole.splitlines(keepends=True), 1):
        try:
            if line.strip():
                found.append((number, parse_row(line.decode("utf-8-sig").strip())))
        except (ValueError, RecursionError) as e:
            if line[-1:] not in b"\r\n":
                break
            raise UserError(f"{path}:{number}: {reason(e)}; correct or remove the line") from None
        size += len(line)
    return found, whole[size:]


# --------------------------------------------------------------------------------------------------
# Frozen files


def freeze(path, kind):
    """The rows of a file that a server may be writing, each checked as its trainer reads it."""
    try:
        found, _ = read_rows(path)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; no vote of this kind has been cast yet?") from None
    for number, row in found:
        try:
            PARSE[kind](row)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}:{number}: {reason(e)}; correct or remove the line") from None
    return [row for _, row in found]


def write_rows(files, overwrite):
    """Write {path: rows}, each file whole or not at all, and none if one is there already; says how
    many rows."""
    for path in files:
        if path.exists() and not overwrite:
            raise UserError(f"{path}: exists; --overwrite=True replaces it, but a run that reads it would be refused")
    for path, found in files.items():
        replace_text(path, json_lines(found))
        print(f"{path}: {len(found):,} rows")


# --------------------------------------------------------------------------------------------------
# Open WebUI's export: a JSON array of {"type": "rating", "user_id", "data": {"rating": 1 or -1,
# "model_id", "sibling_model_ids"}, "meta": {"message_id"},
# "snapshot": {"chat": {"chat": {"history"}}}}


def content_of(message):
    """What a message of Open WebUI says; raises ValueError if a thought or a tool call is folded
    into it, as HTML that no model wrote so."""
    content = message.get("content")
    if folded := re.search(r'<details type="(\w+)"', content or ""):
        raise ValueError(f'"content" has <details type="{folded[1]}">, which is not read')
    return content


def open_webui_rows(item):
    """[(kind, row)] of one item: the rating, and a pair with each answer that it was compared with.

    Those are the other answers to the same question by "sibling_model_ids"; they lose against +1
    and win against -1. Raises ValueError or KeyError saying what is missing.
    """
    data, conversation = item["data"], item["snapshot"]["chat"]["chat"]
    messages = conversation["history"]["messages"]
    label = {"1": True, "-1": False}.get(str(data.get("rating")))
    if label is None:
        raise ValueError(f'"rating" is {data.get("rating")!r}; 1 or -1 was expected')
    answer = messages[item["meta"]["message_id"]]
    if answer.get("done") is False:
        raise ValueError('"done" is false: the answer was cut')
    question = parent = messages[answer["parentId"]]
    prompt = []
    while parent and len(prompt) < len(messages):  # a damaged history may run in a circle
        prompt.insert(0, {"role": parent.get("role"), "content": content_of(parent), "files": parent.get("files")})
        parent = messages.get(parent.get("parentId"))
    if system := (conversation.get("params") or {}).get("system"):
        prompt.insert(0, rows.message("system", system))
    prompt = rows.ends_with(rows.check_messages(prompt, "messages"), "user", "messages")
    said = {name: data[name] for name in ("reason", "comment") if data.get(name)}
    end = {"time": item.get("created_at"), "by": str(item.get("user_id") or "")} | said
    completion, model = rows.text_of(content_of(answer), "content").rstrip(), str(data.get("model_id"))
    rating = {"prompt": prompt, "completion": completion, "label": label, "model": model, "seed": None}
    found = [("ratings", rating | end)]
    for child in question.get("childrenIds", []):
        other = messages.get(child, {})
        other_model = other.get("selectedModelId") or other.get("model")  # the first: of an arena, which hides it
        compared = other_model in (data.get("sibling_model_ids") or []) and other.get("done") is not False
        other_text = (content_of(other) or "").rstrip() if compared else ""
        if other_text.strip() not in ("", completion.strip()):
            pair = pair_row(prompt, [completion, other_text], [model, other_model], [None, None], label)
            found.append(("pairs", pair | end))
    return found


def read_open_webui(path):
    """{"pairs": rows, "ratings": rows} of an export; raises UserError naming the item."""
    try:
        items = json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON ({e}); export it again") from None
    if not isinstance(items, list):
        raise UserError(f"{path}: an array of feedback was expected, as Open WebUI exports it")
    found, unrated = [], 0
    for i, item in enumerate(items):
        try:
            if item["type"] != "rating":
                raise ValueError(f'"type" is {item["type"]!r}; rating was expected')
            if item["data"].get("rating") is None:  # a comment
                unrated += 1
                continue
            for kind, row in open_webui_rows(item):
                PARSE[kind](row)
                found.append((kind, row))
        except KeyError as e:
            raise UserError(f"{path}: item {i} has no {e}; correct or remove it") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(f"{path}: item {i}: {reason(e)}; correct or remove it") from None
    if unrated:
        print(f"{path}: {unrated:,} comments without a rating are left out")
    found = once(found)
    return {name: [row for kind, row in found if kind == name] for name in ("pairs", "ratings")}


def once(found):
    """[(kind, row)] without what a voter had said before, and without pairs of answers that he
    rated alike."""
    kept, labels = {}, {}
    for kind, row in found:
        key, said = identity(kind, row)
        kept.setdefault(key, (kind, row))
        labels.setdefault(key, said)

    def label(row, answer):
        key, _ = identity("ratings", row | {"completion": answer, "label": None})
        return labels.get(key)

    return [
        (kind, row)
        for kind, row in kept.values()
        if kind == "ratings" or label(row, row["chosen"]) != label(row, row["rejected"])
    ]


def main(config):
    check_ranges(config)
    if bool(config.feedback) == bool(config.open_webui):
        raise UserError("one of --feedback and --open_webui must be given, and not both")
    if config.open_webui:
        found = read_open_webui(config.open_webui)
        lock_file(Path(config.out) / ".lock", config.out)  # a server may be writing there
        write_rows({Path(config.out) / f"{kind}.jsonl": kept for kind, kept in found.items()}, config.overwrite)
        return
    earlier = config.after.split(",") if config.after else []
    check_apart("out", config.out, [*earlier, *(Path(config.feedback) / f"{kind}.jsonl" for kind in KINDS)])
    found = freeze(Path(config.feedback) / f"{config.kind}.jsonl", config.kind)
    known = {json.dumps(row) for path in earlier for row in freeze(path, config.kind)}
    found = [row for row in found if json.dumps(row) not in known]
    if not found:
        raise UserError(f"--feedback={config.feedback}: no {config.kind} to freeze; collect some first")
    write_rows({Path(config.out): found}, config.overwrite)


if __name__ == "__main__":
    launch(main, Config)
