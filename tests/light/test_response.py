import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tartvg.response import FAULT_WORDS, Marks, parse_response, read_marks
from tartvg.types import Fault, Span

GOOD = (
    "<think> first <timestamp>12.54 to 17.83</timestamp> then <timestamp>13.10 to 16.90</timestamp> so </think>"
    "<answer>13.10 to 16.90</answer>"
)
ONE = "<think><timestamp>1 to 2</timestamp></think>"
ANSWER = "<answer>1 to 2</answer>"

FAULTY: list[tuple[Fault, str]] = [
    (Fault.NO_THINK, ANSWER),
    (Fault.NO_THINK, ""),
    (Fault.NO_THINK, "so </think><answer>1 to 2</answer>"),
    (Fault.THINK_UNCLOSED, "<think><timestamp>1 to 2</timestamp>"),
    (Fault.THINK_REPEATED, ONE + ONE + ANSWER),
    (Fault.THINK_REPEATED, "<think><think><timestamp>1 to 2</timestamp></think>" + ANSWER),
    (Fault.THINK_REPEATED, ONE + "</think>" + ANSWER),
    (Fault.NO_ANSWER, ONE),
    (Fault.NO_ANSWER, ONE + "1 to 2"),
    (Fault.NO_ANSWER, "<think>the answer is <answer>1 to 2</answer></think>"),
    (Fault.ANSWER_UNCLOSED, ONE + "<answer>1 to 2"),
    (Fault.ANSWER_UNCLOSED, ONE + "<answer>1 to <answer>1 to 2</answer>"),
    (Fault.ANSWER_REPEATED, ONE + ANSWER + ANSWER),
    (Fault.ANSWER_REPEATED, ONE + ANSWER + "</answer>"),
    (Fault.ANSWER_REPEATED, "<think><timestamp>1 to 2</timestamp> <answer>9 to 10</answer></think>" + ANSWER),
    (Fault.ANSWER_UNREADABLE, ONE + "<answer>from 1 to 2</answer>"),
    (Fault.ANSWER_UNREADABLE, ONE + "<answer></answer>"),
    (Fault.ANSWER_UNREADABLE, ONE + "<answer><timestamp>1 to 2</timestamp></answer>"),
    (Fault.ANSWER_REVERSED, ONE + "<answer>2 to 1</answer>"),
    (Fault.ANSWER_REVERSED, ONE + "<answer>2.0 to 2.00</answer>"),
    (Fault.NO_ANCHOR, "<think>1 to 2</think>" + ANSWER),
    (Fault.ANCHOR_UNCLOSED, "<think><timestamp>1 to 2</think>" + ANSWER),
    (Fault.ANCHOR_UNCLOSED, "<think><timestamp>1 to <timestamp>1 to 2</timestamp></think>" + ANSWER),
    (Fault.ANCHOR_UNCLOSED, "<think>1 to 2</timestamp></think>" + ANSWER),
    (Fault.ANCHOR_UNREADABLE, "<think><timestamp>12.54</timestamp></think>" + ANSWER),
    (Fault.ANCHOR_UNREADABLE, "<think><timestamp>-1 to 2</timestamp></think>" + ANSWER),
    (Fault.ANCHOR_REVERSED, "<think><timestamp>2 to 1</timestamp></think>" + ANSWER),
    (Fault.ANCHOR_REVERSED, "<think><timestamp>2 to 2</timestamp></think>" + ANSWER),
    (Fault.ANCHOR_OUTSIDE_THINK, ONE + "<timestamp>1 to 2</timestamp>" + ANSWER),
    (Fault.ANCHOR_OUTSIDE_THINK, ONE + "</timestamp>" + ANSWER),
    (Fault.ANSWER_MISMATCH, ONE + "<answer>1 to 2.5</answer>"),
    (Fault.STRAY_TEXT, "Sure! " + ONE + ANSWER),
    (Fault.STRAY_TEXT, ONE + " therefore " + ANSWER),
    (Fault.STRAY_TEXT, ONE + ANSWER + "."),
    (Fault.STRAY_TEXT, ONE + "<|im_end|>" + ANSWER),
    (Fault.ORDER, ANSWER + ONE),
    (Fault.ORDER, "<think><timestamp>1 to 2</timestamp><answer>1 to 2</answer></think>"),
]


