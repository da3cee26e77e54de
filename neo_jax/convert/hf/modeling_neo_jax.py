"""Native vision-language models exported by neo_jax, in PyTorch for Hugging Face transformers.

One file for every family: `config.neo_jax["model"]` chooses the kind of each part (patch embedding, rotary
coordinates, mask, routing, norms, ...), and `config.neo_jax["tensors"]` says under which name the checkpoint
keeps each weight, so that the safetensors carry the family's own key names.

Inputs are a token table (made by NeoJaxProcessor): besides `input_ids` and `attention_mask`, the `kinds`
(1 text, 2 patch, 4 slot, 5 separator), `image_ids` and `coords` of every position, and the pixels of all
image tokens in order. Text alone needs only `input_ids`.

Dimensions: B rows, L positions, S keys, N query heads, K key/value heads, d channels, P image tokens of m * m
patches of p x p pixels, C channels before the D of the residual stream.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_neo_jax import NeoJaxConfig

PADDING, TEXT, PATCH, SLOT = 0, 1, 2, 4
CLASS_SLOT = 0  # number of the class vector among EVE's slots
PEL_HEADS, PEL_EPS = 8, 1e-5  # of EVE's patch embedding layer
UNSHUFFLE_EPS = 1e-5
PER_TOKEN = ("kinds", "image_ids", "coords")
Table = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # input_ids, kinds, image_ids [B, L]


class Node(nn.Module):
    """A place in the tree of checkpoint names."""


class Weights:
    """The weights below one path of neo_jax's names, such as "layers/mlp/"; of one layer of a stack.

    A weight of a linear layer comes as (out, in), of a convolution as (out, in, height, width).
    """

    def __init__(self, model: "NeoJaxForConditionalGeneration", path: str = "", layer: int | None = None):
        self.model, self.path, self.layer = model, path, layer

    def at(self, name: str) -> "Weights":
        return Weights(self.model, f"{self.path}{name}/", self.layer)

    def has(self, name: str) -> bool:
        return self.path + name in self.model.tensors

    def get(self, name: str) -> torch.Tensor:
        entry = self.model.tensors[self.path + name]
        tensor = self.model.get_parameter(checkpoint_name(entry, self.layer))
        return unfused(tensor, entry, self.model.sizes) if "fused" in entry else tensor

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.get("bias") if self.has("bias") else None
        return F.linear(x, self.get("weight"), bias)

    def norm(self, x: torch.Tensor, eps: float) -> torch.Tensor:
        weight = self.get("weight")
        if self.has("bias"):
            return F.layer_norm(x, weight.shape, weight, self.get("bias"), eps)
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        return x32.to(x.dtype) * weight

    def routed(self, visual: torch.Tensor, function: Callable[["Weights"], torch.Tensor]) -> torch.Tensor:
        """function(weights), visual tokens [B, L] by their own weights where there are some."""
        path = self.path + "visual/"
        if not any(name.startswith(path) for name in self.model.tensors):
            return function(self)
        text = function(self.at("text"))
        if not visual.any():
            return text
        return torch.where(visual[..., None], function(self.at("visual")), text)


def checkpoint_name(entry: dict, layer: int | None) -> str:
    return entry["name"] if layer is None else entry["name"].format(layer + entry["first"])


def unfused(tensor: torch.Tensor, entry: dict, sizes: dict) -> torch.Tensor:
    """The share that one weight has in a fused checkpoint tensor."""
    if entry["fused"] == "below":  # equal shares below each other
        return tensor.chunk(entry["parts"])[entry["part"]]
    # grouped_qkv: per key/value head the rows of its queries, then of its key, then of its value.
    grouped = tensor.unflatten(0, (sizes["num_kv_heads"], -1, sizes["head_dim"]))
    return (grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:])[entry["part"]].flatten(0, 2)


class NeoJaxForConditionalGeneration(PreTrainedModel, GenerationMixin):
    config_class = NeoJaxConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: NeoJaxConfig):
        super().__init__(config)
        if config.neo_jax is None:
            raise ValueError("config.neo_jax is missing: this is no folder that neo_jax exported")
        self.sizes, self.tensors = config.neo_jax["model"], config.neo_jax["tensors"]
        pre_buffer = self.sizes["pre_buffer"]
        depths = {"pre_buffer": pre_buffer, "layers": self.sizes["num_layers"] - pre_buffer}
        self.layers_in_order = [(stack, layer) for stack, depth in depths.items() for layer in range(depth)]
        for path, entry in self.tensors.items():
            stack = path.partition("/")[0]
            for layer in range(depths[stack]) if stack in depths else [None]:
                self._plant(checkpoint_name(entry, layer), entry["shape"])
        self.sources, self.parts = rotary_layout(self.sizes)
        self.post_init()

    def _plant(self, name: str, shape: list[int]) -> None:
        """Makes the parameter `name`, such as "model.layers.0.norm.weight", and the nodes above it."""
        *path, leaf = name.split(".")
        node: nn.Module = self
        for part in path:
            if part not in node._modules:
                node.add_module(part, Node())
            node = node._modules[part]
        if leaf not in node._parameters:  # the parts of a fused tensor share it
            node.register_parameter(leaf, nn.Parameter(torch.empty(shape)))

    def _init_weights(self, module: nn.Module) -> None:
        for name, parameter in module._parameters.items():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=self.sizes["init_std"])

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        kinds: torch.Tensor | None = None,
        image_ids: torch.Tensor | None = None,
        coords: torch.Tensor | None = None,
        patches: torch.Tensor | None = None,
        patch_hw: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cache: DynamicCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: object,
    ) -> CausalLMOutputWithPast:
        """Next-token logits [B, L, V].

        Args:
            input_ids: [B, L]; slot positions hold the slot's number.
            attention_mask: [B, S], 0 for padding (on either side), over cached and new positions.
            kinds, image_ids: [B, L]; coords: [B, L, 3] float32 (t, h, w). Text without them.
            patches: [P, side * side * 3] uint8 squares of all image tokens, in order; patch_hw: [P, 2].
            labels: [B, L], not shifted, -100 where nothing is predicted; gives the mean cross-entropy.
        """
        B, L = input_ids.shape
        past = cache.get_seq_length() if cache is not None else 0
        if attention_mask is None:
            attention_mask = torch.ones(B, past + L, dtype=torch.long, device=input_ids.device)
        if kinds is None or image_ids is None:
            kinds, image_ids = torch.full_like(input_ids, TEXT), torch.zeros_like(input_ids)
        if coords is None:
            coords = text_coords(attention_mask, self.sizes)[:, past:]
        if use_cache and cache is None:
            cache = DynamicCache()

        visual = (kinds == PATCH) | (kinds == SLOT)
        x = self._embed((input_ids, kinds, image_ids), visual, patches, patch_hw)
        mask = attention_bias(self.sizes, attention_mask, image_ids, past)[:, None]
        table = rotary_table(self.parts, coords)
        hidden_states = [x]
        for index in range(self.sizes["num_layers"]):
            x = self._layer(index, x, table, mask, visual, cache)
            hidden_states.append(x)
        x = Weights(self).at("norm").norm(x, self.sizes["norm_eps"])
        head = "token_embed" if self.sizes["tie_embeddings"] else "head"
        logits = F.linear(x, Weights(self).get(head))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=cache,
            hidden_states=(*hidden_states[:-1], x) if output_hidden_states else None,
        )

    def _embed(
        self,
        table: Table,
        visual: torch.Tensor,
        patches: torch.Tensor | None,
        patch_hw: torch.Tensor | None,
    ) -> torch.Tensor:
        """Words [B, L, D], replaced at visual positions by their patch or slot, or that added to them."""
        words = F.embedding(table[0], Weights(self).get("token_embed"))
        if not visual.any():
            return words
        embed = EMBEDS[self.sizes["embed"]["kind"]]
        vectors = embed(self.sizes["embed"], Weights(self).at("patch_embed"), table, patches, patch_hw)
        vectors = vectors.to(words.dtype)
        if self.sizes["embed"]["merge"] == "add":
            vectors = vectors + words[visual]
        return words.masked_scatter(visual[..., None], vectors)

    def _layer(
        self,
        index: int,
        x: torch.Tensor,
        table: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        visual: torch.Tensor,
        cache: DynamicCache | None,
    ) -> torch.Tensor:
        stack, layer = self.layers_in_order[index]
        sizes, weights = self.sizes, Weights(self, f"{stack}/", layer)
        d, eps = sizes["head_dim"], sizes["norm_eps"]

        def qkv(weights: Weights) -> torch.Tensor:
            """Queries, keys and values beside each other: [B, L, (N + K) * d_qk + K * d]."""
            q, k = (self._query_or_key(weights, side, normed) for side in "qk")
            return torch.cat([q.flatten(2), k.flatten(2), weights.at("v").linear(normed)], -1)

        normed = weights.at("attention_norm").routed(visual, lambda w: w.norm(x, eps))
        widths = [
            heads * size
            for heads, size in (
                (sizes["num_heads"], self.qk_size),
                (sizes["num_kv_heads"], self.qk_size),
                (sizes["num_kv_heads"], d),
            )
        ]
        q, k, v = weights.at("attention").at("qkv").routed(visual, qkv).split(widths, -1)
        q, k = (
            rotate(y.unflatten(-1, (-1, self.qk_size)), table, self.parts).transpose(1, 2) for y in (q, k)
        )
        v = v.unflatten(-1, (-1, d)).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, index)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=d**-0.5)
        attended = attended.transpose(1, 2).flatten(2)
        x = x + weights.at("attention").at("o").routed(visual, lambda w: w.linear(attended))
        normed = weights.at("mlp_norm").routed(visual, lambda w: w.norm(x, eps))
        return x + weights.at("mlp").routed(visual, lambda w: feed_forward(sizes["mlp"], w, normed))

    @property
    def qk_size(self) -> int:
        """Channels of a query or key head."""
        return sum(size for _, segments in self.sources for _, size in segments)

    def _query_or_key(self, weights: Weights, side: str, x: torch.Tensor) -> torch.Tensor:
        """[B, L, heads, d_qk], normed, not rotated."""
        channels = []
        for suffix, segments in self.sources:
            y = weights.at(side + suffix).linear(x).unflatten(-1, (-1, self.sizes["head_dim"]))
            if self.sizes["qk_norm"] == "none":
                channels.append(y)
                continue
            pieces = y.split([size for _, size in segments], -1)
            for (name, _), piece in zip(segments, pieces, strict=True):
                channels.append(weights.at(f"{side}_norm{name}").norm(piece, self.sizes["norm_eps"]))
        return torch.cat(channels, -1)

    # Generation

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        cache: DynamicCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """With a filled cache only the new positions go in, and no pixels."""
        inputs = {"input_ids": input_ids, "cache": cache} | kwargs
        if cache is not None and cache.get_seq_length():
            new = next_sequence_length or input_ids.shape[1] - cache.get_seq_length()
            inputs["input_ids"] = input_ids[:, -new:]
            for name in PER_TOKEN:
                if kwargs.get(name) is not None:
                    inputs[name] = kwargs[name][:, -new:]
            inputs["patches"] = inputs["patch_hw"] = None
        return inputs

    def _update_model_kwargs_for_generation(
        self,
        outputs: Any,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        """A generated token is text at the coordinates that follow the row's last ones."""
        kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        for _ in range(num_new_tokens if kwargs.get("kinds") is not None else 0):
            last, extra = kwargs["coords"][:, -1], kwargs["kinds"].new_ones(len(kwargs["kinds"]), 1)
            kwargs["coords"] = torch.cat([kwargs["coords"], next_coords(last, self.sizes)[:, None]], 1)
            kwargs["kinds"] = torch.cat([kwargs["kinds"], TEXT * extra], 1)
            kwargs["image_ids"] = torch.cat([kwargs["image_ids"], 0 * extra], 1)
        return kwargs


