"""Text to token ids and back: byte-level BPE, trained here, run by tiktoken.

    text --PATTERN--> pieces (words, digits, punctuation) --UTF-8--> bytes --merges--> tokens

Training begins with the 256 bytes as tokens and repeats: count the pairs of neighboring tokens
inside the pieces, make the commonest pair a new token. Encoding repeats the same merges, earliest
first, so a token's id is its priority; `parts` spells that out for one token. Any byte is a token,
so no text is out of vocabulary. The last ids are the SPECIALS, which mark structure: text never
yields them, not even text that spells them. A downloaded tokenizer may have added tokens that are
not special, as Qwen3's <think>: these are text, and text yields them.

Stored as Hugging Face's tokenizer.json. Read as well: any byte-level-BPE tokenizer.json (Llama 3,
Qwen, GPT-4o, ...), GPT-2's files, tiktoken's own names. Left out: sentencepiece, WordPiece and
Unigram, and vocabularies whose ids do not follow the order of their merges (OPT, RoBERTa): tiktoken
has one number for both, and no model that Feinschliff loads needs two.

    python -m data.tokenizer --data=corpus.txt,more.jsonl --out=out/tok --vocab_size=4096
"""

import hashlib
import heapq
import json
import re
import time
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import islice, pairwise, zip_longest
from pathlib import Path

import numpy as np
import regex
import tiktoken

from data import template
from data.read import LONG_SPACE, file_kind, good_texts, parse_mixture, read_json, read_lines
from data.workers import batches, in_order
from runtime.cli import check_ranges, launch
from runtime.errors import UserError
from runtime.files import check_writable, write_json


@dataclass
class Config:
    # -- What you will set --
    # comma-separated: .jsonl, .parquet or hf:NAME[configuration,split,rows] with a string "text" in
    # each row (formats: data/read.py), anything else as plain text
    data: str
    # directory for tokenizer.json and tokenizer_config.json
    out: str
    # ids in all: 256 bytes, merges, 4 special tokens (bpe only)
    vocab_size: int = 4096

    # -- What you may set --
    # char: the characters of the data; byte: the 256 bytes [one of bpe, char, byte]
    kind: str = "bpe"
    # processes that count pieces (bpe only) [>= 1]
    workers: int = 1
    # leave bad lines out and count them
    skip_bad: bool = False
    # replace the tokenizer.json in --out
    overwrite: bool = False


EOT_KEY = "end_of_document_token"  # of our tokenizer_config.json, where eos_token ends a turn
SPECIALS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")

# GPT-4's pattern with three changes: single digits (numbers are spelled alike, so sums generalize),
# combining marks stay with their letters, and no possessive quantifiers and no (?i:...), so that
# the regex engines of tiktoken, Hugging Face and Python cut alike.
PATTERN = "|".join(
    (
        r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])",  # 's, 'll and other English endings
        r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+",  # a word, with the space or other character before it
        r"\p{N}",  # a digit
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",  # punctuation, with the line ends after it
        r"\s*[\r\n]+",  # line ends
        r"\s+(?!\S)|\s+",  # other white space, except the space that the next word takes
    )
)
CHARACTER = r"[\s\S]"  # the pattern of a character vocabulary: every character is a piece
# GPT-2's pattern, in tiktoken's spelling
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+\z|\s+(?!\S)|\s"
# SmolLM's and StarCoder's: GPT-2's between digits, so white space may also end at a digit
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+\z|\s+(?!\S)|\s"

BATCH = 2**20  # characters that a worker counts at once
# A longer piece (base64, a rule of dashes) is counted in stretches of 100 characters, so that one
# line cannot stall training.
LONG_PIECE = 100
SAMPLE = 2**16  # characters of a document that are shown in tokens
# An imported vocabulary beyond these is damaged; it would cost too much time and memory.
LONG_TOKEN, MAX_ID = 512, 2**20
LONG_PATTERN = 2000  # characters; GPT-4o's, the longest in use, has 350
SQUARES = 2**25  # sum of squared lengths of tokens, the cost of `parts`; GPT-2: 2.5 million

