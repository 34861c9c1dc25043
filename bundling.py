"""A finished run made fit to come with the repository, as those in saved/lempex-mini (saved/README.md).

python -c "import bundling; bundling.bundle('saved/glove-t5/plain', 'saved/lempex-mini/generator')"
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import exemplars
import storage
from cards import bundled_card
from corpora import listener_turns
from dataloaders import generator_data, plan_once
from gathering import half
from hub import Published
from metrics import count_words, perplexity
from models import Generator, token_nll
from options import HERE, Paths
from pretrained import load_tokenizer
from session import Session

SAMPLE = HERE / "data" / "sample" / "empathetic_dialogues" / "test.csv"


def bundle(run: str | Path, folder: str | Path, encoder: str | None = None) -> None:
    """What `push_to_hub` would send (no logs, no replies, no place on this machine), its weights in half
    precision, in a new folder. Of a generator result.json and card hold its `sample_ppl_word`, too;
    `encoder`: where that of its pooled exemplars lies, if not where its name says."""
    folder, made = Path(folder), Published()
    made.folder = Path(run)
    made.save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        # copies: what was read may still stand in the file alone
        weights = {k: half(w).clone() for k, w in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    storage.share(folder)
    figures: dict[str, float] = {}
    if storage.read_json(folder / "config.json").get("model") == "Generator":
        figures["sample_ppl_word"] = sample_perplexity(folder, encoder)
    storage.write_json(folder / "result.json", storage.read_json(folder / "result.json") | figures)
    card = (folder / "README.md").read_text(encoding="utf-8")
    storage.write_text(folder / "README.md", bundled_card(card, folder, figures))


def sample_perplexity(folder: Path, encoder: str | None = None) -> float:
    """Word perplexity (the end of a reply counts as a word) of the gold replies of the bundled sample's test
    dialogues by a T5 or GloVe-T5 generator, without exemplars. `encoder`: see `exemplars.enter`."""
    model, tokenizer = Generator.from_pretrained(folder), load_tokenizer(folder)
    examples = listener_turns(SAMPLE)
    way = exemplars.enter(model.settings, tokenizer, Session("cpu"), Paths(HERE), encoder)
    data = generator_data(
        examples,
        tokenizer,
        src_len=model.settings.src_len,
        tgt_len=None,
        exemplars=way.live([()] * len(examples)),
        start=model.t5.config.decoder_start_token_id,
    )
    nll = 0.0
    with torch.inference_mode():
        for numbers in plan_once(data.lengths, 64):
            batch = data.collate(numbers)
            nll += float(token_nll(model(batch), batch["labels"]).sum())
    return perplexity(nll, sum(count_words(e.response) + 1 for e in examples))
