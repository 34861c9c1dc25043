"""What a training step costs, by part: operations counted on shapes alone, bytes held, the floor in seconds.

  python benchmarks/cost.py
  python benchmarks/cost.py --sizes mini paper --batch 64 --source 60 --vocabulary 21132

Operations: what torch's flop counter sees in the matrix products of the forward and backward pass (a
multiplication and an addition count as two), on tensors that have shapes and no numbers: no weights are
needed. Held: weights, gradients and AdamW's two moments in fp32 (16 bytes a trained parameter, 4 a frozen
one). Logits: one (B, T, V) in fp32, as a step holds them. Floor: the operations at the rate that this
machine reaches in the products of a feed-forward layer of that size, on --device and in --precision; epoch:
as many steps as 40,254 listener turns make. Below: by how much a step grows where one thing is doubled.

Exemplars: text before the dialogue (prepend), in the encoder and in the decoder's attention to it. Critics:
four frozen ones on soft replies: GloVe's of one layer and width 300 on the reply alone, T5-base on context
and reply. SmolLM2: LoRA of rank 16 on all linear layers, sequences of source + target tokens, no critics.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import reporting
from benchmarks.shapes import LLAMA, T5_BASE, T5_SMALL, T5_WORDS
from options import COUNT, NATURAL, run

SIZES = ("tiny", "mini", "paper", "t5-small", "smollm2")
PARTS = ("encoder", "decoder", "vocabulary", "critics", "exemplars")
TURNS = 40_254  # listener turns of EmpatheticDialogues' training split


@dataclass(frozen=True)
class Shape:
    """Of a step: B examples, S source tokens, T reply tokens, X exemplar tokens, V words."""

    batch: int
    source: int
    target: int
    exemplars: int
    vocabulary: int
    critics: int = 4
    context: int = 0  # tokens that a critic reads before the reply


def parse_args(argv=None):
    parser = reporting.flags(__doc__)
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="models")
    add("--batch", type=NATURAL, default=32, help="examples a step")
    add("--source", type=NATURAL, default=48, help="tokens of a dialogue")
    add("--target", type=NATURAL, default=18, help="tokens of a reply")
    add("--exemplar-tokens", type=COUNT, default=150, help="tokens of the exemplars before a dialogue")
    add("--vocabulary", type=NATURAL, default=21_132, help="words of the GloVe models")
    add("--grown", choices=SIZES[:4], default="mini", help="the model whose step is doubled in each thing")
    return reporting.parsed(parser, argv)


def config_of(size: str, vocabulary: int):
    """transformers' config; dropout does not count."""
    from transformers import LlamaConfig, T5Config

    from glove_models import SIZES as GLOVE

    if size == "smollm2":
        return LlamaConfig(**LLAMA, attn_implementation="eager")
    fields = {**GLOVE, "t5-small": T5_SMALL, "t5-base": T5_BASE}[size]
    return T5Config(vocab_size=vocabulary, num_decoder_layers=fields["num_layers"], **fields)


def operations(work) -> float:
    """Of `work()`'s result, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work().sum().backward()
    return float(counter.get_total_flops())


def seq2seq(size: str, shape: Shape) -> dict[str, float]:
    """Operations of a step by part, and parameters, trained and frozen."""
    import torch
    from torch.nn.functional import linear
    from transformers import T5EncoderModel, T5ForConditionalGeneration

    config = config_of(size, shape.vocabulary)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)

        def words(length: int, width: int = config.d_model) -> torch.Tensor:
            return torch.empty(shape.batch, length, width, requires_grad=True)

        def encoder(length: int) -> float:
            return operations(lambda: model.encoder(inputs_embeds=words(length)).last_hidden_state)

        def decoder(length: int) -> float:
            given = {"encoder_hidden_states": words(length), "use_cache": False}
            return operations(
                lambda: model.decoder(inputs_embeds=words(shape.target), **given).last_hidden_state
            )

        found = {"encoder": encoder(shape.source), "decoder": decoder(shape.source)}
        longer = shape.source + shape.exemplars
        found["exemplars"] = encoder(longer) + decoder(longer) - found["encoder"] - found["decoder"]
        found["vocabulary"] = operations(lambda: linear(words(shape.target), model.shared.weight))
        judge_config = config_of("t5-base" if size == "t5-small" else "paper", shape.vocabulary)
        if size in ("tiny", "mini", "paper"):
            judge_config = replace_layers(judge_config, 1)
        judge = T5EncoderModel(judge_config).requires_grad_(False)

        def critic() -> torch.Tensor:
            reply = words(shape.target, judge_config.vocab_size) @ judge.shared.weight
            both = torch.cat([torch.empty(shape.batch, shape.context, judge_config.d_model), reply], 1)
            return judge.encoder(inputs_embeds=both).last_hidden_state

        found["critics"] = shape.critics * operations(critic)
    found["trained"] = model.num_parameters()
    found["frozen"] = shape.critics * judge.num_parameters()
    return found


def replace_layers(config, layers: int):
    config.num_layers = config.num_decoder_layers = layers
    return config


def causal(shape: Shape) -> dict[str, float]:
    """The same of the causal language model; its layers stand under decoder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.functional import linear
    from transformers import LlamaForCausalLM

    length = shape.source + shape.target
    with torch.device("meta"):
        plain = LlamaForCausalLM(config_of("smollm2", 0)).requires_grad_(False)
        model = get_peft_model(plain, LoraConfig(r=16, target_modules="all-linear"))
        body, head = model.get_base_model().model, model.get_base_model().lm_head

        def words(many: int) -> torch.Tensor:
            return torch.empty(shape.batch, many, LLAMA["hidden_size"], requires_grad=True)

        found = dict.fromkeys(PARTS, 0.0)

        def layers(many: int) -> float:
            seen = torch.zeros(shape.batch, 1, many, many)  # given, since none can be made without numbers
            return operations(
                lambda: (
                    body(inputs_embeds=words(many), attention_mask=seen, use_cache=False).last_hidden_state
                )
            )

        found["decoder"] = layers(length)
        found["exemplars"] = layers(length + shape.exemplars) - found["decoder"]
        found["vocabulary"] = operations(lambda: linear(words(shape.target), head.weight))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found["trained"] = float(trained)
    found["frozen"] = float(sum(p.numel() for p in model.parameters()) - trained)
    return found


