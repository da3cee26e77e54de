"""Plain language models that native models grow from: each function fills a model config's backbone.

    from configs import backbones
    backbones.qwen3_1p7b(c.model)

They set width, depth, heads, feed-forward network, norms, biases, vocabulary and rotary base, with causal
attention over one-dimensional positions; a family then changes what it changes. Numbers are those of the
published config.json files of the models, checked against their published parameter counts in
tests/neo_jax/test_configs.py.
`full_size` sets what has nothing to do with the model.
"""

from ml_collections import ConfigDict


def qwen3_1p7b(m: ConfigDict) -> None:
    """Qwen3-1.7B and -Base: 1.72 B parameters with tied embeddings; a norm on every query and key head."""
    _fill(m, layers=28, hidden=2048, mlp=6144, heads=16, kv_heads=8, vocab=151936)
    m.norm_eps, m.qk_norm, m.coords.rope_theta = 1e-6, "rms", 1e6
    m.tie_embeddings = True


def qwen3_8b(m: ConfigDict) -> None:
    """Qwen3-8B and -Base: 8.19 B parameters."""
    _fill(m, layers=36, hidden=4096, mlp=12288, heads=32, kv_heads=8, vocab=151936)
    m.norm_eps, m.qk_norm, m.coords.rope_theta = 1e-6, "rms", 1e6


def qwen2p5_7b(m: ConfigDict) -> None:
    """Qwen2.5-7B and -Instruct: 7.62 B parameters; queries, keys and values have biases."""
    _fill(m, layers=28, hidden=3584, mlp=18944, heads=28, kv_heads=4, vocab=152064)
    m.norm_eps, m.attention_bias, m.coords.rope_theta = 1e-6, ("q", "k", "v"), 1e6


def mistral_7b(m: ConfigDict) -> None:
    """Mistral-7B-v0.1: 7.24 B parameters; a query sees 4096 keys, itself among them."""
    _fill(m, layers=32, hidden=4096, mlp=14336, heads=32, kv_heads=8, vocab=32000)
    m.norm_eps, m.coords.rope_theta, m.sliding_window = 1e-5, 1e4, 4095


def llama2_7b(m: ConfigDict) -> None:
    """Llama-2-7B, and Vicuna-7B-v1.5, which has its shape: 6.74 B parameters."""
    _fill(m, layers=32, hidden=4096, mlp=11008, heads=32, kv_heads=32, vocab=32000)
    m.norm_eps, m.coords.rope_theta = 1e-5, 1e4


def internlm2_1p8b(m: ConfigDict) -> None:
    """InternLM2-1.8B and -chat: 1.89 B parameters. One matrix holds q, k and v in its files (convert/)."""
    _fill(m, layers=24, hidden=2048, mlp=8192, heads=16, kv_heads=8, vocab=92544)
    m.norm_eps, m.coords.rope_theta = 1e-5, 1e6


def persimmon_8b(m: ConfigDict) -> None:
    """Persimmon-8B: 9.4 B parameters; LayerNorms, biases, ReLU^2, half of a head's channels rotate."""
    _fill(m, layers=36, hidden=4096, mlp=16384, heads=64, kv_heads=64, vocab=262144)
    m.head_dim = 64
    m.norm, m.norm_eps, m.qk_norm = "layer", 1e-5, "layer"
    m.attention_bias, m.mlp, m.mlp_bias = ("q", "k", "v", "o"), "relu2", True
    m.coords.rope_theta, m.coords.rotary_fraction = 25000.0, 0.5


def full_size(c: ConfigDict, path: str, devices: int) -> None:
    """What an experiment on a whole backbone needs: data of their own, bfloat16, sharded weights."""
    c.data.path, c.data.recipe, c.data.augment = path, "", False
    c.eval.splits = ()
    c.model.dtype, c.model.remat_policy = "bfloat16", "full"
    c.mesh.num_devices = c.mesh.fsdp = devices


def _fill(
    m: ConfigDict, *, layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, vocab: int
) -> None:
    m.num_layers, m.pre_buffer, m.hidden_size, m.mlp_size = layers, 0, hidden, mlp
    m.num_heads, m.num_kv_heads, m.head_dim, m.vocab_size = heads, kv_heads, 128, vocab
    m.qk_norm, m.mask, m.coords.kind = "none", "causal", "1d"
