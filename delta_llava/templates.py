"""Chat templates that others wrote are programs: here they run in a process of their own, with little time and memory.

`python -m delta_llava.templates` is that process. Names, filters and tags are those that transformers gives templates.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from .errors import UserError, reason

SECONDS = 5
# Seconds of the clock, for a machine that is busy with other things.
PATIENCE = 60
MEMORY_BYTES = 2**29
LONGEST_TEMPLATE, LONGEST_PROMPT = 500_000, 1_000_000


class Rendered(NamedTuple):
    """A conversation as a template shows it, or why the template cannot."""

    text: str | None
    problem: str | None = None


def render(template: str, conversations: Sequence[list[dict]], variables: dict, where: str) -> list[Rendered]:
    """What a chat template makes of conversations; behind a question it also opens the answer.

    Args:
        template: Jinja text.
        conversations: lists of messages, of strings, numbers, lists and dictionaries only.
        variables: other names that the template may use, such as `bos_token`.
        where: what the message calls the template.

    Raises:
        UserError: the template takes too long, or too much memory, or writes too much.
    """
    if not isinstance(template, str) or len(template) > LONGEST_TEMPLATE:
        raise UserError(f"{where} is no text of at most {LONGEST_TEMPLATE:,} characters: repair or remove it")
    order = json.dumps({"template": template, "conversations": conversations, "variables": variables})
    command = [sys.executable, "-P", "-m", __spec__.name]
    try:
        process = subprocess.run(command, input=order, capture_output=True, encoding="utf-8", timeout=PATIENCE)
        answer = process.stdout if process.returncode == 0 else None
    except subprocess.TimeoutExpired:
        answer = None
    if answer is None:
        raise UserError(
            f"{where} takes more than {SECONDS} seconds, {MEMORY_BYTES / 2**20:.0f} MiB or {LONGEST_PROMPT:,} "
            "characters to show a conversation: repair or remove it"
        )
    return [Rendered(*entry) for entry in json.loads(answer)]


def _main() -> None:
    _limit()
    order = json.load(sys.stdin)
    results = []
    for messages in order["conversations"]:
        try:
            asked = messages[-1]["role"] == "user"
            variables = {"tools": None, "documents": None, **order["variables"], "add_generation_prompt": asked}
            result = Rendered(_environment().from_string(order["template"]).render(variables, messages=messages))
        except MemoryError:
            raise
        except Exception as error:
            result = Rendered(None, reason(error))
        if result.text is not None and len(result.text) > LONGEST_PROMPT:
            sys.exit(1)
        results.append(result)
    json.dump(results, sys.stdout)


def _limit() -> None:
    """Limits this process, where the system can; the parent's patience is the only limit elsewhere."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _environment():
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks what the assistant says and shows it as it is."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message):
        raise TemplateError(message)

    def to_json(value, ensure_ascii=False, **settings):
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment


if __name__ == "__main__":
    _main()
