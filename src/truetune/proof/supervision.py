"""Supervision audit: what is trained of the data, over all documents, from token ids and labels alone.

It shares no code with what makes labels, so that a fault there shows here.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import datasets
import numpy as np

from truetune.data.breakdown import in_words
from truetune.data.chat import COUNTS
from truetune.proof.errors import ProofError
from truetune.proof.excerpt import IGNORE_INDEX
from truetune.proof.generation_prompt import generation_prompt, places_behind
from truetune.proof.result import Check, Verdict

SHOWN = 3  # worst documents of a kind
SHOWN_SHARES = 8  # sources or roles
MOST_EMPTY, MOST_ALIKE, MOST_ONE_ANSWER = 0.1, 0.5, 0.9  # of the answers
ENOUGH_ANSWERS = 16
COPY_TOKENS = 8  # a shorter answer may well stand in its prompt
LEAST_INSIDE = 0.5  # of supervised turns that are the assistant's
LEFT_OUT = tuple(name for name in COUNTS if name.endswith("_ignored"))
NOT_ANSWERS = ("system", "developer", "user", "tool", "prompt")


@dataclass(frozen=True)
class Limits:
    """What stops a run; shares from 0 to 1.

    supervised: at least, of all tokens; lost: at most, of supervised tokens that truncation takes;
    turn_ends: at least, of supervised turns whose last token is one that generation stops on;
    whole_documents: at most, of documents in which everything is supervised, prompts included.
    """

    supervised: float = 0.005
    lost: float = 0.25
    turn_ends: float = 0.9
    whole_documents: float = 1.0

    @classmethod
    def of(cls, given: Mapping[str, float] | str | None) -> "Limits":
        """A mapping, or JSON with one. Raises `ProofError` for a name that is none."""
        if isinstance(given, str):
            given = dict(json.loads(given))
        names = [field.name for field in fields(cls)]
        values: dict[str, float] = dict(given or {})
        for name in values:
            if name not in names:
                raise ProofError(f"preflight_limits has no {name}: use {', '.join(names)}.")
        return cls(**values)


class Documents:
    """Token ids and labels of many documents, flat: int32 [N], and offsets int64 [D + 1]."""

    def __init__(self, input_ids: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> None:
        self.ids_N = np.concatenate([*input_ids, np.empty(0, np.int32)]).astype(np.int32)
        self.labels_N = np.concatenate([*labels, np.empty(0, np.int32)]).astype(np.int32)
        self.ends = np.cumsum([0, *map(len, input_ids)])

    @classmethod
    def of(cls, documents: datasets.Dataset) -> "Documents":
        table = documents.with_format("arrow").select_columns(["input_ids", "labels"])[:]
        made = cls([], [])
        made.ids_N, made.labels_N = (
            np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[name].chunks])
            for name in ("input_ids", "labels")
        )
        lengths = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in table["input_ids"].chunks]
        made.ends = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        return made

    @classmethod
    def joined(cls, parts: Sequence["Documents"]) -> "Documents":
        made = cls([], [])
        made.ids_N, made.labels_N = (np.concatenate([vars(p)[name] for p in parts]) for name in ("ids_N", "labels_N"))
        made.ends = np.cumsum([0, *(length for part in parts for length in np.diff(part.ends))])
        return made

    def __len__(self) -> int:
        return len(self.ends) - 1

    @cached_property
    def supervised_N(self) -> np.ndarray:
        return self.labels_N != IGNORE_INDEX

    @cached_property
    def turns(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last place of each run of supervised tokens within a document."""
        first = np.zeros(len(self.ids_N), bool)
        first[self.ends[:-1][np.diff(self.ends) > 0]] = True
        before = np.concatenate([[False], self.supervised_N[:-1]]) & ~first
        starts = np.flatnonzero(self.supervised_N & ~before)
        after = np.concatenate([self.supervised_N[1:] & ~first[1:], [False]])
        return starts, np.flatnonzero(self.supervised_N & ~after)

    def document_of(self, places: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.ends, places, side="right") - 1

    def tokens(self, document: int) -> np.ndarray:
        return self.ids_N[self.ends[document] : self.ends[document + 1]]

    def prompt(self, document: int) -> bytes:
        """What comes before the first supervised token."""
        start, end = self.ends[document : document + 2]
        supervised = np.flatnonzero(self.supervised_N[start:end])
        return self.ids_N[start : start + (supervised[0] if len(supervised) else 0)].tobytes()


