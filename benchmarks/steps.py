"""What train_step.py measures: models of the real sizes, random weights, one batch, a step by each way."""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5EncoderModel, T5ForConditionalGeneration

import train_causal_lm
import train_glove_t5
import train_t5
from benchmarks import published, reporting
from benchmarks.shapes import LLAMA, T5_BASE, T5_SMALL, T5_WORDS
from causal_generators import CausalObjective
from causal_models import CausalGenerator, CausalSettings
from chats import causal_data
from corpora import Example
from critic_set import CriticSet
from dataloaders import Data, encode, generator_data, pad
from exemplars import PooledTokens, PooledVectors, Prepended
from glove_models import glove_config, word_tokenizer
from models import Critic, CriticSettings, Generator, GeneratorSettings
from objectives import GeneratorObjective
from options import CRITICS, DIMENSIONS
from session import Session
from settings import TrainingOptions, causal_command, generator_command
from updates import Update, placed

EXEMPLARS = 10
TINY_LLAMA = LLAMA | {"vocab_size": 300, "hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2}

Step = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """Configs of the models, and what the critics read, of one of the seq2seq shapes."""

    family: str
    generator: T5Config
    critic: T5Config
    exemplar_encoder: T5Config
    pooling: str  # of the critics
    context_len: int  # tokens of the dialogue that ours read; the published way's read the source


def words(count: int):
    """A tokenizer of `count` tokens in all, four of them controls."""
    return word_tokenizer(f"w{i}" for i in range(count - 4))


def shape_of(name: str) -> tuple[Shape, Any]:
    """The shape and its tokenizer. The critics are those of the recipes: of `glove` the paper's."""
    if name == "t5":
        tokenizer = words(T5_WORDS)
        common = {"vocab_size": T5_WORDS, "eos_token_id": tokenizer.eos_token_id, "decoder_start_token_id": 0}
        base = T5Config(**common, **T5_BASE)
        return Shape("t5", T5Config(**common, **T5_SMALL), base, base, "first", 100), tokenizer
    count, size = {"glove": (21_132, "paper"), "glove-mini": (12_000, "mini"), "tiny": (200, "tiny")}[name]
    tokenizer = words(count)
    paper = name == "glove"
    critic = glove_config(tokenizer, size, num_layers=6 if paper else 1)
    exemplar_encoder = glove_config(tokenizer, size, num_layers=2 if name == "tiny" else 6)
    pooling, context_len = ("first", 100) if paper else ("reply", 0)
    own = glove_config(tokenizer, size)
    return Shape("glove-t5", own, critic, exemplar_encoder, pooling, context_len), tokenizer


def drawn_examples(count: int, vocabulary: int, seed: int) -> tuple[list[Example], list[list[str]]]:
    """Dialogues of one, three or five turns, a reply and ten exemplars each, all different.

    Words drawn evenly; lengths about EmpatheticDialogues' (a source of 48 tokens, a reply of 15).
    """
    draw = random.Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(f"w{draw.randrange(vocabulary - 4)}" for _ in range(draw.randint(least, most)))

    examples, exemplars = [], []
    for n in range(count):
        history = tuple(text(8, 22) for _ in range(1 + 2 * (n % 3)))
        examples.append(Example(f"dialogue {n}", len(history) + 1, "", history, text(6, 22)))
        exemplars.append([text(6, 22) for _ in range(EXEMPLARS)])
    return examples, exemplars


def targets_of(count: int, critics: bool) -> dict[str, list]:
    """Labels for `count` examples: 0, 1 and so on, and scores."""
    if not critics:
        return {}
    levels: dict[str, list] = {dim: [n % 2 for n in range(count)] for dim in DIMENSIONS}
    return levels | {"sentiment": [n % 3 / 2 - 0.5 for n in range(count)]}


def build_ways(args, session: Session) -> dict[str, Step]:
    """{way: a function that makes one update on the one batch}."""
    if args.shape.endswith("causal"):
        return causal_ways(args, session)
    shape, tokenizer = shape_of(args.shape)
    examples, texts = drawn_examples(args.batch_size, len(tokenizer), args.seed)
    targets = targets_of(len(examples), args.critics != "none")
    own_shape = shape
    if args.critics == "small":
        small = glove_config(tokenizer, "small")
        own_shape = replace(shape, critic=small, pooling="reply", context_len=0)
    found: dict[str, Step] = {}
    frozen = None
    for way in args.ways:
        torch.manual_seed(args.seed)
        if way == "published":
            found[way] = published_step(shape, tokenizer, examples, texts, targets, args.padding, session)
        else:
            frozen = frozen or frozen_critics(own_shape, targets, session)
            found[way] = own_step(own_shape, tokenizer, examples, texts, targets, way, frozen, args, session)
    return found


# ------------------------------------------------------------------------------------------------------- ours


def frozen_critics(shape: Shape, targets: dict, session: Session) -> CriticSet:
    critics = {}
    for kind in (k for k in CRITICS if k in targets):
        settings = CriticSettings(
            kind=kind,
            outputs=1 if kind == "sentiment" else 2,
            pooling=shape.pooling,
            context_len=shape.context_len,
            reply_len=64,
            head_dropout=0.1,
            word_dropout=0.0,
            backbone=shape.critic.to_dict(),
            tokenizer="",
        )
        critics[kind] = Critic(settings)
    return CriticSet(critics, session.device, session.precision == "bf16")


def own_step(shape, tokenizer, examples, texts, targets, way: str, critics, args, session: Session) -> Step:
    """`Update` as the training scripts make it, with their defaults."""
    script = train_t5 if shape.family == "t5" else train_glove_t5
    flags = ["--workdir", args.workdir, "--batch-size", str(args.batch_size)]
    flags += ["--compile"] if args.compile else []
    command = generator_command(script.parse_args(flags), shape.family)
    options = command.options
    settings = GeneratorSettings(
        backbone=shape.generator.to_dict(), exemplars=way, exemplar_len=options.exemplar_len
    )
    frozen = shape.family == "t5"
    entering: Any
    if way == "prepend":
        entering = Prepended(settings, tokenizer, command.paths.cache).live(texts)
    elif frozen:
        width = shape.exemplar_encoder.d_model
        settings = replace(settings, exemplar_width=width)
        table = {t: np.random.default_rng(0).normal(size=width) for row in texts for t in row}
        entering = PooledVectors(texts, table, width)
    else:
        settings = replace(settings, exemplar_backbone=shape.exemplar_encoder.to_dict())
        entering = PooledTokens(texts, tokenizer, options.exemplar_len)
    data = generator_data(
        examples,
        tokenizer,
        src_len=options.src_len,
        tgt_len=options.tgt_len,
        exemplars=entering,
        labels=targets,
        critic_context_len=critics.context_len,
    )
    model = Generator(settings)
    objective = GeneratorObjective(critics, options)
    return one_update(model, objective, data, command.training, session, command.paths.cache)


def one_update(model, objective, data: Data, options: TrainingOptions, session: Session, cache: Path) -> Step:
    update = Update(placed(model, session), objective, data, options, session, total_steps=1000, cache=cache)
    numbers = list(range(len(data)))
    update.following = numbers
    return lambda: update(numbers)


# -------------------------------------------------------------------------------------------------- published


def published_step(shape, tokenizer, examples, texts, targets, padding: str, session: Session) -> Step:
    critics = {}
    for kind in targets:
        encoder = T5EncoderModel(shape.critic)
        critics[kind] = published.Critic(encoder, 1 if kind == "sentiment" else 2)
    step = published.Step(
        T5ForConditionalGeneration(shape.generator).train(),
        T5EncoderModel(shape.exemplar_encoder),
        shape.family != "t5",
        critics,
        session.device,
    )
    step.parts.train()
    most = (published.SRC_LEN, published.TGT_LEN) if padding == "full" else (0, 0)
    batch = published_batch(tokenizer, examples, texts, targets, *most)
    return lambda: step(session.move(batch))


def published_batch(tokenizer, examples, texts, targets, src_len: int, tgt_len: int) -> dict:
    """Padded to the longest, or to `src_len` and `tgt_len` where that is more."""
    encoded = encode(tokenizer, [t for e in examples for t in (*e.history, e.response)])
    encoded |= encode(tokenizer, [t for row in texts for t in row])
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id

    def wide(ids: Tensor, width: int, value: int) -> Tensor:
        return nn.functional.pad(ids, (0, max(0, width - ids.shape[1])), value=value)

    turns = [[np.append(encoded[t], end) for t in e.history] for e in examples]
    source_ids, source_mask = pad([np.concatenate(row) for row in turns], padding)
    speakers = []
    for row in turns:
        speakers.append(np.concatenate([np.full(len(t), 1 + i % 2) for i, t in enumerate(row)]))
    labels = pad([np.append(encoded[e.response], end) for e in examples], -100)[0]
    return {
        "source_ids": wide(source_ids, src_len, padding),
        "source_mask": wide(source_mask, src_len, 0),
        "speaker_ids": wide(pad(speakers, 0)[0], src_len, 0),
        "labels": wide(labels, tgt_len, -100),
        "exemplars": [pad([np.append(encoded[t], end) for t in row], padding) for row in texts],
        "critic_targets": {kind: torch.tensor(values) for kind, values in targets.items()},
    }


# ---------------------------------------------------------------------------------- the causal language model


def causal_ways(args, session: Session) -> dict[str, Step]:
    """LoRA on a Llama of SmolLM2's shape, sequences of 60 tokens."""
    config = LlamaConfig(**(LLAMA if args.shape == "causal" else TINY_LLAMA))
    tokenizer = words(config.vocab_size)
    draw = random.Random(args.seed)
    examples = []
    for n in range(args.batch_size):
        said = [" ".join(f"w{draw.randrange(200)}" for _ in range(count)) for count in (19, 18)]
        examples.append(Example(f"dialogue {n}", 2, "", (said[0],), said[1]))
    found: dict[str, Step] = {}
    for way in args.ways:
        torch.manual_seed(args.seed)
        flags = ["--workdir", args.workdir, "--batch-size", str(args.batch_size)]
        flags += ["--compile"] if args.compile else []
        command = causal_command(train_causal_lm.parse_args(flags))
        rank = command.options.lora_rank
        base = LlamaForCausalLM(copy.deepcopy(config))  # which says how attention is computed
        base.set_attn_implementation("sdpa" if way == "plain" else way.removeprefix("ours-"))
        model = CausalGenerator(CausalSettings("random", "", rank), base, tokenizer)
        data = causal_data(examples, tokenizer, packed=True, **model.settings.layout)
        if way == "plain":
            found[way] = plain_causal_step(model.to(session.device), data, session)
        else:
            cache = command.paths.cache
            found[way] = one_update(model, CausalObjective(), data, command.training, session, cache)
    return found


def plain_causal_step(model: CausalGenerator, data: Data, session: Session) -> Step:
    """transformers' own loss, and torch's default AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model.train()

    def step() -> float:
        batch = session.move(data.collate(list(range(len(data)))))
        labels = batch["input_ids"].masked_fill(~batch["target_mask"], -100)
        with session.autocast():
            found = model.lm(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
            )
        found.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(found.loss.detach())

    return step


# ------------------------------------------------------------------------------------------------------ floor


def with_all_heads(args: Sequence) -> list:
    """Operands of a fused attention as if each head of the queries had keys and values of its own: before
    torch 2.13 its formulas know no grouped heads."""
    heads = max((a.shape[1] for a in args if isinstance(a, Tensor) and a.dim() == 4), default=0)
    return [
        a[:, :1].expand(-1, heads, -1, -1) if isinstance(a, Tensor) and a.dim() == 4 and heads else a
        for a in args
    ]


class Floor(TorchDispatchMode):
    """Notes every matrix product of what runs in its block; `seconds` then makes each of them alone."""

    PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}

    def __init__(self, session: Session):
        super().__init__()
        self.session = session
        self.operations = 0  # of all that torch.utils.flop_counter knows
        self.of_products = 0
        self.seen: dict[tuple, int] = {}

    @property
    def gflop(self) -> float:
        return self.operations / 1e9

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            operands = with_all_heads(args) if "scaled_dot_product" in str(packet) else args
            count = flop_registry[packet](*operands, **(kwargs or {}), out_val=out)
            self.operations += count
            if packet in self.PRODUCTS:
                self.of_products += count
                shapes = tuple((tuple(a.shape), a.stride(), a.dtype) for a in args if isinstance(a, Tensor))
                # a product into a given tensor is one without it, made in another place
                self.seen[packet.default, shapes] = self.seen.get((packet.default, shapes), 0) + 1
        return out

    def seconds(self, repeats: int = 5) -> float:
        """All products of the block, each alone on operands of the same layout and as often as there; what is
        counted and no plain product (a fused attention) at the same rate."""
        total = 0.0
        for (func, shapes), count in self.seen.items():
            operands = [self.operand(*shape) for shape in shapes]
            each = reporting.seconds_of(partial(func, *operands), self.session.device.type, repeats)
            total += count * each
        return total * self.operations / self.of_products

    def operand(self, shape: tuple, stride: tuple, dtype: torch.dtype) -> Tensor:
        size = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        return torch.randn(max(1, size), device=self.session.device).to(dtype).as_strided(shape, stride)