# GPT-2 writes the bytes of a token as printable characters, those that are not printable from
# U+0100 on. Every tokenizer.json follows.
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
UNPRINTABLE = [b for b in range(256) if b not in PRINTABLE]
BYTE_TO_CHAR = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(UNPRINTABLE)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


class Tokenizer(tiktoken.Encoding):
    """A tiktoken.Encoding, and what tokenizer.json says beyond it.

    Text goes in by `encode_ordinary`, special tokens by `encode_single_token`.
    """

    def __init__(
        self,
        name,
        pat_str,
        mergeable_ranks,
        special_tokens,
        nfc=False,
        eot="<|endoftext|>",
        pad="<|pad|>",
        added=(),
        bos=None,
        eos_ids=(),
        template=None,
    ):
        super().__init__(name, pat_str=pat_str, mergeable_ranks=mergeable_ranks, special_tokens=special_tokens)
        self.options = {"nfc": nfc, "eot": eot, "pad": pad, "added": added, "bos": bos, "eos_ids": eos_ids}
        self.options["template"] = template
        self.nfc = nfc  # NFC-normalize a text first (Qwen)
        self.eot = special_tokens[eot]  # id that begins and ends a document
        self.pad = special_tokens[pad]  # id for other people's padding; may be eot's
        self.bos = self.eot if bos is None else bos  # id that begins a document; eot unless the model has its own
        self.eos_ids = eos_ids  # that end what its model writes, by config.json and generation_config.json
        self.template = template  # the data.template.Template of its model's chats, None if it has none
        self.added = added  # the rows of tokenizer.json's added_tokens, () for a tokenizer made here
        structural = {self.eot, self.bos, *eos_ids}  # these no text may yield
        self.text_tokens = [row for row in added if not (row.get("special", True) or row["id"] in structural)]
        text_ids = {row["id"] for row in self.text_tokens}
        self.special_ids = frozenset(special_tokens.values()) - text_ids  # that no text yields
        contents = sorted((row["content"] for row in self.text_tokens), key=len, reverse=True)
        self.text_pattern = re.compile("|".join(map(re.escape, contents)))  # of several at one place the longest
        self.longest_token = max(map(len, mergeable_ranks))  # in bytes
        self.missing_bytes = {b for b in range(256) if bytes([b]) not in mergeable_ranks}

    def encode_ordinary(self, text):
        """The ids of a text, never a special one.

        Raises UserError for a character that the vocabulary lacks, and for a text that tiktoken
        cannot cut into pieces.
        """
        if not self.text_tokens:
            return self.encode_plain(text)
        ids, begin = [], 0
        for start, end, i in self.find_text_tokens(text):
            ids += [*self.encode_plain(text[begin:start]), i]
            begin = end
        return ids + self.encode_plain(text[begin:])

    def find_text_tokens(self, text):
        """Yield (start, end, id) of the added tokens in a text, as Hugging Face's `tokenizers`
        finds them: some only as whole words, some with the white space before or after them."""
        rows, begin = {row["content"]: row for row in self.text_tokens}, 0
        for match in self.text_pattern.finditer(text):
            start, end, row = match.start(), match.end(), rows[match[0]]
            beside = text[max(0, start - 1) : start] + text[end : end + 1]
            if start < begin or row.get("single_word") and regex.search(r"[\w\p{M}]", beside):
                continue
            if row.get("lstrip"):
                start = max(begin, len(text[:start].rstrip()))
            if row.get("rstrip"):
                end = len(text) - len(text[end:].lstrip())
            yield start, end, row["id"]
            begin = end

    def encode_plain(self, text):
        """The ids of a text in which no added token is looked for."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if self.missing_bytes:
            self.check_characters(text)
        if len(text) > LONG_SPACE and max(map(len, re.findall(r"\s+", text)), default=0) > LONG_SPACE:
            raise UserError(
                f"a text of {len(text)} characters has more than {LONG_SPACE} white-space characters in a row; "
                "shorten them"
            )
        try:
            return super().encode_ordinary(text)
        except BaseException as e:
            if type(e).__name__ != "PanicException":
                raise
            raise UserError(
                f"tiktoken gave up on a text of {len(text)} characters: "
                f"the pattern of this tokenizer takes too many steps on it ({e})"
            ) from None

    def check_characters(self, text):
        """Raises UserError if a vocabulary without all bytes lacks a character of the text."""
        for char in set(text):
            raw = char.encode("utf-8", "surrogatepass")
            whole = self._pat_str == CHARACTER and raw in self._mergeable_ranks
            if not whole and not self.missing_bytes.isdisjoint(raw):
                raise UserError(
                    f"{char!r} (U+{ord(char):04X}) is not in the vocabulary; "
                    "take it out of the text, or use a byte-level tokenizer"
                )

    def decode_single_token_bytes(self, token):
        """The bytes of an id, b"" for an id without a token.

        A model with a padded vocabulary may sample such an id.
        """
        try:
            return super().decode_single_token_bytes(token)
        except KeyError:
            return b""

    def decode(self, tokens, errors="replace"):
        """The text of some ids, U+FFFD for bytes that are not UTF-8."""
        return b"".join(map(self.decode_single_token_bytes, tokens)).decode("utf-8", errors)

    def __getstate__(self):
        """The arguments of __init__: tiktoken pickles an encoding by them, for worker processes."""
        return super().__getstate__() | self.options


# -------------------------------------------------------------------------------------------------
# Making a tokenizer


def train(documents, vocab_size, workers=1):
    """Byte-level BPE of `vocab_size` ids in all, from an iterable of texts that is read once.

    `workers` processes count the pieces. Memory grows with the number of different pieces. The
    result depends on the texts alone, not on their order or the workers. Only pairs that occur
    twice are merged. Raises UserError naming the vocabulary that a small corpus supports, for
    nobody would notice fewer ids.
    """
    least = 256 + len(SPECIALS)
    n = vocab_size - least
    if n < 0:
        raise UserError(f"--vocab_size={vocab_size}: at least {least} is needed, for the bytes and the special tokens")
    counts = Counter()
    for part in in_order(count_pieces, (), batches(documents, BATCH), workers):
        counts.update(part)
    pieces = Counter()
    for piece, count in counts.items():
        for i in range(0, len(piece), LONG_PIECE):
            pieces[piece[i : i + LONG_PIECE].encode("utf-8", "surrogatepass")] += count
    merged = learn_merges(pieces, n)
    if len(merged) < n:
        raise UserError(
            f"--vocab_size={vocab_size}: the corpus has only {len(merged)} pairs to merge; "
            f"give more text, or --vocab_size={least + len(merged)}"
        )
    tokens = [bytes([b]) for b in range(256)] + merged
    return with_specials("bpe", PATTERN, {token: i for i, token in enumerate(tokens)}, {})


def count_pieces(texts):
    return Counter(piece for text in texts for piece in regex.findall(PATTERN, text))


def learn_merges(pieces, n):
    """BPE's training: {piece: count} -> up to `n` new tokens, in the order in which they are made.

    Of equally common pairs the one of lower ids wins. A piece is held as a str with a character for
    each token, chr(id): then a pair is a str of two, and merging it is str.replace.
    """
    words, weights = [piece.decode("latin-1") for piece in pieces], list(pieces.values())
    counts = defaultdict(int)  # pair -> occurrences
    where = defaultdict(set)  # pair -> indices of the words that contain it, or did
    for i, word in enumerate(words):
        for a, b in pairwise(word):
            counts[a + b] += weights[i]
            where[a + b].add(i)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    tokens = [bytes([b]) for b in range(256)]
    while heap and len(tokens) < 256 + n:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:  # out of date: an old pair's count only falls, so it comes later
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        if -count < 2:
            break
        new, born = chr(len(tokens)), set()
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
        for i in where.pop(pair):
            old, word = words[i], words[i].replace(pair, new)
            words[i] = word
            for a, b in pairwise(old):
                counts[a + b] -= weights[i]
            for a, b in pairwise(word):
                counts[a + b] += weights[i]
                if new in (a, b):
                    where[a + b].add(i)
                    born.add(a + b)
        for pair in born:
            heapq.heappush(heap, (-counts[pair], pair))
    return tokens[256:]


def characters(text):
    """The sorted characters of `text`, then the SPECIALS.

    Encoding any other character raises UserError.
    """
    if not text:
        raise UserError("a vocabulary of characters needs some text")
    return with_specials("characters", CHARACTER, {c.encode(): i for i, c in enumerate(sorted(set(text)))}, {})


def byte_level():
    """The 256 bytes, then the SPECIALS."""
    return with_specials("bytes", PATTERN, {bytes([b]): b for b in range(256)}, {})


def with_specials(name, pattern, ranks, specials):
    """A Tokenizer that appends those of the SPECIALS that `specials` lacks, after all other ids."""
    end = max([*ranks.values(), *specials.values()]) + 1
    return Tokenizer(name, pattern, ranks, append_missing(specials, SPECIALS, end))


def with_turns(tok):
    """The same tokenizer, with <|im_start|> and <|im_end|> appended if it lacks them.

    What ends its documents and what pads stays. A tokenizer whose model has a chat template of its
    own has what it needs.
    """
    if tok.template:
        return tok
    specials = append_missing(tok._special_tokens, SPECIALS[2:], tok.n_vocab)
    return Tokenizer(**tok.__getstate__() | {"special_tokens": specials})


def append_missing(specials, wanted, end):
    """{special token: id}, with those of `wanted` that it lacks given the ids from `end` on."""
    return specials | {s: end + i for i, s in enumerate(s for s in wanted if s not in specials)}


# -------------------------------------------------------------------------------------------------
# Reading one


def load(where):
    """The tokenizer in a folder (a checkpoint, prepared data, a download), or of a tiktoken name.

    The folder has a tokenizer.json or GPT-2's two files; a path to a tokenizer.json will do. Ids
    are kept. Raises UserError naming the file and what in it is damaged, or impossible with
    tiktoken.
    """
    path = Path(where)
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        try:
            return read_tokenizer_json(file)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError, regex.error) as e:
            raise UserError(
                f"{file}: damaged ({type(e).__name__}: {str(e)[:200]}); download or write it again"
            ) from None
    if (path / "vocab.bpe").is_file():
        return gpt2(path)
    if (path / "config.json").is_file():
        raise UserError(
            f"{where}: has no tokenizer.json; the tokenizer's save_pretrained of transformers writes it, unless it is "
            "one of sentencepiece, which is not read"
        )
    folders = "a folder with tokenizer.json, or with encoder.json and vocab.bpe"
    names = tiktoken.list_encoding_names()
    if str(where) not in names:
        raise UserError(f"{where}: expected {folders}, or one of {', '.join(names)}")
    try:
        theirs = tiktoken.get_encoding(str(where))
    except (OSError, ValueError) as e:
        raise UserError(
            f"{where}: tiktoken cannot download it ({type(e).__name__}); "
            f"go online, set TIKTOKEN_CACHE_DIR to a folder that has it, or give {folders}"
        ) from None
    pattern = without_possessives(theirs._pat_str)
    return with_specials(theirs.name, pattern, theirs._mergeable_ranks, theirs._special_tokens)


def without_possessives(pattern):
    """A pattern of tiktoken's for Hugging Face's engine, too.

    To that engine {1,3}+ is not possessive, and $ ends a line. Here possessives only save time.
    """
    return re.sub(r"(?<=[?*+])\+|(?<=\d\})\+", "", pattern).replace("$", r"\z")


def gpt2(folder):
    """GPT-2's tokenizer from its encoder.json and vocab.bpe, completed with the SPECIALS."""
    file = Path(folder) / "encoder.json"
    vocab = read_json(file)
    lines = islice(read_lines(file.with_name("vocab.bpe")), 1, None)  # after "#version: 0.2"
    merges = [line.split() for _, line in lines]
    specials = {"<|endoftext|>": vocab.get("<|endoftext|>")}
    return with_specials("gpt2", GPT2_PATTERN, checked_ranks(file, vocab, merges, specials), specials)


