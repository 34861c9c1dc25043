"""Replies a second: one at a time in file order against batches of like length, by top-k and by beam search.

  python benchmarks/generate.py --workdir demo                          random weights of the mini shape
  python benchmarks/generate.py --run saved/glove-t5/mini --replies 64
  python benchmarks/generate.py --part causal --contexts 4 --candidates 8          the bundled adapter
  python benchmarks/generate.py --stand-in --device cuda                no files: random words and weights

Generator: both ways write the same number of tokens to the same dialogues of the validation split (a reply
never ends early and never late: --new-tokens), with the gold replies' likelihood beside them as predictions
have it. The plain way reads each dialogue twice, for the likelihood and for the reply; ours once.

Causal: candidates to each context by a language model with its adapter merged: transformers' `generate`,
which reads the prompt anew for every candidate, against sampling.py, which reads it once. Both draw with
top-k and have as many tokens to write.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import reporting  # noqa: E402
from options import NATURAL, Paths, run  # noqa: E402
from use_commands import add_base  # noqa: E402

STAND_IN_WORDS = 12_000


def parse_args(argv=None):
    parser = reporting.flags(__doc__)
    add = parser.add_argument
    add(
        "--part",
        nargs="+",
        choices=["generator", "causal"],
        default=["generator", "causal"],
        help="what is measured",
    )
    add(
        "--stand-in",
        action="store_true",
        help="random weights (causal: of SmolLM2's shape) and dialogues of random words",
    )
    add("--run", metavar="RUN", help="generator: a finished run (default: random weights)")
    add_base(parser, adapters=False)
    add("--size", choices=["tiny", "mini", "paper"], default="mini", help="generator: of random weights")
    add("--replies", type=NATURAL, default=64, help="generator: dialogues of the validation split")
    add("--batch-size", type=NATURAL, default=64, help="generator: replies written together")
    add("--beams", type=NATURAL, nargs="+", default=[1, 8], help="generator: 1 is top-k sampling")
    add("--causal", default=str(ROOT / "saved" / "smollm2-empathetic"), help="causal: a causal run's folder")
    add("--layers", type=NATURAL, default=30, help="causal: of random weights")
    add("--contexts", type=NATURAL, default=4, help="causal: dialogues, answered together")
    add("--candidates", type=NATURAL, default=8, help="causal: replies sampled to each")
    add("--new-tokens", type=NATURAL, default=20, help="tokens of every reply")
    add("--repeats", type=NATURAL, default=2, help="turns of each way, of which the fastest counts")
    return reporting.parsed(parser, argv)


def load_generator(args, paths: Paths, session):
    """A run, or random weights over the workdir's GloVe words; its tokenizer, and the validation split."""
    import exemplars
    from benchmarks.steps import drawn_examples, words
    from dataloaders import SplitData, generator_data, tokenizer_hash
    from generators import load_glove_t5, split_data
    from glove_models import glove_config
    from models import Generator, GeneratorSettings
    from pretrained import load_tokenizer

    if args.stand_in:
        tokenizer = words(STAND_IN_WORDS)
        settings = GeneratorSettings(
            backbone=glove_config(tokenizer, args.size, 0.0).to_dict(), exemplars="none"
        )
        examples, _ = drawn_examples(2 * args.replies, STAND_IN_WORDS, args.seed)
        data = generator_data(examples, tokenizer, src_len=settings.src_len, tgt_len=None)
        return Generator(settings).to(session.device).eval(), tokenizer, SplitData(examples, data)
    if args.run:
        model, tokenizer = Generator.from_pretrained(args.run), load_tokenizer(args.run)
        folder, settings = Path(args.run), model.settings
        way = exemplars.enter_again(folder, settings, tokenizer, session, paths, args.base, "--base")
    else:
        backbone = load_glove_t5(args.size, 0.0, args.seed, paths)
        tokenizer = backbone.tokenizer
        settings = GeneratorSettings(
            backbone=backbone.t5.config.to_dict(), exemplars="none", tokenizer=tokenizer_hash(tokenizer)
        )
        model, way = Generator(settings, backbone.t5), exemplars.Way()
    return (
        model.to(session.device).eval(),
        tokenizer,
        split_data(model.settings, "valid", tokenizer, way, paths),
    )


