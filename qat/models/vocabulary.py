"""Whether a teacher's numbers are the student's words: logits over vocabularies of one size are compared without any error."""

from __future__ import annotations

from typing import Any

from qat.config import ModelConfig
from qat.models.tokenizer import load_tokenizer


def check_same_words(config: ModelConfig) -> None:
    """Compare the tokenizer of `config.teacher` with that of `config.path`, whose models have as many tokens.

    Added tokens are left out: they are names that a chat model gives to numbers its base model had reserved. Where the teacher
    brings no tokenizer that is said, and its vocabulary is taken to be the student's.

    Raises:
        ValueError: the same number is another word.
    """
    try:
        theirs = load_tokenizer(config, config.teacher)
    except ValueError as error:
        print(f"model.teacher={config.teacher} has no tokenizer to compare ({error}); its tokens are taken to be the student's")
        return
    mine, words = load_tokenizer(config), _words(theirs)
    added = {*mine.get_added_vocab().values(), *theirs.get_added_vocab().values()}
    other = [(number, word) for number, word in sorted(_words(mine).items()) if number not in added and words.get(number) != word]
    if other:
        number, word = other[0]
        raise ValueError(
            f"model.teacher={config.teacher} has as many tokens as the student, but {len(other)} of them are others: token"
            f" {number} is {words.get(number)!r} to the teacher and {word!r} to the student; give a teacher of its vocabulary"
        )


def _words(tokenizer: Any) -> dict[int, str]:
    return {number: word for word, number in tokenizer.get_vocab().items()}
