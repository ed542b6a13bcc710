"""The rules: which number an answer has, what form and length are worth, for any text, quickly."""

import json
import time
from decimal import Decimal

import pytest
from hypothesis import given, settings, strategies as st

from data import rows
from data.rules import (
    brief,
    final_number,
    number_after,
    one_final_number,
    right_number,
    thinks_first,
)

quick = settings(deadline=None, derandomize=True, max_examples=100)
NUMBERS = {
    "#### 72": 72,
    "so 5\n#### 72.": 72,
    "#### -5": -5,
    "#### $1,234,567": 1234567,
    "#### -$3.50": "-3.5",
    "#### 3.50 dollars": "3.5",
    "####7": 7,
    "#### 0072": 72,
    "#### 5 #### 6": 6,
    "####\n\n 9": 9,
    "#### 72\n- 5 apples are left": 72,
    "#### 72 or 73": 72,
    "#### 5%": 5,
    "#### 1,000": 1000,
    "#### 10, not 9": 10,
    "##### 5": 5,
    "#### 5kg": 5,
    "#### 5\n6 more": 5,
    "#### 5. 3 are left": 5,
    r"#### 5\text{ cm}": 5,
    r"#### 90^\circ": 90,
    r"#### 5\%": 5,
}
NO_NUMBER = [
    "72",
    "",
    "####",
    "#### five",
    "#### - 5",
    "#### #### ",
    "#### 6 ####",
    "#### .5",
    "#### 1e9",
    "#### 1.2.3",
]
NO_NUMBER += ["#### 2**5", "#### 2 ** 5", "#### 10/2", "#### 6*7", "#### 3 + 4", "#### 99**98**97", "#### 2^5"]
NO_NUMBER += ["#### 7-(2)", "#### 1,23", "#### 1,0000", "#### 9" + "9" * 40, "#### 1." + "0" * 41]
NO_NUMBER += ["#### 9" + ",999" * 30]
NO_NUMBER += [
    "#### 1 000",
    "#### 1\u202f000",
    "#### 1'000",
    "#### 1_000",
    "#### 5 1/2",
    "#### 5:30",
    "#### 0x10",
    "#### 5²",
    "#### 2, 3",
    "#### 1½",
    r"#### 10,\!080",
    r"#### 11\sqrt2",
    r"#### 1 \pm \sqrt{19}",
    "#### 3x^2",
    "#### 2k+2",
    "#### 5i",
]


@pytest.mark.parametrize("text", [*NUMBERS, *NO_NUMBER], ids=lambda text: text[:12])
def test_the_number_after_the_mark(text):
    number = Decimal(NUMBERS[text]) if text in NUMBERS else None
    assert number_after(text) == number
    assert final_number("", text, {"answer": f"#### {number}", "finished": True}) == (number is not None)
    assert final_number("", text, {"answer": f"#### {number}", "finished": False}) == 0.0


@pytest.mark.parametrize(
    "answer",
    ["2 hours 30 minutes", "5 or 7", "3 red, 2 blue", "5 dollars and 25 cents", "5–7", "5;6", "45°30'", "5 (or 6)"]
    + ["5 = 2 + 3", "5\n6", "5 to 7", "1st of 3", "$5 and $6", "10% of 50", "five", "", "5 cm by 7 cm"],
)
def test_an_answer_of_several_numbers_is_none(answer):
    """Whichever of them was compared with, most right completions would be worth 0."""
    assert right_number({"answer": answer}) is None
    assert right_number({"answer": f"So 9.\n#### {answer}"}) == (5 if "\n" in answer else None)  # one in its line
    with pytest.raises(ValueError, match='"answer" '):
        rows.problem({"question": "q", "answer": answer})


