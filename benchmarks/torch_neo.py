"""NEO's train step in PyTorch, as one would write it for speed without writing kernels: the yardstick.

Same function, parameters and optimizer as ours (benchmarks/train_step.py checks it): queries, keys
and values from one product, gate and up from one, F.rms_norm, scaled_dot_product_attention under the boolean
mask of documents and images, cross-entropy at the supervised positions only, fused AdamW.

Dimensions: as in neo_jax/model: B rows, L positions, P image tokens, D width, N heads, K key/value heads.
"""

from collections.abc import Mapping

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import nn
from torch.nn import functional as F

Batch = dict[str, torch.Tensor]


class Attention(nn.Module):
    def __init__(self, config: ConfigDict):
        super().__init__()
        self.heads, self.kv_heads, self.d = config.num_heads, config.num_kv_heads, config.head_dim
        N, K, d, D = self.heads, self.kv_heads, self.d, config.hidden_size
        self.widths = [N * d, N * d, K * d, K * d, K * d]  # q, q_hw, k, k_hw, v
        self.qkv = nn.Linear(D, sum(self.widths), bias=False)
        self.o = nn.Linear(N * d, D, bias=False)
        for side in "qk":
            for suffix, size in (("", d), ("_h", d // 2), ("_w", d // 2)):
                setattr(self, f"{side}_norm{suffix}", nn.RMSNorm(size, config.norm_eps))

    def side(self, side: str, t: torch.Tensor, hw: torch.Tensor, rotary: tuple) -> torch.Tensor:
        """Normed and rotated queries or keys [B, heads, L, 2 d] of [B, L, heads * d] T and H/W channels."""
        t, hw = t.unflatten(-1, (-1, self.d)), hw.unflatten(-1, (-1, self.d))
        h, w = hw.chunk(2, -1)
        parts = [getattr(self, f"{side}_norm{s}")(x) for s, x in (("", t), ("_h", h), ("_w", w))]
        out = []
        for x, (cos, sin) in zip(parts, rotary, strict=True):
            first, second = x.chunk(2, -1)
            out += [first * cos - second * sin, second * cos + first * sin]
        return torch.cat(out, -1).transpose(1, 2)

    def forward(self, x: torch.Tensor, rotary: tuple, mask: torch.Tensor) -> torch.Tensor:
        q, q_hw, k, k_hw, v = self.qkv(x).split(self.widths, -1)
        q, k = self.side("q", q, q_hw, rotary), self.side("k", k, k_hw, rotary)
        v = v.unflatten(-1, (-1, self.d)).transpose(1, 2)
        # The CPU's fused kernel wants values as wide as keys: with zeros added it costs less than any other.
        v = F.pad(v, (0, self.d))
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=self.d**-0.5, enable_gqa=True)
        return self.o(out[..., : self.d].transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: ConfigDict):
        super().__init__()
        D, F_ = config.hidden_size, config.mlp_size
        self.attention_norm = nn.RMSNorm(D, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(D, config.norm_eps)
        self.gate_up = nn.Linear(D, 2 * F_, bias=False)
        self.down = nn.Linear(F_, D, bias=False)

    def forward(self, x: torch.Tensor, rotary: tuple, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, mask)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Neo(nn.Module):
    """The loss sum(w * ce) / sum(w) of a batch (`tensors`)."""

    def __init__(self, config: ConfigDict):
        super().__init__()
        D, V, embed = config.hidden_size, config.vocab_size, config.embed
        self.config, self.d = config, config.head_dim
        self.patch_size, self.merge_size = embed.patch_size, embed.merge_size
        self.token_embed = nn.Embedding(V, D)
        self.patch = nn.Linear(3 * embed.patch_size**2, embed.hidden_size)
        self.merge = nn.Linear(embed.hidden_size * embed.merge_size**2, D)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(D, config.norm_eps)
        self.head = nn.Linear(D, V, bias=False)
        self.register_buffer("mean", torch.tensor(embed.pixel_mean), persistent=False)
        self.register_buffer("std", torch.tensor(embed.pixel_std), persistent=False)

    def embed_patches(self, patches: torch.Tensor, hw: torch.Tensor) -> torch.Tensor:
        """uint8 [B, P, side * side * 3] -> [B, P, D]."""
        p, m = self.patch_size, self.merge_size
        x = patches.unflatten(-1, (m, p, m, p, 3)).permute(0, 1, 2, 4, 3, 5, 6)
        x = ((x.float() / 255 - self.mean) / self.std).reshape(*patches.shape[:2], m * m, -1)
        x = F.gelu(self.patch(x))
        half = x.shape[-1] // 2
        steps = torch.arange(m)
        inner = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
        at = (hw[:, :, None] * m + inner).float()
        frequency = self.config.embed.rope_theta ** -(torch.arange(0, half, 2) / half)
        angles = torch.cat([at[..., 1:] * frequency, at[..., :1] * frequency], -1)
        first, second = x.unflatten(-1, (half, 2)).unbind(-1)
        cos, sin = angles.cos(), angles.sin()
        x = torch.stack([first * cos - second * sin, first * sin + second * cos], -1)
        return self.merge(x.flatten(2))

    def rotary(self, coords: torch.Tensor) -> tuple:
        """(cos, sin) [B, L, 1, pairs] along t, h and w."""
        c, out = self.config.coords, []
        for axis, size, theta in (
            (0, self.d, c.rope_theta),
            (1, self.d // 2, c.rope_theta_hw),
            (2, self.d // 2, c.rope_theta_hw),
        ):
            angles = coords[..., axis, None] * theta ** -(torch.arange(0, size, 2) / size)
            out.append((angles.cos()[:, :, None], angles.sin()[:, :, None]))
        return tuple(out)

    def forward(self, batch: Batch) -> torch.Tensor:
        words = self.token_embed(batch["tokens"])
        vectors = self.embed_patches(batch["patches"], batch["patch_hw"])
        index = batch["patch_index"][..., None]
        shown = vectors.gather(1, index.clamp(min=0).expand(-1, -1, vectors.shape[-1]))
        x = torch.where(index >= 0, shown, words)
        segments, images = batch["segment_ids"], batch["image_ids"]
        places = torch.arange(segments.shape[1])
        same = segments[:, :, None] == segments[:, None]
        image = (images[:, :, None] == images[:, None]) & (images > 0)[:, None]
        mask = (same & ((places <= places[:, None]) | image))[:, None]
        rotary = self.rotary(batch["coords"])
        for block in self.blocks:
            x = block(x, rotary, mask)
        hidden = self.norm(x).flatten(0, 1)[batch["supervised"]]
        ce = F.cross_entropy(self.head(hidden), batch["targets"], reduction="none")
        return (ce * batch["weights"]).sum() / batch["weights"].sum()


def tensors(batch: Mapping[str, np.ndarray]) -> Batch:
    """The fields that `Neo` reads; targets and weights are those of the supervised positions."""
    names = ("tokens", "patches", "patch_hw", "patch_index", "segment_ids", "image_ids", "coords")
    fields = {name: torch.tensor(batch[name]) for name in names}
    fields["tokens"], fields["patch_index"] = fields["tokens"].long(), fields["patch_index"].long()
    supervised = np.flatnonzero(batch["loss_weights"].ravel() > 0)
    return fields | {
        "supervised": torch.tensor(supervised),
        "targets": torch.tensor(batch["targets"].ravel()[supervised]).long(),
        "weights": torch.tensor(batch["loss_weights"].ravel()[supervised]),
    }


@torch.no_grad()
def load(model: Neo, params: Mapping[str, np.ndarray]) -> None:
    """Copies our parameters, by the names of neo_jax."""

    def matrix(weight: np.ndarray, num_inputs: int = 1) -> torch.Tensor:
        """[in..., out...] -> [out, in]."""
        return torch.tensor(weight.reshape(int(np.prod(weight.shape[:num_inputs])), -1).T.copy())

    model.token_embed.weight.copy_(torch.tensor(params["token_embed"]))
    model.head.weight.copy_(matrix(params["head"]))
    model.norm.weight.copy_(torch.tensor(params["norm/weight"]))
    for name, linear in (("patch", model.patch), ("merge", model.merge)):
        linear.weight.copy_(matrix(params[f"patch_embed/{name}/weight"]))
        linear.bias.copy_(torch.tensor(params[f"patch_embed/{name}/bias"]))
    stacks = [name for name in ("pre_buffer", "layers") if f"{name}/mlp_norm/weight" in params]
    places = [(name, i) for name in stacks for i in range(len(params[f"{name}/mlp_norm/weight"]))]
    for block, (stack, i) in zip(model.blocks, places, strict=True):

        def of(path: str, stack: str = stack, i: int = i) -> np.ndarray:
            return params[f"{stack}/{path}/weight"][i]

        qkv = [matrix(of(f"attention/qkv/{name}")) for name in ("q", "q_hw", "k", "k_hw", "v")]
        block.attention.qkv.weight.copy_(torch.cat(qkv))
        block.attention.o.weight.copy_(matrix(of("attention/o"), 2))
        block.gate_up.weight.copy_(torch.cat([matrix(of("mlp/gate")), matrix(of("mlp/up"))]))
        block.down.weight.copy_(matrix(of("mlp/down")))
        for name in ("attention_norm", "mlp_norm"):
            getattr(block, name).weight.copy_(torch.tensor(of(name)))
        for name in (f"{side}_norm{suffix}" for side in "qk" for suffix in ("", "_h", "_w")):
            getattr(block.attention, name).weight.copy_(torch.tensor(of(f"attention/qkv/{name}")))


class Trainer:
    """One train step per call: loss, gradients, clipping, AdamW."""

    def __init__(self, model: Neo, stage: ConfigDict, compiled: bool):
        self.model, self.clip_norm = model, stage.clip_norm
        self.loss = torch.compile(model) if compiled else model
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
            lr=stage.peak_lr,
            betas=(stage.b1, stage.b2),
            eps=stage.adam_eps,
            weight_decay=stage.weight_decay,
            fused=True,
        )

    def step(self, batch: Batch) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        return loss.item()
