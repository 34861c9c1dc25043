"""Generators: built, fed with the data of a split, and trained by eq. 14; predicting.py decodes them.

What a generator computes stands in models.Generator, what critics are asked in critics.py, how exemplars
enter in exemplars.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, T5ForConditionalGeneration

import exemplars
import marks
import storage
from commands import DECODING, never_read
from corpora import Example, all_turns, listener_turns
from critic_set import CriticSet
from critics import LossCritics, choose_for_loss, load_critics, say_uninformed
from dataloaders import SplitData, generator_data, plan_once, require_same_words, tokenizer_hash, too_much_cut
from families import data_sources, inputs_of, reward_sources, sampled_replies, to_the_end, validate
from glove_models import glove_config, load_vectors, set_word_vectors
from gold import gold_labels
from models import Generator, GeneratorSettings
from objectives import GeneratorObjective, draw_replies, gradient_norms
from options import Paths, UserError, by_flag
from predicting import Predictor, decoding_arguments, inference, write_predictions
from pretrained import (
    asks_for_own_head,
    begin_from,
    load_config,
    load_pretrained,
    load_tokenizer,
    new_t5,
    offline,
    require_words,
)
from quick import quicken
from session import Session
from settings import PARAPHRASER, GeneratorCommand, GeneratorOptions
from storage import require
from training import Loop

# ------------------------------------------------------------------------------------------------------ built


@dataclass(frozen=True)
class Backbone:
    """What a family brings: its tokenizer, its T5, and the size of a GloVe encoder that fits beside it."""

    tokenizer: Any
    t5: T5ForConditionalGeneration
    exemplar_size: str  # glove_models.SIZES
    source: Path | str  # the folder, or the hub name, that it begins from


def load_t5(model: str, from_scratch: bool, dropout: float, paths: Paths) -> Backbone:
    """A pretrained T5 by hub name or folder; `t5-tiny`, or any with `from_scratch`, with random weights."""
    tiny = model == "t5-tiny"
    name = require(paths.t5_tiny) if tiny else model
    with offline("--model t5-tiny (random weights)"):
        config = load_config(name)
        if config.model_type != "t5":
            kind, both = type(config), config.is_encoder_decoder  # BERT is listed as causal, too
            causal = (
                kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING and not both
            )
            other = "; train_causal_lm.py is for causal language models" if causal else ""
            raise UserError(f"--model {model}: a {config.model_type} model; the generator needs a T5{other}")
        config.dropout_rate = dropout
        tokenizer = load_tokenizer(name)
        if getattr(config, "decoder_start_token_id", None) is None:  # T5's: its padding begins a reply
            config.decoder_start_token_id = config.pad_token_id
        if tiny or from_scratch:
            t5 = new_t5(config, asks_for_own_head(config))
        else:
            t5 = load_pretrained(T5ForConditionalGeneration, name, config)
    require_words(tokenizer, t5.get_input_embeddings().weight, f"--model {model}")
    return Backbone(tokenizer, t5, "tiny" if tiny else "paper", name)


def load_glove_t5(size: str, dropout: float, seed: int, paths: Paths, **changes: int | None) -> Backbone:
    """A T5 from scratch over GloVe's words, which begin as GloVe's vectors. `changes`: see
    glove_models.glove_config."""
    tokenizer = load_tokenizer(require(paths.glove))
    t5 = T5ForConditionalGeneration(glove_config(tokenizer, size, dropout, **changes))
    set_word_vectors(t5.get_input_embeddings(), load_vectors(paths.glove), seed)
    return Backbone(tokenizer, t5, size, paths.glove)


def build(backbone: Backbone, family: str, options: GeneratorOptions, paths: Paths) -> Generator:
    """A generator around a backbone, with the layers that the chosen way of exemplars needs: new, or with the
    weights of `--init-from`."""
    reads = options.add_exemplars != "none"
    settings = GeneratorSettings(
        backbone=backbone.t5.config.to_dict(),
        exemplars=options.add_exemplars,
        tokenizer=tokenizer_hash(backbone.tokenizer),
        src_len=options.src_len,
        tgt_len=options.tgt_len,
        exemplar_len=options.exemplar_len,
        top_exemplars=exemplars.at_most(options.top_exemplars, paths) if reads else options.top_exemplars,
        family=family,
        marks=marks.known(paths) if options.control else {},
        match=exemplars.found_by(paths.exemplars("train")) if reads else "",
        **exemplars.way_settings(options, backbone.exemplar_size, paths),
    )
    marks.require_words(backbone.tokenizer, settings.marks)
    model = Generator(settings, backbone.t5)
    exemplars.begin(model, paths, options.seed)
    if options.init_from:
        folder = Path(options.init_from)
        with by_flag("--init-from"):
            trained = Generator.from_pretrained(folder)
            require_same_words(folder, load_tokenizer(folder), settings.tokenizer)
            begin_from(model, trained, folder, fresh=("exemplar_encoder.", "fusion."))
    return model


# ------------------------------------------------------------------------------------------------------- data


def split_data(
    settings: GeneratorSettings,
    split: str,
    tokenizer,
    way: exemplars.Way,
    paths: Paths,
    critics: CriticSet | None = None,
    whole: bool = True,
    marks_seed: int | None = None,
    targets: str | None = None,
) -> SplitData:
    """One split; files are joined on (conv_id, utterance_idx). `critics`: whose labels a batch holds.

    `whole`: replies are not cut to the model's tgt_len. `marks_seed`: replies get their marks, of which this
    seed leaves some out; None: no marks. `targets`: "all" takes the speaker's turns, too.
    """
    examples = (all_turns if targets == "all" else listener_turns)(paths.dialogues(split))
    entering = None
    if settings.exemplars != "none":
        entering = way.split(exemplars.of_split(split, examples, settings.top_exemplars, paths))
    data = generator_data(
        examples,
        tokenizer,
        src_len=settings.src_len,
        tgt_len=None if whole else settings.tgt_len,
        cache=paths.cache,
        exemplars=entering,
        labels=critic_targets(split, examples, critics, settings.family, paths) if critics else None,
        critic_context_len=critics.context_len if critics else 0,
        marks=None if marks_seed is None else marks.of_split(split, examples, paths, marks_seed),
        start=settings.backbone["decoder_start_token_id"],
    )
    return SplitData(examples, data)


def critic_targets(
    split: str, examples: list[Example], critics: CriticSet, family: str, paths: Paths
) -> dict[str, list]:
    """{critic: the label of each example's gold reply}, of as many levels as the critic knows."""
    levels = {k: c.settings.outputs for k, c in critics.critics.items() if not c.settings.is_regressor}
    found = gold_labels(split, examples, paths, family, levels)
    return {kind: found[kind] for kind in critics.critics}


# -------------------------------------------------------------------------------------------------- the stage


def run(command: GeneratorCommand, load: Callable[[Paths], Backbone]) -> dict | None:
    """Train and predict, or with `--inference` only predict: the one function behind all generators'
    scripts."""
    session = Session(**command.device)
    if command.inference:
        return infer(Path(command.inference), command, session)
    return train_generator(command, load(command.paths), session)


def train_generator(command: GeneratorCommand, backbone: Backbone, session: Session) -> dict:
    paths, options, family = command.paths, command.options, command.family
    tokenizer = backbone.tokenizer
    model = build(backbone, family, options, paths)
    settings = model.settings
    # built once for all splits: the frozen way loads an encoder of its own
    way = exemplars.enter(settings, tokenizer, session, paths, options.exemplar_model)
    chosen = choose_for_loss(
        command.critics,
        command.leading,
        settings.tokenizer,
        options.tgt_len,
        session,
        settings.backbone["vocab_size"],
    )
    say_other_labellers(chosen, paths, session)
    critics = chosen.critics

    # replies are cut for training alone: a perplexity is of the whole reply
    # the others are measured without marks: in use nobody knows a reply's levels before it is written
    marks_seed = options.seed if options.control else None
    train = split_data(
        settings,
        "train",
        tokenizer,
        way,
        paths,
        critics,
        whole=False,
        marks_seed=marks_seed,
        targets=options.targets,
    )
    held = split_data(settings, "valid", tokenizer, way, paths, critics)
    if options.targets:
        listeners = sum(e.utterance_idx % 2 == 0 for e in train.examples)
        session.say(
            f"--targets all: {len(train.examples):,} training turns, {listeners:,} of them the listener's; "
            f"measured on {len(held.examples):,} listener's turns"
        )
    for warning in too_much_cut(train.data, {"--src-len": options.src_len, "--tgt-len": options.tgt_len}):
        session.say(warning)
    say_uninformed(critics, train.data, session)
    # read before the training: what would be missing after it is missed now
    split = command.predict_split
    predicted = split_data(settings, split, tokenizer, way, paths) if split else None
    drawing = command.sampled.decoding(settings.tgt_len)
    arguments = decoding_arguments(drawing, tokenizer, model.vocabulary)
    drawn = draw_replies(tokenizer, arguments, session.device)
    rewards = load_critics(command.rewards, command.leading, session)
    sampled = sampled_replies(command.sampled, rewards, train.examples, drawn, paths, session)
    objective = GeneratorObjective(critics, options, sampled)

    def evaluate() -> dict[str, float]:
        batches = plan_once(held.data.lengths, 2 * loop.batch_size, 2 * command.training.batch_tokens)
        found = validate(model, objective, held, batches, session)
        if options.log_gradients:
            # with all gradients: no more than the training has room for
            numbers = batches[len(batches) // 2][: loop.batch_size]
            batch = session.move(held.data.collate(numbers))
            with session.autocast():
                found |= gradient_norms(model, objective, batch)
        return found

    def export(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(str(folder))
        way.save(folder)

    def reload(folder: Path) -> Generator:
        require_same_words(folder, load_tokenizer(folder), settings.tokenizer)
        return Generator.from_pretrained(folder)

    folder = paths.saved / family / command.name
    sources = run_sources(backbone, way, chosen, settings, paths)
    sources |= storage.sources_of({"init": options.init_from}, paths) | reward_sources(
        command.rewards, command.sampled, paths
    )
    loop = Loop(
        command.training,
        session,
        model,
        objective,
        train.data,
        evaluate,
        export,
        folder,
        flags=command.flags,
        inputs=inputs_of(sources) | {"tokenizer": settings.tokenizer, **way.inputs()},
        sources=sources,
        free=DECODING | {"log_gradients"} | never_read(command.flags),
        metric="nll",
        micro_batches_matter=bool(options.balance or command.sampled.sampled_loss_w),
        mode="min",
        reload=reload,
        probe=lambda model: model(session.move(held.data.collate([0]))),
    )

    def predict(split: str) -> dict[str, float]:
        assert predicted
        predictor = Predictor(model, tokenizer, predicted.data, command.decoding, session)
        return write_predictions(folder, split, predicted, predictor, paths, folder)

    return to_the_end(loop, folder, split, predict, command.decoding, paths, session)


def run_sources(
    backbone: Backbone, way: exemplars.Way, chosen: LossCritics, settings: GeneratorSettings, paths: Paths
) -> dict[str, dict[str, str]]:
    """{name: path and sha256} of everything that a generator is made from; runs.sources reads it back."""
    labelled = [
        split for split in ("train", "valid") if chosen.critics or settings.marks and split == "train"
    ]
    found = {"model": storage.source(backbone.source, paths, storage.identity(backbone.source))}
    for kind, digest in chosen.checksums.items():
        found[f"critic {kind}"] = storage.source(chosen.folders[kind], paths, digest)
    return found | data_sources(paths, settings.exemplars != "none", labelled) | way.sources()


def say_other_labellers(chosen: LossCritics, paths: Paths, session: Session) -> None:
    """The labels may be of other critics than the loss's: allowed, and said."""
    labels = paths.labels("train")
    made_from = storage.read_origin(labels)
    for kind in made_from.keys() & chosen.checksums.keys():
        if made_from[kind]["sha256"] != chosen.checksums[kind]:
            other = made_from[kind]["critic"]
            session.say(
                f"note: the {kind} labels in {labels.parent} are of {other}, another critic than the loss's"
            )


def infer(folder: Path, command: GeneratorCommand, session: Session) -> dict[str, float]:
    """Only evaluate a finished run, with the exemplars it was trained on unless others are given."""
    paths, split, output = inference(folder, command, session)
    model = Generator.from_pretrained(folder).to(session.device)
    quicken(model, session.device)  # as after its training: the same seed writes the same replies
    moved = command.options.exemplar_model
    tokenizer = load_tokenizer(folder)
    way = exemplars.enter_again(
        folder,
        model.settings,
        tokenizer,
        session,
        paths,
        None if moved == PARAPHRASER else moved,
        "--exemplar-model",
    )
    found = split_data(model.settings, split, tokenizer, way, paths)
    predictor = Predictor(model, tokenizer, found.data, command.decoding, session)
    return write_predictions(folder, split, found, predictor, paths, output)
