"""What an adapter of rank R keeps of a model of which all weights were trained, and that adapter.

  python train_causal_lm.py --lora-rank 0 --lr 2e-4 --name all-weights
  python benchmarks/low_rank.py saved/causal-lm/all-weights --ranks 4 16 64
  python benchmarks/low_rank.py saved/causal-lm/all-weights --ranks 16 --output saved/causal-lm/cut

Of every linear layer the difference from the base is cut to its R largest singular values (no matrix of that
rank is nearer). Embeddings, output layer and norms, which an adapter does not hold, go back to the base's.
Printed for each rank: the share of the difference's squared length that is kept, over the layers that an
adapter holds; the adapter's MB in half precision; word perplexity of the validation split. Beside them stand
the base, and the trained model itself. The adapter loads like any other: respond.py --run, --inference,
--init-from.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import reporting
from options import COUNT, NATURAL, UserError, check, refuse_existing, run


def parse_args(argv=None):
    parser = reporting.flags(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run of train_causal_lm.py --lora-rank 0")
    add("--ranks", type=NATURAL, nargs="+", default=[4, 16, 64], help="of the adapters")
    add("--conversations", type=COUNT, default=200, help="of the validation split; 0: all")
    add("--batch-tokens", type=NATURAL, default=4000, help="padded tokens in one forward pass")
    add("--output", metavar="DIR", help="write the adapter there (of one rank)")
    args = parser.parse_args(argv)
    several = len(args.ranks) > 1 and args.output
    check(parser, args, ["--output: give one of --ranks"] if several else [])
    return args


def pieces(difference, rank: int):
    """B (out, R) and A (R, in), whose product is nearest to `difference` (out, in)."""
    import torch

    left, values, right = torch.linalg.svd(difference, full_matrices=False)
    half = values[:rank].sqrt()
    return left[:, :rank] * half, half[:, None] * right[:rank]


def adapter(tuned, base: str, rank: int, cache: Path, device):
    """(an adapter of `base` with `tuned`'s weights as far as it can hold them; the share that it keeps).

    A rank beyond a matrix's own fills up with zeros.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    from causal_models import CausalGenerator

    settings = tuned.settings
    own = {"src_len": settings.src_len, "tgt_len": settings.tgt_len, "system": settings.system}
    own |= {"exemplars": settings.exemplars, "exemplar_len": settings.exemplar_len}
    own |= {"top_exemplars": settings.top_exemplars, "marks": settings.marks, "match": settings.match}
    model = CausalGenerator.start(
        base, rank=rank, cache=cache, device=device, called=settings.base, alpha=rank, **own
    )
    if model.settings.base_sha256 != settings.base_sha256:
        raise UserError(f"{base}: not the base that the run began with; give that one as --base")
    kept = whole = 0.0
    trained = dict(tuned.lm.named_modules())
    with torch.no_grad():
        for name, layer in model.lm.base_model.model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            difference = trained[name].weight - layer.get_base_layer().weight  # (out, in)
            up, down = pieces(difference, rank)
            layer.lora_B["default"].weight.zero_()[:, : up.shape[1]] = up
            layer.lora_A["default"].weight.zero_()[: down.shape[0]] = down
            kept += float((up @ down).square().sum())
            whole += float(difference.square().sum())
    return model.eval(), kept / whole if whole else 1.0


def perplexity(model, args, paths, session) -> float:
    """Of a word of the validation split's replies."""
    from causal_generators import CausalObjective, sequences
    from dataloaders import plan_once
    from generators import validate

    model.to(session.device)
    held = sequences(model, "valid", paths, conversations=args.conversations)
    batches = plan_once(held.data.lengths, len(held.data.lengths), args.batch_tokens)
    return validate(model, CausalObjective(), held, batches, session)["ppl_word"]  # type: ignore[arg-type]


def main(argv=None):
    args = parse_args(argv)
    from causal_generators import load
    from causal_models import CausalGenerator, base_of

    session, paths, file = reporting.begin(args, "low_rank")
    refuse_existing([Path(args.output) / "config.json"] if args.output else [], args.overwrite)
    tuned = load(Path(args.run), paths, session)
    if tuned.settings.rank:
        raise UserError(f"{args.run}: an adapter already; RUN is one of --lora-rank 0")
    base = base_of(args.run, paths) or tuned.settings.base
    plain = CausalGenerator.start(base, rank=0, cache=paths.cache, device=session.device)
    found = {"the base": {"ppl_word": perplexity(plain.eval(), args, paths, session)}}
    del plain
    for rank in sorted(args.ranks):
        reporting.say(f"rank {rank}")
        model, share = adapter(tuned, base, rank, paths.cache, session.device)
        weights = model.parameter_counts()[0]
        row = {"kept": 100 * share, "MB": 2 * weights / 1e6}
        found[f"rank {rank}"] = row | {"ppl_word": perplexity(model, args, paths, session)}
        if args.output:
            model.save_pretrained(args.output)
            reporting.say(f"written to {args.output}")
        del model
    found["all weights"] = {"kept": 100.0, "ppl_word": perplexity(tuned, args, paths, session)}
    columns = {"kept": "kept, %", "MB": "MB", "ppl_word": "word perplexity"}
    rows = [[name, *(row.get(c, "") for c in columns)] for name, row in found.items()]
    print(reporting.table(["model", *columns.values()], rows))
    reporting.write(file, vars(args), session.device.type, found)
    return found


if __name__ == "__main__":
    run(main)
