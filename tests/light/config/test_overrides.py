"""Text on the command line: what stays as it was written, and what Hydra refuses with a line that says how to quote."""

import shlex
import signal
import sys
from collections.abc import Iterator

import pytest
from helpers.settings import composer
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from tartvg.config import Config, to_dataclasses
from tartvg.config.errors import explain
from tartvg.config.overrides import keep_text, quoted, texts
from tartvg.launch.job import launch
from tartvg.launch.signals import SIGNALS


@pytest.fixture(scope="module", autouse=True)
def composing() -> Iterator[None]:
    with composer():
        yield


def config_of(*arguments: str) -> Config:
    return to_dataclasses(compose("config", overrides=keep_text(arguments)))


@pytest.mark.parametrize("text", ["2024_01_05", "1e3", "007", "1.10", "0x10", "true", "TRUE", "+1", ".5", "1.", "v2"])
def test_a_name_is_the_text_that_was_written(text: str) -> None:
    assert config_of(f"name={text}").name == text


def test_text_is_kept_in_lists_sweeps_and_prefixed_overrides_and_nowhere_else() -> None:
    assert keep_text(["tracking.tags=[2024_01,a]", "name=1e3,2e3,x", "++name=1_0", "seed=1_0", "grpo.lr=1e-6"]) == [
        "tracking.tags=['2024_01',a]", "name='1e3','2e3',x", "++name='1_0'", "seed=1_0", "grpo.lr=1e-6"
    ]  # fmt: skip
    same = ["name='1e3'", "name=null", "runs_dir=${name}", "-m", "stage=grpo1", "policy.revision=null", "name=12",
            "evaluate.num_queries=null", "name=inf", "query=1 2", "tracking.tags=[[1e3]]", "--cfg", "job"]  # fmt: skip
    assert keep_text(same) == same
    assert config_of("policy.revision=1e3", "tracking.tags=[1_0,true]").tracking.tags == ["1_0", "true"]
    assert texts()["dataset.root"] == texts()["dataset.videos"] == "text" and texts()["report.runs"] == "list"
    assert "seed" not in texts() and "evaluate.num_queries" not in texts()


ODD = ["~/data", "/it's/here", "/a(1)/x", "/a=b/x", "/donn\u00e9es/x", "a;b", "a&b", "<a>", "a#b", 'say "a" b', "{a}",
       "runs/anchors=one,seed=0/grpo1/adapter", "a, b", "$HOME (1)", "back\\slash (1)\\", "`a`"]  # fmt: skip


@pytest.mark.parametrize("text", ODD)
def test_what_hydra_refuses_is_one_line_with_the_override_as_it_is_written(text: str) -> None:
    with pytest.raises(Exception) as caught:
        compose("config", overrides=["seed=0", f"dataset.root={text}"])
    said = explain(caught.value)
    head = f"dataset.root={text}: this value needs quotes: "
    assert said.startswith(head) and "\n" not in said
    (given,) = shlex.split(said.removeprefix(head).removesuffix(", or -m in front to sweep over its parts"))
    assert config_of(given).dataset.root == text


def test_a_per_cent_sign_and_spaces_need_no_quotes() -> None:
    assert config_of("dataset.root=/a/50%/my videos").dataset.root == "/a/50%/my videos"


def test_items_of_a_list_and_words_without_a_value_are_told_apart() -> None:
    with pytest.raises(Exception) as caught:
        compose("config", overrides=["evaluate.policies=[runs/anchors=one,seed=0/grpo1/adapter]"])
    said = explain(caught.value)
    (given,) = shlex.split(said.partition("need quotes: ")[2])
    assert config_of(given).evaluate.policies == ["runs/anchors=one,seed=0/grpo1/adapter"]
    with pytest.raises(Exception) as caught:
        compose("config", overrides=["dataset.root"])
    assert explain(caught.value) == "dataset.root: an override is written setting=value"


@given(st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1))
def test_every_quoted_text_is_read_letter_by_letter(text: str) -> None:
    (given,) = shlex.split(quoted("query", text))
    override = OverridesParser.create().parse_override(given)
    assert str(override.value()) == text


def test_the_command_line_goes_through_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "name=2024_01_05", "seed=1_0"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    before = {number: signal.getsignal(number) for number in SIGNALS}
    assert launch(lambda: print(sys.argv[1:])) == 0
    for number, handler in before.items():
        signal.signal(number, handler)
    assert capsys.readouterr().out == "[\"name='2024_01_05'\", 'seed=1_0']\n"
