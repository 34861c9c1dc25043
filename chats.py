"""A dialogue as a causal language model reads it: its chat format, token rows, batches.

Knows tokenizers, and no model. The speaker is the chat's user, the listener its assistant.
Letters in shapes: B sequences, L tokens, N target tokens in a batch, E examples in a batch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError

from corpora import Example
from dataloaders import Data, encode, join, pad

#: said to the model before every dialogue; without it a template puts a turn of its own there
SYSTEM = "You are a caring listener. Answer in one or two sentences."
#: what a template that asks is told for today: a model reads tomorrow what it was trained on
TODAY = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"
EXEMPLAR_INTRO = "\nReplies that others gave in like situations:"
EXEMPLAR_MARKER = "\n- "


@dataclass(frozen=True)
class ChatFormat:
    """What stands between the texts of a chat:
    `opening SYSTEM after_system TURN before_reply REPLY <end> after_reply TURN ...`"""

    opening: str
    after_system: str
    before_reply: str
    after_reply: str  # what follows the end token
    end_id: int
    own: bool  # from the tokenizer's own template
    special: tuple[str, ...]  # strings that a tokenizer reads as control tokens
    lead: str = ""  # white space that a reply begins with

    def clean(self, text: str) -> str:
        """Without the strings of control tokens: nobody's words may begin or end a turn."""
        before = None
        while text != before:  # taking one out can put another together
            before = text
            for token in self.special:
                text = text.replace(token, "")
        return text.strip()


def chat_format(tokenizer) -> ChatFormat:
    """The format that the tokenizer's chat template gives to speaker (user) and listener (assistant).

    Each turn must look the same wherever it stands, so that a conversation's tokens are a prefix of its
    continuation's; a tokenizer without such a template gets turns marked in plain words.
    """
    marked = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    special = tuple(t for t in dict.fromkeys([*tokenizer.all_special_tokens, *marked]) if t)
    pieces = _template_pieces(tokenizer, system=True)
    if pieces is None:  # no system role: its text opens the first turn
        without = _template_pieces(tokenizer, system=False)
        pieces = without and [without[0], "\n\n", *without[1:]]
    if pieces is None:
        return ChatFormat(
            opening=tokenizer.bos_token or "",
            after_system="\nSpeaker:\n",
            before_reply="\nListener:\n",
            after_reply="\nSpeaker:\n",
            end_id=tokenizer.eos_token_id,
            own=False,
            special=special,
        )
    opening, after_system, before_reply, lead, after_reply = pieces
    end = min((t for t in special if t in after_reply), key=after_reply.find, default=None)
    if end is not None:  # else the tokenizer's own is put there
        after_reply = after_reply[after_reply.find(end) + len(end) :]
    return ChatFormat(
        opening=opening,
        after_system=after_system,
        before_reply=before_reply,
        after_reply=after_reply,
        end_id=tokenizer.eos_token_id if end is None else tokenizer.convert_tokens_to_ids(end),
        own=True,
        special=special,
        lead=lead,
    )


def _template_pieces(tokenizer, system: bool) -> list[str] | None:
    """[opening, (after_system,) before_reply, lead, after_reply]; None where turns do not all look alike."""
    if not tokenizer.chat_template:
        return None
    template = tokenizer.get_chat_template()  # the default one, of several
    roles = ["system"] * system + ["user", "assistant", "user", "assistant", "user"]
    messages = [{"role": role, "content": f"@{i}@"} for i, role in enumerate(roles)]
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=TODAY + template, tokenize=False, add_generation_prompt=True
        )
    except TemplateError:  # how a template says that it knows no system role
        return None
    if re.findall(r"@\d@", text) != [m["content"] for m in messages]:
        return None
    opening, *between = re.split(r"@\d@", text)
    head, turns = between[: int(system)], between[int(system) :]
    prompt = turns[4]  # what a reply is asked for with; in a turn that was said, white space may follow it
    lead = turns[0].removeprefix(prompt)
    alike = turns[0] == turns[2] == prompt + lead and not lead.strip() and turns[1] == turns[3]
    return [opening, *head, prompt, lead, turns[1]] if alike else None


@dataclass(frozen=True)
class Row:
    """One sequence. `owner` (L,): whose reply a token belongs to as a target, the example's number, or -1."""

    ids: np.ndarray  # (L,)
    owner: np.ndarray  # (L,)
    prompt: int  # tokens before the last reply
    bare: int  # tokens without exemplars and marks


