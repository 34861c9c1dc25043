"""Sizes of the pretrained models that benchmarks build with random weights (GloVe: glove_models.SIZES).

Nothing heavy is imported.
"""

T5_SMALL = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
T5_WORDS = 32_128
#: all-MiniLM-L6-v2's
MINILM = {
    "vocab_size": 30_522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
}
#: SmolLM2-135M's
LLAMA = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
