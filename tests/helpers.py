"""What several tests ask of a model, and no script does."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from chats import SYSTEM, conversation_rows
from corpora import Example
from models import Critic


def forward_soft(
    critic: Critic, context_ids: Tensor, context_mask: Tensor, soft: Tensor, reply_mask: Tensor
) -> Tensor:
    """What a critic says of soft replies (B, T, V)."""
    return critic.forward_words(context_ids, context_mask, soft @ critic.embeddings, reply_mask)


def chat_ids(
    tokenizer,
    turns: Sequence[str],
    exemplars: Sequence[str] = (),
    *,
    exemplar_len: int = 0,
    src_len: int = 10**9,
    system: str = SYSTEM,
) -> np.ndarray:
    """The tokens (L,) after which the reply begins. `turns`: oldest first, the speaker's first and last."""
    if len(turns) % 2 == 0:
        raise ValueError("a reply is written to a speaker's turn: an odd number of turns, oldest first")
    example = Example("chat", len(turns) + 1, "", tuple(turns), "")
    (row,) = conversation_rows(
        [example],
        tokenizer,
        src_len=src_len,
        tgt_len=None,
        packed=False,
        exemplars=[exemplars],
        exemplar_len=exemplar_len,
        system=system,
    )
    return row.ids[: row.prompt]
