# SPDX-License-Identifier: Apache-2.0
"""Film reviews, praise or not: a bidirectional LSTM of the sizes of arXiv 2010.08689, and a small transformer."""

import csv
import io
import lzma
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from rankfall.recipes._data import PADDING, Data, Rows
from rankfall.recipes._recipe import Network, Recipe

_VOCABULARY = 25_000
_LONGEST = 512
_PADDING_TOKEN, _UNKNOWN_TOKEN = "[PAD]", "[UNK]"
_COLUMNS = ("label", "text")


@lru_cache(maxsize=1)  # A comparison reads the same texts for every run.
def _load(data_dir: Path | None) -> Data:
    if data_dir is None or not data_dir.is_dir():
        where = "" if data_dir is None else f"no folder {data_dir}. "
        raise FileNotFoundError(f"{where}Pass --data-dir with imdb_train.csv.xz and imdb_test.csv.xz.")
    (train_texts, train_labels), (test_texts, test_labels) = (
        read_reviews(data_dir / f"imdb_{part}.csv.xz") for part in ("train", "test")
    )
    tokenizer = make_tokenizer(train_texts, _VOCABULARY)
    train = encoded(tokenizer, train_texts, _LONGEST), torch.tensor(train_labels)
    test = encoded(tokenizer, test_texts, _LONGEST), torch.tensor(test_labels)
    return Data(_mixed(train), _mixed(test), texts=True)


def _mixed(rows: Rows) -> Rows:
    # The files are sorted by label; a fixed order, so that --limit takes the same rows each time.
    order = torch.randperm(len(rows[0]), generator=torch.Generator().manual_seed(0))
    return rows[0][order], rows[1][order]


def read_reviews(path: Path) -> tuple[list[str], list[int]]:
    """Reads the texts and labels (1 is praise) of a csv.xz file with columns label and text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or lacks a column.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}. Pass --data-dir with imdb_train.csv.xz and imdb_test.csv.xz.")
    reader = csv.DictReader(io.StringIO(_decompressed(path).decode("utf-8", errors="replace"), newline=""))
    if not set(_COLUMNS) <= set(reader.fieldnames or ()):
        raise ValueError(f"{path} has columns {reader.fieldnames}, but needs label and text. Get the file again.")
    texts, labels = [], []
    for row in reader:
        if row["label"] not in ("0", "1") or row["text"] is None:
            raise ValueError(
                f"{path} is damaged at line {reader.line_num}: label {row['label']!r} is not 0 or 1, or the text is "
                "missing. Get the file again."
            )
        texts.append(row["text"].replace("<br />", " "))
        labels.append(int(row["label"]))
    return texts, labels


def _decompressed(path: Path) -> bytes:
    content = b""
    with path.open("rb") as raw:
        try:
            with lzma.open(raw) as file:
                content = file.read()
        except (lzma.LZMAError, EOFError) as error:
            raise ValueError(f"{path} is damaged before byte {raw.tell()}: {error} Get the file again.") from error
    return content


def make_tokenizer(texts: list[str], size: int) -> Tokenizer:
    """A vocabulary of the most frequent words and marks, in small letters; the first ids are padding and the unknown.

    Example:
        >>> tokenizer = make_tokenizer(["a good film", "a bad film."], 20)
        >>> tokenizer.encode("A good house").tokens
        ['a', 'good', '[UNK]']
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=_UNKNOWN_TOKEN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [_PADDING_TOKEN, _UNKNOWN_TOKEN]
    tokenizer.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    return tokenizer


def encoded(tokenizer: Tokenizer, texts: list[str], length: int) -> Tensor:
    """Token ids of each text, shape (texts, length), int16: cut, or filled up with PADDING."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=PADDING, pad_token=_PADDING_TOKEN, length=length)
    return torch.tensor([row.ids for row in tokenizer.encode_batch_fast(texts)], dtype=torch.int16)


class Reader(nn.Module):
    """Embedding 256, two layers of bidirectional LSTM 128, and the mean of their outputs to two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, 256, padding_idx=PADDING)
        self.lstm = nn.LSTM(256, 128, num_layers=2, bidirectional=True, batch_first=True, dropout=0.3)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(256, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of each text, shape (texts, 2), from its ids, shape (texts, length)."""
        # Not packed: torch has a fast kernel for even sequences alone, and 86 % of the texts have 128 words or more.
        # What is read from the end of the others begins in the padding of a batch of texts of similar length.
        read, _ = self.lstm(self.dropout(self.embedding(ids)))
        # The mean hears every word at once; a last state has to learn first to carry what it heard.
        return self.out(self.dropout(_mean_of_words(read, ids)))


def _mean_of_words(read: Tensor, ids: Tensor) -> Tensor:
    """Shape (texts, width), from what was read at each place, (texts, length, width); padding does not count."""
    is_word = (ids != PADDING).to(read.dtype)
    return torch.einsum("tlw,tl->tw", read, is_word) / is_word.sum(1, keepdim=True).clamp(min=1)


class Encoder(nn.Module):
    """A transformer encoder of width 256 with four layers, and the mean over tokens to two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, 256, padding_idx=PADDING)
        self.places = nn.Embedding(_LONGEST, 256)
        layer = nn.TransformerEncoderLayer(256, 4, 512, dropout=0.2, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, nn.LayerNorm(256), enable_nested_tensor=False)
        self.out = nn.Linear(256, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of each text, shape (texts, 2), from its ids, shape (texts, length)."""
        is_word = ids != PADDING
        is_word[:, 0] = True  # A text without a word is still a text, of which something has to be attended to.
        words = self.embedding(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        read = self.encoder(words, src_key_padding_mask=~is_word)
        return self.out(_mean_of_words(read, ids))


# Each word has numbers of its own; digits of its place in the vocabulary would share theirs among words that have
# nothing in common. The vocabulary is sorted by frequency: the evidence does without words too rare to say anything.
_WORDS = ((25_000, 1), (1, 256))


def _network(make: Callable[[], nn.Module], lr: float, epochs: int, kl_warmup: int) -> Network:
    # The data have 25,000 bits to tell and a fresh posterior costs several nats an entry: unless the reviews speak
    # first, the KL silences them. A pass over texts takes long, so the evidence test looks at fewer of them.
    modes = {"embedding": _WORDS}
    return Network(make, epochs, batch_size=64, lr=lr, max_rank=8, kl_warmup=kl_warmup, test_examples=2048, modes=modes)


RECIPE = Recipe("imdb", _load, {"lstm": _network(Reader, lr=1e-3, epochs=20, kl_warmup=6)}, length=128)
# With larger steps attention learns nothing in its first epoch, and the KL, which comes in sooner, ends at the prior.
TRANSFORMER = Recipe("transformer", _load, {"encoder": _network(Encoder, lr=2e-4, epochs=10, kl_warmup=6)}, length=128)
