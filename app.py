"""A page in the browser, on this machine alone: talk to a trained generator, steer it, compare two of them.

  python app.py                                                 the newest generator in saved/
  python app.py --model saved/t5/lempex --pool replies.txt      with exemplars out of your own replies
  python app.py --model saved/t5/lempex --other saved/t5/plain     side by side, blinded, with a vote
  python app.py --export-votes votes.csv                        what was voted, as a table

Shown are the reply, the exemplars that it read, and what the critics see in it. The page is served on
127.0.0.1 and nothing is sent elsewhere; votes are kept in results/votes.sqlite. It needs gradio, which is an
extra: python -m pip install -r requirements-app.txt. English only.
"""

import os
from pathlib import Path
from typing import Any

import options
from options import NATURAL, Paths, UserError, add_common, add_device, check, make_parser, number
from records import check_output
from settings import IN_USE, Weights, pick
from use_commands import add_base, add_critic_runs, add_pool, critic_runs, pool_problems

#: what respond.py can be asked for and the page cannot
FIXED: dict[str, Any] = {
    "emotion": None,
    "target": {},
    **{f"{name}_w": weight for name, weight in vars(Weights()).items()},
    **{name: getattr(IN_USE, name) for name in ("top_k", "top_p", "temperature", "max_new_tokens")},
}


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    parser.set_defaults(seed=None, **FIXED)  # without a seed each reply has its own
    add = parser.add_argument
    add(
        "--model",
        dest="run",
        metavar="RUN",
        help="folder of a generator (default: the one in saved/ that was finished last, or the bundled one)",
    )
    add_base(parser)
    add("--other", metavar="RUN", help="a second generator, for the comparison")
    add("--family", help="whose critics: saved/empathy/FAMILY-DIM and so on (default: the generator's)")
    add_critic_runs(parser)
    add("--candidates-per-reply", type=NATURAL, default=8, help="sampled replies, of which the best is kept")
    add("--port", type=number(int, least=1, most=65535), default=7860, help="of the page on 127.0.0.1")
    add("--export-votes", metavar="FILE", help="write all votes of the workdir as csv, and end")
    add_pool(parser, "the training dialogues")
    add_device(parser)
    args = parser.parse_args(argv)
    problems = check_output(args.export_votes, endings=[".csv"], flag="--export-votes")
    check(parser, args, problems + pool_problems(args))
    return args


def main(argv=None):
    args = parse_args(argv)
    paths = Paths(args.workdir)
    if args.export_votes:
        from votes import Votes

        return Votes(paths.results / "votes.sqlite").export(Path(args.export_votes), args.overwrite)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before its import
    try:
        import chat_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        remedy = "python -m pip install -r requirements-app.txt (or: make app)"
        raise UserError(f"the page needs gradio, which is an extra: {remedy}") from error
    from conversation import RespondOptions

    asked = chat_page.PageOptions(
        respond=pick(RespondOptions, args),
        other=args.other,
        family=args.family,
        given=critic_runs(args),
        device=args.device,
        precision=args.precision,
    )
    return chat_page.serve(asked, paths, args.port)


if __name__ == "__main__":
    options.run(main)
