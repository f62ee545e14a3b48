"""A conversation: what is sent, what is shown where, and how commands and errors are met."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rekindle.cli.chat import Chat, opening, typed_lines
from rekindle.cli.talk import Answer, Answering, Message, Wish
from rekindle.errors import InvalidRequest, PromptTooLong


class Scripted:
    """A talker (a test double) that answers with what it was given, and keeps what it was asked."""

    def __init__(self, *answers: Sequence[str] | Exception | type[KeyboardInterrupt]) -> None:
        self._answers = list(answers)
        self.asked: list[list[Message]] = []
        self.closed = 0

    def chat(self, messages: Sequence[Message], wish: Wish) -> Answering:
        self.asked.append(list(messages))
        answer = self._answers.pop(0)
        try:
            if isinstance(answer, Exception):
                raise answer
            for piece in answer:
                if piece == "^C":
                    raise KeyboardInterrupt
                yield piece
            yield Answer(
                text="".join(answer),
                finish_reason="stop",
                prompt_tokens=12,
                cached_tokens=7,
                completion_tokens=5,
                timings={"ttft_ms": 3.25, "decode_ms": 40.0, "prefill_calls": 1},
            )
        finally:
            self.closed += 1

    def stats(self) -> dict[str, Any]:
        return {"hits": 3, "hit_rate": 0.75}


class Shown:
    """Runs a chat over lines and keeps what it prints."""

    def __init__(self, talker: Scripted, *lines: str, begin: Sequence[Message] = ()) -> None:
        out, err = (Console(file=io.StringIO(), width=80) for _ in range(2))
        self.failures = Chat(talker, begin, Wish(), out=out, err=err).run(iter(lines))
        self.out, self.err = (console.file.getvalue() for console in (out, err))  # type: ignore[attr-defined]


def texts(messages: Sequence[Message]) -> list[str]:
    return [f"{message['role']}: {message['content']}" for message in messages]


def test_the_conversation_grows_at_its_end_only() -> None:
    talker = Scripted(["Hel", "lo."], ["Fine."])
    shown = Shown(talker, "Hi\n", "How are you?\n", begin=opening("Be brief.", ()))
    assert texts(talker.asked[0]) == ["system: Be brief.", "user: Hi"]
    assert texts(talker.asked[1]) == [*texts(talker.asked[0]), "assistant: Hello.", "user: How are you?"]
    assert shown.out == "Hello.\nFine.\n"
    assert shown.failures == 0


def test_what_an_answer_cost_goes_to_stderr() -> None:
    shown = Shown(Scripted(["Hello."]), "Hi\n")
    assert shown.err == "prompt: 7 tokens reused, 5 computed; first token after 3.2 ms, then 100 tokens/s\n"


def test_markup_and_long_lines_of_an_answer_are_printed_as_they_are() -> None:
    answer = "[bold]:smile: " + "word " * 40
    assert Shown(Scripted([answer]), "Hi\n").out == answer + "\n"


def test_ctrl_c_interrupts_the_answer_and_the_conversation_goes_on() -> None:
    talker = Scripted(["Once", "^C", " upon"], ["Yes."])
    shown = Shown(talker, "Tell me a story.\n", "Really?\n")
    assert shown.out == "Once\nYes.\n"
    assert "Interrupted." in shown.err
    assert texts(talker.asked[1])[1:] == ["assistant: Once", "user: Really?"]
    assert talker.closed == 2


def test_an_answer_interrupted_before_its_first_word_leaves_nothing_behind() -> None:
    talker = Scripted(["^C"], ["Yes."])
    Shown(talker, "First.\n", "Second.\n")
    assert texts(talker.asked[1]) == ["user: Second."]


class Interrupted(str):
    """A line after whose return key Ctrl-C comes at once."""

    def strip(self, chars: str | None = None) -> str:
        raise KeyboardInterrupt


def test_ctrl_c_before_an_answer_has_begun_leaves_the_chat_open() -> None:
    talker = Scripted(["Yes."])
    shown = Shown(talker, Interrupted("First.\n"), "Second.\n")
    assert [texts(asked) for asked in talker.asked] == [["user: Second."]]
    assert (shown.out, shown.failures) == ("Yes.\n", 0) and "Interrupted." in shown.err


def test_a_refused_message_is_taken_back_and_counted() -> None:
    talker = Scripted(PromptTooLong("the prompt has 9 tokens; at most 8 fit"), ["Yes."])
    shown = Shown(talker, "Too long.\n", "Short.\n")
    assert "rekindle: the prompt has 9 tokens" in shown.err
    assert texts(talker.asked[1]) == ["user: Short."]
    assert shown.failures == 1


def test_reset_forgets_all_but_the_opening() -> None:
    talker = Scripted(["One."], ["Two."])
    Shown(talker, "First.\n", "/reset\n", "Second.\n", begin=opening("Be brief.", ()))
    assert texts(talker.asked[1]) == ["system: Be brief.", "user: Second."]


def test_quit_ends_and_empty_lines_are_skipped() -> None:
    talker = Scripted(["One."])
    Shown(talker, "\n", "  \n", "First.\n", "/quit\n", "Second.\n")
    assert len(talker.asked) == 1


def test_stats_and_help() -> None:
    shown = Shown(Scripted(), "/stats\n", "/help\n", "/what\n")
    assert "hits" in shown.err
    assert "0.750" in shown.err
    assert "/reset" in shown.err
    assert "There is no command /what." in shown.err
    assert shown.out == ""


def test_documents_follow_the_instructions(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("One.\n")
    second.write_text("Zwölf.\n", "utf-8")
    assert texts(opening("Be brief.", [first, second])) == ["system: Be brief.\n\nOne.\n\nZwölf."]
    assert opening(None, []) == []


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"  \n", None])
def test_a_document_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "document.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"document\.txt"):
        opening(None, [file])


def test_ctrl_c_at_the_prompt_drops_the_line_and_ctrl_d_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    typed: Iterator[str | type[BaseException]] = iter(["one", KeyboardInterrupt, "two", EOFError])

    def read(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    assert list(typed_lines(Console(file=io.StringIO()))) == ["one", "two"]
