"""Conversations as text: read from files, and rendered with a model's own chat template.

Renderings follow one another without anything between them, and are cut into chunks as any other text. Special tokens
in them ("<|im_end|>") are parsed.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from bitladder.errors import BitladderError
from bitladder.files import sha256_bytes
from bitladder.gguf import open_model
from bitladder.text.file_content import Numbered, json_lines, json_list, plain_text

SUFFIXES = (".jsonl", ".json")
LISTS = ("messages", "conversations", "conversation")
# Words of published data sets → those of chat templates.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "model": "assistant"}
ANSWER = "assistant"
# Environment variables that the child gets: those that Python needs.
PASSED = ("PATH", "HOME", "USERPROFILE", "APPDATA", "SYSTEMROOT", "PYTHONPATH")
# Limits of the child: processor time (and as much more for each conversation), memory, and characters.
SECONDS, SECONDS_EACH = 20, 0.02
BYTES = 4 << 30
CHARACTERS, CHARACTERS_EACH = 1 << 20, 8
WALL = 30  # times the processor time, for a busy machine
METADATA = "tokenizer.chat_template"
_ENDS = ("eot", "eos", "eom")

Message = dict[str, Any]
Span = tuple[int, int]  # the first character, and the one after the last


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages with "role" and "content", and what a template gets beside them.

    Parameters:
        where: its place in the file, such as "chat.jsonl, line 3".
        messages: from the first to the last.
        more: other values of the record that templates know, such as "tools".
    """

    where: str
    messages: tuple[Message, ...]
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def contents(self) -> Iterator[str]:
        """The text of each message."""
        return (message["content"] for message in self.messages)


def is_chat(path: pathlib.Path) -> bool:
    """Whether a file holds conversations, by the end of its name."""
    return path.suffix.lower() in SUFFIXES


def read_conversations(path: pathlib.Path, data: bytes) -> tuple[Conversation, ...]:
    """The conversations of a file.

    A record is a list of messages, or an object with such a list under "messages", "conversations" or "conversation". A
    message has "role" and "content", or "from" and "value".

    Parameters:
        path: the file.
        data: its content.

    Raises:
        BitladderError: a record is no conversation; the error names the file and the record.
    """
    conversations = tuple(conversation(where, value) for where, value in _records(path, data))
    if not conversations:
        raise BitladderError(f"{path.name} has no conversations")
    return conversations


def _records(path: pathlib.Path, data: bytes) -> Numbered:
    suffix, name = path.suffix.lower(), path.name
    text = plain_text(data, name).removeprefix("\ufeff")
    if suffix == ".jsonl":
        return json_lines(text, name)
    records = json_list(text if text.lstrip().startswith("[") else f"[{text}]", name)
    # A list of messages is one conversation.
    if all(isinstance(value, dict) and not _list_of(value) for _, value in records):
        return [(name, [value for _, value in records])]
    return records


def _list_of(record: dict[str, Any]) -> Any:
    return next((record[name] for name in LISTS if record.get(name)), None)


def conversation(where: str, record: Any) -> Conversation:
    """The conversation of a record. Raises BitladderError that names its place if it is none."""
    listed = _list_of(record) if isinstance(record, dict) else record
    if not isinstance(listed, list) or not listed:
        raise BitladderError(
            f"{where}: no conversation; a record is a list of messages, or an object with one under {', '.join(LISTS)} "
            "(a file of plain text needs another name, such as .txt)"
        )
    messages = [_message(f"{where}, message {number}", value) for number, value in enumerate(listed, 1)]
    more: dict[str, Any] = {}
    if isinstance(record, dict):
        if isinstance(record.get("tools"), list):
            more["tools"] = record["tools"]
        if isinstance(record.get("system"), str) and record["system"] and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": record["system"]})
    return Conversation(where, tuple(messages), more)


