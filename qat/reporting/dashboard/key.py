"""Whether this machine has a key of Weights & Biases; wandb asks the server what it thinks of one."""

from __future__ import annotations


def has_key() -> bool:
    """Whether there is a key; nobody is asked for one.

    Raises:
        ValueError: there is one, and it is none for the server, or the server does not answer.
    """
    import wandb

    try:
        return bool(wandb.login(prompt=False))
    except (wandb.Error, ValueError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"Weights & Biases does not take its key: {said}; run `wandb login --relogin`") from error
