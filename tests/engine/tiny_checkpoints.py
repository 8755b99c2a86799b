"""Tiny random checkpoints, made and answered by transformers, and a plain attention to run ours with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 173
LINEAR = {"rope_type": "linear", "factor": 2.5}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def make_checkpoint(path: Path, kind: str, *, max_shard_size: str = "1GB", seed: int = 0, **fields: Any) -> Any:
    """Saves a random model of one kind (Llama, Mistral, Qwen2, Qwen3) as safetensors and returns it in float32."""
    import transformers

    num_heads, num_kv_heads = fields.pop("heads", (6, 2))
    rope = {"rope_theta": fields.pop("rope_theta", 10000.0)} | fields.pop("rope", {"rope_type": "default"})
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=fields.pop("vocab_size", VOCABULARY),
        hidden_size=fields.pop("hidden_size", 96),
        intermediate_size=112,
        num_hidden_layers=fields.pop("num_layers", 2),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=fields.pop("max_position", 256),
        rope_parameters=rope,
        **fields,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3 if name.endswith("bias") else parameter.shape[-1] ** -0.5)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


def random_tokens(num_tokens: int = 150) -> Tensor:
    """Token ids int64 [num_tokens]."""
    return torch.randint(0, VOCABULARY, (num_tokens,), generator=torch.Generator().manual_seed(1))


def causal(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one whole sequence: what a model's attend callback computes without pages."""
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query, key, value, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def our_logits(model: Any, token_ids: Tensor) -> Tensor:
    """float32 [T, vocabulary] of one sequence under plain causal attention."""
    with torch.inference_mode():
        return model.logits(model.forward(token_ids, torch.arange(len(token_ids)), causal))


def their_logits(model: Any, token_ids: Tensor) -> Tensor:
    """The same by transformers."""
    with torch.inference_mode():
        return model(token_ids[None]).logits[0]
