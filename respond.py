"""Reply to your own words with a trained generator, and see what the reply came from.

  python respond.py "My dog died last week."                                 the newest generator in saved/
  python respond.py "I lost my job." "Oh no, what happened?" "They closed."  a dialogue, oldest turn first
  python respond.py                                                          on a terminal: a conversation
  python respond.py --file dialogues.jsonl --output replies.jsonl            a dialogue a line
  python respond.py --run saved/t5/lempex --pool replies.txt --target emo=1,sentiment=0.4 "I feel so alone."

A reply is the best of several sampled candidates: by the mean log-probability of its tokens and, where a
target is given, by how close the critics' levels come to it. Exemplars are found in --pool, or among the
training dialogues, without knowing the emotion. A line of --file is plain text, a JSON list of turns, or
{"id": ..., "turns": [...]}, a turn a text or {"speaker": ..., "text": ...} (role and content do as well);
without it, standard input is read where that is no terminal. Generator, critics and retriever are folders of
runs, or names on the hub (user/name). English only.
"""

import sys

import options
from options import DIMENSIONS, NATURAL, WEIGHT, Paths, add_common, add_device, check, make_parser
from records import check_output
from settings import IN_USE, Weights, pick, target
from use_commands import add_base, add_critic_runs, add_pool, add_sampling, critic_runs, pool_problems


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    parser.set_defaults(seed=None)  # each reply its own, which is shown
    add = parser.add_argument
    add(
        "turns",
        nargs="*",
        metavar="TURN",
        help="a dialogue, oldest turn first; the last one is the speaker's",
    )
    add(
        "--run",
        metavar="RUN",
        help="folder of a generator, or its name on the hub (default: the newest in saved/, or bundled)",
    )
    add_base(parser)
    add("--file", metavar="FILE", help="dialogues, one a line; - is standard input")
    add(
        "--output",
        metavar="FILE",
        help="of --file: where the replies go, as JSON lines (default: standard output); an interrupted call "
        "goes on where it stopped",
    )
    add("--emotion", help="only exemplars of this emotion")
    add_critic_runs(parser, "the generator's family's, or bundled")
    add_pool(parser, "the training dialogues")
    add = parser.add_argument_group("choice").add_argument
    add("--candidates-per-reply", type=NATURAL, default=8, help="sampled replies, of which the best is kept")
    add(
        "--target",
        type=target,
        default={},
        metavar="DIM=LEVEL,...",
        help="levels (sentiment: -1 to 1) to come close to, as in emo=1,exp=0",
    )
    for name, of_what in (
        ("likelihood", "the mean log-probability in the choice"),
        ("empathy", f"the distance to a target of {', '.join(DIMENSIONS)}"),
        ("sentiment", "the distance to a target of sentiment"),
    ):
        usual = getattr(Weights(), name)
        add(f"--{name}-w", type=WEIGHT, default=usual, help=f"weight of {of_what}")
    add_sampling(parser, most=IN_USE.max_new_tokens)
    add_device(parser)
    args = parser.parse_args(argv)
    problems = pool_problems(args)
    if args.turns and args.file:
        problems.append("give either a dialogue as arguments or dialogues with --file")
    problems += check_output(args.output, [args.file, args.pool], (".jsonl", ".ndjson"))
    closed = sys.stdin is None  # as a shell's <&- leaves it
    if closed and not args.turns and args.file in (None, "-"):
        problems.append("no standard input; give the dialogue as arguments or --file")
    if args.output and (args.turns or (not args.file and not closed and sys.stdin.isatty())):
        problems.append(
            "--output: only for --file or standard input; a conversation is kept with its command /save FILE"
        )
    check(parser, args, problems)
    return args


def main(argv=None):
    args = parse_args(argv)
    import conversation
    from session import Session

    asked = pick(conversation.RespondOptions, args)
    session = Session(args.device, args.precision)

    def responder():
        return conversation.open_responder(asked, critic_runs(args), Paths(args.workdir), session)

    if args.turns:
        conversation.check_turns([turn.strip() for turn in args.turns])  # before models are loaded
        return conversation.once(responder(), args.turns, asked)
    if args.file or not sys.stdin.isatty():
        return conversation.respond_to_file(responder, args.file or "-", args.output, asked)
    return conversation.Conversation(responder(), asked).run()


if __name__ == "__main__":
    options.run(main)
