# SPDX-License-Identifier: Apache-2.0
"""Film reviews, praise or not: a bidirectional LSTM of the sizes of arXiv 2010.08689, and a small transformer."""

import csv
import io
import lzma
import reprlib
from collections.abc import Callable, Iterator
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
_PIECE = 2**16  # Bytes that are decompressed at a time: a damaged place is named to within as many.


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
        ValueError: If it is damaged, lacks a column, or has no rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}. Pass --data-dir with imdb_train.csv.xz and imdb_test.csv.xz.")
    texts, labels = [], []
    for line, row in _rows(path, _decoded(path, _decompressed(path))):
        if row["label"] not in ("0", "1"):
            raise _damaged(path, f"at line {line}", f"label {reprlib.repr(row['label'])} is not 0 or 1")
        texts.append(row["text"].replace("<br />", " "))
        labels.append(int(row["label"]))
    if not texts:
        raise ValueError(f"{path} has columns, but no rows. Get the file again.")
    return texts, labels


def _damaged(path: Path, where: str, what: str) -> ValueError:
    return ValueError(f"{path} is damaged {where}: {what}. Get the file again.")


def _rows(path: Path, content: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The line at which each row begins, and its values by their columns."""
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    line = 1
    try:
        columns = next(reader, [])
        if not set(_COLUMNS) <= set(columns):
            raise ValueError(
                f"{path} has columns {reprlib.repr(columns)}, but needs label and text. Get the file again."
            )
        line = reader.line_num + 1
        for values in reader:
            if len(values) != len(columns):
                raise _damaged(path, f"at line {line}", f"{len(columns)} columns, but {len(values)} values")
            yield line, dict(zip(columns, values, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        # A quote that is not closed is noticed long after the row that it stands in.
        raise _damaged(path, f"in the row that begins at line {line}", str(error)) from error


def _decoded(path: Path, content: bytes) -> str:
    try:
        text, place = content.decode(), content.find(b"\0")
    except UnicodeDecodeError as error:
        text, place = "", error.start
    if place >= 0:
        line = content.count(b"\n", 0, place) + 1
        raise _damaged(path, f"at line {line}", f"byte {content[place]:#04x} belongs in no UTF-8 text")
    return text


def _decompressed(path: Path) -> bytes:
    stream, pieces = lzma.LZMADecompressor(lzma.FORMAT_XZ), []
    with path.open("rb") as packed:
        try:
            while not stream.eof and (piece := packed.read(_PIECE)):
                pieces.append(stream.decompress(piece))
        except lzma.LZMAError as error:
            raise _damaged(path, f"before byte {packed.tell()}", str(error)) from error
        end = packed.tell() - len(stream.unused_data)
    if not stream.eof:
        raise _damaged(path, f"at byte {end}", "the file ends there, and its xz stream goes on")
    if end < path.stat().st_size:
        raise _damaged(path, f"at byte {end}", "its xz stream ends there, and the file goes on")
    return b"".join(pieces)


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