def read_tokenizer_json(path):
    """A byte-level-BPE tokenizer.json; the tokenizer_config.json next to it names eos and pad.

    Damage may also surface as a KeyError, TypeError and such.
    """
    config_file = path.with_name("tokenizer_config.json")
    config = read_json(config_file) if config_file.exists() else {}
    spec = read_json(path)
    model, added = spec["model"], spec.get("added_tokens") or []
    normalizers = single_steps(spec.get("normalizer"), "normalizers")
    options = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    unknown = [f"BPE with {option}" for option in options if model.get(option)]
    unknown += [f"normalizer {step['type']}" for step in normalizers if step["type"] != "NFC"]
    if model.get("type", "BPE") != "BPE":
        unknown = [f"model {model['type']}"]
    if unknown:
        raise UserError(
            f"{path}: {unknown[0]} is not supported, only byte-level BPE with or without NFC (as in Llama 3 and Qwen)"
        )
    pattern = split_pattern(path, single_steps(spec["pre_tokenizer"], "pretokenizers"), config)
    # Hugging Face finds all added tokens in a text; here text yields none of them.
    specials = {token["content"]: token["id"] for token in added}
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    ranks = checked_ranks(path, model["vocab"], merges, specials, model.get("ignore_merges", False))
    eot = end_of_document(path, specials, template.token_text(config.get(EOT_KEY) or config.get("eos_token")))
    pad = next(s for s in ("<|pad|>", template.token_text(config.get("pad_token")), eot) if s in specials)
    bos = begin_of_text(path, spec.get("post_processor"))
    largest = max([*ranks.values(), *specials.values()])
    eos_ids = tuple(i for i in template.read_eos_ids(path.parent) if i <= largest)  # no model writes another
    own_template, nfc = template.read_template(path.parent, config), bool(normalizers)
    check_added(path, config, specials, own_template)
    return Tokenizer(path.parent.name, pattern, ranks, specials, nfc, eot, pad, added, bos, eos_ids, own_template)


