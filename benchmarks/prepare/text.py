"""Texts, and the words in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .samples import Clip

WORDS = 2000
TOKENS = 128


def read(source: Clip | str) -> str:
    """The text itself, or that of a file, whose bytes that are not UTF-8 become U+FFFD."""
    return source if isinstance(source, str) else source.path().read_text(encoding="utf-8", errors="replace").strip()


def token_ids(name: str) -> Callable[[Sequence[str]], np.ndarray]:
    """texts -> int32 (N, 128), the ids of a tokenizer of transformers: one in its cache, or in the folder `name`.

    Longer texts are cut, shorter ones padded. ImportError without transformers, ValueError where there is no tokenizer.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError("--tokenizer needs transformers: pip install transformers") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--tokenizer: expected {name!r} in transformers' cache, or a folder: {reason}") from error

    def encode(texts: Sequence[str]) -> np.ndarray:
        tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="np")
        return np.asarray(tokens["input_ids"], dtype=np.int32)

    return encode


def tf_idf(training: Sequence[str]) -> Callable[[Sequence[str]], np.ndarray]:
    """Fit on the training texts; returns texts -> float32 (N, words).

    Term frequency (1 + log) times inverse document frequency, of the 2000 most frequent words of the training texts,
    each text scaled to length 1; zeros for a text that has none of them. ValueError where there is no word.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(max_features=WORDS, sublinear_tf=True, dtype=np.float32)
    try:
        vectorizer.fit(training)
    except ValueError as error:
        raise ValueError(f"text: expected words in the {len(training)} training texts, found none") from error
    return lambda texts: vectorizer.transform(texts).toarray()
