"""Judge texts: words as numbers, the rules, and what duplicates are.

Pure functions of batches; data/prepare.py applies them to files. A batch of D texts becomes W
words, each a 64-bit hash, and all else is arithmetic on these. A word is a maximal run of letters,
digits and combining marks, lower-cased and composed (NFC); in scripts written without spaces
(Chinese, Japanese, Thai, ...) each letter is a word.

Near-duplicates are found by MinHash. For texts with sets A, B of word 5-grams, and a random order
of all 5-grams,

    P[first of A = first of B] = |A n B| / |A u B| = J        (Broder 1997)

One such order is spread over 112 bins, each of which keeps its first (Li, Owen, Zhang 2012); empty
bins borrow from full ones (Shrivastava 2017); 8 bits of each are stored. Texts that agree in one of
14 bands of 8 bins are compared, P = 1 - (1 - J^8)^14 (FineWeb's numbers): 0.05 at J = 0.5, 0.56 at
0.7, 0.99 at 0.85. They are duplicates if 77 % of all bins agree. Left out: duplicates within a
text, learned quality filters (fastText).
"""

import collections
import functools
import hashlib
import re
import unicodedata
from typing import NamedTuple

import numpy as np

GRAM = 5  # words
BANDS, ROWS = 14, 8
BINS = BANDS * ROWS
# Two standard deviations of the estimate (and some) below 0.85: nearly every pair with J = 0.85
# passes.
SIMILAR = 0.77