# Positions


def rotary_layout(sizes: dict) -> tuple[list, list]:
    """Where the channels of a query or key head come from, and which coordinate turns which of them.

    Returns (sources, parts): sources [(suffix of the projection, [(suffix of the norm, channels), ...])],
    parts [(channels, theta, [(coordinate, pairs), ...])].
    """
    coords, d = sizes["coords"], sizes["head_dim"]
    theta, theta_hw, half, quarter = coords["rope_theta"], coords["rope_theta_hw"], d // 2, d // 4

    def follow(axis: int, size: int, theta: float) -> tuple:
        return size, theta, [(axis, size // 2)]

    if coords["kind"] == "thw":
        sources = [("", [("", d)]), ("_hw", [("_h", half), ("_w", half)])]
        return sources, [follow(0, d, theta), follow(1, half, theta_hw), follow(2, half, theta_hw)]
    if coords["kind"] == "thw_split":
        parts = [follow(0, half, theta), follow(1, quarter, theta_hw), follow(2, quarter, theta_hw)]
        return [("", [("", half), ("_hw", half)])], parts
    if coords["kind"] == "mrope":
        return [("", [("", d)])], [(d, theta, list(enumerate(coords["sections"])))]
    return [("", [("", d)])], [follow(0, round(d * coords["rotary_fraction"]), theta)]


def rotary_table(parts: list, coords: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B, L, 1, pairs] of every pair of every part, float32."""
    angles = []
    for size, theta, sections in parts:
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device=coords.device) / size
        frequencies = (theta**-exponents).split([pairs for _, pairs in sections])
        angles += [
            coords[..., axis, None].float() * frequency
            for (axis, _), frequency in zip(sections, frequencies, strict=True)
        ]
    joined = torch.cat(angles, -1)[:, :, None]
    return joined.cos(), joined.sin()


def rotate(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], parts: list) -> torch.Tensor:
    """Rotates pairs (i, i + size / 2) inside each part of x [B, L, heads, d_qk]; what follows them stays."""
    sizes = [size for size, _, _ in parts]
    *pieces, rest = x.split([*sizes, x.shape[-1] - sum(sizes)], -1)
    halves = [size // 2 for size in sizes]
    cosines, sines = (y.to(x.dtype).split(halves, -1) for y in table)
    out = []
    for piece, cos, sin in zip(pieces, cosines, sines, strict=True):
        first, second = piece.chunk(2, -1)
        out += [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*out, rest], -1)


def text_coords(attention_mask: torch.Tensor, sizes: dict) -> torch.Tensor:
    """Coordinates [B, S, 3] of rows of text alone."""
    t = (attention_mask.cumsum(-1) - 1).clamp(min=0).float()
    other = t if sizes["coords"]["kind"] == "mrope" else torch.zeros_like(t)
    return torch.stack([t, other, other], -1)


def next_coords(last: torch.Tensor, sizes: dict) -> torch.Tensor:
    """Coordinates [B, 3] of the text token that follows a position."""
    if sizes["coords"]["kind"] == "mrope":
        return (last.max(-1, keepdim=True).values + 1).expand(-1, 3)
    t = last[:, 0].ceil() + 1
    return torch.stack([t, torch.zeros_like(t), torch.zeros_like(t)], -1)


# Attention and feed-forward network


def attention_bias(
    sizes: dict, attention_mask: torch.Tensor, image_ids: torch.Tensor, past: int
) -> torch.Tensor:
    """bool [B, L, S]: which keys each of the new positions sees."""
    B, S = attention_mask.shape
    keys = torch.arange(S, device=attention_mask.device)
    queries = keys[past:, None]
    allowed = (keys <= queries).expand(B, -1, -1)
    if past == 0 and sizes["mask"] == "image_bidirectional":
        allowed = allowed | ((image_ids[:, :, None] == image_ids[:, None]) & (image_ids > 0)[:, None])
    if past == 0 and sizes["mask"] == "prefix":
        allowed = torch.ones_like(allowed)  # a prompt sees itself both ways
    if sizes["sliding_window"]:
        allowed = allowed & (keys >= queries - sizes["sliding_window"])
    real = attention_mask.bool()
    # A padded query sees itself, so that its softmax has something to sum.
    return (allowed & real[:, None]) | (keys == queries)


def feed_forward(kind: str, weights: Weights, x: torch.Tensor) -> torch.Tensor:
    if kind == "relu2":
        return weights.at("down").linear(F.relu(weights.at("up").linear(x)).square())
    return weights.at("down").linear(F.silu(weights.at("gate").linear(x)) * weights.at("up").linear(x))


# Patch embeddings: (config of the embedding, weights, (input_ids, kinds, image_ids), patches [P, pixels]
# uint8, patch_hw [P, 2]) -> the vectors of all visual positions of the batch, in order


def pixels(embed: dict, patches: torch.Tensor) -> torch.Tensor:
    """Normalised squares of p x p pixels: [P, m * m, 3, p, p], the m * m patches of a token row by row."""
    p, m = embed["patch_size"], embed["merge_size"]
    mean, std = (torch.tensor(embed[name], device=patches.device) for name in ("pixel_mean", "pixel_std"))
    x = (patches.reshape(-1, m, p, m, p, 3).float() / 255 - mean) / std
    return x.permute(0, 1, 3, 5, 2, 4).flatten(1, 2)


def inner_hw(embed: dict, patch_hw: torch.Tensor) -> torch.Tensor:
    """Row and column of the m * m patches of each image token, in patches: [P, m * m, 2]."""
    steps = torch.arange(embed["merge_size"], device=patch_hw.device)
    inner = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
    return patch_hw[:, None] * embed["merge_size"] + inner


def with_slots(weights: Weights, table: Table, x: torch.Tensor) -> torch.Tensor:
    """Puts learned vectors between the patches x [P, D]: [visual positions, D]."""
    input_ids, kinds, _ = table
    slots = kinds == SLOT
    if not slots.any():
        return x
    visual = slots | (kinds == PATCH)
    out = x.new_empty(int(visual.sum()), x.shape[-1])
    out[kinds[visual] == PATCH] = x
    out[kinds[visual] == SLOT] = slot_vectors(weights.at("slots")).to(x.dtype)[input_ids[slots]]
    return out


def slot_vectors(weights: Weights) -> torch.Tensor:
    """All learned vectors [num, D]; some families keep each in a tensor of its own."""
    if weights.has("vectors"):
        return weights.get("vectors")
    each = weights.at("vectors")
    numbers = itertools.takewhile(lambda n: each.has(str(n)), itertools.count())
    return torch.stack([each.get(str(n)) for n in numbers])


def linear_patch(
    embed: dict, weights: Weights, table: Table, patches: torch.Tensor, patch_hw: torch.Tensor
) -> torch.Tensor:
    weight = weights.at("project").get("weight")
    x = pixels(embed, patches).flatten(1).to(weight.dtype)  # one patch per token: (rgb, y, x)
    return with_slots(weights, table, weights.at("project").linear(x))


def convolve(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """A convolution with stride = kernel on squares of just one kernel: [..., C, k, k] -> [..., out]."""
    weight = weights.get("weight")
    bias = weights.get("bias") if weights.has("bias") else None
    return F.linear(x.flatten(-3).to(weight.dtype), weight.flatten(1), bias)


def conv_gelu_conv(
    embed: dict, weights: Weights, table: Table, patches: torch.Tensor, patch_hw: torch.Tensor
) -> torch.Tensor:
    m = embed["merge_size"]
    x = F.gelu(convolve(weights.at("patch"), pixels(embed, patches)))  # [P, m * m, C]
    if embed["rotate"]:
        half = x.shape[-1] // 2
        exponents = torch.arange(0, half, 2, dtype=torch.float32, device=x.device) / half
        hw = inner_hw(embed, patch_hw).float()
        angles = torch.cat([hw[..., 1:], hw[..., :1]], -1)[..., None] * embed["rope_theta"] ** -exponents
        angles = angles.flatten(-2)  # the column turns the first half of the channels, the row the second
        first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = angles.cos(), angles.sin()
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1)
        x = turned.flatten(-2).to(x.dtype)
    squares = x.transpose(1, 2).unflatten(-1, (m, m))  # [P, C, m, m]
    return with_slots(weights, table, convolve(weights.at("merge"), squares))


def unshuffle_mlp(
    embed: dict, weights: Weights, table: Table, patches: torch.Tensor, patch_hw: torch.Tensor
) -> torch.Tensor:
    x = convolve(weights.at("patch"), pixels(embed, patches))
    hw = inner_hw(embed, patch_hw)
    positions = weights.get("positions").flatten(0, -2)
    if len(positions) > (embed["tile_size"] // embed["patch_size"]) ** 2:
        positions = positions[1:]  # the first belongs to a class token that is never used
    x = x + positions[hw[..., 0] * (embed["tile_size"] // embed["patch_size"]) + hw[..., 1]]
    x = x.flatten(1)
    if weights.at("norm").has("weight"):  # HoVLE has none
        x = weights.at("norm").norm(x, UNSHUFFLE_EPS)
    return weights.at("out").linear(F.gelu(weights.at("up").linear(x)))


def local_attention(
    embed: dict, weights: Weights, table: Table, patches: torch.Tensor, patch_hw: torch.Tensor
) -> torch.Tensor:
    input_ids, kinds, image_ids = table
    x = convolve(weights.at("patch"), pixels(embed, patches))  # [P, m * m, C]
    x = pool(weights.at("local"), x.mean(1, keepdim=True), x)[:, 0]
    row_ids = torch.arange(len(kinds), device=kinds.device)[:, None].expand_as(kinds)
    image_of = torch.stack([row_ids, image_ids], -1)  # [B, L, 2]
    of_patch = image_of[kinds == PATCH]
    class_vector, row_vector = (weights.get(name).to(x.dtype) for name in ("class_vector", "row_vector"))
    visual = (kinds == PATCH) | (kinds == SLOT)
    out = x.new_empty(int(visual.sum()), x.shape[-1])
    out[kinds[visual] == PATCH] = x
    slots = []
    for number, image in zip(input_ids[kinds == SLOT], image_of[kinds == SLOT], strict=True):
        if number != CLASS_SLOT:
            slots.append(row_vector)
            continue
        own = x[(of_patch == image).all(-1)]
        slots.append(pool(weights.at("over_image"), class_vector[None, None], own[None])[0, 0])
    out[kinds[visual] == SLOT] = torch.stack(slots)
    return weights.at("out").linear(F.gelu(weights.at("up").linear(out)))


def pool(weights: Weights, query: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """EVE's attention of one query [n, 1, C] over a group [n, k, C]; scores scaled by C^-1/2."""
    normed = weights.at("kv_norm").norm(group, PEL_EPS)
    q = weights.at("q").linear(weights.at("q_norm").norm(query, PEL_EPS))
    k, v = weights.at("k").linear(normed), weights.at("v").linear(normed)
    q, k, v = (y.unflatten(-1, (PEL_HEADS, -1)).transpose(1, 2) for y in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, scale=query.shape[-1] ** -0.5)
    return query + weights.at("o").linear(attended.transpose(1, 2).flatten(2))


EMBEDS = {
    "linear_patch": linear_patch,
    "conv_gelu_conv": conv_gelu_conv,
    "unshuffle_mlp": unshuffle_mlp,
    "local_attention": local_attention,
}
