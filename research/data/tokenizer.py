"""A byte-level BPE tokenizer, trained on the corpus: every text has an encoding, and decoding gives it back."""

from collections.abc import Mapping

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(blocks: Mapping[str, list[str]], vocabulary: int, megabytes: float) -> Tokenizer:
    """Train on about `megabytes` of text, taken from every domain alike (the first blocks of each).

    As in DeepSeek's tokenizer, newlines, digits and runs of CJK characters are kept apart from words.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\r\n]+|\p{N}|[一-龥ぁ-ヿ가-힣]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_sample(blocks, megabytes), trainer)
    return tokenizer


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """int64 (vocabulary,): a byte-level token has one character per byte; the special token spells nothing."""
    vocabulary = tokenizer.get_vocab()
    sizes = np.zeros(len(vocabulary), np.int64)
    for token, index in vocabulary.items():
        sizes[index] = 0 if token == END_OF_TEXT else len(token)
    return sizes


def _sample(blocks: Mapping[str, list[str]], megabytes: float) -> list[str]:
    share = megabytes * 1e6 / len(blocks)
    chosen = []
    for domain in sorted(blocks):
        taken = 0
        for text in blocks[domain]:
            if taken >= share:
                break
            chosen.append(text)
            taken += len(text.encode())
    return chosen