SPACE, SYMBOL, ALONE, DIGIT, LETTER = range(5)  # kinds of characters; ALONE: a letter that is a word
UNSPACED = (  # Thai and Lao, Burmese, Khmer, Chinese and Japanese
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x2E80, 0xA4CF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
ENGLISH = (  # words that are common in English and rare elsewhere
    "the of and to that it with for is are was were this from they you not his her she be by which have has"
)

# What `folded` makes alike: quotes, dashes and minus, the degree sign and the ordinal of n\u00b0 1
ALIKE = {"\u00b0": "o", **dict.fromkeys("\u2018\u2019", "'"), **dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"')}
ALIKE |= dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-")
# Symbols (accents apart), and raised and lowered digits
ODD = re.compile(r"[^\w\x00-\x7f\u0300-\u036f]|[\u00b2\u00b3\u00b9\u2070-\u2079\u2080-\u2089]")
OPENING = re.compile(r"""["'\u00bf\u00a1](?<!\S.)["'\u00bf\u00a1]*(?=\s?\w)""")  # marks that begin a word
# Marks that end a word, or stand alone behind it, as French has them. Behind anything but two
# letters some stay: 5! and y' are sums, and so is 6 : 3. Bounded, or a line of dots takes hours.
MARK = r"""[.,;:!?"'\u3002\u3001\u061f\u060c\u061b\u0964]"""  # the last: Chinese, Arabic, Hindi
WORD = r"[^\W\d_]{2}"
ENDING = re.compile(
    rf"{MARK}(?:(?<={WORD}.)|(?<={WORD} .)|(?<=\S[^!'\"])|(?<=[?\u061f])|(?<= .)(?={MARK}*$)){MARK}{{0,99}}+(?!\S)"
)


class Words(NamedTuple):
    hashes: np.ndarray  # uint64 [W]
    bounds: np.ndarray  # int64 [D+1]: text d has the words bounds[d]:bounds[d+1]
    count: np.ndarray  # int64 [D]
    letters: np.ndarray  # float64 [D]: share of letters among all but white space


@functools.cache
def character_kinds():
    """uint8 [0x110000]: the kind of every code point."""
    kinds = np.full(0x110000, SYMBOL, np.uint8)
    for code in range(0x40000):  # there are no letters beyond
        char = chr(code)
        if char.isspace():
            kinds[code] = SPACE
        elif char.isalpha() or unicodedata.category(char)[0] == "M":
            kinds[code] = LETTER
        elif char.isalnum():
            kinds[code] = DIGIT
    for first, last in UNSPACED:
        part = kinds[first : last + 1]
        part[part == LETTER] = ALONE
    return kinds


def splitmix64(x):
    """The finalizer of splitmix64: uint64 -> uint64, one to one; every bit depends on all bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def span_hashes(values, begin, end):
    """uint64 [n]: hashes of the spans values[begin[i]:end[i]], none of them empty.

    A hash is the polynomial sum_j values[begin + j] B^j mod 2^64, mixed by splitmix64. All come
    from one prefix sum S of values[j] B^j, as (S[end] - S[begin]) B^-begin. B is odd, so it has an
    inverse.
    """
    base = 0x9E3779B97F4A7C15
    powers = np.cumprod(np.full(len(values), base, np.uint64))
    inverses = np.cumprod(np.full(len(values), pow(base, -1, 2**64), np.uint64))
    sums = np.append(np.uint64(0), np.cumsum(values * powers))
    return splitmix64((sums[end] - sums[begin]) * inverses[begin])


def find_words(texts):
    """A batch of texts -> Words."""
    texts = [unicodedata.normalize("NFC", text).lower() for text in texts]
    edges = np.cumsum([0] + [len(text) + 1 for text in texts])
    chars = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le"), np.uint32)
    kinds = character_kinds()[chars]
    alone, inside = kinds == ALONE, kinds >= DIGIT
    begin = np.flatnonzero(alone | inside & ~np.append(False, inside[:-1]))
    end = np.flatnonzero(alone | inside & ~np.append(inside[1:], False)) + 1
    bounds = np.searchsorted(begin, edges)
    letters = np.add.reduceat(alone | (kinds == LETTER), edges[:-1], dtype=np.int64)  # [D]
    visible = np.add.reduceat(kinds != SPACE, edges[:-1], dtype=np.int64)
    return Words(span_hashes(chars, begin, end), bounds, np.diff(bounds), letters / np.maximum(visible, 1))


def ngrams(words, n):
    """Every run of n words within a text -> (hashes uint64 [G], number of the text int64 [G])."""
    text = np.repeat(np.arange(len(words.count)), words.count)
    begin = np.flatnonzero(np.arange(len(text)) + n <= words.bounds[text + 1])
    return span_hashes(words.hashes, begin, begin + n), text[begin]


def contains(table, hashes):
    """bool [n]: which of the hashes are in the table (uint64 [T], sorted, not empty)."""
    return table[np.searchsorted(table, hashes).clip(max=len(table) - 1)] == hashes


# -------------------------------------------------------------------------------------------------
# Rules: (texts, their Words, config) -> bool [D], True for a text that must go. It is counted for
# the first rule that it breaks. From Gopher (Rae et al. 2021, appendix A.1), but milder if Gopher's
# bounds, meant for web pages, would remove good exercises, dialogue or code.


def empty(texts, words, config):
    """No word at all. The one rule that --clean=False leaves on."""
    return words.count == 0


def too_short(texts, words, config):
    """Fewer than --min_words words."""
    return words.count < config.min_words


def too_long(texts, words, config):
    """More than --max_words words."""
    return words.count > config.max_words


def few_letters(texts, words, config):
    """Under 30 % letters: tables, drawings, codes (Gopher: 80 % of the words have a letter)."""
    return words.letters < 0.3


def many_marks(texts, words, config):
    """Over one hash sign (`###` is one) or ellipsis in ten words: tag clouds, teasers (Gopher)."""
    return np.array([len(re.findall(r"#+|\.\.\.|\u2026", text)) for text in texts]) > 0.1 * words.count


def repeated_lines(texts, words, config):
    """Over 20 % of the characters are in lines that the text had before: menus, logs (Gopher)."""
    return np.array([repeated_line_share(text) for text in texts]) > 0.2


def repeated_phrase(texts, words, config):
    """The commonest 3-gram makes up over 30 % of the words, and occurs four times or more: spam.

    (Gopher: 18 % of the characters, in 50 words or more.)
    """
    grams, text = ngrams(words, 3)
    # the number of the text above 40 bits of hash
    keys, count = np.unique((text.astype(np.uint64) << np.uint64(40)) | (grams >> np.uint64(24)), return_counts=True)
    most = np.zeros(len(texts), np.int64)  # [D]
    np.maximum.at(most, (keys >> np.uint64(40)).astype(np.int64), count)
    return (most >= 4) & (3 * most > 0.3 * words.count)


def not_english(texts, words, config):
    """With --language=en, under 5 % of the words are ENGLISH.

    (Gopher: two of the, be, to, of, and, that, have, with.)
    """
    if config.language != "en":
        return np.zeros(len(texts), bool)
    number = np.cumsum(np.append(0, contains(np.sort(find_words([ENGLISH]).hashes), words.hashes)))
    return np.diff(number[words.bounds]) < 0.05 * words.count


RULES = (empty, too_short, too_long, few_letters, many_marks, repeated_lines, repeated_phrase, not_english)


def repeated_line_share(text):
    """The share of a text's characters in lines that it had before, stripped of white space."""
    lines = [line.strip() for line in text.split("\n")]
    again = sum(len(line) * (n - 1) for line, n in collections.Counter(lines).items())
    return again / max(sum(map(len, lines)), 1)


# -------------------------------------------------------------------------------------------------
# Duplicates


def alike(match):
    """What stands for a character of ODD: nothing for one unseen, ^3 for a raised 3."""
    char = match[0]
    if unicodedata.category(char) == "Cf":
        return ""
    return "^" + char if char.isdigit() else ALIKE.get(char, char)


def folded(text):
    """A text but for case, white space, Unicode forms, and the marks of sentences and quotes at the
    ends of words: the same for what a reader takes for the same question."""
    plain = text.casefold()
    if not text.isascii():  # folded again: what stands for \u2116 has a capital
        plain = unicodedata.normalize("NFKC", ODD.sub(alike, plain)).casefold()
    plain = " ".join(plain.split())
    return " ".join(ENDING.sub("", OPENING.sub("", plain)).split()) or plain


def text_key(text):
    """64 bits, equal for exact duplicates: texts that differ in case, white space and composed or
    decomposed letters at most."""
    plain = " ".join(unicodedata.normalize("NFC", text).lower().split())
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little")


def exact_duplicates(keys):
    """bool [D]: texts whose key (uint64) an earlier text has."""
    found = np.ones(len(keys), bool)
    found[np.unique(keys, return_index=True)[1]] = False  # the first of each
    return found


@functools.cache
def probe_order():
    """int64 [BINS, BINS]: the order in which each empty bin tries the others.

    The same for all texts, so that similar texts borrow alike.
    """
    return np.argsort(splitmix64(np.arange(BINS**2, dtype=np.uint64)).reshape(BINS, BINS), axis=1)


def signatures(words):
    """MinHash signatures of the sets of 5-grams, uint8 [D, BINS].

    A text of fewer words is one gram as a whole; without words its signature has no meaning.
    """
    none = 2**32 - 1
    grams, text = ngrams(words, GRAM)
    # The upper half of a hash chooses the bin, the lower half is the place in the order.
    bins = ((grams >> np.uint64(32)) * np.uint64(BINS) >> np.uint64(32)).astype(np.int64)
    full = np.full((len(words.count), BINS), none, np.uint32)
    np.minimum.at(full.reshape(-1), text * BINS + bins, grams.astype(np.uint32))

    short = np.flatnonzero((words.count > 0) & (words.count < GRAM))
    whole = span_hashes(words.hashes, words.bounds[short], words.bounds[short + 1])
    # what as many orders of a single gram would give
    full[short] = splitmix64(whole[:, None] + np.arange(BINS, dtype=np.uint64)).astype(np.uint32)

    first = full.copy()
    row, column = np.nonzero((full == none) & (words.count > 0)[:, None])
    for step in range(BINS):
        first[row, column] = full[row, probe_order()[column, step]]
        still = first[row, column] == none
        row, column = row[still], column[still]
    return first.astype(np.uint8)


def near_duplicates(bands, rows):
    """bool [R]: which of the texts bands[rows] resemble an earlier one of them.

    bands: signatures as uint64 [_, BANDS], one number per band. Sorted by a band, texts that share
    it are neighbors. Each is compared with the first of them and with the one just before it; all
    pairs would be quadratic. So of a chain of near-duplicates the first stays. Memory: some 50
    bytes per text, besides the arguments.
    """
    found = np.zeros(len(rows), bool)
    for band in range(BANDS):
        keys = bands[rows, band]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        same = keys[1:] == keys[:-1]
        starts = np.flatnonzero(np.append(True, ~same))
        later = np.flatnonzero(same) + 1
        for some in np.array_split(later, len(later) // 4096 + 1):
            ours = bands[rows[order[some]]].view(np.uint8)
            for earlier in (starts[np.searchsorted(starts, some, side="right") - 1], some - 1):
                agree = ours == bands[rows[order[earlier]]].view(np.uint8)
                found[order[some[agree.mean(1) >= SIMILAR]]] = True
    return found
