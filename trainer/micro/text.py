"""Words: the captions of the corpus, and tokenizers that hold each of their words as one token."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertTokenizer, CLIPTokenizer

from factory import toon
from factory.caption import CaptionConfig, sample_text
from factory.toon.traits import Scene

KEYWORDS = CaptionConfig().keywords  # what the factory writes beside a caption, unless set otherwise
MAX_TOKENS = 77  # as SD v1.5


def caption_of(scene: Scene, rng: np.random.Generator, *, line: bool = False) -> str:
    """Return a caption of the scene, worded by `rng`; with the keywords of line art if it is for the line layer."""
    caption = toon.caption(scene, random.Random(int(rng.integers(1 << 62))))
    return sample_text(caption, KEYWORDS if line else ())


def captions(scenes: Sequence[Scene], count: int = 20_000, seed: int = 0) -> list[str]:
    """Return `count` captions over the scenes in turn, every second with the keywords: what tokenizers learn from."""
    rng = np.random.default_rng(seed)
    return [caption_of(scenes[i % len(scenes)], rng, line=bool(i % 2)) for i in range(count)]


def clip_tokenizer(texts: Sequence[str]) -> CLIPTokenizer:
    """Return a CLIPTokenizer whose merges are learnt from `texts`; any other text is spelled in smaller pieces."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, initial_alphabet=sorted(alphabet), end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([text.lower() for text in texts], trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = sorted(alphabet)
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*words, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def bert_tokenizer(texts: Sequence[str], folder: Path) -> BertTokenizer:
    """Return the BERT tokenizer that BLIP takes, its words those of `texts`; `[DEC]` begins a caption."""
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *words]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    tokenizer = BertTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer
