"""The child process that renders chat templates: a script that imports nothing of bitladder.

A template is code of a stranger. Jinja's sandbox keeps it from files and from Python's objects, but not from endless
loops and huge strings. So it runs in a process of its own, which the system ends when its time or memory is used up.

The parent writes one JSON object to stdin: `template`, `conversations` (`messages`, `tools`), `tokens` (bos_token,
eos_token), `answers`, `prompt` (whether the beginning of an answer follows), and the limits `seconds`, `bytes` and
`characters`. The answer is one JSON object on stdout:
`texts`, and with `answers` where each answer of each text begins at the earliest; or `error` with the number of the
conversation.
"""

import contextlib
import datetime
import json
import sys
from collections.abc import Callable
from typing import Any

from bitladder.units import number_of

# Templates that name today's date would give other text each day. This is the date that Llama 3's template has.
TODAY = datetime.datetime(2024, 7, 26)


class TooLongError(Exception):
    """A template makes too much text."""


def limit(seconds: int, size: int) -> None:
    """Sets the most processor time and memory of this process, where the system has such limits."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def environment() -> Any:
    """Jinja's sandbox, with what transformers gives to chat templates."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks answers in templates for training. Here it marks nothing."""

        tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **more)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": TODAY.strftime}
    return sandbox


def render(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request."""
    place, texts, starts = 0, [], []
    try:
        template = environment().from_string(request["template"])

        def render_one(conversation: dict[str, Any], *, prompt: bool) -> str:
            pieces, size = [], 0
            for piece in template.generate(**request["tokens"], **conversation, add_generation_prompt=prompt):
                pieces.append(piece)
                size += len(piece)
                if size > request["characters"]:
                    raise TooLongError(f"it makes more than {number_of(request['characters'], 'character')}")
            return "".join(pieces)

        for place, conversation in enumerate(request["conversations"], 1):  # noqa: B007  # the error names it
            texts.append(render_one(conversation, prompt=request["prompt"]))
            if request["answers"]:
                starts.append(answer_starts(conversation, texts[-1], render_one))
    except TooLongError as error:
        return {"error": str(error), "place": place}
    except MemoryError:
        return {"error": "it needs too much memory", "place": place}
    except RecursionError:
        return {"error": "it calls itself without end", "place": place}
    except Exception as error:  # whatever a stranger's template does
        reason = " ".join(str(error).split())[:200]
        return {"error": f"{type(error).__name__}: {reason}" if reason else type(error).__name__, "place": place}
    return {"texts": texts, "starts": starts}


def answer_starts(conversation: dict[str, Any], text: str, render_one: Callable[..., str]) -> list[int]:
    """For each answer the characters of the text before it: what the template makes to prompt for it; 0 if unknown."""
    starts = []
    for number, message in enumerate(conversation["messages"]):
        if message["role"] == "assistant":
            try:
                before = render_one(conversation | {"messages": conversation["messages"][:number]}, prompt=True)
            except Exception:  # such as a template that refuses to begin with an answer
                before = ""
            starts.append(len(before) if text.startswith(before) else 0)
    return starts


if __name__ == "__main__":
    received = json.load(sys.stdin)
    limit(received["seconds"], received["bytes"])
    json.dump(render(received), sys.stdout)
