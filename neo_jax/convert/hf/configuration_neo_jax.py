"""Configuration of models exported by neo_jax."""

from typing import Any

from transformers import PreTrainedConfig


class NeoJaxConfig(PreTrainedConfig):
    """The family's own fields stay as they are; `neo_jax` holds what NeoJaxForConditionalGeneration reads.

    neo_jax["model"]: neo_jax's config of the model. neo_jax["tensors"]: its weights -> checkpoint names.
    neo_jax["data"]: how images and text become tokens, for NeoJaxProcessor.
    """

    model_type = "neo_jax"
    neo_jax: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.neo_jax is not None:
            model = self.neo_jax["model"]
            # What caches and `generate` ask for.
            self.num_hidden_layers = model["num_layers"]
            self.hidden_size = model["hidden_size"]
            self.num_attention_heads = model["num_heads"]
            self.num_key_value_heads = model["num_kv_heads"]
            self.head_dim = model["head_dim"]
            self.vocab_size = model["vocab_size"]