def conversation_rows(
    examples: Sequence[Example],
    tokenizer,
    *,
    src_len: int,
    tgt_len: int | None,
    packed: bool,
    exemplars: Sequence[Sequence[str]] | None = None,
    exemplar_len: int = 0,
    marks: Sequence[str] | None = None,
    system: str = SYSTEM,
    cache: Path | None = None,
) -> list[Row]:
    """Sequences in which every listener turn of `examples` is a target once: its tokens and its end token.

    packed: a conversation is one sequence with all its listener turns; with `exemplars` or `marks`, which
    differ from turn to turn, each listener turn is its own. A listener turn sees the same tokens either way.
    Its dialogue keeps the latest turns that fit in `src_len` tokens: the oldest are dropped in pairs, so that
    a speaker begins (a long conversation becomes a sequence for each first turn), and where the last turn
    alone is too long, it keeps its latest tokens. Replies keep their first `tgt_len` tokens with their end
    token, as targets and as history (the end of a cut one is no target); None: whole. Exemplars
    stand in the system turn: whole, best first, each that still fits in `exemplar_len` tokens with those
    before it. `marks`: a line for each example, or "", at the head of the listener's turn that is written
    there, before the reply; no target, and never in a turn of the history.
    """
    chat = chat_format(tokenizer)
    cleaned = {}  # (listener's, text) -> what is encoded
    for example in examples:
        for i, text in enumerate((*example.history, example.response)):
            cleaned[i % 2, text] = (chat.lead if i % 2 else "") + chat.clean(text)
    shown = [[EXEMPLAR_MARKER + chat.clean(t) for t in row] for row in exemplars or ()]
    opening = chat.opening + chat.clean(system)
    marked = [f"{chat.lead}{text}\n" if text else "" for text in marks or [""] * len(examples)]
    fixed = [opening, chat.after_system, chat.before_reply, chat.after_reply, EXEMPLAR_INTRO]
    texts = [*cleaned.values(), *(t for row in shown for t in row), *marked]
    encoded = encode(tokenizer, texts, cache)
    encoded |= encode(tokenizer, fixed, cache, controls=True)  # the marks between the texts
    before, after = encoded[chat.before_reply], encoded[chat.after_reply]
    end = np.array([chat.end_id])

    def head(number: int) -> np.ndarray:
        block, total = [], len(encoded[EXEMPLAR_INTRO])
        for text in shown[number] if shown else ():
            if total + len(encoded[text]) <= exemplar_len:
                block.append(encoded[text])
                total += len(encoded[text])
        block = [encoded[EXEMPLAR_INTRO], *block] if block else []
        return join([encoded[opening], *block, encoded[chat.after_system]])

    def row(numbers: list[int], turns: Sequence[np.ndarray], cut: Sequence[bool], first: int) -> Row:
        """The turns from `first` on, up to the last reply of `numbers`; their replies are the targets.

        Where a reply was `cut`, its end token is none: nothing ended there.
        """
        owners = {len(examples[n].history): n for n in numbers}
        last = max(owners)
        ids, owner = [head(numbers[0])], [np.full(len(head(numbers[0])), -1)]
        for i in range(first, last + 1):
            if i == last:  # of a row that is no reply's alone there are no marks
                ids.append(encoded[marked[numbers[-1]]])
                owner.append(np.full(len(ids[-1]), -1))
            if i % 2:
                ids += [turns[i], end] if i == last else [turns[i], end, after]
                owner.append(np.full(len(turns[i]), owners.get(i, -1)))
                owner.append(np.full(1, -1 if cut[i] else owners.get(i, -1)))
                owner.append(np.full(0 if i == last else len(after), -1))
            else:
                over = len(turns[i]) + len(before) - src_len
                text = turns[i][over:] if i + 1 == last and over > 0 else turns[i]
                ids += [text, before]
                owner.append(np.full(len(text) + len(before), -1))
        whole = join(ids)
        added = len(ids[0]) - len(plain_head) + len(encoded[marked[numbers[-1]]])
        return Row(whole, join(owner), len(whole) - len(turns[last]) - 1, len(whole) - added)

    plain_head = join([encoded[opening], encoded[chat.after_system]])
    rows = []
    for numbers in _conversations(examples, packed and exemplars is None and marks is None):
        longest = examples[numbers[-1]]
        said = enumerate((*longest.history, longest.response))
        turns = [encoded[cleaned[i % 2, t]] for i, t in said]
        cut = [bool(i % 2 and tgt_len is not None and len(t) >= tgt_len) for i, t in enumerate(turns)]
        if tgt_len is not None:
            turns = [t[: tgt_len - 1] if i % 2 else t for i, t in enumerate(turns)]
        cost = [len(t) + (1 + len(after) if i % 2 else len(before)) for i, t in enumerate(turns)]
        together: dict[int, list[int]] = {}  # first turn kept -> who keeps it
        for n in numbers:
            first, last = 0, len(examples[n].history)
            while first + 1 < last and sum(cost[first:last]) > src_len:
                first += 2
            together.setdefault(first, []).append(n)
        rows += [row(members, turns, cut, first) for first, members in together.items()]
    return rows


