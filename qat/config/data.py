"""The section `data`: text, chats, the model's own samples, or these mixed with text."""

from __future__ import annotations

from dataclasses import dataclass, field

from qat.config.checks import TOKENS, at_least, check_types, choose, fraction

MOST_SEQUENCES = 2**20
"""Of one batch."""
MOST_WORKERS = 1024


@dataclass
class SelfgenConfig:
    """Training text sampled from the full-precision model itself (data-free)."""

    tokens: int = 500_000
    """How many tokens to sample."""
    valid_tokens: int = 32_768
    """How many more to sample for validation, with other random numbers."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_k: int | None = None
    """Sample among the k likeliest tokens; null: all."""
    batch_size: int = 256
    """Sequences sampled at once."""
    share: float = 0.5
    """Of data=mixed: the share of the training sequences that are sampled; the others are text."""

    def __post_init__(self) -> None:
        check_types("data.selfgen", self)
        at_least("data.selfgen.tokens", self.tokens, 1, most=TOKENS)
        at_least("data.selfgen.valid_tokens", self.valid_tokens, 1, most=TOKENS)
        at_least("data.selfgen.temperature", self.temperature, 1e-4, most=1e4)
        at_least("data.selfgen.top_k", self.top_k, 1)
        at_least("data.selfgen.batch_size", self.batch_size, 1, most=MOST_SEQUENCES)
        fraction("data.selfgen.share", self.share)


@dataclass
class DataConfig:
    """Where the training and the evaluation text comes from, and how it is cut."""

    kind: str = "text"
    """`text`: documents packed to length; `chat`: loss on the assistant; `selfgen`: the teacher's samples; `mixed`: both."""
    train: str | None = None
    """A .txt, .jsonl or .parquet file, or the name of a hub data set. Not for selfgen."""
    valid: str | None = None
    """The same for validation; null: the last `valid_fraction` of the training text."""
    valid_fraction: float = 0.05
    """The share of the training text held out when `valid` is null."""
    train_split: str = "train"
    """Split of a hub data set; `name/config:split` in `train` is not parsed."""
    valid_split: str = "validation"
    """Split for `valid`, when that is a hub data set."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    text_field: str = "text"
    """Field of a .jsonl, .parquet or hub record, or column of a .tsv or .csv file, that holds the text."""
    pair_field: str | None = None
    """Of task=classification: the field of a second text, as the tokenizer joins two; null: there is one text."""
    label_field: str = "label"
    """Of task=classification: the field of the label, a word or a whole number."""
    messages_field: str = "messages"
    """Field that holds a chat's list of {role, content}; where it is `messages` and absent, other forms of chats are read."""
    max_tokens: int | None = None
    """Stop reading the training text after so many tokens; null: read all."""
    sequence_length: int = 512
    """Tokens a sequence; of task=classification the most that a text may have, what is longer is cut and counted."""
    batch_size: int = 8
    """Sequences a batch on each device."""
    bucket: int = 1024
    """Of task=classification: sequences of which those of like length make batches, so that little is padded; 0: any do."""
    workers: int = 0
    """Loader processes."""
    cache_dir: str | None = None
    """Folder of the tokenized cache; null: $QAT_CACHE or ~/.cache/qat."""
    selfgen: SelfgenConfig = field(default_factory=SelfgenConfig)

    def __post_init__(self) -> None:
        check_types("data", self)
        choose("data.kind", self.kind, ("text", "chat", "selfgen", "mixed"))
        fraction("data.valid_fraction", self.valid_fraction)
        at_least("data.sequence_length", self.sequence_length, 2)
        at_least("data.batch_size", self.batch_size, 1, most=MOST_SEQUENCES)
        at_least("data.max_tokens", self.max_tokens, 1, most=TOKENS)
        at_least("data.bucket", self.bucket, 0, most=MOST_SEQUENCES)
        at_least("data.workers", self.workers, 0, most=MOST_WORKERS)
        if self.kind == "selfgen" and (self.train or self.valid):
            key = "train" if self.train else "valid"
            raise ValueError(f"data.{key}={getattr(self, key)!r} does not fit data=selfgen, which samples its own; use data=text")
        if self.kind != "selfgen" and self.valid is None and self.valid_fraction == 0:
            raise ValueError("data.valid_fraction=0 leaves nothing to evaluate on; give data.valid or a fraction above 0")

    @property
    def sampled(self) -> bool:
        """Whether the full-precision model writes training text, so that it must be loaded first."""
        return self.kind in ("selfgen", "mixed")