def audit(
    documents: Documents,
    tokenizer: Any,
    limits: Limits,
    *,
    stops: Sequence[int],
    max_length: int | None,
    embeddings: int,
    counts: Mapping[str, Any] | None = None,
    evaluation: Documents | None = None,
    strict: bool = True,
) -> list[Check]:
    """`stops`: ids that generation ends on; `embeddings`: rows of the model's input embedding; `counts`: what became of
    the rows (`Counts`), what is trained by source and role (`breakdown`), and the recipe's `supervise`, where known.

    Not `strict`: what could be accepted by name is a warning, because data may be meant to be so.
    """
    checks = [
        _supervised(documents, limits),
        _known_ids(documents, embeddings),
        _labels(documents, tokenizer),
        _first_tokens(documents, tokenizer),
        _turn_ends(documents, tokenizer, limits, stops, max_length),
        _prompts(documents, tokenizer, limits),
        _answers(documents, tokenizer, stops),
        *_turn_starts(documents, tokenizer, stops),
    ]
    if counts is not None:
        if left_out := _left_out(counts):
            checks.append(left_out)
        if "sources" in counts:
            checks.append(_sources(counts["sources"]))
        if "roles" in counts:
            checks.append(_roles(counts["roles"], counts.get("supervise", "all")))
        checks.append(_lost(counts, limits))
    checks.append(_duplicates(documents, tokenizer))
    if evaluation is not None:
        checks.append(_overlap(documents, evaluation, tokenizer))
    return checks if strict else [replace(c, verdict="warn") if c.verdict == "fail" and c.allow else c for c in checks]


def _supervised(documents: Documents, limits: Limits) -> Check:
    supervised, tokens = int(documents.supervised_N.sum()), len(documents.ids_N)
    share = supervised / max(1, tokens)
    low = share < limits.supervised
    return Check(
        "supervised tokens",
        f"{supervised:,} of {tokens:,} tokens in {len(documents):,} documents ({share:.1%})",
        f"at least {limits.supervised:.1%}",
        "fail" if low else "pass",
        mend="nearly nothing is trained: check the roles of the data and what is supervised" if low else "",
        allow="few_supervised" if low and supervised else "",
        details={"supervised": supervised, "tokens": tokens, "documents": len(documents), "share": share},
    )


OTHER_TOKENIZER = "the tokenizer knows more tokens than the model: use the model's own, or resize the embeddings"


def _known_ids(documents: Documents, embeddings: int) -> Check:
    """A GPU ends the process at an id without a row, in a kernel's assertion that names nothing."""
    largest = int(documents.ids_N.max(initial=0))
    bad = largest >= embeddings
    return Check(
        "token ids", f"the largest is {largest:,}", f"below {embeddings:,}, the embedding's rows",
        "fail" if bad else "pass", mend=OTHER_TOKENIZER if bad else "",
    )  # fmt: skip


def _sources(shares: Mapping[str, Mapping[str, Any]]) -> Check:
    bad = [name for name, found in shares.items() if not found["supervised"]]
    return Check(
        "sources", _in_words(shares), "each is trained", "warn" if bad else "pass",
        mend=f"nothing of {' and '.join(bad)} is trained: look at its rows with truetune inspect, or drop it"
        if bad else "",
        details={name: dict(found) for name, found in shares.items()},
    )  # fmt: skip


def _roles(shares: Mapping[str, Mapping[str, Any]], supervise: str) -> Check:
    """`supervise`: what was asked for."""
    bad = [name for name in NOT_ANSWERS if supervise != "all" and shares.get(name, {}).get("supervised")]
    return Check(
        "roles", _in_words(shares), f"supervise: {supervise}", "fail" if bad else "pass",
        mend=f"what {' and '.join(bad)} say is trained: report the chat template, or set supervise: all if it is meant"
        if bad else "",
        allow="supervised_roles" if bad else "",
        details={name: dict(found) for name, found in shares.items()},
    )  # fmt: skip


def _in_words(shares: Mapping[str, Mapping[str, Any]]) -> str:
    shown = [f"{name}: {in_words(found)}" for name, found in shares.items()]
    more = len(shown) - SHOWN_SHARES
    return "; ".join(shown[:SHOWN_SHARES] + ([f"{more} more in proof.json"] if more > 0 else []))


def _labels(documents: Documents, tokenizer: Any) -> Check:
    """Labels are the ids themselves, unshifted."""
    wrong = documents.supervised_N & (documents.labels_N != documents.ids_N)
    found = np.unique(documents.document_of(np.flatnonzero(wrong)))
    return Check(
        "labels", f"{int(wrong.sum()):,} differ from their token", "0", "fail" if len(found) else "pass",
        mend="labels are shifted or of another tokenizer: give labels that stand at their own token"
        if len(found) else "",
        details=_shown(documents, found, tokenizer),
    )  # fmt: skip