def _conversations(examples: Sequence[Example], packed: bool) -> list[list[int]]:
    """Numbers of examples that continue one another, shortest first; each alone where not `packed`."""
    if not packed:
        return [[n] for n in range(len(examples))]
    groups: dict[str, list[int]] = {}
    for n, example in enumerate(examples):
        groups.setdefault(example.conv_id, []).append(n)
    chains = []
    for numbers in groups.values():
        chain: list[int] = []
        for n in sorted(numbers, key=lambda n: len(examples[n].history)):
            said = (*examples[chain[-1]].history, examples[chain[-1]].response) if chain else ()
            if examples[n].history[: len(said)] != said:  # the same id over other words
                chains.append(chain)
                chain = []
            chain.append(n)
        chains.append(chain)
    return chains


def pad_id(tokenizer) -> int:
    """What fills a batch; the attention mask hides it, so an end token serves where there is no other."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def target_places(target_mask: torch.Tensor) -> torch.Tensor:
    """(B, L) -> (N,): in the flattened batch, the positions that predict the targets, each the one before
    it."""
    return torch.nn.functional.pad(target_mask[:, 1:], (0, 1)).flatten().nonzero()[:, 0]


def _name(examples: Sequence[Example], row: Row) -> str:
    own = np.unique(row.owner[row.owner >= 0])
    return f"{examples[own[0]].conv_id} utterance " + ", ".join(str(examples[n].utterance_idx) for n in own)


def causal_data(examples: Sequence[Example], tokenizer, **layout) -> Data:
    """Sequences for training and likelihood, padded on the right; `layout` is `conversation_rows`'.

    A batch: names; input_ids, attention_mask, target_mask (B, L); target_ids (N,); target_places (N,), see
    `target_places`; example_of (N,), the place in `examples` of each target token's example; examples (E,),
    their numbers in `examples` of this call.
    """
    rows = conversation_rows(examples, tokenizer, **layout)
    names = [_name(examples, r) for r in rows]

    def collate(numbers: list[int]) -> dict:
        input_ids, mask = pad([rows[i].ids for i in numbers], pad_id(tokenizer))
        owner = pad([rows[i].owner for i in numbers], -1)[0]
        target_mask = owner >= 0
        present, example_of = torch.unique(owner[target_mask], return_inverse=True)
        return {
            "names": [names[i] for i in numbers],
            "input_ids": input_ids,
            "attention_mask": mask,
            "target_mask": target_mask,
            "target_ids": input_ids[target_mask],
            "target_places": target_places(target_mask),
            "example_of": example_of,
            "examples": present,
        }

    targets = [int((r.owner >= 0).sum()) for r in rows]
    return Data([len(r.ids) for r in rows], collate, [targets], bare_lengths=[r.bare for r in rows])


def prompt_data(examples: Sequence[Example], tokenizer, **layout) -> Data:
    """What stands before each example's reply, padded on the left, for `generate`; row n is example n."""
    rows = conversation_rows(examples, tokenizer, packed=False, **layout)
    prompts = [r.ids[: r.prompt] for r in rows]
    names = [_name(examples, r) for r in rows]

    def collate(numbers: list[int]) -> dict:
        input_ids, mask = pad([prompts[i] for i in numbers], pad_id(tokenizer), left=True)
        return {"names": [names[i] for i in numbers], "input_ids": input_ids, "attention_mask": mask}

    return Data([len(p) for p in prompts], collate)
