"""The terminal's side of a conversation: questions and commands in, streamed answers out, and only those on stdout."""

import json
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from .conversation import Conversation, Question
from .errors import ConfigError, VLMGRPOError, nearest
from .media import KINDS, Kind, Medium

Who = Literal["trained", "base", "both"]
_HELP = {
    "/image PATH ...": "show pictures with the next question; also /video, /audio",
    "/base": "let the model before training answer, or the trained one again",
    "/compare": "let both answer, or the trained one alone again",
    "/reset": "forget all turns and start anew",
    "/help": "this list",
    "/quit": "leave; also Ctrl-D",
}
COMMANDS = ("image", "video", "audio", "base", "compare", "reset", "help", "quit", "exit")


def parse(line: str) -> tuple[str, list[str]] | None:
    """A line's command and its arguments, or None for a question.

    >>> parse('/image "my cat.png" ~/dog.png')
    ('image', ['my cat.png', '~/dog.png'])
    >>> parse("/usr/bin is a folder, isn't it?")

    Raises:
        ConfigError: no such command, a quote that is not closed, or a command of media without any.
    """
    first, _, rest = line.strip().partition(" ")
    name, rest = first[1:].lower(), rest.strip()
    if not first.startswith("/") or not name.isalpha():
        return ("quit", []) if line.strip().lower() in ("exit", "quit") else None
    if name not in COMMANDS:
        hint = nearest(f"/{name}", [f"/{known}" for known in COMMANDS])
        raise ConfigError(f"There is no command /{name}.{hint} /help lists them.")
    if name not in KINDS:
        return name, []
    if not rest:
        raise ConfigError(f"/{name} needs a file: /{name} PATH, in quotes where it has spaces.")
    if Path(rest).expanduser().is_file():  # a name with spaces, as it is
        return name, [rest]
    try:
        return name, shlex.split(rest)
    except ValueError as error:
        raise ConfigError(f"/{name} {rest}: {str(error)[:1].lower()}{str(error)[1:]}. Close the quote.") from error


