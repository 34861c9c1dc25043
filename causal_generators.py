"""The third family's stage: a causal language model trained, decoded and measured like the other generators.

What the model computes stands in causal_models.py, how a dialogue becomes tokens in chats.py. The loop is
that of training.py, predictions and figures are those of predicting.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import marks
import storage
from causal_models import CausalGenerator, CausalSettings, base_of, example_nll
from chats import causal_data, pad_id, prompt_data
from commands import DECODING, never_read
from corpora import Example, listener_turns
from critics import load_critics
from dataloaders import Data, SplitData, pad, plan_once, tokenizer_hash
from exemplars import at_most, found_by, of_split
from families import data_sources, inputs_of, reward_sources, sampled_replies, to_the_end, validate
from models import until_end
from objectives import Draw, Drawn, ReplyObjective, SampledReplies, drawn_nll, some
from options import Paths, UserError, by_flag
from predicting import Predictor, inference, strict_but_for_top_p, write_predictions
from pretrained import begin_from, positions
from sampling import cache_name, sample, side_by_side
from session import Session, own_random_stream
from settings import CausalCommand, CausalOptions, Decoding, SampledOptions
from storage import hash_seed
from training import Loop
from vocabulary import logits_nll

FAMILY = "causal-lm"
#: how far logits may move, as a share of the largest, where weights are saved in half precision, by the
#: precision of the products: SmolLM2's moved by .002 and .027 on random tokens, all of its weights halved
IN_HALF = {"fp32": 1e-2, "bf16": 5e-2}


class CausalObjective(ReplyObjective):
    """nll: negative log-likelihood of the gold replies and their ends, over their tokens."""

    def __init__(self, sampled: SampledReplies | None = None) -> None:
        super().__init__({"nll": 1.0}, sampled)

    def gold_units(self, batch: dict) -> dict[str, float]:
        return {"nll": float(len(batch["target_ids"]))}

    def losses(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        return {"nll": logits_nll(model(batch), batch["target_ids"]).sum()}  # (N, V) -> (N,) -> ()

    def sampled_nll(self, model: nn.Module, sampled: dict, options: SampledOptions) -> Tensor:
        return sampled_nll(model, sampled, options)


def sampled_nll(model: nn.Module, drawn: dict, options: SampledOptions) -> Tensor:
    """(M,) of sampled replies, with gradient, under the distribution that they were drawn from.

    Of several parts nothing is kept for the backward pass, which reads each of them again: no more is held
    than one part needs.
    """

    def read(part: dict) -> Tensor:
        nll = drawn_nll(model(part), part["target_ids"], part["suppressed"], options)  # (N, V) -> (N,)
        return example_nll(nll, part)

    parts = drawn["parts"]
    if len(parts) == 1:
        return read(parts[0])
    return torch.cat([checkpoint(read, part, use_reentrant=False) for part in parts])


def draw_replies(
    prompts: Data, most_tokens: int, options: SampledOptions, device: torch.device, part_tokens: int = 0
) -> Draw:
    """A causal language model's `Draw`. A prompt is read once for all of its samples, where they are drawn
    and, by a model that can be told positions, where they are scored.

    prompts: what stands before the reply of each training example; part_tokens: padded tokens that are read
    at once where replies are scored (0: all).
    """
    decoding = options.decoding(most_tokens)

    def draw(model: nn.Module, batch: dict, most: int, samples: int) -> Drawn:
        assert isinstance(model, CausalGenerator)
        numbers = batch["examples"][some(len(batch["examples"]), most)].tolist()
        asked = {k: v.to(device) for k, v in prompts.collate(numbers).items() if k != "names"}
        out = sample(model, asked, torch.rand(len(numbers), samples, most_tokens), decoding).ids
        read = asked["attention_mask"].bool()
        before = [ids[mask] for ids, mask in zip(asked["input_ids"], read, strict=True)]
        numbers = [n for n in numbers for _ in range(samples)]
        written = until_end(out == model.chat.end_id)  # (M, T)
        replies = [ids[mask] for ids, mask in zip(out, written, strict=True)]
        together = samples if side_by_side(model.lm) else 1  # of a prompt's replies in one sequence
        rows = [(before[n // samples], replies[n : n + together]) for n in range(0, len(replies), together)]
        longest = max(len(prompt) + sum(map(len, after)) for prompt, after in rows)
        size = max(1, part_tokens // longest) if part_tokens else len(rows)
        parts = [scored_rows(rows[n : n + size], model) for n in range(0, len(rows), size)]
        return Drawn({"parts": parts}, numbers, model.replies(out))

    return draw


def scored_rows(rows: Sequence[tuple[Tensor, Sequence[Tensor]]], model: CausalGenerator) -> dict:
    """A batch of prompts (P,), each with its sampled replies as targets, side by side: none sees another, and
    each stands at the positions right after the prompt."""
    # padded on the right again, as in training
    input_ids, mask = pad(
        [torch.cat([prompt, *after]).cpu().numpy() for prompt, after in rows], pad_id(model.tokenizer)
    )
    whose, positions = torch.zeros_like(input_ids), torch.arange(input_ids.shape[1]).repeat(len(rows), 1)
    places: list[Tensor] = []
    targets: list[Tensor] = []
    example_of: list[Tensor] = []
    for row, (prompt, after) in enumerate(rows):
        start = len(prompt)
        for number, reply in enumerate(after, 1):
            here = torch.arange(start, start + len(reply))
            whose[row, here], positions[row, here] = number, torch.arange(len(reply)) + len(prompt)
            # its first token follows the prompt's last one
            before = torch.cat([torch.tensor([len(prompt) - 1]), here[:-1]])
            places.append(before + row * input_ids.shape[1])
            targets.append(input_ids[row, here])
            example_of.append(torch.full((len(reply),), len(example_of)))
            start += len(reply)
    batch = {"input_ids": input_ids, "attention_mask": mask}
    if max(len(after) for _, after in rows) > 1:
        # what a token sees: up to itself, of the prompt and of its own reply
        own = (whose[:, None] == 0) | (whose[:, None] == whose[:, :, None])  # (R, L, L)
        seen = (own & mask[:, None].bool()).tril()
        hidden = torch.finfo(torch.float32).min
        batch["attention_mask"] = torch.zeros(seen.shape).masked_fill(~seen, hidden)[:, None]
        batch["position_ids"] = positions
    return batch | {
        "target_ids": torch.cat(targets),
        "target_places": torch.cat(places),
        "example_of": torch.cat(example_of),
        "examples": torch.arange(len(example_of)),
        "suppressed": torch.tensor(model.banned, dtype=torch.long),
    }


def read_split(
    model: CausalGenerator, split: str, paths: Paths, conversations: int = 0
) -> tuple[list[Example], list[list[str]] | None]:
    """The listener turns of a split's first `conversations` (0: all), and the exemplars of each where the
    model reads some."""
    examples = listener_turns(paths.dialogues(split))
    kept = set(list(dict.fromkeys(e.conv_id for e in examples))[: conversations or None])
    examples = [e for e in examples if e.conv_id in kept]
    if model.settings.exemplars == "none":
        return examples, None
    return examples, of_split(split, examples, model.settings.top_exemplars, paths)


def sequences(
    model: CausalGenerator,
    split: str,
    paths: Paths,
    whole: bool = True,
    conversations: int = 0,
    marks_seed: int | None = None,
    packed: bool = True,
    read: tuple[list[Example], list[list[str]] | None] | None = None,
) -> SplitData:
    """Sequences for training and likelihood, `packed` where there are neither exemplars nor marks. `whole`:
    replies are not cut. `marks_seed`: replies get their marks, of which this seed leaves some out; None: no
    marks. `read`: what `read_split` has read."""
    examples, exemplars = read or read_split(model, split, paths, conversations)
    layout: dict[str, Any] = model.settings.layout | ({"tgt_len": None} if whole else {})
    if marks_seed is not None:
        layout["marks"] = marks.of_split(split, examples, paths, marks_seed)
    data = causal_data(
        examples, model.tokenizer, packed=packed, exemplars=exemplars, cache=paths.cache, **layout
    )
    return SplitData(examples, data)


def require_positions(model: CausalGenerator, data: Data, split: str, flag: str = "", more: int = 0) -> None:
    """Raises `UserError` where the base cannot read the longest sequence, and `more` new tokens, which `flag`
    allows. Learnt positions end there; what rotary ones say beyond, no training has seen."""
    longest, most = max(data.lengths, default=0) + more, positions(model.lm)
    if most and longest > most:
        lower = (
            [flag] * bool(more) + ["--src-len"] + ["--exemplar-len"] * (model.settings.exemplars != "none")
        )
        raise UserError(
            f"{model.settings.base}: reads {most:,} tokens, and the longest sequence of the {split} split "
            f"has {longest:,}{f' with {flag} {more}' if more else ''}; lower {' or '.join(lower)}"
            f"{' (gold replies are measured whole)' * (split != 'train' and not more)}"
            f"{', where --inference keeps the lengths of its run' * (split != 'train')}"
        )


class CausalPredictor(Predictor):
    """The gold reply's likelihood, and a reply, for every example of a split.

    `gold`: sequences with targets. `prompts`: one for each of them, or None where no replies are asked for;
    then a sequence can hold the targets of several examples.
    """

    def __init__(
        self, model: CausalGenerator, gold: Data, prompts: Data | None, decoding: Decoding, session: Session
    ):
        super().__init__(model, model.tokenizer, gold, decoding, session)  # type: ignore[arg-type]
        self.prompts, self.causal = prompts, model
        # the model bans its own control tokens
        self.arguments.pop("suppress_tokens")

    def batch(self, number: int, numbers: list[int]) -> dict[str, np.ndarray]:
        session, model = self.session, self.causal
        gold = session.move(self.data.collate(numbers))
        texts, each = {}, None
        with (
            torch.inference_mode(),
            session.autocast(),
            own_random_stream(hash_seed(self.decoding.seed, number)),
        ):
            if self.prompts:
                prompts = session.move(self.prompts.collate(numbers))
                ids, each = self.write(prompts, gold)
                replies = np.array(model.replies(ids))
                written = dict(zip(numbers, replies.reshape(len(numbers), -1), strict=True))
                texts["response"] = np.stack([written[n] for n in gold["examples"].tolist()])
            if each is None:
                each = logits_nll(model(gold), gold["target_ids"])  # (N,)
            nll = example_nll(each, gold)  # (E,)
        tokens = torch.bincount(gold["example_of"], minlength=len(nll))
        # an example's targets stand in a row, so that its end is the last of them
        places = torch.arange(len(each), device=each.device)
        ends = torch.zeros_like(tokens).scatter_reduce(0, gold["example_of"], places, "amax")  # (E,)
        unknown = gold["target_ids"] == self.unknown
        unknown[ends] = False  # one token can serve as both
        unknown = torch.zeros_like(tokens).index_add(0, gold["example_of"], unknown.long())
        return {
            "numbers": np.array(gold["examples"].tolist()),
            "nll": np.array(nll.tolist()),
            "nll_end": np.array(each[ends].tolist()),
            "tokens": np.array(tokens.tolist()),
            "unknown": np.array(unknown.tolist()),
            **texts,
        }

    def write(self, prompts: dict, gold: dict | None = None) -> tuple[Tensor, Tensor | None]:
        """(B * replies, T) new tokens, the replies to one prompt side by side; and (N,) the nll of the
        targets of `gold`, where they could follow the prompts once these were read."""
        model, decoding = self.causal, self.decoding
        if decoding.beams > 1 or decoding.no_repeat_ngram or not cache_name(model.lm):
            with strict_but_for_top_p(self.arguments):
                return model.generate(prompts, **self.arguments), None
        draws = torch.rand(len(prompts["input_ids"]), decoding.replies, decoding.max_new_tokens)
        follow = gold_replies(gold, prompts) if gold and side_by_side(model.lm) else None
        found = sample(model, prompts, draws, decoding, follow)
        return found.ids, found.nll


def gold_replies(gold: dict, prompts: dict) -> Tensor | None:
    """(B, T) the targets of each sequence of a batch that has one reply each, padded with -1; None where they
    do not all stand behind their prompts: only in these are earlier replies cut to --tgt-len."""
    before = gold["input_ids"][gold["attention_mask"].bool() & ~gold["target_mask"]]
    if not torch.equal(before, prompts["input_ids"][prompts["attention_mask"].bool()]):
        return None
    counts = gold["target_mask"].sum(1)  # (B,)
    places = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
    ids = gold["target_ids"].new_full(places.shape, -1)
    return ids.masked_scatter(places, gold["target_ids"])


def gold_and_prompts(
    model: CausalGenerator, split: str, paths: Paths, decoding: Decoding
) -> tuple[SplitData, Data | None]:
    """Every listener turn of a split as a sequence of its own, and as a prompt; for the likelihood alone
    packed as in training, which reads a dialogue once, and no prompts."""
    if not decoding.predict:
        found, prompts = sequences(model, split, paths), None
    else:
        examples, exemplars = read_split(model, split, paths)
        same: dict[str, Any] = {"exemplars": exemplars, "cache": paths.cache, **model.settings.layout}
        prompts = prompt_data(examples, model.tokenizer, **same)
        gold = causal_data(examples, model.tokenizer, packed=False, **same | {"tgt_len": None})
        found = SplitData(examples, gold)
        require_positions(model, prompts, split, "--max-new-tokens", decoding.max_new_tokens)
    require_positions(model, found.data, split)
    return found, prompts


def load(folder: Path, paths: Paths, session: Session, base: str | None = None) -> CausalGenerator:
    """A saved model. `base`: where its base lies, if not where it lay in training."""
    place = base or base_of(folder, paths)
    return CausalGenerator.from_pretrained(folder, cache=paths.cache, base=place, device=session.device)


def run(command: CausalCommand) -> dict | None:
    """Train and predict, or with `--inference` only predict."""
    session = Session(**command.device)
    if command.inference:
        return infer(Path(command.inference), command, session)
    return train(command, session)


def build(options: CausalOptions, base: str, paths: Paths, session: Session) -> CausalGenerator:
    """A model to be trained from `base`: with a new adapter, or the weights of `--init-from`."""
    known = marks.known(paths) if options.control else {}  # missing labels are missed at once
    folder_of_base = base if Path(base).is_dir() else None
    reads = options.add_exemplars != "none"
    model = CausalGenerator.start(
        base,
        rank=options.lora_rank,
        cache=paths.cache,
        device=session.device,
        called=paths.name(folder_of_base) if folder_of_base else None,
        alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        exemplars=options.add_exemplars,
        src_len=options.src_len,
        tgt_len=options.tgt_len,
        exemplar_len=options.exemplar_len,
        top_exemplars=at_most(options.top_exemplars, paths) if reads else options.top_exemplars,
        marks=known,
        match=found_by(paths.exemplars("train")) if reads else "",
    )
    if options.init_from:
        begun = Path(options.init_from)
        noted = storage.read_if_there(begun / "config.json").get("base_sha256")
        # --model says where its base lies, if it was moved
        moved = folder_of_base if noted == model.settings.base_sha256 else None
        with by_flag("--init-from"):
            trained = load(begun, paths, session, options.base or moved)
            if trained.settings.base_sha256 != model.settings.base_sha256:
                raise UserError(f"{begun}: of another base, {trained.settings.base}; give it as --model")
            begin_from(model, trained, begun)
            if options.lora_rank and trained.settings.lora_alpha != model.settings.lora_alpha:
                raise UserError(
                    f"{begun}: its adapter counts for more or less than this one's would; give "
                    f"--lora-alpha {trained.settings.lora_alpha}"
                )
        del trained
    return model


def train(command: CausalCommand, session: Session) -> dict:
    paths, options = command.paths, command.options
    base = options.base or options.model  # of a run to begin from it may be named by either flag
    model = build(options, base, paths, session)
    # the others are measured without marks: in use nobody knows a reply's levels before it is written
    marks_seed = options.seed if options.control else None
    read = read_split(model, "train", paths)
    data = sequences(
        model, "train", paths, whole=False, marks_seed=marks_seed, packed=options.pack, read=read
    )
    held = sequences(model, "valid", paths, conversations=options.valid_conversations)
    # read before the training: what would be missing after it is missed now
    split = command.predict_split
    require_positions(model, data.data, "train")
    require_positions(model, held.data, "valid")
    if split:
        gold_and_prompts(model, split, paths, command.decoding)
    sampled = None
    if command.sampled.sampled_loss_w:
        examples, exemplars = read
        prompts = prompt_data(
            examples, model.tokenizer, exemplars=exemplars, cache=paths.cache, **model.settings.layout
        )
        require_positions(model, prompts, "train", "--tgt-len", options.tgt_len)
        draw = draw_replies(
            prompts, options.tgt_len, command.sampled, session.device, command.training.batch_tokens
        )
        rewards = load_critics(command.rewards, command.leading, session)
        sampled = sampled_replies(command.sampled, rewards, examples, draw, paths, session)
    objective = CausalObjective(sampled)

    def evaluate() -> dict[str, float]:
        batches = plan_once(held.data.lengths, 2 * loop.batch_size, 2 * command.training.batch_tokens)
        return validate(model, objective, held, batches, session)

    sources = {"base": storage.source(base, paths, model.settings.base_sha256)}
    sources |= storage.sources_of({"init": options.init_from}, paths) | reward_sources(
        command.rewards, command.sampled, paths
    )
    reads = options.add_exemplars != "none"
    sources |= data_sources(paths, reads, ["train"] if options.control else [])
    folder = paths.saved / FAMILY / command.name
    loop = Loop(
        command.training,
        session,
        model,
        objective,
        data.data,
        evaluate,
        model.save_pretrained,
        folder,
        flags=command.flags,
        inputs=inputs_of(sources)
        | {"tokenizer": tokenizer_hash(model.tokenizer), "chat format": storage.fingerprint(str(model.chat))},
        sources=sources,
        free=DECODING | never_read(command.flags),
        metric="nll",
        micro_batches_matter=bool(command.sampled.sampled_loss_w),
        mode="min",
        reload=lambda place: load(place, paths, session, base),
        probe=lambda trained: trained(session.move(held.data.collate([0]))),
        same=IN_HALF[session.precision],
        evaluate_first=not command.training.epochs,
    )

    def of_saved(split: str) -> dict[str, float]:
        """In half precision: the replies are of that, as they will be later."""
        loop.make_room()
        return predict(folder, load(folder, paths, session, base), split, command, session, folder)

    return to_the_end(loop, folder, split, of_saved, command.decoding, paths, session)


def predict(
    folder: Path, model: CausalGenerator, split: str, command: CausalCommand, session: Session, output: Path
) -> dict[str, float]:
    model = model.for_use(session.device, session.precision)
    gold, prompts = gold_and_prompts(model, split, command.paths, command.decoding)
    predictor = CausalPredictor(model, gold.data, prompts, command.decoding, session)
    if model.settings.base_sha256 != CausalSettings.load(folder).base_sha256:
        predictor.notes = {"base": model.settings.base_sha256}
    # batches are planned by the prompts, if there are some
    found = gold if prompts is None else SplitData(gold.examples, prompts)
    return write_predictions(folder, split, found, predictor, command.paths, output)


def infer(folder: Path, command: CausalCommand, session: Session) -> dict[str, float]:
    """Only write the predictions of a finished run, with the exemplars it was trained on unless others are
    given."""
    paths, split, output = inference(folder, command, session)
    model = load(folder, paths, session, command.options.base)
    command = replace(command, paths=paths)
    return predict(folder, model, split, command, session, output)