@pytest.mark.parametrize(
    "answer, number",
    [("72", 72), ("$1,234", 1234), ("5 cm", 5), (r"5 \text{ cm}", 5), ("5 cm^2", 5), ("5 cm²", 5), (" -3.5 ", "-3.5")]
    + [(r"5 \text{ m}^{2}", 5), ("5 m2", 5), ("5 m/s^2", 5), ("5 m s^-2", 5), ("5%", 5), (r"90^\circ", 90), (5, 5)]
    + [("2 + 3 = 5\n#### 5", 5), ("#### 72\nThe answer is: 72", 72), ("#### 5 apples", 5), ("7 kg of CO2", 7)],
)
def test_an_answer_of_one_number_is_that(answer, number):
    assert right_number({"answer": answer}) == Decimal(number)
    if "####" not in str(answer):
        assert right_number({"answer": f"#### {answer}"}) == Decimal(number)


def test_answers_that_cannot_be_read_are_warned_of(capsys):
    """Every completion would be worth 0, which looks like problems that are too hard."""
    some = [([], {"answer": answer}) for answer in ("5", "five", "#### 7", r"\frac{1}{2}", "", 3)]
    rows.warn_of_no_number([*some, ([], {})], "data/rules.py:final_number,out/rm*0.3")
    assert "warning: --data: 3 of 7 answers have no number, as 'five'" in capsys.readouterr().out
    rows.warn_of_no_number([some[0], ([], {})], "data/rules.py:final_number")
    rows.warn_of_no_number(some, "my.py:reward")
    assert not capsys.readouterr().out


@quick
@given(st.text() | st.text(alphabet="0123456789.,-+*/^$# e(\n٣½x", max_size=60))
def test_any_text_is_worth_something(text):
    number = number_after(text)
    assert number is None or number.is_finite()
    for rule in (final_number, one_final_number, thinks_first):
        assert rule("", text, {"answer": "#### 72"}) in (0.0, 1.0)
    assert 0 <= brief("", text, {}) <= 1


def test_no_text_makes_a_rule_slow():
    texts = ["####" * 10**5, "#### " + "1" * 10**6, "#### " + "1," * 10**6, "#### " + "1,000" * 10**5, "#" * 10**6]
    texts += ["#### " + " " * 10**6, "#### 9" + "**9" * 10**5, "#### " + "-$" * 10**6, "#### 1." + "0" * 10**6]
    texts += ["<think>" * 30000, "<think>" + "<answer" * 30000, "<think>a</think>" + " " * 100000 + "<answer>"]
    begin = time.process_time()
    for text in texts:
        for rule in (final_number, one_final_number, thinks_first):
            assert rule("", text, {"answer": "#### 72"}) == 0.0
    assert time.process_time() - begin < 2


@pytest.mark.parametrize("name", ["gsm8k_test.jsonl", "gsm8k_train.jsonl"])
def test_every_answer_of_gsm8k_is_read(realdata, name):
    for line in realdata(name).read_text(encoding="utf-8").splitlines():
        _, row = rows.problem(json.loads(line))
        written = row["answer"].split("####")[1].strip()
        assert right_number(row) == Decimal(written.replace(",", "")) and "<<" not in row["answer"]
        assert final_number("", row["answer"], row) == 1.0


@pytest.mark.parametrize(
    "text, value",
    [
        ("2 + 3 = 5 #### 5", 1),
        ("####  $1,000 ", 1),
        ("#### 5 #### 6", 0),
        ("#### 5.", 0),
        ("#### five", 0),
        ("5", 0),
        ("", 0),
    ],
)
def test_the_form_of_a_final_number(text, value):
    assert one_final_number("", text, {}) == value
    assert one_final_number("", text, {"finished": False}) == 0


@pytest.mark.parametrize(
    "text, value",
    [
        ("<think>a\nb</think>\n<answer>4</answer>", 1),
        ("<think></think><answer>4</answer>", 0),
        ("x <think>a</think><answer>4</answer>", 0),
        ("<think>a</think>", 0),
        ("<think>a<think>b</think><answer>4</answer>", 0),
        ("<think>a</think> so <answer>4</answer>", 0),
        ("<think>a</think><answer>4</answer><answer>5</answer>", 0),
    ],
)
def test_thinking_comes_before_the_answer(text, value):
    assert thinks_first("", text, {}) == value
    assert thinks_first("", text, {"finished": False}) == 0


def test_a_shorter_answer_is_worth_more():
    assert [brief("", "a " * n, {}) for n in (0, 50, 100, 1000)] == [1, 0.5, 0, 0]