def _first_tokens(documents: Documents, tokenizer: Any) -> Check:
    """BOS, once."""
    starts = documents.ends[:-1][np.diff(documents.ends) > 0]
    bos = tokenizer.bos_token_id
    puts_it = bos is not None and tokenizer("x")["input_ids"][:1] == [bos]
    first_is_bos = documents.ids_N[starts] == (-1 if bos is None else bos)
    second = np.minimum(starts + 1, len(documents.ids_N) - 1)
    twice = (
        first_is_bos
        & (documents.ids_N[second] == documents.ids_N[starts])
        & (np.diff(documents.ends) > 1)[: len(starts)]
    )
    without = ~first_is_bos if puts_it else np.zeros(len(starts), bool)
    words = {
        "begin with BOS": first_is_bos,
        "with two": twice,
        "lack the BOS that the tokenizer puts": without,
    }
    bad = np.flatnonzero(twice)
    seen = ", ".join(f"{int(found.sum()):,} {name}" for name, found in words.items() if found.any()) or "no BOS"
    verdict: Verdict = "fail" if len(bad) else "warn" if without.any() else "pass"
    mend = "the chat template and the tokenizer disagree about BOS: put it into one of them, once"
    return Check(
        "first tokens", seen, "one BOS", verdict,
        mend="" if verdict == "pass" else mend,
        allow="bos" if len(bad) else "",
        details=_shown(documents, bad, tokenizer),
    )  # fmt: skip


def _turn_ends(
    documents: Documents, tokenizer: Any, limits: Limits, stops: Sequence[int], max_length: int | None
) -> Check:
    _, last = documents.turns
    of = documents.document_of(last)
    ends = documents.ends[1:][of]
    cut = (last == ends - 1) & (np.diff(documents.ends)[of] >= (max_length or np.iinfo(np.int64).max))
    whole = ~cut
    stopped = np.isin(documents.ids_N[last], list(stops))
    # A template may put white space behind the token that ends a turn, and supervise it.
    before = documents.ids_N[np.maximum(last - 1, 0)]
    stopped |= np.isin(before, list(stops)) & documents.supervised_N[np.maximum(last - 1, 0)]
    share = float(stopped[whole].mean()) if whole.any() else 1.0
    wrong = whole & ~stopped
    others = Counter(documents.ids_N[last[wrong]].tolist()).most_common(SHOWN)
    names = ", ".join(repr(tokenizer.decode([token])) for token, _ in others)
    low = share < limits.turn_ends
    return Check(
        "turn ends",
        f"{share:.1%} of {int(whole.sum()):,} supervised turns end with a token that generation stops on"
        + (f"; others with {names}" if names else "")
        + (f"; {int(cut.sum()):,} are cut at max_length" if cut.any() else ""),
        f"at least {limits.turn_ends:.1%}",
        "fail" if low else "pass",
        mend="a model so trained does not stop: let the tokenizer's eos_token be what ends a turn of the chat template"
        if low else "",
        allow="turn_ends" if low else "",
        details={"share": share, "stops": list(stops), "cut": int(cut.sum()),
                 **_shown(documents, np.unique(of[wrong]), tokenizer)},
    )  # fmt: skip


def _prompts(documents: Documents, tokenizer: Any, limits: Limits) -> Check:
    lengths = np.diff(documents.ends)
    supervised = np.add.reduceat(np.append(documents.supervised_N, 0), documents.ends[:-1])[: len(lengths)]
    whole = (supervised >= lengths - 1) & (lengths > 1)
    share = float(whole.mean()) if len(whole) else 0.0
    high = share > limits.whole_documents
    return Check(
        "prompts",
        f"{int(whole.sum()):,} of {len(lengths):,} documents are supervised as a whole ({share:.1%})",
        f"at most {limits.whole_documents:.1%}",
        "fail" if high else "pass",
        mend="prompts are trained too: give prompts and completions apart, or messages" if high else "",
        allow="prompts_supervised" if high else "",
        details={"share": share, **_shown(documents, np.flatnonzero(whole), tokenizer)},
    )