def test_every_fault_has_words_of_its_own():
    assert set(FAULT_WORDS) == set(Fault) and len(set(FAULT_WORDS.values())) == len(Fault)


def test_the_format():
    response = parse_response(GOOD)
    assert response.anchors == (Span(12.54, 17.83), Span(13.10, 16.90))
    assert response.answer == Span(13.10, 16.90)
    assert response.faults == ()
    assert response.reasoning.startswith("first <timestamp>") and response.reasoning.endswith("so")


@pytest.mark.parametrize(
    "text",
    [
        f"\n {GOOD}\n",
        GOOD.replace("</think>", "</think>\n\n"),
        GOOD + "<|im_end|>",
        GOOD + "\n<|im_end|>\n<|endoftext|><|endoftext|>",
        GOOD.replace("<answer>13.10 to 16.90<", "<answer>\n13.10  to\t16.90\n<"),
        GOOD.replace("13.10 to 16.90", "13.1s to 16.9 seconds"),
        GOOD.replace("13.10 to 16.90", "013.1 seconds to 16.900s"),
    ],
)
def test_tolerated_variants(text: str):
    response = parse_response(text)
    assert response.faults == ()
    assert response.answer == response.anchors[-1] == Span(13.10, 16.90)


@pytest.mark.parametrize(("fault", "text"), FAULTY)
def test_fault(fault: Fault, text: str):
    assert fault in parse_response(text).faults


def test_every_fault_is_covered():
    assert {fault for fault, _ in FAULTY} == set(Fault) - {Fault.UNWANTED_THINK}, "of direct answers, see below"


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", [Fault.NO_THINK, Fault.NO_ANSWER, Fault.NO_ANCHOR]),
        (ONE, [Fault.NO_ANSWER]),
        (ONE + "<answer>1 to 2", [Fault.ANSWER_UNCLOSED]),
        (ONE + "<answer>2 to 1</answer>", [Fault.ANSWER_REVERSED]),
        (ONE + "<answer>1 to 3</answer>", [Fault.ANSWER_MISMATCH]),
        (ANSWER + ONE, [Fault.ORDER]),
        ("<think>a</think>" + ANSWER, [Fault.NO_ANCHOR]),
        ("<think><timestamp>1 to 2</timestamp> so" + ANSWER, [Fault.THINK_UNCLOSED]),
    ],
)
def test_nothing_but_the_fault(text: str, faults: list[Fault]):
    assert list(parse_response(text).faults) == faults


@pytest.mark.parametrize(
    "content",
    [
        "", "12.5", "1 to", "to 2", "1 - 2", "1to2", "1 to 2 to 3", "1, 2", "-1 to 2", "+1 to 2", "1e3 to 2e3",
        ".5 to 1", "1. to 2", "nan to 2", "1 to inf", "1:02 to 1:10", "1 to 2 minutes", "1 to 2.", "[1 to 2]", "1 TO 2",
        "1_0 to 20", "1.1.1 to 2", "1234567890123456 to 2", "0.1234567890123456 to 2", "1 to 12345678901.12345",
        "1 to 10000000.1", "\u0661 to \u0662", "1 to " + " " * 200 + "2", "<b>1 to 2</b>", "1\x00 to 2",
    ],
)  # fmt: skip
def test_unreadable_spans(content: str):
    response = parse_response(f"<think><timestamp>{content}</timestamp></think><answer>{content}</answer>")
    assert response.anchors == () and response.answer is None
    assert {Fault.ANCHOR_UNREADABLE, Fault.ANSWER_UNREADABLE} <= set(response.faults)


def test_limits_of_numbers_are_included():
    assert parse_response("<answer>0 to 10000000</answer>").answer == Span(0, 1e7)
    assert parse_response("<answer>0.12345678901234 to 1</answer>").answer == Span(0.12345678901234, 1)


def test_a_broken_anchor_is_not_counted():
    text = "<think><timestamp>5 to 4</timestamp><timestamp>x</timestamp><timestamp>1 to 2</timestamp></think>" + ANSWER
    response = parse_response(text)
    assert response.anchors == (Span(1, 2),)
    assert list(response.faults) == [Fault.ANCHOR_UNREADABLE, Fault.ANCHOR_REVERSED]