def _message(where: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise BitladderError(f"{where}: not an object with role and content")
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(role, str) or not isinstance(content, str | None):
        raise BitladderError(f"{where}: role and content must be text")
    message = {name: part for name, part in value.items() if name not in ("from", "value") and part is not None}
    return message | {"role": ROLES.get(role, role), "content": content or ""}


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a model.

    Parameters:
        model: the name of the file.
        text: the template.
        bos: the token at the beginning of a text; empty if there is none.
        eos: the token at the end of a text.
        ends: tokens that end an answer.
        adds_bos: whether the tokenizer puts `bos` before a text.
    """

    model: str
    text: str
    bos: str
    eos: str
    ends: tuple[str, ...]
    adds_bos: bool

    @classmethod
    def of(cls, path: pathlib.Path) -> "ChatTemplate":
        """The template that a GGUF has. Raises BitladderError if it has none."""
        with open_model(path) as file:
            template = file.get(METADATA)
            if not isinstance(template, str):
                raise BitladderError(
                    f"{path.name} has no chat template, which conversations need: give plain text, or a model for chat"
                )
            tokens = file.get("tokenizer.ggml.tokens", [])

            def token(name: str) -> str:
                place = file.get(f"tokenizer.ggml.{name}_token_id")
                return tokens[place] if isinstance(place, int) and place < len(tokens) else ""

            return cls(
                path.name,
                template,
                token("bos"),
                token("eos"),
                tuple(filter(None, map(token, _ENDS))),
                bool(file.get("tokenizer.ggml.add_bos_token", False)),
            )

    def render(
        self, conversations: Sequence[Conversation], *, answers: bool = False, prompt: bool = False
    ) -> tuple[list[str], list[list[int]]]:
        """The text of each conversation and, with `answers`, where each of its answers begins at the earliest.

        With `prompt` the beginning of an answer follows, as for generation.

        Raises:
            BitladderError: the template fails, refuses a conversation, does not end, or makes too much text.
        """
        seconds = int(SECONDS + SECONDS_EACH * len(conversations))
        longest = max(sum(map(len, conversation.contents)) for conversation in conversations)
        request = {
            "template": self.text,
            "conversations": [{"messages": part.messages, **part.more} for part in conversations],
            "tokens": {"bos_token": self.bos, "eos_token": self.eos},
            "answers": answers,
            "prompt": prompt,
            "seconds": seconds,
            "bytes": BYTES,
            "characters": CHARACTERS + CHARACTERS_EACH * longest,
        }
        command = [sys.executable, os.fspath(pathlib.Path(__file__).with_name("render_chat.py"))]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(request).encode(),
                capture_output=True,
                check=False,
                timeout=WALL * seconds,
                env={name: os.environ[name] for name in PASSED if name in os.environ},
            )
            answer = json.loads(done.stdout) if done.returncode == 0 else {}
        except (subprocess.TimeoutExpired, ValueError):
            answer = {}
        if "texts" in answer:
            return answer["texts"], answer["starts"]
        place = answer.get("place")
        where = f" at {conversations[place - 1].where}" if place else ""
        reason = answer.get("error") or f"it does not end in {seconds} s, or needs too much memory"
        raise BitladderError(f"the chat template of {self.model} fails{where}: {reason}")


def rendered_text(
    conversations: Sequence[Conversation], template: ChatTemplate, *, answers: bool
) -> tuple[str, tuple[Span, ...] | None]:
    """The renderings of conversations as one text and, with `answers`, where its answers are.

    Raises:
        BitladderError: as `ChatTemplate.render`; or an answer is not in its rendering as it is.
    """
    texts, starts = template.render(conversations, answers=answers)
    spans: list[Span] = []
    length = 0
    for number, text in enumerate(texts if answers else ()):
        of_text = _answers(conversations[number], text, starts[number], template)
        spans += [(length + start, length + end) for start, end in of_text]
        length += len(text)
    # The tokenizer puts BOS before the text.
    cut = len(template.bos) if template.adds_bos and template.bos and texts[0].startswith(template.bos) else 0
    return "".join(texts)[cut:], tuple((start - cut, end - cut) for start, end in spans) if answers else None


def _answers(conversation: Conversation, text: str, starts: Sequence[int], template: ChatTemplate) -> Iterator[Span]:
    """Where the answers of a conversation are in its rendering, each with the token that ends it."""
    place, earliest = 0, iter(starts)
    for message in conversation.messages:
        content = message["content"]
        if message["role"] == ANSWER:
            place = max(place, next(earliest))
        # Templates strip blanks, and most leave out what a model thought before.
        forms = (content, content.strip(), content.rpartition("</think>")[2].strip())
        start, form = next(((at, form) for form in forms if (at := text.find(form, place)) >= 0), (-1, ""))
        if message["role"] != ANSWER:
            place = start + len(form) if start >= 0 else place
            continue
        if start < 0:
            raise BitladderError(
                f"{conversation.where}: the chat template of {template.model} changes an answer, so its tokens cannot "
                "be told from others; leave --assistant-only out"
            )
        end = start + len(form)
        end += next((len(token) for token in template.ends if text.startswith(token, end)), 0)
        if form:
            yield start, end
        place = end


def chat_sha256(text: str) -> str:
    """The hash of a text whose special tokens are parsed, which is another text than the same characters are."""
    return sha256_bytes(b"special tokens are parsed\n" + text.encode("utf-8", "surrogateescape"))
