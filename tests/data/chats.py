"""Conversations for tests, and what is trained of them."""

from truetune.data.chat import COUNTS, Encoder
from truetune.data.rows import Row

PREFIX = "{{ messages[0].content }}={% if messages|length > 1 %}{{ messages[1].content }}{{ eos_token }}{% endif %}"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def chat(*messages, **fields):
    return Row(messages=list(messages), origin="chats.jsonl:1", **fields)


def answers(tokenizer, document):
    """The text of each run of supervised tokens."""
    texts, run = [], []
    for token, label in zip([*document.input_ids, None], [*document.labels, -100], strict=True):
        if label != -100:
            assert label == token
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


def trained(tokenizer, row, **settings):
    """The supervised texts of each document of a row, and the counts."""
    documents, counts = Encoder(tokenizer, **settings).encode([row])
    assert all(document.labels[0] == -100 and document.row == 0 for document in documents)
    assert set(counts) <= set(COUNTS)
    return [answers(tokenizer, document) for document in documents], counts


def with_bos(tokenizer, by_tokenizer):
    """`tokenizer` with a BOS, which it puts before a plain text itself or not."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if by_tokenizer:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    return tokenizer