def test_anchors_outside_the_reasoning_are_not_counted():
    response = parse_response("<timestamp>8 to 9</timestamp>" + ONE + "<timestamp>8 to 9</timestamp>" + ANSWER)
    assert response.anchors == (Span(1, 2),)
    assert list(response.faults) == [Fault.ANCHOR_OUTSIDE_THINK]


def test_an_unclosed_think_still_gives_its_anchors():
    response = parse_response("<think><timestamp>1 to 2</timestamp> and <timestamp>3 to 4</timestamp> and <timest")
    assert response.anchors == (Span(1, 2), Span(3, 4))
    assert Fault.THINK_UNCLOSED in response.faults


def test_the_last_readable_answer_counts():
    assert parse_response(ONE + "<answer>8 to 9</answer>" + ANSWER).answer == Span(1, 2)
    assert parse_response(ONE + ANSWER + "<answer>x</answer>").answer == Span(1, 2)
    assert parse_response(ONE + ANSWER + "<answer>9 to 8</answer>").answer == Span(1, 2)


def test_a_quoted_answer_is_not_the_answer():
    quote = "<think> The format is <answer>12.54 to 17.83</answer> <timestamp>1 to 2</timestamp> {}"
    assert parse_response(quote.format("</think>") + ANSWER).answer == Span(1, 2)
    assert parse_response(quote.format("</think>")).answer is None
    assert parse_response(quote.format("</think>") + "<answer>x</answer>").answer is None
    assert parse_response(quote.format("and then the video")).answer is None  # cut off while thinking
    assert parse_response(quote.format("the <answer> tag </think>") + ANSWER).answer == Span(1, 2)


def test_an_answer_that_ends_an_unclosed_think_counts():
    response = parse_response("<think> hm <timestamp>1 to 2</timestamp> <answer>1 to 2</answer>\n<|im_end|>")
    assert response.answer == Span(1, 2)
    assert list(response.faults) == [Fault.THINK_UNCLOSED]


def test_tolerance_of_the_match():
    text = "<think><timestamp>1.00 to 2.00</timestamp></think><answer>{}</answer>"
    assert parse_response(text.format("1.005 to 2")).faults == ()
    assert parse_response(text.format("1 to 2.01")).faults == (Fault.ANSWER_MISMATCH,)
    assert parse_response(text.format("1.01 to 2")).faults == (Fault.ANSWER_MISMATCH,)
    assert parse_response(text.format("1.4 to 2.4"), tolerance=0.5).faults == ()


def test_direct_is_the_answer_and_nothing_else():
    assert parse_response(ANSWER, is_direct=True).faults == ()
    assert parse_response(ANSWER).faults == (Fault.NO_THINK, Fault.NO_ANCHOR)
    assert parse_response(ONE + ANSWER, is_direct=True).faults == (Fault.UNWANTED_THINK,)
    assert parse_response("</think>" + ANSWER, is_direct=True).faults == (Fault.UNWANTED_THINK, Fault.STRAY_TEXT)
    assert parse_response("It is " + ANSWER, is_direct=True).faults == (Fault.STRAY_TEXT,)
    assert Fault.ANCHOR_OUTSIDE_THINK in parse_response("<timestamp>1 to 2</timestamp>" + ANSWER, is_direct=True).faults


def test_marks_are_where_the_times_stand():
    text = "<think>a <timestamp>1 to 2</timestamp> <timestamp>x</timestamp></think><answer> 3 to 4 </answer> <|im_end|>"
    marks = read_marks(text)
    assert [text[a:b] for a, b in marks.anchors] == ["1 to 2</timestamp>"]
    assert marks.answer is not None and text[slice(*marks.answer)] == " 3 to 4 </answer>"
    assert read_marks("") == read_marks("<think><timestamp>1 to 2") == Marks((), None)


def test_reasoning_joins_all_blocks():
    assert parse_response("<think> a </think><think>b <timestamp>").reasoning == "a \nb <timestamp>"
    assert parse_response("no tags").reasoning == ""


PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", "<timestamp>", "</timestamp>", "<|im_end|>", "1 to 2", "2 to 1",
    "3.5", " to ", "s", " seconds", "\n", " ", "x", "<", ">", "\ud800", "\x00", "<timestamp", "</", "\u0661",
    "9" * 20, ".", "-",
]  # fmt: skip


