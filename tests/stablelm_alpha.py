"""StableLM-alpha v2 for transformers, which has no class for it: as small as its published description allows.

One LayerNorm feeds attention and MLP, whose results are added to the stream at once; rotary embedding turns a part of
each head; query, key and value are fused head by head; of the MLP's fused first matrix the second half gates through
SiLU; its width is 8/3 of the model's, rounded up to 256s. The modules are named as the checkpoint names its weights.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


class Config(PreTrainedConfig):
    model_type = "stablelm_alpha"
    num_heads: int = 32
    rotary_pct: float = 0.25
    rotary_emb_base: int = 10000
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = False


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head, self.head_size = config.num_heads, config.hidden_size // config.num_heads
        self.turned = int(self.head_size * config.rotary_pct)
        self.theta = config.rotary_emb_base
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def rotate(self, x: Tensor) -> Tensor:
        """Pair i of the first ``turned`` dimensions is (i, i + turned/2), turned by position · theta^(-2i/turned)."""
        half = self.turned // 2
        frequencies = self.theta ** (-torch.arange(half).double() / half)
        angles = (torch.arange(x.shape[2]).double()[:, None] * frequencies).to(torch.complex128)
        turned = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double()) * torch.exp(1j * angles)
        return torch.cat((turned.real.to(x.dtype), turned.imag.to(x.dtype), x[..., 2 * half :]), -1)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv_proj(x).unflatten(-1, (self.n_head, 3, self.head_size))
        query, key, value = heads.permute(3, 0, 2, 1, 4)  # (3, B, H, T, D)
        scores = self.rotate(query) @ self.rotate(key).transpose(-1, -2) / self.head_size**0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width = next(n for n in range(0, 10**6, 256) if n >= int(config.hidden_size * 8 / 3))
        self.gate_proj = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.out_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        linear, gate = self.gate_proj(x).chunk(2, -1)
        return self.out_proj(linear * gate * torch.sigmoid(gate))


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attention, self.mlp = Attention(config), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.attention(normed) + self.mlp(normed)


class StableLMAlphaForCausalLM(PreTrainedModel):
    config_class = Config
    base_model_prefix = "transformer"
    _supports_attention_backend = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.transformer = nn.ModuleDict(
            {
                "embed": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": layers,
                "final_norm": nn.LayerNorm(config.hidden_size, eps=config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> object:
        x = self.transformer["embed"](input_ids)
        for layer in self.transformer["layers"]:
            x = layer(x)
        return SimpleNamespace(logits=self.lm_head(self.transformer["final_norm"](x)))


AutoConfig.register("stablelm_alpha", Config)
AutoModelForCausalLM.register(Config, StableLMAlphaForCausalLM)
