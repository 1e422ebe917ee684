"""Captions → what a denoiser gets of them: token numbers or features, zero where there is no text.

`bytes` needs no weights: each byte of the UTF-8 text is a token of its own, and the denoiser learns their embeddings.
Any other name is a text encoder of transformers' (T5, CLIP, BERT and their kin such as MiniLM), by local directory or
hub name; it runs once, when images are encoded, and again for the prompts of sampling. Text beyond `length` tokens is
cut off; an empty caption is no text at all, which is what guidance compares with.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from ldt.errors import InputError, by_reason
from ldt.nn.text_shape import TextShape

BYTES = "bytes"
CHARACTERS = 64  # no caption needs more characters a token, and tokenizers are slow on long ones
TOGETHER = 32  # captions that an encoder gets at once


class TextEncoder(Protocol):
    """hash: of its weights, so that prompts are never encoded with others than the captions were."""

    name: str
    hash: str
    shape: TextShape

    def encode(self, captions: Sequence[str]) -> NDArray[np.generic]:
        """uint16 [n, M] or float16 [n, M, F]."""
        ...

    def cuts(self, caption: str) -> bool:
        """Whether the caption has more tokens than are kept."""
        ...


def load_text_encoder(name: str, length: int, device: torch.device | str = "cpu") -> TextEncoder:
    """The encoder of that name for captions of at most `length` tokens."""
    if length < 1:
        raise InputError(f"text.length={length} must be at least 1")
    return ByteEncoder(length) if name == BYTES else TransformersEncoder(name, length, torch.device(device))


def describe(encoder: TextEncoder) -> dict[str, Any]:
    """The encoder as manifests and checkpoints describe it."""
    return {"encoder": encoder.name, "hash": encoder.hash, **encoder.shape._asdict()}


def reload_text_encoder(described: dict[str, Any], device: torch.device | str = "cpu") -> TextEncoder:
    """The encoder that captions were encoded with; refuses one with other weights."""
    encoder = load_text_encoder(described["encoder"], described["length"], device)
    if describe(encoder) != {k: described[k] for k in describe(encoder)}:
        raise InputError(
            f"text encoder {described['encoder']} is not the one that the captions were encoded with; put the original "
            "weights back, or encode and train again"
        )
    return encoder


class ByteEncoder:
    """Byte b is token b + 1, so that 0 is left for padding."""

    name, hash = BYTES, "utf-8"

    def __init__(self, length: int) -> None:
        self.shape = TextShape(length, vocabulary=257)

    def encode(self, captions: Sequence[str]) -> NDArray[np.generic]:
        out = np.zeros((len(captions), self.shape.length), np.uint16)
        for row, caption in zip(out, captions, strict=True):
            content = np.frombuffer(caption[: len(row)].encode()[: len(row)], np.uint8)
            row[: len(content)] = content.astype(np.uint16) + 1
        return out

    def cuts(self, caption: str) -> bool:
        return len(caption.encode()) > self.shape.length


class KnownCaptions:
    """Captions that have been encoded already, so that the encoder, often larger than the denoiser, can be freed."""

    def __init__(self, encoder: TextEncoder, captions: Sequence[str]) -> None:
        self.name, self.hash, self.shape = encoder.name, encoder.hash, encoder.shape
        each = list(dict.fromkeys(captions))
        blocks = [encoder.encode(each[i : i + TOGETHER]) for i in range(0, len(each), TOGETHER)]
        self._rows = dict(zip(each, np.concatenate(blocks), strict=True))
        self._cut = {caption for caption in each if encoder.cuts(caption)}

    def encode(self, captions: Sequence[str]) -> NDArray[np.generic]:
        return np.stack([self._rows[caption] for caption in captions])

    def cuts(self, caption: str) -> bool:
        return caption in self._cut


class TransformersEncoder:
    """Last hidden states of an encoder of transformers', zero at padding."""

    def __init__(self, name: str, length: int, device: torch.device) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise InputError(
                f"text encoder {name} needs transformers; pip install ldt-train[text], or use text.encoder=bytes"
            )
        self.name, self._device = name, device
        self._tokenizer, model = _from_pretrained(name)
        self._model = model.eval().requires_grad_(False).to(device)
        self.hash = _weights_hash(self._model)
        self.shape = TextShape(length, width=self._model.config.hidden_size)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> NDArray[np.generic]:
        out = np.zeros((len(captions), self.shape.length, self.shape.width), np.float16)
        real = [i for i, caption in enumerate(captions) if caption.strip()]
        if not real:
            return out
        texts = [captions[i][: CHARACTERS * self.shape.length] for i in real]
        tokens = self._tokenizer(
            texts, max_length=self.shape.length, padding="max_length", truncation=True, return_tensors="pt"
        ).to(self._device)
        hidden = self._model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        features = (hidden.float() * tokens["attention_mask"][..., None]).cpu().numpy()
        if not np.isfinite(features).all() or np.abs(features).max() > np.finfo(np.float16).max:
            raise InputError(f"text encoder {self.name} gives values that half precision cannot hold; use another")
        out[real] = features.astype(np.float16)
        return out

    def cuts(self, caption: str) -> bool:
        text = caption[: CHARACTERS * self.shape.length]
        kept = self._tokenizer(text, max_length=self.shape.length, truncation=True)["input_ids"]
        more = self._tokenizer(text, max_length=self.shape.length + 1, truncation=True)["input_ids"]
        return len(text) < len(caption) or len(more) > len(kept)


def _from_pretrained(name: str) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies, while it is imported
        import transformers
    kinds = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel", "clip": "CLIPTextModel"}
    kinds["clip_text_model"] = "CLIPTextModel"
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kind = getattr(transformers, kinds.get(config.model_type, "AutoModel"))
        return transformers.AutoTokenizer.from_pretrained(name), kind.from_pretrained(name, use_safetensors=True)
    except Exception as error:  # transformers and the hub raise a dozen types; all mean that it can't be had
        reason = " ".join(str(error).split())[:200]
        raise by_reason(
            f"text encoder {name} can't be loaded ({reason}); give a hub name, a directory saved by transformers with "
            "safetensors and its tokenizer, or text.encoder=bytes",
            error,
        ) from None


def _weights_hash(model: Any) -> str:
    digest = xxhash.xxh64()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