def check_added(path, config, specials, own_template):
    """Raises UserError for a token that another file adds to those of tokenizer.json, as
    transformers then does: text would yield other ids than with this model's own tokenizer."""
    named, more = [], path.with_name("added_tokens.json")
    for key in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        value = config.get(key) or []
        named += map(template.token_text, value.values() if isinstance(value, dict) else value)
    named += read_json(more) if more.is_file() else []
    if own_template:  # which may write these
        named += [text for name, text in own_template.tokens if name in own_template.source]
    for content in named:
        if content not in specials:
            raise UserError(
                f"{path}: lacks the token {str(content)[:80]!r}, which a file beside it adds; save the tokenizer "
                "again: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of transformers"
            )


def begin_of_text(path, processor):
    """The id that a tokenizer.json puts before every text, None if it puts none.

    transformers 5 goes by the post-processor alone, not by add_bos_token. Raises UserError if there
    are several ids, or a processor that may put others.
    """
    steps = single_steps(processor, "processors")
    unknown = [step["type"] for step in steps if step["type"] not in ("ByteLevel", "TemplateProcessing")]
    if unknown:
        raise UserError(
            f"{path}: post_processor {unknown[0]} is not supported, only TemplateProcessing; write what it puts before "
            "a text as one of these"
        )
    templates = [step for step in steps if step["type"] == "TemplateProcessing"]
    if not templates:
        return None
    begin = []
    for part in templates[-1]["single"]:
        if "SpecialToken" not in part:
            break
        begin += templates[-1]["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    if len(begin) > 1:
        raise UserError(f"{path}: the post_processor puts {len(begin)} tokens before a text; one at most is supported")
    return begin[0] if begin else None


def end_of_document(path, specials, eos):
    """The added token that ends documents; eos: the eos_token of tokenizer_config.json, or None.

    Raises UserError saying how to get one.
    """
    names = ("<|endoftext|>", "<|end_of_text|>", "</s>", eos)
    for name in names:
        if name in specials:
            return name
    add = 'add one with tokenizers: tokenizer.add_special_tokens(["<|endoftext|>"]); tokenizer.save("tokenizer.json")'
    if not specials:
        raise UserError(f"{path}: has no added tokens, so none ends documents; {add}")
    if eos:
        raise UserError(f"{path}: the eos_token {eos!r} of tokenizer_config.json is not an added token; {add}")
    raise UserError(
        f"{path}: no added token <|endoftext|>, <|end_of_text|> or </s> ends documents; "
        f"name one of {', '.join(list(specials)[:5])} as eos_token in tokenizer_config.json, or {add}"
    )


def single_steps(part, inner):
    """A normalizer or pre-tokenizer as a list of single steps."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for p in part[inner] for step in single_steps(p, inner)]


def split_pattern(path, steps, config):
    """The regex whose matches are the pieces that these pre-tokenizers make; config: the
    tokenizer_config.json.

    Raises UserError if they are unknown, or tiktoken would make other pieces.
    """
    own_regex = bool(steps) and steps[-1].get("use_regex", True)
    match steps:
        case [{"type": "ByteLevel"}] if own_regex:
            pattern = GPT2_PATTERN
        case [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}] if own_regex:
            pattern = DIGITS_PATTERN
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert},
            {"type": "ByteLevel"},
        ] if not own_regex and (behavior, invert) in (("Isolated", False), ("Removed", True)):
            check_pattern(path, pattern)
        case _:
            kinds = " + ".join(step["type"] for step in steps) or "none"
            raise UserError(
                f"{path}: pre_tokenizer {kinds} with these settings is not supported: {json.dumps(steps)[:300]}"
            )
    if steps[-1].get("add_prefix_space") or config.get("add_prefix_space"):  # the default of tokenizers' ByteLevel()
        raise UserError(
            f"{path}: ByteLevel with add_prefix_space (here or in tokenizer_config.json), which adds a space to every "
            "text, is not supported; train the tokenizer with ByteLevel(add_prefix_space=False)"
        )
    return pattern


def check_pattern(path, pattern):
    """Raises UserError unless tiktoken makes the same pieces with the pattern."""
    if len(pattern) > LONG_PATTERN:
        raise UserError(f"{path}: the pattern has {len(pattern)} characters, more than {LONG_PATTERN}: damaged")
    if re.search(r"\d,?\}\+|(?<![\\\[])[$^]", pattern):
        raise UserError(
            f"{path}: in {pattern!r}, {{n,m}}+, ^ or $ means one thing to Hugging Face and another to tiktoken; "
            "rewrite it"
        )
    one_of_each = (
        "aZ15'_-.$\u20ac \t\n\r\v\0\xa0\u20dd\xe9\u200d\u2028\u3000\u4e2d\u0639"
        "\u0967\xb2\u01c5\u02b0\U0001f600\U0010ffff"
    )
    probe = "".join(a + b for a in one_of_each for b in one_of_each)
    try:
        pieces = [match[0] for match in regex.finditer(pattern, probe, flags=regex.V1, timeout=0.2)]
    except (TimeoutError, MemoryError):  # recursion, which tiktoken does not know, takes endless memory
        raise UserError(f"{path}: the pattern {pattern!r} takes too long even on short texts; rewrite it") from None
    if "" in pieces or "".join(pieces) != probe:
        raise UserError(f"{path}: the pattern {pattern!r} does not match all text; tiktoken would lose the rest")


def check_ids(path, vocab, specials):
    """Raises UserError if an imported vocabulary has impossible, too many or repeated entries."""
    for text, i in [*vocab.items(), *specials.items()]:
        if type(i) is not int or not 0 <= i < MAX_ID or not 0 < len(text) <= LONG_TOKEN:
            raise UserError(
                f"{path}: {text[:40]!r}, a token of {len(text)} characters, has the id {str(i)[:40]}: "
                "damaged (see LONG_TOKEN, MAX_ID)"
            )
    if sum(len(text) ** 2 for text in vocab) > SQUARES:
        raise UserError(f"{path}: {len(vocab)} tokens, of which too many are too long: damaged (see SQUARES)")
    entries = {*vocab.items(), *specials.items()}
    for column in (0, 1):
        value, n = Counter(entry[column] for entry in entries).most_common(1)[0]
        if n > 1:
            same = sorted(str(entry) for entry in entries if entry[column] == value)
            raise UserError(f"{path}: {value!r} occurs {n} times: {', '.join(same)}")


def checked_ranks(path, vocab, merges, specials, whole_pieces=False):
    """{token bytes: id} of an imported vocabulary.

    Raises UserError unless tiktoken makes the same ids of it as the file's own merges do. The file
    says which *pairs* merge, in order; tiktoken merges the pair whose *result* has the lowest id.
    They agree if the file lists, in the order of the ids, the pair that each token is merged from
    (`merge_of_each`). More pairs do no harm, they never come up (Llama 3 lists every way to halve a
    token). Tokens that no merge makes are found only as whole pieces: always by tiktoken, with
    ignore_merges (`whole_pieces`) by Hugging Face.
    """
    check_ids(path, vocab, specials)
    try:
        as_bytes = {text: bytes([CHAR_TO_BYTE[c] for c in text]) for text in vocab if text not in specials}
        listed = [(as_bytes[a], as_bytes[b], as_bytes[a + b])[:2] for a, b in merges]
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{path}: vocabulary and merges disagree, or this is not byte-level BPE ({type(e).__name__}: {e})"
        ) from None
    ranks = {token: vocab[text] for text, token in as_bytes.items()}
    merge_of = merge_of_each(ranks)
    ours, known = list(merge_of.values()), set(merge_of.values())
    theirs = [pair for pair in dict.fromkeys(listed) if pair in known]
    for by_ids, by_merges in zip_longest(ours, theirs):
        if by_ids != by_merges:
            raise UserError(
                f"{path}: by the ids the next merge is {by_ids}, by the merges {by_merges}; the file is damaged, "
                "or its ids do not follow the order of its merges (OPT, RoBERTa), which tiktoken needs"
            )
    unmade = [token for token in ranks if len(token) > 1 and token not in merge_of]
    if unmade and not whole_pieces:
        raise UserError(f"{path}: no merge makes the token {unmade[0]}; vocabulary and merges disagree")
    return ranks


def merge_of_each(ranks):
    """{token: (left, right)}, in the order of the ids: what each token is merged from.

    Bytes and tokens that merging never reaches are left out.
    """
    found = {token: tuple(parts(token, ranks)) for token in sorted(ranks, key=ranks.get)}
    return {token: pair for token, pair in found.items() if len(pair) == 2 and ranks.keys() >= set(pair)}


def parts(token, ranks):
    """The parts of a token that BPE would make if the token itself did not exist.

    Merges the neighbors whose union has the lowest id until two are left or no union is a token.
    """
    found = [token[i : i + 1] for i in range(len(token))]
    while len(found) > 2:
        ids = [ranks.get(a + b, MAX_ID) for a, b in pairwise(found)]
        i = ids.index(min(ids))
        if ids[i] == MAX_ID:
            break
        found[i : i + 2] = [found[i] + found[i + 1]]
    return found


# -------------------------------------------------------------------------------------------------
# Writing one, and what others ask of it


def printable(token):
    """The bytes of a token as tokenizer.json writes them."""
    return "".join(BYTE_TO_CHAR[b] for b in token)


def save(tok, folder, chat_template="", eos=None):
    """Write tokenizer.json and tokenizer_config.json.

    AutoTokenizer.from_pretrained(folder) then gives the same ids as `encode_ordinary`. eos: the id
    that ends what its model writes; by default the one that ends documents.
    """
    ranks, specials = tok._mergeable_ranks, tok._special_tokens
    vocab = {printable(token): ranks[token] for token in sorted(ranks, key=ranks.get)}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,  # like tiktoken: a piece that is a token needs no merging
        "vocab": vocab | specials,  # without the specials, those after a gap would lose their ids
        "merges": [[printable(left), printable(right)] for left, right in merge_of_each(ranks).values()],
    }
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    known = {row["content"]: row for row in tok.added}
    added = [
        plain | known.get(s, {}) | {"id": specials[s], "content": s, "special": specials[s] in tok.special_ids}
        for s in sorted(specials, key=specials.get)
    ]
    split = {"type": "Split", "pattern": {"Regex": tok._pat_str}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if tok.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "post_processor": None if tok.bos == tok.eot else before_every_text(tok.decode([tok.bos]), tok.bos),
        "decoder": to_bytes,
        "model": model,
    }
    config = dict(tok.template.tokens) if tok.template else {}
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": tok.decode([tok.eot if eos is None else eos]),
        "pad_token": tok.decode([tok.pad]),
    }
    if eos not in (None, tok.eot):
        config[EOT_KEY] = tok.decode([tok.eot])
    if tok.bos != tok.eot:
        config["bos_token"] = tok.decode([tok.bos])
    if chat_template:
        config["chat_template"] = chat_template
    write_json(Path(folder) / "tokenizer.json", spec)
    write_json(Path(folder) / "tokenizer_config.json", dict(sorted(config.items())))


def before_every_text(content, i):
    """The post_processor that puts the token `content` before a text."""
    begin = {"SpecialToken": {"id": content, "type_id": 0}}
    single = [begin, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {content: {"id": content, "ids": [i], "tokens": [content]}},
    }


def fingerprint(tok):
    """SHA-256 (hex) of all that decides ids: tokens, pattern, specials, eot, normalization.

    Equal if and only if two tokenizers encode alike.
    """
    ranks = sorted((i, token.hex()) for token, i in tok._mergeable_ranks.items())
    decisive = [tok._pat_str, tok.nfc, tok.eot, sorted(tok._special_tokens.items()), ranks]
    if tok.bos != tok.eot or tok.text_tokens:
        decisive += [tok.bos, sorted(row["content"] for row in tok.text_tokens)]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def token_bytes(tok):
    """int64 [n_vocab]: how many bytes of text each id stands for, 0 for special and unused ids."""
    sizes = np.zeros(tok.n_vocab, dtype=np.int64)
    for row in tok.text_tokens:
        sizes[row["id"]] = len(row["content"].encode())
    for token, i in tok._mergeable_ranks.items():
        sizes[i] = len(token)
    return sizes


# -------------------------------------------------------------------------------------------------
# The script


def read_documents(names, skip_bad=False):
    """Yield the texts of files with rows and of hf:NAME[...], and of text files the lines.

    Lines come in stretches of a million characters, so that a large file is never held whole.
    """
    for name in names:
        if file_kind(name) == "text":
            yield from map("".join, batches((line for _, line in read_lines(name)), BATCH))
        else:
            yield from good_texts(name, skip_bad)


def main(config):
    check_ranges(config)
    names = [name for name, _ in parse_mixture(config.data)] if config.data else []  # weights are for data.prepare
    target, begin = Path(config.out) / "tokenizer.json", time.perf_counter()
    if target.exists() and not config.overwrite:
        raise UserError(f"{target}: exists; --overwrite replaces it")
    check_writable("out", target)
    if config.kind == "bpe":
        tok = train(read_documents(names, config.skip_bad), config.vocab_size, config.workers)
    elif config.kind == "char":
        found = set()
        for text in read_documents(names, config.skip_bad):
            found.update(text)
        tok = characters("".join(found))
    else:
        tok = byte_level()
    save(tok, config.out)
    print(f"{target}: {tok.n_vocab} ids in {time.perf_counter() - begin:.1f} s")
    sample = "".join(text[:SAMPLE] for text in islice(read_documents(names, config.skip_bad), 10))
    ids = tok.encode_ordinary(sample)
    print(f"{len(sample.encode()) / max(1, len(ids)):.3f} bytes per token at the head of the data, which begins:")
    print("|".join(tok.decode([i]) for i in ids[:50]))


if __name__ == "__main__":
    launch(main, Config)
