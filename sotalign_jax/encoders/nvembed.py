"""NV-Embed in PyTorch: a Mistral that attends in both directions, and pooling by latent attention.

Written from the paper and the published names of weights, because the code that comes with the
model is of transformers 4 and does not import with transformers 5.

References:
    C. Lee et al., "NV-Embed: improved techniques for training LLMs as generalist embedding models",
    arXiv 2405.17428, section 3.
"""

from __future__ import annotations

from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from transformers import (  # pyright: ignore[reportMissingImports]
    MistralConfig,
    MistralModel,
    PreTrainedConfig,
    PreTrainedModel,
)

__all__ = ["NVEmbed", "NVEmbedConfig", "attend_both_ways"]


class NVEmbedConfig(PreTrainedConfig):
    """The published configuration, of which the parts that make the network are read."""

    model_type = "nvembed"

    def __init__(
        self,
        text_config: Any = None,
        latent_attention_config: dict[str, Any] | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        known = dict(text_config or {})
        for name in ("model_type", "auto_map", "architectures", "_name_or_path"):
            known.pop(name, None)
        # Both directions see all of the text.
        self.text_config = {**known, "sliding_window": None}
        self.latent_attention_config = dict(latent_attention_config or {})

    @property
    def mistral(self) -> MistralConfig:
        """Of the language model."""
        return MistralConfig(**self.text_config)

    @property
    def latent(self) -> dict[str, int]:
        """Of the pooling: latents, width of a latent, heads and width of a head."""
        published = {
            "num_latents_value": 512,
            "latent_dim": 4096,
            "num_cross_heads": 8,
            "cross_dim_head": 4096,
        }
        return {k: int(self.latent_attention_config.get(k, v)) for k, v in published.items()}

    @property
    def num_hidden_layers(self) -> int:
        return int(self.mistral.num_hidden_layers or 0)

    @property
    def max_position_embeddings(self) -> int:
        return int(self.mistral.max_position_embeddings or 0)


def attend_both_ways(model: Any) -> Any:
    """Has a decoder's every token see the whole text."""
    model.config.is_causal = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    return model


class _Attention(torch.nn.Module):
    """Each token asks the latents, which are keys and values."""

    def __init__(self, dim: int, heads: int, width: int):
        super().__init__()
        self.heads = heads
        self.to_q = torch.nn.Linear(dim, heads * width, bias=False)
        self.to_kv = torch.nn.Linear(dim, 2 * heads * width, bias=False)
        self.to_out = torch.nn.Linear(heads * width, dim, bias=False)

    def forward(self, tokens, latents):
        def split(x):
            return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

        query = split(self.to_q(tokens))
        key, value = (split(x) for x in self.to_kv(latents).chunk(2, dim=-1))
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        weights = scores.to(torch.float32).softmax(-1).to(value.dtype)
        return self.to_out((weights @ value).transpose(-3, -2).flatten(-2))


class _Gated(torch.nn.Module):
    def forward(self, x):
        values, gates = x.chunk(2, dim=-1)
        return values * torch.nn.functional.gelu(gates)


class _FeedForward(torch.nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(dim, 8 * dim), _Gated(), torch.nn.Linear(4 * dim, dim)
        )

    def forward(self, x):
        return self.net(x)


class _Normed(torch.nn.Module):
    """Norms before a layer, by the published names."""

    def __init__(self, dim: int, fn: torch.nn.Module, *, context: bool = False):
        super().__init__()
        self.fn = fn
        self.norm = torch.nn.LayerNorm(dim)
        self.norm_context = torch.nn.LayerNorm(dim) if context else None

    def forward(self, x, context=None):
        if self.norm_context is None:
            return self.fn(self.norm(x))
        return self.fn(self.norm(x), self.norm_context(context))


class _LatentAttention(torch.nn.Module):
    def __init__(self, dim: int, latents: int, heads: int, width: int):
        super().__init__()
        self.cross_attend_blocks = torch.nn.ModuleList(
            [
                _Normed(dim, _Attention(dim, heads, width), context=True),
                _Normed(dim, _FeedForward(dim)),
            ]
        )
        self.latents = torch.nn.Parameter(torch.randn(latents, dim))

    def forward(self, tokens, mask):
        attend, feed = self.cross_attend_blocks
        tokens = attend(tokens, self.latents[None]) + tokens
        tokens = (feed(tokens) + tokens).to(torch.float32)
        weights = mask.to(torch.float32)[:, :, None]
        return (tokens * weights).sum(1) / weights.sum(1)


class NVEmbed(PreTrainedModel):
    """Hidden states of the language model, and the row that latent attention makes of them."""

    config_class = NVEmbedConfig
    _supports_sdpa = True

    def __init__(self, config: NVEmbedConfig):
        super().__init__(config)
        latent, language = config.latent, config.mistral
        language._attn_implementation = config._attn_implementation
        self.embedding_model = attend_both_ways(MistralModel(language))
        self.latent_attention_model = _LatentAttention(
            latent["latent_dim"],
            latent["num_latents_value"],
            latent["num_cross_heads"],
            latent["cross_dim_head"],
        )
        self.post_init()

    def forward(self, input_ids, attention_mask):
        """Rows without instruction: every token of the text is pooled."""
        hidden = self.embedding_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        rows = self.latent_attention_model(hidden, attention_mask)
        return {"last_hidden_state": hidden, "sentence_embeddings": rows}