def shape_of(size: str, args) -> Shape:
    vocabulary = {"t5-small": T5_WORDS, "smollm2": LLAMA["vocab_size"]}.get(size, args.vocabulary)
    context = args.source if size == "t5-small" else 0
    return Shape(args.batch, args.source, args.target, args.exemplar_tokens, vocabulary, context=context)


def cost(size: str, shape: Shape) -> dict[str, float]:
    return causal(shape) if size == "smollm2" else seq2seq(size, shape)


def rate(size: str, shape: Shape, session) -> float:
    """Operations a second in the product of a feed-forward layer, on the device. A processor's by its own
    clock: what other programs take away does not count."""
    import torch

    config = config_of(size, shape.vocabulary)
    width = config.hidden_size  # d_model by T5's attribute map
    inner = config.intermediate_size if size == "smollm2" else config.d_ff
    kind = torch.bfloat16 if session.precision == "bf16" else torch.float32
    left = torch.rand(shape.batch * shape.source, width, device=session.device, dtype=kind)
    right = torch.rand(width, inner, device=session.device, dtype=kind)

    def ten() -> None:
        for _ in range(10):
            left @ right

    ten()
    if session.device.type == "cuda":
        each = reporting.seconds_of(ten, "cuda") / 10
    else:
        each = min(reporting.processor_seconds(ten) for _ in range(5)) / 10 / torch.get_num_threads()
    return 2 * left.numel() * inner / each


def main(argv=None):
    args = parse_args(argv)

    session, _, file = reporting.begin(args, "cost")
    rows, result = [], {}
    for size in args.sizes:
        reporting.say(size)
        shape = shape_of(size, args)
        found = cost(size, shape)
        total = sum(found[part] for part in PARTS)
        each = rate(size, shape, session)
        floor = total / each
        epoch = floor * -(-TURNS // shape.batch)
        held = (16 * found["trained"] + 4 * found["frozen"]) / 2**20
        logits = 4 * shape.batch * shape.target * shape.vocabulary / 2**20
        result[size] = found | {
            "total": total,
            "rate": each,
            "floor": floor,
            "epoch": epoch,
            "held_MiB": held,
        }
        billions = [found[part] / 1e9 for part in PARTS]
        rows.append(
            [
                size,
                found["trained"] / 1e6,
                *billions,
                total / 1e9,
                held,
                logits,
                each / 1e9,
                floor,
                epoch / 3600,
            ]
        )
    columns = [
        "size",
        "trained, M",
        *PARTS,
        "total",
        "held, MiB",
        "logits, MiB",
        "rate",
        "floor, s",
        "epoch, h",
    ]
    print(f"\na step of {args.batch} examples, billions of operations by part; rate: billions a second")
    print(f"{session.device}, {session.precision}")
    print(reporting.table(columns, rows), flush=True)

    base = shape_of(args.grown, args)
    plain = cost(args.grown, base)
    before = sum(plain[part] for part in PARTS)
    doubled = {
        "vocabulary": replace(base, vocabulary=2 * base.vocabulary),
        "source": replace(base, source=2 * base.source, context=2 * base.context),
        "reply": replace(base, target=2 * base.target),
        "exemplar tokens": replace(base, exemplars=2 * base.exemplars),
        "batch": replace(base, batch=2 * base.batch),
        "critics": replace(base, critics=2 * base.critics),
    }
    grown = {}
    for name, shape in doubled.items():
        found = cost(args.grown, shape)
        grown[name] = sum(found[part] for part in PARTS) / before
    print(f"\nthe step of {args.grown}, where this is doubled")
    print(
        reporting.table(["doubled", "times the operations"], [[name, times] for name, times in grown.items()])
    )
    reporting.write(file, vars(args), session.device.type, {"sizes": result, "doubled": grown})
    return result


if __name__ == "__main__":
    run(main)
