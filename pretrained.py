"""Models from the hub, from folders and from scratch: configs, tokenizers, encoders, saved modules."""

import contextlib
import contextvars
import dataclasses
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    MT5EncoderModel,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5EncoderModel,
)

from advice import makes
from options import UserError
from session import fits
from storage import load_weights, read_if_there, read_json, save_weights, split_revision, write_json

# transformers would ask the hub for safetensors of a repository without, and fetch its weights a second time
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


class Settings:
    """Base of the frozen dataclasses that say what a saved model is, as its `config.json` has it."""

    @classmethod
    def of(cls, stored: "Self | Mapping[str, Any]") -> Self:
        """From a mapping; what it does not name keeps its default, what is not known here is left out."""
        if isinstance(stored, cls):
            return stored
        names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**{k: v for k, v in stored.items() if k in names})  # type: ignore[union-attr]


class SavedModule(nn.Module):
    """A plain module that is saved as `config.json` + `model.safetensors` and loaded with one call.

    Not a `PreTrainedModel`: a new layer in one is initialised with T5's factor (std 1.0), torch's own is
    0.036 here.
    """

    kind_of_settings: ClassVar[type[Settings]]

    def __init__(self, settings: Settings | Mapping[str, Any]):
        super().__init__()
        self.settings: Any = without_places(self.kind_of_settings.of(settings))

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_weights(self, Path(folder) / "model.safetensors")
        config = {"model": type(self).__name__, **dataclasses.asdict(self.settings)}
        write_json(Path(folder) / "config.json", config)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The saved model in eval mode, fp32. Raises `UserError` where the folder holds no such model."""
        folder = Path(folder)
        name = cls.__name__.lower()
        config, weights = folder / "config.json", folder / "model.safetensors"
        if not config.exists():
            raise nothing_there(folder, name)
        settings = read_json(config)
        held = settings.pop("model", None)
        if held != cls.__name__:
            what = f"but a {held}" if isinstance(held, str) else "by its config.json"
            if held == "CausalGenerator":
                what = "of this kind but a causal language model (train_causal_lm.py)"
            raise UserError(f"{folder}: holds no {name} {what}; give the folder of a trained {name}")
        if not weights.exists():
            raise nothing_there(folder, name)
        try:
            model = cls(settings)
            load_weights(model, weights)
        except Exception as error:
            raise UserError(
                f"{weights}: does not fit its config.json, or is damaged ({error}); restore the "
                "folder from a copy, or train it again"
            ) from error
        return model.eval()


def nothing_there(folder: Path, what: str) -> UserError:
    """The error for a folder that should hold a trained model, `what`, and does not."""
    if not folder.is_dir():
        return UserError(f"{folder}: no such folder; give that of a trained {what}")
    if (folder / "args.json").exists():
        return UserError(f"{folder}: no trained {what} yet; finish its training first")
    runs = sorted(file.parent.name for file in folder.glob("*/config.json"))
    hint = f"; it holds {', '.join(runs[:5])}{' ...' * (len(runs) > 5)}" if runs else ""
    return UserError(
        f"{folder}: no trained {what} (no config.json and weights){hint}; give the folder of one"
    )


def without_places(settings: Settings) -> Settings:
    """Settings whose transformers configs do not say where on this machine they came from."""
    changes = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if isinstance(value, dict) and "_name_or_path" in value:
            changes[field.name] = {k: v for k, v in value.items() if k != "_name_or_path"}
    return dataclasses.replace(settings, **changes)  # type: ignore[type-var]


def backbone_config(stored: dict):
    """A transformers config from its `to_dict()`."""
    return AutoConfig.for_model(**stored)


#: how the file begins that stands for a large one in a clone that was made without git-lfs
LFS_POINTER = b"version https://git-lfs"
#: what to give in place of a hub name, by what is being loaded
OFFLINE = contextvars.ContextVar("offline", default="give the folder of one")


@contextlib.contextmanager
def offline(flag: str):
    """What is loaded in this block could be had without the hub by `flag`, which an error then says."""
    token = OFFLINE.set(f"give the folder of one, or {flag}")
    try:
        yield
    finally:
        OFFLINE.reset(token)


def from_hub(load, name: str | Path, what: str = "model", **kwargs) -> Any:
    """`load(name)`: a folder, a hub name, or name@revision (a commit, branch or tag there). What is missing,
    damaged or too large for memory becomes a `UserError`."""
    name = str(name)
    require_no_pointers(Path(name))
    place, revision = split_revision(name)
    try:
        with fits(f"{name}: this {what}"):
            return load(place, **kwargs, **({"revision": revision} if revision else {}))
    except (OSError, ValueError, RuntimeError, SafetensorError, HfHubHTTPError, UnpicklingError) as error:
        raise cannot_be_had(name, what, error) from error


def cannot_be_had(name: str, what: str, error: Exception) -> UserError:
    """What is said of a folder or hub name that does not load, with what there is to do."""
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    if isinstance(error, UnpicklingError):  # torch's own words advise to switch its safety off
        reason = "its weights are damaged, or hold more than tensors"
    again = makes(name, "") if Path(name).is_dir() else ""
    remedy = f"make it again with: {again}" if again else f"without the hub, {OFFLINE.get()}"
    if not Path(name).is_absolute() and not constants.HF_HUB_OFFLINE:
        remedy += "; what was downloaded before is found without a network by HF_HUB_OFFLINE=1"
    return UserError(f"{name}: no {what} can be loaded from the hub or this folder ({reason}); {remedy}")


def require_no_pointers(folder: Path) -> None:
    """Raises `UserError` where a clone made without git-lfs has a pointer in place of a large file."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        large = file.suffix in (".safetensors", ".bin", ".model", ".json", ".gguf") and file.is_file()
        if large and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS_POINTER):
            raise UserError(f"{file}: a pointer of Git LFS, not the file itself; run there: git lfs pull")