def _answers(documents: Documents, tokenizer: Any, stops: Sequence[int]) -> Check:
    """What is said behind prompts: the same as they say, as all others, or nothing; or all prompts are one.

    An answer is the first supervised turn of a document; a document that is supervised as a whole has none. Alike are
    documents with the same of all their turns: chats may all begin with the same greeting.
    """
    starts, last = documents.turns
    of, first = np.unique(documents.document_of(starts), return_index=True)
    asked = starts[first] - documents.ends[of] > 1  # plain text has its first token before it, and so has a part
    of, starts, ends = of[asked], starts[first][asked], last[first][asked] + 1
    silent = {*stops, *tokenizer.all_special_ids}
    ids_N, supervised_N = documents.ids_N, documents.supervised_N
    answers, prompts = Counter[int](), Counter[int]()
    empty, copies = [], []
    for document, start, end in zip(of.tolist(), starts.tolist(), ends.tolist(), strict=True):
        answer = ids_N[start:end]
        while len(answer) and int(answer[-1]) in silent:
            answer = answer[:-1]
        prompt = ids_N[documents.ends[document] : start]
        whole = slice(documents.ends[document], documents.ends[document + 1])
        answers[hash(ids_N[whole][supervised_N[whole]].tobytes())] += 1
        prompts[hash(ids_N[whole][~supervised_N[whole]].tobytes())] += 1
        short = len(answer) < COPY_TOKENS
        if short and not tokenizer.decode(answer.tolist(), skip_special_tokens=True).strip():
            empty.append(document)
        elif not short and 2 * len(answer) > len(prompt) and answer.tobytes() in prompt.tobytes():
            copies.append(document)
    count = len(of)
    most, one_prompt = _most(answers), _most(prompts)
    faults = []
    if len(empty) > MOST_EMPTY * count:
        faults.append("answers say nothing, which teaches the model to be silent: look for the column that holds them")
    if len(copies) > MOST_ALIKE * count:
        faults.append("answers repeat their prompts: look whether one column was given for both")
    if count >= ENOUGH_ANSWERS and most > MOST_ONE_ANSWER * count and len(empty) <= MOST_EMPTY * count:
        faults.append("nearly all answers are the same, which needs no question: look at the column that holds them")
    if count >= ENOUGH_ANSWERS and one_prompt > MOST_ALIKE * count and len(answers) > 1:
        faults.append(
            "one prompt stands before most answers, which cannot depend on it: look whether the chat template or the "
            "columns leave the questions out"
        )
    shares = [(len(empty), "empty"), (len(copies), "in their prompt"), (most, "with the commonest answer"),
              (one_prompt, "with the commonest prompt")]  # fmt: skip
    return Check(
        "answers",
        f"of {count:,}: " + ", ".join(f"{number:,} {what}" for number, what in shares),
        f"at most {MOST_EMPTY:.0%}, {MOST_ALIKE:.0%}, {MOST_ONE_ANSWER:.0%}, {MOST_ALIKE:.0%}",
        "warn" if faults else "pass", mend="; ".join(faults),
        details={"documents": count, "empty": len(empty), "copies": len(copies), "one_answer": most,
                 "one_prompt": one_prompt, **_shown(documents, np.array(empty + copies, int), tokenizer)},
    )  # fmt: skip


def _most(counts: Counter[int]) -> int:
    return max(counts.values(), default=0)


def _turn_starts(documents: Documents, tokenizer: Any, stops: Sequence[int]) -> list[Check]:
    """What is supervised lies in the turn that the template's generation prompt begins; nothing where none has one.

    A mask that is off by one turn trains the questions, which end like answers.
    """
    prompt = generation_prompt(tokenizer)
    behind_prompts = places_behind(documents.ids_N, prompt)
    starts, _ = documents.turns
    of = documents.document_of(starts)
    chats = np.isin(of, documents.document_of(behind_prompts - 1))
    starts, of = starts[chats & (starts - documents.ends[of] > 1)], of[chats & (starts - documents.ends[of] > 1)]
    if not len(starts):
        return []
    ended = np.concatenate([[0], np.cumsum(np.isin(documents.ids_N, list(stops)))])
    before = behind_prompts[np.maximum(np.searchsorted(behind_prompts, starts, side="right") - 1, 0)]
    inside = (before <= starts) & (before > documents.ends[of]) & (ended[before] == ended[starts])
    # A mask may take the generation prompt itself too.
    inside |= np.isin(starts + len(prompt), behind_prompts)
    share = float(inside.mean())
    wrong = share < LEAST_INSIDE
    return [Check(
        "turn starts",
        f"{share:.1%} of {len(starts):,} supervised turns are those that {tokenizer.decode(prompt)!r} begins",
        f"at least {LEAST_INSIDE:.1%}",
        "warn" if wrong else "pass",
        mend="other turns than the assistant's are trained: look at what is supervised (assistant_masks, or "
        "{% generation %} in the chat template)" if wrong else "",
        details={"share": share, **_shown(documents, np.unique(of[~inside]), tokenizer)},
    )]  # fmt: skip