class Terminal:
    """Asks a conversation what comes in and prints what it answers.

    Args:
        conversation: what is asked.
        find_base: gives the model before training, None for the conversation's own with its adapter off; called the
            first time that the base is to answer.
        given: media for the first question, by kind.
        stream: print answers as they come.
        as_json: print a line of JSON a question instead.
    """

    def __init__(
        self,
        conversation: Conversation,
        find_base: Callable[[], Any],
        given: dict[Kind, list[Any]],
        *,
        stream: bool = True,
        as_json: bool = False,
    ) -> None:
        self.conversation, self._find_base, self._has_base = conversation, find_base, False
        self.waiting: dict[Kind, list[Any]] = {kind: list(given.get(kind, [])) for kind in KINDS}
        self.stream, self.as_json = stream and not as_json, as_json
        self.who: Who = "trained"
        self.interactive = False
        self.notes = Console(stderr=True)

    def switch(self, who: Who) -> None:
        """Choose who answers from now on.

        Raises:
            ConfigError: there is no base.
        """
        if who != "trained" and not self._has_base:
            self.conversation.base = self._find_base()
            self._has_base = True
        self.who = who

    def hold(self, name: str) -> str:
        """Read questions and commands until the input ends; return the last answer."""
        self.interactive = sys.stdin.isatty() or self.notes.is_jupyter
        if not self.interactive and isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # else a file in another encoding would end it
        if self.interactive:
            with suppress(ImportError):  # lines can be edited and called back
                import readline  # noqa: F401
            self._note(f"Talking to {name}. /help lists the commands, Ctrl-D leaves.")
            self._note_waiting()
        answer = ""
        while (line := self._line()) is not None:
            waited = any(self.waiting.values())
            try:
                command = parse(line)
                if command is None:
                    if line.strip() or waited:
                        answer = self.ask(line.strip())
                elif command[0] in ("quit", "exit"):
                    break
                else:
                    self._obey(*command)
            except VLMGRPOError as error:
                self._refuse(line, error)
                if waited and not any(self.waiting.values()):
                    self._note("The files that waited are put away.")
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self._note("\nStopped.")
        return answer

    def ask(self, text: str) -> str:
        """Ask ``text`` about the files that wait, print the answers, and keep the first, also if it is interrupted."""
        text = text.encode("utf-8", "replace").decode()  # bytes of another encoding, which no tokenizer takes
        media, self.waiting = self.waiting, _none()
        question = self.conversation.read(text, images=media["image"], videos=media["video"], audios=media["audio"])
        answers: dict[str, str] = {}
        try:
            for who in ("trained", "base") if self.who == "both" else (self.who,):
                self._answer(question, who, answers)
        finally:
            if answers:
                self.conversation.keep(question, next(iter(answers.values())))
            else:
                self.waiting = media
        if self.as_json:
            print(_as_json(text, answers), flush=True)
        return next(iter(answers.values()))

    def _answer(self, question: Question, who: str, answers: dict[str, str]) -> None:
        """Put the answer into ``answers``, piece by piece, so that an interrupted one is there too."""
        label = who if self.who == "both" or (self.interactive and self.who == "base") else "model" * self.interactive
        write = _nothing if self.as_json else _print

        def show(piece: str) -> None:
            answers[who] = answers.get(who, "") + piece
            if self.stream:
                write(piece)

        if label:
            write(f"{label}: ")
        answer = self.conversation.answer(question, of_base=who == "base", show=show)
        if not self.stream:
            write(answer)
        write("\n")
        answers[who] = answer

    def _line(self) -> str | None:
        """The next line of the input, or None at its end."""
        while True:
            try:
                if sys.stdin.isatty() and not sys.stdout.isatty():  # answers go into a file
                    print("you: ", end="", file=sys.stderr, flush=True)
                    return input()
                return input("you: " if self.interactive else "")
            except EOFError:
                self._note("")  # what follows begins a line
                return None
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self._note("\n/quit or Ctrl-D leaves.")

    def _obey(self, name: str, paths: list[str]) -> None:
        if name in KINDS:
            for path in paths:
                medium = Medium.of(path, name)
                self.conversation.check(medium, name)
                self.waiting[name].append(medium)
            self._note_waiting()
        elif name == "help":
            width = max(map(len, _HELP))
            self._note("\n".join(f"{command:<{width}}  {text}" for command, text in _HELP.items()))
        elif name == "reset":
            self.conversation.reset()
            self.waiting = _none()
            self._note("All turns are forgotten.")
        else:
            other: Who = "base" if name == "base" else "both"
            self.switch("trained" if self.who == other else other)
            self._note(self._who_answers())

    def _who_answers(self) -> str:
        by_adapter = self.conversation.base is None
        return {
            "trained": f"The trained model answers{' (adapter on)' * by_adapter}.",
            "base": f"The model before training answers{' (adapter off)' * by_adapter}.",
            "both": "Both answer the same conversation, which goes on with the trained model's answers.",
        }[self.who]

    def _note_waiting(self) -> None:
        names = [Medium.of(value, kind).label for kind in KINDS for value in self.waiting[kind]]
        if names:
            self._note(f"With the next question: {', '.join(names)}")

    def _note(self, text: str) -> None:
        if self.interactive:
            self.notes.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def _refuse(self, line: str, error: VLMGRPOError) -> None:
        self.notes.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        if self.as_json:
            print(json.dumps({"question": line.strip(), "error": str(error)}, ensure_ascii=False), flush=True)


def _none() -> dict[Kind, list[Any]]:
    return {kind: [] for kind in KINDS}


def _as_json(question: str, answers: dict[str, str]) -> str:
    """A turn as a line; an answer that was not asked for is null."""
    line = {"question": question, "answer": answers.get("trained"), "base_answer": answers.get("base")}
    return json.dumps(line, ensure_ascii=False)


def _print(text: str) -> None:
    # Not through rich: in a notebook it would begin a line with every piece.
    print(text, end="", flush=True)


def _nothing(text: str) -> None:
    pass