def file_of(name: str, file: str) -> Path | None:
    """A file of a folder or hub name (see `from_hub`); None where that has none."""
    if Path(name).exists():
        return path if (path := Path(name) / file).exists() else None
    place, revision = split_revision(name)
    try:
        return Path(hf_hub_download(place, file, revision=revision))
    except (OSError, ValueError, HfHubHTTPError, EntryNotFoundError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        kept = try_to_load_from_cache(place, file, revision=revision)
        if kept is not None and not isinstance(kept, str):  # the hub once said that there is none
            return None
        raise cannot_be_had(name, file, error) from error


def load_pretrained(auto, name: str | Path, config, what: str = "model", **kwargs) -> Any:
    """Pretrained fp32 weights, every one of them: a checkpoint that lacks some would leave them random in
    silence."""
    kwargs |= {"config": config, "dtype": torch.float32, "output_loading_info": True}
    model, info = from_hub(auto.from_pretrained, name, what, **kwargs)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"{name}: holds no {what} of type {config.model_type}; its weights lack {len(missing)} tensors "
            f"({', '.join(missing[:3])} ...)"
        )
    return model


def load_config(name: str | Path) -> Any:
    """Raises `UserError` for a run of this project, too, whose config.json is not transformers'."""
    folder = Path(name)
    if (folder / "args.json").exists() and "model_type" not in read_if_there(folder / "config.json"):
        raise UserError(
            f"{name}: a run of this project, not a model of transformers: a generator or critic goes on from "
            "one by --init-from, a retriever is used by --path, and its encoders are folders in it"
        )
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise UserError(f"{name}: an adapter without its base; merge them, and give the folder of the whole")
    return from_hub(AutoConfig.from_pretrained, name)