def _left_out(counts: Mapping[str, Any]) -> Check | None:
    """What the chat template does not write of the conversations, as the encoder counted it."""
    found = {name: counts["encoder"][name] for name in LEFT_OUT if counts.get("encoder", {}).get(name)}
    if "encoder" not in counts:
        return None
    seen = "; ".join(f"{count:,} {COUNTS[name]}" for name, count in found.items())
    return Check(
        "chat template", seen or "leaves nothing out", "leaves nothing out", "warn" if found else "pass",
        mend="the model is not shown all of the data: take a chat_template that writes it, or leave it out of the rows"
        if found else "",
        details=found,
    )  # fmt: skip


def _lost(counts: Mapping[str, Any], limits: Limits) -> Check:
    lost = counts.get("lost_supervised", 0) + counts.get("cut_off_supervised", 0)
    kept = counts.get("supervised", 0)
    share = lost / max(1, lost + kept)
    dropped = counts.get("dropped", {})
    reasons = "".join(f"; {count:,} documents dropped: {why.replace('_', ' ')}" for why, count in dropped.items())
    high = share > limits.lost
    return Check(
        "truncation",
        f"{counts.get('truncated', 0):,} documents cut, and {share:.1%} of their supervised tokens lost{reasons}",
        f"at most {limits.lost:.1%} lost",
        "fail" if high else "pass",
        mend="answers are cut off: raise max_length, or set overflow: split" if high else "",
        allow="lost_supervised" if high else "",
        details={"lost_supervised": lost, "share": share, "dropped": dict(dropped)},
    )


def _duplicates(documents: Documents, tokenizer: Any) -> Check:
    seen: set[bytes] = set()
    again = []
    for document in range(len(documents)):
        key = documents.tokens(document).tobytes()
        if key in seen:
            again.append(document)
        seen.add(key)
    return Check(
        "duplicates", f"{len(again):,} of {len(documents):,} documents stand there before", "0",
        "warn" if again else "pass",
        mend=f"{len(again):,} documents are trained more than once an epoch: remove them where that is not meant"
        if again else "",
        details=_shown(documents, np.array(again, int), tokenizer),
    )  # fmt: skip


def _overlap(documents: Documents, evaluation: Documents, tokenizer: Any) -> Check:
    whole = {documents.tokens(document).tobytes() for document in range(len(documents))}
    prompts = {documents.prompt(document) for document in range(len(documents))} - {b""}
    same = [d for d in range(len(evaluation)) if evaluation.tokens(d).tobytes() in whole]
    others = sorted(set(range(len(evaluation))) - set(same))
    asked = [d for d in others if evaluation.prompt(d) in prompts]
    others = sorted(set(others) - set(asked))
    letters = _Letters(tokenizer) if others else None
    trained = {letters.of(documents.tokens(document)) for document in range(len(documents))} if letters else set()
    alike = [d for d in others if letters and letters.of(evaluation.tokens(d)) in trained]
    found = same + asked + alike
    return Check(
        "evaluation set",
        f"{len(same):,} of {len(evaluation):,} documents stand in the training data, "
        f"{len(asked):,} with another answer, {len(alike):,} but for white space and case",
        "0",
        "warn" if found else "pass",
        mend="the evaluation loss measures memory: hold those rows out" if found else "",
        details={"same": len(same), "same_prompt": len(asked), "alike": len(alike),
                 **_shown(evaluation, np.array(found, int), tokenizer)},
    )  # fmt: skip


class _Letters:
    """Documents without white space and case, as hashes: tokens of another spacing spell the same letters."""

    def __init__(self, tokenizer: Any) -> None:
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        # Byte-level tokenizers write a space, a line's end and a tab as other letters, SentencePiece a space.
        self.letters = ["".join((token or "").translate(_SPACES).split()).lower() for token in tokens]

    def of(self, ids: np.ndarray) -> int:
        last = len(self.letters) - 1
        return hash("".join([self.letters[token] for token in ids.clip(max=last).tolist()]))


_SPACES = str.maketrans(dict.fromkeys("ĠĊĉčĨ▁", " "))


def _shown(documents: Documents, which: np.ndarray, tokenizer: Any) -> dict[str, Any]:
    """The first few, as text."""
    if not len(which):
        return {}
    examples = [
        {"document": int(document), "text": tokenizer.decode(documents.tokens(int(document)).tolist())[:400]}
        for document in which[:SHOWN]
    ]
    return {"count": len(which), "examples": examples}
