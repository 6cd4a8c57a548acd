"""What BViT's broad attention costs beside its network, and against the formulation that concatenates all layers."""
import timm
import torch

from models.bvit import broad_attention, split_qkv

from .timing import interleave, peak_memory, summarize, warm
from .trial import Trial

NETWORK = "the network, without it"
CONCATENATED = "all tokens, layers concatenated (published)"


def concatenated(qkvs: list[torch.Tensor], num_heads: int) -> torch.Tensor:
    """`broad_attention` as it was published: attention over (B, heads, N, L * head_dim) queries, keys and values."""
    layers = [split_qkv(qkv, num_heads) for qkv in qkvs]
    query, key, value = (torch.cat(tensors, dim=-1) for tensors in zip(*layers, strict=True))
    head_dim = layers[0][0].shape[-1]
    weights = (query * head_dim**-0.5 @ key.transpose(-2, -1)).softmax(dim=-1)
    return (weights @ value).unflatten(-1, (head_dim, len(qkvs))).mean(dim=-1).transpose(1, 2).flatten(2)


def _contenders(model: torch.nn.Module, images: torch.Tensor) -> dict:
    x, _ = model._embed(images)
    qkvs = []
    for block in model.blocks:
        x, qkv = block(x)
        qkvs.append(qkv)

    def network():
        hidden, _ = model._embed(images)
        for block in model.blocks:
            hidden, _ = block(hidden)

    return {
        NETWORK: network,
        "class token": lambda: broad_attention(qkvs, model.blocks[0].attn.num_heads, 1),
        "all tokens": lambda: broad_attention(qkvs, model.blocks[0].attn.num_heads),
        CONCATENATED: lambda: concatenated(qkvs, model.blocks[0].attn.num_heads),
    }


@torch.inference_mode()
def measure(name: str, batch: int, trial: Trial) -> list[dict]:
    """One row for each part of a BViT at inference: time, ratio to the whole of its blocks, peak memory."""
    model = timm.create_model(name).eval().to(trial.device)
    calls = _contenders(model, torch.randn(batch, 3, *model.default_cfg["input_size"][1:], device=trial.device))
    for call in calls.values():
        warm(call, trial.device)
    memory = {part: peak_memory(call, trial.device) for part, call in calls.items()}
    seconds = interleave(calls, trial)
    return [
        dict(model=name, part=part, batch=batch, peak_memory_mb=memory[part],
             **summarize(seconds[part], seconds[NETWORK], batch))
        for part in calls
    ]