def decoded(tokenizer, ids: Tensor) -> list[str]:
    """(N, T) tokens as texts without control tokens, each on one line."""
    return [" ".join(text.split()) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def load_tokenizer(name: str | Path) -> Any:
    """Raises `UserError` for one without words, as transformers makes it of a folder without its files."""
    tokenizer = from_hub(AutoTokenizer.from_pretrained, name, what="tokenizer")
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if not any(c.isalnum() for word in words for c in word):
        raise UserError(
            f"{name}: there are no files of its tokenizer, so that every word is unknown; save the tokenizer "
            "there, too (tokenizer.save_pretrained)"
        )
    return tokenizer


#: T5's relatives, whose encoder half stands alone
T5_ENCODERS = {"t5": T5EncoderModel, "mt5": MT5EncoderModel, "umt5": UMT5EncoderModel}
#: what configs call the dropout inside an encoder: T5, BERT and its relatives, DistilBERT, ModernBERT
DROPOUTS = (
    "dropout_rate",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
)


def load_encoder(name: str | Path, from_scratch: bool = False, dropout: float | None = None) -> Any:
    """The encoder of a hub name or folder: T5's encoder half, or a BERT or one of its relatives. fp32.

    Raises `UserError` for what is no encoder, and for one whose output depends on padding.
    """
    config = load_config(name)
    require_encoder(name, config)
    for option in DROPOUTS:
        if dropout is not None and hasattr(config, option):
            setattr(config, option, dropout)
    if from_scratch:
        return new_encoder(config)
    if config.model_type in T5_ENCODERS:
        return load_pretrained(T5_ENCODERS[config.model_type], name, config)
    encoder = load_pretrained(AutoModel, name, config, "encoder", **without_pooler(config))
    try_out(encoder, name)
    return encoder


def new_encoder(config) -> Any:
    """An encoder with random weights."""
    if config.model_type in T5_ENCODERS:
        return T5_ENCODERS[config.model_type](config)
    return AutoModel.from_config(config, **without_pooler(config))


def require_encoder(name: str | Path, config) -> None:
    """Raises `UserError` where nothing reads a text in both directions, or only together with a decoder."""
    if config.model_type in T5_ENCODERS:
        return
    if config.is_encoder_decoder:
        what = "an encoder with a decoder; only T5's relatives can be read with the encoder alone"
    elif type(config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False):
        what = "no encoder that reads a text in both directions"
    else:
        return
    known = "T5, mT5, BERT, RoBERTa, XLM-RoBERTa, MPNet, ALBERT, DistilBERT, DeBERTa ..."
    raise UserError(f"{name}: a {config.model_type} model is {what}. Give one of {known}")


def new_t5(config, own_head: bool) -> T5ForConditionalGeneration:
    """A T5 with random weights; `own_head`: its output layer is a matrix of its own (T5 v1.1, Flan-T5).

    transformers 5 ties every T5 it builds, and keeps two matrices only where it loads two that differ.
    """
    t5 = T5ForConditionalGeneration(config)
    if own_head:
        t5.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        # what it reads is normed and not scaled: with this the first logits are spread by about 1
        nn.init.normal_(t5.lm_head.weight, std=config.initializer_factor * config.d_model**-0.5)
    return t5


def asks_for_own_head(config) -> bool:
    """Whether a T5's config was published with `tie_word_embeddings: false`, of which transformers 5 keeps
    only this trace."""
    return not config.scale_decoder_outputs


def without_pooler(config) -> dict[str, bool]:
    """What keeps BERT's relatives from adding a layer that nothing here reads."""
    made = MODEL_MAPPING[type(config)]
    made = made[0] if isinstance(made, tuple) else made
    pools = "add_pooling_layer" in inspect.signature(made.__init__).parameters
    return {"add_pooling_layer": False} if pools else {}


@torch.no_grad()
def try_out(encoder, name: str | Path) -> None:
    """One short row, alone and padded: refuses an encoder that cannot be used as critics use it."""
    words = encoder.get_input_embeddings().weight[None, :8]  # (1, 8, E)
    padded = F.pad(words, (0, 0, 0, 4))
    mask = torch.ones(padded.shape[:2], dtype=torch.long)
    mask[:, words.shape[1] :] = 0
    encoder.eval()
    try:
        alone = encoder(inputs_embeds=words, attention_mask=mask[:, : words.shape[1]]).last_hidden_state
        among = encoder(inputs_embeds=padded, attention_mask=mask).last_hidden_state[:, : words.shape[1]]
    except Exception as error:
        raise UserError(
            f"{name}: a {encoder.config.model_type} model cannot be read by word embeddings and a mask "
            f"({error})"
        ) from error
    if not torch.isfinite(alone).all():
        raise UserError(f"{name}: its output is not finite; the weights are damaged")
    if not torch.allclose(alone, among, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"{name}: what a {encoder.config.model_type} model makes of a text depends on the padding "
            "behind it, so that no score would be the text's own; give another encoder"
        )


def positions(encoder: nn.Module) -> int | None:
    """How many tokens an encoder can read; None where positions are relative, and any length is read."""
    config = encoder.config
    tables = [
        module
        for name, module in encoder.named_modules()
        if "position" in name.split(".")[-1] and hasattr(module, "padding_idx")
    ]
    if not tables and getattr(config, "relative_attention", False):  # DeBERTa
        return None
    most = getattr(config, "max_position_embeddings", None)
    # RoBERTa and its relatives count positions from behind the padding's
    skipped = [table.padding_idx + 1 for table in tables if table.padding_idx is not None]
    return most - max(skipped, default=0) if most else None


def require_words(tokenizer, embeddings: Tensor, name: str | Path) -> None:
    """Raises `UserError` where a tokenizer lacks a token that the layout needs, or knows more words than the
    model. `embeddings` (V, D)."""
    for what, ids in {
        "padding": [tokenizer.pad_token_id],
        "end or separator": [tokenizer.eos_token_id, tokenizer.sep_token_id],
    }.items():
        if all(i is None for i in ids):
            raise UserError(
                f"{name}: its tokenizer has no {what} token; add one, with a word embedding, and save it"
            )
    last = max(tokenizer.get_vocab().values())
    if last >= len(embeddings):
        raise UserError(
            f"{name}: its tokenizer's ids reach {last:,}, but the model knows {len(embeddings):,} words; "
            "they are not of one model, or the model was not resized to its tokenizer"
        )


def without_word(tokenizer, vocabulary: int) -> list[int]:
    """The ids below `vocabulary` that stand for no word: a model's table can be longer than its
    tokenizer's."""
    return sorted(set(range(vocabulary)) - set(tokenizer.get_vocab().values()))


def begin_from(model: nn.Module, trained: nn.Module, folder: Path, fresh: tuple[str, ...] = ()) -> None:
    """--init-from: `model` takes over the weights of `trained`, which was loaded from `folder`.

    What begins with one of `fresh` may be missing there, or have another shape: it stays as it is. Raises
    `UserError` where anything else does not fit.
    """
    own, given = model.state_dict(), trained.state_dict()
    fits = {name for name in own.keys() & given.keys() if own[name].shape == given[name].shape}
    unlike = sorted(name for name in (own.keys() ^ fits) if not name.startswith(fresh))
    unlike += sorted(name for name in given.keys() - own.keys() if not name.startswith(fresh))
    if unlike:
        raise UserError(
            f"{folder}: {len(unlike)} tensors differ in shape, or are on one side alone "
            f"({', '.join(unlike[:3])} ...); build the model with the flags of its args.json"
        )
    model.load_state_dict({**own, **{name: given[name] for name in fits}})
