"""The small language model that is trained from nothing: a Llama, in sizes that a laptop trains in minutes."""

from transformers import LlamaConfig, LlamaForCausalLM


def build_model(vocabulary_size: int, *, length: int, hidden_size: int, layers: int, heads: int) -> LlamaForCausalLM:
    """Returns a randomly initialized Llama with an output head of its own.

    Args:
        vocabulary_size: Of the tokenizer.
        length: Longest window in tokens.
        hidden_size: Width; the feed-forward layers are 8/3 as wide, rounded up to a multiple of 8.
        layers: Decoder layers.
        heads: Attention heads of each.
    """
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=-(-hidden_size * 8 // 24) * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        use_cache=False,
    )
    return LlamaForCausalLM(config)