@settings(max_examples=500)
@given(st.one_of(st.text(st.characters()), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_any_text_is_read(text: str):
    response = parse_response(text)
    assert list(response.faults) == [fault for fault in Fault if fault in response.faults]
    assert all(0 <= a.start < a.end <= 1e7 for a in response.anchors)
    assert response.answer is None or 0 <= response.answer.start < response.answer.end <= 1e7
    assert (Fault.NO_ANCHOR in response.faults) == (not response.anchors)
    unanswered = {Fault.NO_ANSWER, Fault.ANSWER_UNCLOSED, Fault.ANSWER_UNREADABLE, Fault.ANSWER_REVERSED}
    assert response.answer is not None or unanswered & set(response.faults)
    assert parse_response(text) == response
    assert parse_response(f" {text}\n<|im_end|>") == response


cents = st.integers(0, 99_999)
span_strategy = st.tuples(cents, cents).filter(lambda p: p[0] < p[1]).map(lambda p: Span(p[0] / 100, p[1] / 100))


@given(st.lists(span_strategy, min_size=1, max_size=5), st.text(st.characters(exclude_characters="<>")))
def test_what_is_written_is_read(spans: list[Span], prose: str):
    stamps = prose.join(f"<timestamp>{span}</timestamp>" for span in spans)
    response = parse_response(f"<think>{prose}{stamps}{prose}</think>\n<answer>{spans[-1]}</answer>")
    assert response.anchors == tuple(spans)
    assert response.answer == spans[-1]
    assert response.faults == ()


def test_real_completions_of_a_relative():
    # a Time-R1 output as its users post it: an answer block with line breaks, and the end token
    response = parse_response("<answer>\n23.50 to 30.00\n</answer><|im_end|>")
    assert response.answer == Span(23.5, 30.0)
    assert list(response.faults) == [Fault.NO_THINK, Fault.NO_ANCHOR]


ADVERSARIES = {
    "open anchors": ("", "<timestamp>", ""),
    "open anchors in think": ("<think>", "<timestamp>", ""),
    "open thinks": ("", "<think>", ""),
    "open answers": ("", "<answer>", ""),
    "closed anchors": ("<think>", "</timestamp>", ""),
    "digits": ("<answer>", "1", "</answer>"),
    "dots": ("<answer>", "1.", "</answer>"),
    "spaces in a span": ("<answer>1", " ", "2</answer>"),
    "spaces around": ("<answer>", " \n", "1 to 2</answer>"),
    "units": ("<answer>1 ", "s ", "to 2</answer>"),
    "many to": ("<answer>", "1 to ", "</answer>"),
    "angle brackets": ("", "<", ""),
    "slashes": ("", "</", ""),
    "almost tags": ("<think>", "<timestamp", ""),
    "end tokens": (ONE + ANSWER, "<|im_end|>", ""),
    "end tokens after text": ("", "<|im_end|> ", "x"),
    "trailing spaces": (ONE + ANSWER, " ", ""),
    "good anchors": ("<think>", "<timestamp>1 to 2</timestamp>", "</think>"),
    "good blocks": ("", ONE + ANSWER, ""),
    "nested": ("", "<think><answer><timestamp>", ""),
    "surrogates": ("<think>", "\ud800", ""),
}


@pytest.mark.parametrize("family", ADVERSARIES)
def test_time_is_linear_up_to_a_megabyte(family: str):
    prefix, unit, suffix = ADVERSARIES[family]

    def seconds(length: int) -> float:
        text = prefix + unit * (length // len(unit)) + suffix
        best = float("inf")
        for _ in range(3):
            begin = time.process_time()
            parse_response(text)
            best = min(best, time.process_time() - begin)
        return best

    # four times the text takes 4 times as long when linear and 16 times when quadratic; a busy machine may need a
    # second look, a quadratic parser fails them all
    for _ in range(4):
        short, long = seconds(250_000), seconds(1_000_000)
        if long < 9 * short + 0.02:
            break
    else:
        raise AssertionError(f"{short:.4f} s -> {long:.4f} s")
    assert long < 5
