"""What an adapter of rank R keeps of a model of which all weights were trained, and that adapter.

  python train_causal_lm.py --lora-rank 0 --lr 2e-4 --name all-weights
  python benchmarks/low_rank.py saved/causal-lm/all-weights --ranks 4 16 64
  python benchmarks/low_rank.py saved/causal-lm/all-weights --ranks 16 --output saved/causal-lm/cut

Of every linear layer the difference from the base is cut to its R largest singular values (no matrix of that
rank is nearer). Embeddings, output layer and norms, which an adapter does not hold, go back to the base's.
Printed for each rank: the share of the difference's squared length that is kept, over the layers that an
adapter holds, and beside it how much of the whole difference lies outside them; the adapter's MB in half
precision; word perplexity of the validation split. Beside them stand the base, and the trained model itself.
--output is a finished run's folder, with its card, and serves as any other: respond.py --run, --inference,
--init-from. Writes results/benchmarks/low_rank_RANKS.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import reporting
from options import COUNT, NATURAL, UserError, check, refuse_existing, run

COLUMNS = {"kept": "kept, %", "outside": "outside, %", "MB": "MB", "ppl_word": "word perplexity"}


def parse_args(argv=None):
    parser = reporting.flags(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run of train_causal_lm.py --lora-rank 0")
    add("--ranks", type=NATURAL, nargs="+", default=[4, 16, 64], help="of the adapters")
    add("--conversations", type=COUNT, default=200, help="of the validation split; 0: all")
    add("--batch-tokens", type=NATURAL, default=4000, help="padded tokens in one forward pass")
    add("--output", metavar="DIR", help="write the adapter there (of one rank)")
    args = parser.parse_args(argv)
    problems = []
    if args.output and len(args.ranks) > 1:
        problems.append("--output: give one of --ranks")
    if args.output and Path(args.output).resolve() == Path(args.run).resolve():
        problems.append("--output: RUN itself, which would be lost; give another folder")
    check(parser, args, problems)
    return args


def pieces(difference, rank: int):
    """B (out, R) and A (R, in), whose product is nearest to `difference` (out, in)."""
    import torch

    left, values, right = torch.linalg.svd(difference, full_matrices=False)
    half = values[:rank].sqrt()
    return left[:, :rank] * half, half[:, None] * right[:rank]


def adapter(tuned, base: str, rank: int, cache: Path, device):
    """(an adapter of `base` with `tuned`'s weights as far as it can hold them; its figures).

    `kept`: of the squared length of the difference in the layers that it holds; `outside`: what part of the
    whole difference's lies in weights that it does not hold. Both in percent. A rank beyond a matrix's own
    fills up with zeros.
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
    kept = held = 0.0
    left = dict(tuned.lm.named_parameters())  # a tied weight once
    with torch.no_grad():
        for name, layer in model.lm.base_model.model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            difference = left.pop(f"{name}.weight") - layer.get_base_layer().weight  # (out, in)
            up, down = pieces(difference, rank)
            layer.lora_B["default"].weight.zero_()[:, : up.shape[1]] = up
            layer.lora_A["default"].weight.zero_()[: down.shape[0]] = down
            kept += float((up @ down).square().sum())
            held += float(difference.square().sum())
        of_base = {n.replace(".base_layer.", "."): w for n, w in model.lm.base_model.model.named_parameters()}
        outside = sum(float((weight - of_base[name]).square().sum()) for name, weight in left.items())
    shares = {"kept": kept / (held or 1.0), "outside": outside / (held + outside or 1.0)}
    return model.eval(), {name: 100 * share for name, share in shares.items()}


def write_run(model, begun: dict, figures: dict, args, paths, device: str) -> None:
    """The adapter as a finished run; `begun`: the args.json of the run that it was cut from."""
    import cards
    import storage
    from runs import Run

    place, rank = Path(args.run), model.settings.rank
    cut_from = storage.sources_of({"all weights": place}, paths)
    sources = storage.read_if_there(place / "sources.json") | cut_from
    cut = Run(
        Path(args.output),
        begun["args"] | {"lora_rank": rank, "lora_alpha": rank, "name": Path(args.output).name},
        free=set(),
        inputs=begun["inputs"] | {name: entry["sha256"] for name, entry in cut_from.items()},
        sources=sources,
    )
    cut.open("auto" if args.overwrite else "never", args.overwrite)
    cut.begin(device)
    model.save_pretrained(cut.folder)
    result = {"low_rank": figures | {"rank": rank}}
    cards.write_card(cut.folder, result)
    storage.write_json(cut.folder / "result.json", result)
    cut.close()


def perplexity(model, args, paths, session) -> float:
    """Of a word of the validation split's replies."""
    import torch

    from causal_generators import CausalObjective, sequences
    from dataloaders import plan_once
    from families import validate

    model.to(session.device)
    held = sequences(model, "valid", paths, conversations=args.conversations)
    batches = plan_once(held.data.lengths, len(held.data.lengths), args.batch_tokens)
    with torch.inference_mode():
        return validate(model, CausalObjective(), held, batches, session)["ppl_word"]


def main(argv=None):
    args = parse_args(argv)
    import advice
    from causal_generators import load
    from causal_models import CausalGenerator, base_of
    from runs import require_run
    from storage import read_json
    from updates import count_parameters

    ranks = sorted({*args.ranks})
    session, paths, file = reporting.begin(args, "_".join(["low_rank", *map(str, ranks)]))
    begun = {}
    if args.output:
        refuse_existing([Path(args.output) / "config.json"], args.overwrite, "another --output")
        require_run(Path(args.run), advice.GIVE_A_GENERATOR)
        begun = read_json(Path(args.run) / "args.json")
    tuned = load(Path(args.run), paths, session)
    if tuned.settings.rank:
        raise UserError(f"{args.run}: an adapter already; RUN is one of --lora-rank 0")
    base = base_of(args.run, paths) or tuned.settings.base
    plain = CausalGenerator.start(base, rank=0, cache=paths.cache, device=session.device)
    found = {"the base": {"ppl_word": perplexity(plain.eval(), args, paths, session)}}
    del plain
    for rank in ranks:
        reporting.say(f"rank {rank}")
        model, row = adapter(tuned, base, rank, paths.cache, session.device)
        row["MB"] = 2 * count_parameters(model)[0] / 1e6
        row["ppl_word"] = perplexity(model, args, paths, session)
        found[f"rank {rank}"] = row
        if args.output:
            write_run(model, begun, row, args, paths, session.device.type)
            reporting.say(f"written to {args.output}")
        del model
    found["all weights"] = {"ppl_word": perplexity(tuned, args, paths, session)}
    rows = [[name, *(row.get(c, "") for c in COLUMNS)] for name, row in found.items()]
    print(reporting.table(["model", *COLUMNS.values()], rows))
    print("outside: in embeddings, output layer and norms, which an adapter leaves as the base's")
    reporting.write(file, vars(args), session.device.type, found)
    return found


if __name__ == "__main__":
    run(main)
