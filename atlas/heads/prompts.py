"""Prompts of a task: templates filled at random, and which of their predictions count.

A template is text with slots in braces and one stretch in double brackets, which is what the model has to
predict::

    {noun} {digit}, {filler} {noun}[[ {digit}]]

Every ``{noun}`` of a prompt is filled with the same word. A token counts if it has a character of the
stretch, so a space that belongs to the predicted token should stand inside the brackets.
Source: seed 001, row B9 and its footnote 1.
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from atlas.configs import TaskConfig
from atlas.errors import ConfigError
from atlas.plain import from_plain

BUNDLED = Path(__file__).parents[1] / "resources" / "tasks.toml"


@dataclass(frozen=True)
class TaskFile:
    """A TOML file of ``[[task]]`` tables."""

    task: tuple[TaskConfig, ...] = ()


class Prompts(NamedTuple):
    """Prompts as rows of tokens, padded behind; ``counted`` marks the predictions that count."""

    texts: tuple[str, ...]
    tokens: Int[Tensor, "prompt pos"]
    counted: Bool[Tensor, "prompt next"]


def read_tasks(path: Path) -> tuple[TaskConfig, ...]:
    """Read a file of tasks; ConfigError names the file and what is wrong in it."""
    try:
        found = from_plain(TaskFile, tomllib.loads(path.read_text(encoding="utf8"))).task
    except OSError as error:
        raise ConfigError(f"tasks {str(path)!r} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"tasks {str(path)!r} is not TOML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"tasks {str(path)!r}: {error}") from None
    if not found:
        raise ConfigError(f"tasks {str(path)!r} has no [[task]]")
    return found


def all_tasks(more: Sequence[TaskConfig]) -> tuple[TaskConfig, ...]:
    """The bundled tasks and more; a task of the same name takes the bundled one's place."""
    tasks = {task.name: task for task in read_tasks(BUNDLED)}
    return tuple((tasks | {task.name: task for task in more}).values())


def fill(task: TaskConfig, random: np.random.Generator) -> tuple[str, int, int]:
    """One prompt, and where the stretch to be predicted begins and ends.

    >>> from atlas.configs import SlotConfig
    >>> fill(TaskConfig("t", "{a} and[[ {a}]]", (SlotConfig("a", ("x",)),)), np.random.default_rng(0))
    ('x and x', 5, 7)
    """
    values = {}
    for slot in task.slot:
        if slot.words:
            values[slot.name] = slot.words[random.integers(len(slot.words))]
        else:
            drawn = random.integers(len(slot.characters), size=slot.length)
            values[slot.name] = "".join(slot.characters[i] for i in drawn)
    before, stretch, after = (
        re.sub(r"\{(\w*)\}", lambda m: values[m[1]], part) for part in re.split(r"\[\[|\]\]", task.template)
    )
    return before + stretch + after, len(before), len(before) + len(stretch)


def make_prompts(task: TaskConfig, tokenizer: Any, n: int, *, bos: int, n_ctx: int, seed: int = 0) -> Prompts:
    """Return ``n`` prompts of a task, BOS first; they depend on the task and the seed alone.

    Raises:
        ConfigError: a prompt is longer than the model's context, or nothing of it counts.
    """
    random = np.random.default_rng([seed, *task.name.encode()])
    texts, rows, counted = [], [], []
    for _ in range(n):
        text, start, stop = fill(task, random)
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = found["input_ids"], found["offset_mapping"]
        if len(ids) + 1 > n_ctx:
            raise ConfigError(
                f"task {task.name!r} has a prompt of {len(ids) + 1} tokens; the model allows {n_ctx}"
            )
        texts.append(text)
        rows.append([bos, *ids])
        counted.append([low < stop and high > start for low, high in spans])
        if not any(counted[-1]):
            raise ConfigError(f"task {task.name!r} has nothing to predict in the prompt {text!r}")
    width = max(map(len, rows), default=2)
    tokens = [row + [bos] * (width - len(row)) for row in rows]
    marks = [row + [False] * (width - 1 - len(row)) for row in counted]
    return Prompts(tuple(texts), torch.tensor(tokens), torch.tensor(marks, dtype=torch.bool))
