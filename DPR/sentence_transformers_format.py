"""What sentence-transformers needs beside a saved DPR encoder, so that it loads the folder as it is.

It reads a BERT and a pooling; a DPR encoder holds the same BERT under other names. So `0_BERT` has a config
of its own, the same weights (a second name of one file, where the file system has hard links) and the names
to read them by. That package is not needed here.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers import BertConfig

import storage

MODULES = [
    {"idx": 0, "name": "0", "path": "0_BERT", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
#: what says which model it is, and where it came from
NOT_COPIED = {"model_type", "architectures", "dtype", "_name_or_path", "transformers_version"}
#: side -> how the names of its BERT's weights begin
PREFIXES = {"question": r"^question_encoder\.bert_model\.", "context": r"^ctx_encoder\.bert_model\."}


def write(folder: Path, side: str, encoder: Any, max_length: int) -> None:
    """Beside what `save_pretrained` has written of one encoder. `max_length`: tokens that it reads of a text.

    Nothing for an encoder with a projection, which no pooling stands for.
    """
    if encoder.config.projection_dim:
        return
    bert = folder / "0_BERT"
    bert.mkdir(parents=True, exist_ok=True)
    mine, stored = BertConfig().to_dict(), encoder.config.to_dict()
    config = BertConfig(**{k: stored[k] for k in mine if k in stored and k not in NOT_COPIED})
    config.architectures = ["BertModel"]
    config.save_pretrained(str(bert))
    (bert / "model.safetensors").unlink(missing_ok=True)
    storage.link_or_copy(folder / "model.safetensors", bert / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, bert / name)
    words = storage.read_json(bert / "tokenizer_config.json")
    # of too long a dialogue the latest words count, of too long a passage the first
    words["truncation_side"] = "left" if side == "question" else "right"
    storage.write_json(bert / "tokenizer_config.json", words)
    how = {"max_seq_length": max_length, "do_lower_case": False}
    names = {"key_mapping": {PREFIXES[side]: ""}, "add_pooling_layer": False}
    storage.write_json(bert / "sentence_bert_config.json", {**how, "model_args": names})
    mean = getattr(encoder.config, "pooling", "cls") == "mean"
    pooling = {
        "word_embedding_dimension": encoder.config.hidden_size,
        "pooling_mode_cls_token": not mean,
        "pooling_mode_mean_tokens": mean,
    }
    (folder / "1_Pooling").mkdir(exist_ok=True)
    storage.write_json(folder / "1_Pooling" / "config.json", pooling)
    storage.write_json(folder / "modules.json", MODULES)
    storage.write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "dot"})


def length_of(folder: Path) -> int | None:
    """The tokens that a saved encoder was trained to read of a text, as `write` has noted; None: unknown."""
    return storage.read_if_there(folder / "0_BERT" / "sentence_bert_config.json").get("max_seq_length")
