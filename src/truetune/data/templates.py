"""Built-in chat templates, for a model that brings none, and how a template is named.

Each one says which special tokens it writes. A tokenizer that lacks some of them has to learn them: whoever loads the
model adds them (`special_tokens`), resizes the embeddings and trains the new rows; it also makes `stop_token` the
tokenizer's EOS, so that `generate` stops where the training data stops. None of them rewrites earlier turns.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from truetune.data.errors import DataError


@dataclass(frozen=True)
class BuiltinTemplate:
    """A chat template: `text` is Jinja; `stop_token` ends every assistant turn (None: the tokenizer's own EOS does)."""

    text: str
    special_tokens: tuple[str, ...]
    stop_token: str | None


_CHATML = """\
{{- bos_token }}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- if system or tools %}
    {{- '<|im_start|>system\\n' + system }}
    {%- if tools %}
        {{- '\\n\\n' if system }}
        {{- 'You may call these functions:\\n<tools>' }}
        {%- for tool in tools %}
            {{- '\\n' + (tool | tojson) }}
        {%- endfor %}
        {{- '\\n</tools>\\nTo call one, write <tool_call>{"name": ..., "arguments": {...}}</tool_call>.' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in (messages[1:] if messages[0].role == 'system' else messages) %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and message.reasoning_content %}
        {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content }}
    {%- for call in message.tool_calls or [] %}
        {%- set function = {'name': call.function.name, 'arguments': call.function.arguments} %}
        {{- '\\n' if message.content or not loop.first }}
        {{- '<tool_call>' + (function | tojson) + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

_GEMMA = """\
{{- bos_token }}
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for message in (messages[1:] if messages[0].role == 'system' else messages) %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
    {{- system if loop.first }}
    {{- message.content + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""

_PLAIN = """\
{{- bos_token }}
{%- for message in messages %}
    {{- message.role | capitalize + ': ' + message.content }}
    {{- eos_token if message.role == 'assistant' }}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}
"""

BUILTIN_TEMPLATES: dict[str, BuiltinTemplate] = {
    "chatml": BuiltinTemplate(_CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama3": BuiltinTemplate(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "gemma": BuiltinTemplate(_GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "plain": BuiltinTemplate(_PLAIN, (), None),
}


def template_text(name_or_path: str) -> str:
    """The Jinja text behind the name of a built-in template, the path of a `.jinja` file, or template text itself.

    Raises `DataError` for anything else.
    """
    if name_or_path in BUILTIN_TEMPLATES:
        return BUILTIN_TEMPLATES[name_or_path].text
    if "{{" in name_or_path or "{%" in name_or_path:
        return name_or_path
    try:
        return Path(os.path.expanduser(name_or_path)).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"chat_template: the file {name_or_path} is not UTF-8") from None
    except (OSError, ValueError) as error:  # a ValueError: no path at all
        raise DataError(
            f"chat_template: {name_or_path!r} is none of {', '.join(BUILTIN_TEMPLATES)}, and no file can be read "
            f"under that path ({getattr(error, 'strerror', None) or error})"
        ) from None