def measure_generator(args, session, paths: Paths) -> dict:
    import numpy as np
    import torch

    from dataloaders import plan_once
    from models import token_nll
    from predicting import Predictor, reply
    from quick import quicken
    from settings import Decoding

    reporting.say("the generator and its dialogues")
    model, tokenizer, found = load_generator(args, paths, session)
    quicken(model, session.device)
    data = found.data
    drawn = np.random.default_rng(args.seed).permutation(len(data))[: args.replies]
    chosen = sorted(drawn.tolist())  # file order
    tokens = args.new_tokens
    rows, result = [], {}
    for beams in args.beams:
        decoding = Decoding(20, 0.9, tokens, beams=beams, predict_batch_size=args.batch_size, seed=args.seed)
        predictor = Predictor(model, tokenizer, data, decoding, session)
        predictor.arguments["min_new_tokens"] = tokens

        def plain(predictor=predictor) -> list[str]:
            texts = []
            for number in chosen:
                batch = session.move(data.collate([number]))
                with torch.inference_mode(), session.autocast():
                    token_nll(model(batch), batch["labels"])
                    texts += reply(model, tokenizer, batch, predictor.arguments)
            return texts

        def ours(predictor=predictor) -> list[str]:
            plan = plan_once([data.lengths[n] for n in chosen], args.batch_size)
            parts = [predictor.batch(i, [chosen[n] for n in batch]) for i, batch in enumerate(plan)]
            texts: dict[int, str] = {}
            for part in parts:
                texts |= dict(zip(part["numbers"].tolist(), part["response"][:, 0].tolist(), strict=True))
            return [texts[n] for n in chosen]

        name = f"beam {beams}" if beams > 1 else "top-k 20"
        taken, given = reporting.seconds(
            {f"{name}, one at a time": plain, f"{name}, ours": ours}, args.repeats
        )
        slow, fast = taken.values()
        for way, seconds in taken.items():
            rows.append([way, len(chosen) / seconds, slow / seconds])
        texts = list(given.values())
        same = sum(a == b for a, b in zip(*texts, strict=True)) / len(chosen)
        result[name] = {"plain": slow, "ours": fast, "same_replies": same if beams > 1 else None}
    print(
        f"\n{len(chosen)} replies of {tokens} tokens each, batches of {args.batch_size}, {session.precision}"
    )
    print(reporting.table(["way", "replies a second", "times one at a time"], rows), flush=True)
    return result


def measure_causal(args, session, paths: Paths) -> dict:
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.shapes import LLAMA
    from benchmarks.steps import drawn_examples, words
    from causal_models import CausalGenerator, CausalSettings
    from chats import prompt_data
    from corpora import listener_turns
    from predicting import of_flags
    from sampling import sample
    from session import own_random_stream
    from settings import Decoding

    class Endless(CausalGenerator):
        """No reply ends before its last token."""

        @property
        def banned(self) -> list[int]:
            return [*super().banned, self.chat.end_id]

    if args.stand_in:
        base = LlamaForCausalLM(LlamaConfig(**LLAMA | {"num_hidden_layers": args.layers}))
        tokenizer = words(LLAMA["vocab_size"])
        model: CausalGenerator = Endless(CausalSettings("random", "", 0), base, tokenizer)
        turns, _ = drawn_examples(args.contexts, len(tokenizer), args.seed)
    else:
        reporting.say(f"the language model of {args.causal}")
        model = Endless.from_pretrained(args.causal, cache=paths.cache, device=session.device)
        turns = listener_turns(paths.dialogues("valid"))
    model = model.for_use(session.device, session.precision)
    chosen = np.sort(np.random.default_rng(args.seed).permutation(len(turns))[: args.contexts]).tolist()
    prompts = prompt_data([turns[n] for n in chosen], model.tokenizer, **model.settings.layout)
    batch = session.move(prompts.collate(list(range(len(chosen)))))
    count, tokens = args.candidates, args.new_tokens
    decoding = Decoding(20, 0.9, tokens, seed=args.seed)

    def plain() -> int:
        with torch.inference_mode(), session.autocast(), own_random_stream(args.seed):
            return model.generate(batch, num_return_sequences=count, **of_flags(decoding)).numel()

    def ours() -> int:
        with torch.inference_mode(), session.autocast(), own_random_stream(args.seed):
            draws = torch.rand(len(chosen), count, tokens)
            return int(sample(model, batch, draws, decoding).tokens.sum())

    taken, given = reporting.seconds({"each prompt anew": plain, "one prompt pass": ours}, args.repeats)
    assert given["each prompt anew"] == given["one prompt pass"] == len(chosen) * count * tokens
    slow, replies = taken["each prompt anew"], len(chosen) * count
    read = batch["attention_mask"].sum(1).float().mean()
    print(
        f"\n{len(chosen)} contexts of {read:.0f} tokens on average, {count} candidates of {tokens} tokens, "
        f"{session.precision}"
    )
    rows = [[way, replies / seconds, slow / seconds] for way, seconds in taken.items()]
    print(reporting.table(["way", "replies a second", "times each prompt anew"], rows), flush=True)
    return {"seconds": taken, "replies": replies, "prompt_tokens": float(read)}


def main(argv=None):
    args = parse_args(argv)

    session, paths, file = reporting.begin(args, "generate")
    measures = {"generator": measure_generator, "causal": measure_causal}
    result = {part: measures[part](args, session, paths) for part in args.part}
    reporting.write(file, vars(args), session.device.type, result)
    return result


if __name__ == "__main__":
    run(main)
