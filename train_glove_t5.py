"""Train the GloVe-T5 generator: a T5 from scratch over GloVe's words, with exemplars and frozen critics.

  python train_glove_t5.py --epochs 50 --lr 1e-4 --add-exemplars "glove-t5"        the paper's fusion (plain it has 27.6M parameters)
  python train_glove_t5.py --size mini --lr 8e-4 --epochs 4 --schedule linear --warmup-steps 800 --batch-size 128 --batch-tokens 2600
  python train_glove_t5.py --size tiny --epochs 1 --workdir demo                   seconds, on the bundled sample
  python train_glove_t5.py --inference saved/glove-t5/pool-glove-critics --predict-split valid

Losses, exemplars, decoding and outputs are train_t5.py's; here stand the backbone and its defaults.
"""

import options
from options import Paths, add_common, add_device, add_training, make_parser
from train_t5 import add_generator_flags, settle, train_generator


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    group = parser.add_argument_group("GloVe-T5")
    group.add_argument(
        "--size",
        choices=["paper", "mini", "tiny"],
        default="paper",
        help="paper: 300 wide, 6 + 6 layers; mini: 256, 4 + 4; tiny: 64, 2 + 2",
    )
    group.add_argument("--d-model", type=int, help="width (default: the size's)")
    group.add_argument("--d-kv", type=int, help="width of an attention head (default: the size's)")
    group.add_argument("--heads", type=int, help="attention heads (default: the size's)")
    group.add_argument("--d-ff", type=int, help="width of the feed-forward layers (default: the size's)")
    group.add_argument("--layers", type=int, help="layers of encoder and of decoder (default: the size's)")
    add_generator_flags(parser)
    add_training(parser, epochs=50, lr=1e-4, batch_size=32)
    add_device(parser)
    args = parser.parse_args(argv)
    sizes = ("d_model", "d_kv", "heads", "d_ff", "layers")
    return settle(parser, args, **{n: 1 for n in sizes if getattr(args, n) is not None})


def load_glove_t5(args, paths: Paths):
    """(tokenizer, T5 with GloVe word vectors)."""
    from transformers import T5ForConditionalGeneration

    from glove_models import glove_config, load_vectors, set_word_vectors
    from inference import require
    from models import load_tokenizer

    tokenizer = load_tokenizer(require(paths.glove))
    config = glove_config(
        tokenizer,
        args.size,
        args.dropout,
        d_model=args.d_model,
        d_kv=args.d_kv,
        num_heads=args.heads,
        d_ff=args.d_ff,
        num_layers=args.layers,
    )
    t5 = T5ForConditionalGeneration(config)
    set_word_vectors(t5.get_input_embeddings(), load_vectors(paths.glove), args.seed)
    return tokenizer, t5


def main(argv=None):
    train_generator(parse_args(argv), "glove-t5", load_glove_t5)


if __name__ == "__main__":
    options.run(main)
