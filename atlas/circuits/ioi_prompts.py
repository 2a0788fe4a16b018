"""Prompts of the indirect-object-identification task: seeded names, places and objects of one token each.

"Then, [S] and [IO] went to the store. [S] gave a ring to" -> [IO] is a BABA prompt; with the two names before
" and" swapped it is an ABBA prompt. ABC prompts have a third name in place of the second [S]. Templates and
words: Wang et al. 2022 (``atlas/resources/ioi.json``); seed 004, rows E1 to E7.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from atlas.corpus.tokens import bos_id, load_tokenizer
from atlas.errors import ConfigError
from atlas.lm.load import LanguageModel

RESOURCE = Path(__file__).parents[1] / "resources" / "ioi.json"
ORDERS = ("ABBA", "BABA")
LEAST_NAMES = 6
FILLER_BEFORE, FILLER_BETWEEN = "After a long day of work,", "Some time passed and it got late."
_WORD = re.compile(r"[A-Z][a-z]{2,}")


@cache
def resource() -> dict[str, Any]:
    """Words, templates and GPT-2's head groups, as shipped."""
    found: dict[str, Any] = json.loads(RESOURCE.read_text(encoding="utf8"))
    return found


@dataclass(frozen=True)
class Words:
    """What prompts are filled with; each is one token with a space before it."""

    names: tuple[str, ...]
    places: tuple[str, ...]
    objects: tuple[str, ...]
    substitute: bool
    """Whether the tokenizer has too few first names as single tokens, so that other words stand for them."""


class Tokens:
    """A model's tokenizer, as prompts need it."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.bos = int(bos_id(self.tokenizer) or 0)

    def ids(self, text: str) -> list[int]:
        """Token ids without BOS."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def single(self, words: Sequence[str]) -> tuple[str, ...]:
        """Those that are one token after a space, and not the token of unknown words."""
        found = {word: self.ids(f" {word}") for word in words}
        return tuple(
            w for w, ids in found.items() if len(ids) == 1 and self.tokenizer.decode(ids).strip() == w
        )


@cache
def tokens_of(folder: Path) -> Tokens:
    """The tokenizer of a model folder, read once."""
    return Tokens(folder)


@cache
def words_of(folder: Path) -> Words:
    """The published words that are single tokens here.

    Where fewer than six first names are, capitalised words of the vocabulary stand for names, in the order of
    their ids. ConfigError if there are none of these either.
    """
    tokens, known = tokens_of(folder), resource()
    names = tokens.single(known["names"])
    substitute = len(names) < LEAST_NAMES
    if substitute:
        texts = (tokens.tokenizer.decode([one]) for one in range(len(tokens.tokenizer)))
        words = [text[1:] for text in texts if text[:1] == " " and _WORD.fullmatch(text[1:])]
        taken = {*" ".join([*known["templates"], FILLER_BEFORE, FILLER_BETWEEN]).replace(",", "").split()}
        names = tokens.single([word for word in words if word not in taken])[:100]
    if len(names) < LEAST_NAMES:
        least = f"at least {LEAST_NAMES} are needed"
        raise ConfigError(f"tokenizer in {str(folder)!r} has {len(names)} single-token names; {least}")
    one = {key: tokens.single(known[key]) or (known[key][0],) for key in ("places", "objects")}
    return Words(names, one["places"], one["objects"], substitute)


@dataclass(frozen=True)
class Prompt:
    """One prompt before it is tokenised; names in the order in which they are said."""

    template: int
    order: str
    subject: str
    indirect: str
    third: str
    place: str
    object: str
    conjunction: str = " and"
    before: str = ""
    between: str = ""
    abc: bool = False

    @property
    def text(self) -> str:
        """The prompt up to the name that is to be predicted.

        >>> Prompt(0, "BABA", "John", "Mary", "Tom", "store", "ring").text
        'Then, John and Mary went to the store. John gave a ring to'
        """
        text = _template(self.template)
        first, second = ("[B]", "[A]") if self.order == "BABA" else ("[A]", "[B]")
        head, tail = text.split("[B] and [A]", 1)
        text = f"{head}{first}{self.conjunction} {second}{tail}"
        at = text.rindex("[B]")
        said = "[C]" if self.abc else "[B]"
        between = f"{self.between} " if self.between else ""
        text = f"{text[:at]}{between}{said}{text[at + 3 :]}"
        filled = {"[A]": self.indirect, "[B]": self.subject, "[C]": self.third, "[PLACE]": self.place}
        for mark, word in (filled | {"[OBJECT]": self.object}).items():
            text = text.replace(mark, word)
        text = text[0].lower() + text[1:] if self.before else text
        return f"{self.before} {text}" if self.before else text


@cache
def _template(number: int) -> str:
    """A template without the name at its end, which is to be predicted."""
    text: str = resource()["templates"][number]
    return text.removesuffix(" [A]")


def draw_prompts(words: Words, n: int, seed: int = 0) -> list[Prompt]:
    """n prompts, ABBA and BABA by turns, a prompt of each with the same words; templates come in order.

    ConfigError unless n is even and from 2.
    """
    if n < 2 or n % 2:
        raise ConfigError(f"{n} prompts are not allowed; allowed: even numbers from 2")
    random = np.random.default_rng(seed)
    out: list[Prompt] = []
    n_templates = len(resource()["templates"])
    for pair in range(n // 2):
        subject, indirect, third = random.choice(len(words.names), 3, replace=False)
        place, object_ = random.integers(len(words.places)), random.integers(len(words.objects))
        names = (words.names[subject], words.names[indirect], words.names[third])
        for order in ORDERS:
            filled = (words.places[place], words.objects[object_])
            out.append(Prompt(pair % n_templates, order, *names, *filled))
    return out


@dataclass(frozen=True)
class Batch:
    """Tokenised prompts, padded behind their ends with BOS, which no earlier position sees."""

    prompts: tuple[Prompt, ...]
    tokens: Int[Tensor, "n pos"]
    at: Mapping[str, Int[Tensor, " n"]]
    """Positions of S1, S2, IO and end; name2 is the second name said."""
    subject: Int[Tensor, " n"]
    indirect: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def rows(self) -> dict[str, Int[Tensor, " m"]]:
        """Rows of each order, and of all."""
        orders = [prompt.order for prompt in self.prompts]
        found = {order: torch.tensor([i for i, o in enumerate(orders) if o == order]) for order in ORDERS}
        return found | {"all": torch.arange(len(orders))}

    def of(self, rows: Int[Tensor, " m"]) -> "Batch":
        """Some of the prompts."""
        at = {name: where[rows] for name, where in self.at.items()}
        prompts = tuple(self.prompts[i] for i in rows.tolist())
        return Batch(prompts, self.tokens[rows], at, self.subject[rows], self.indirect[rows])


def tokenised(model: LanguageModel, prompts: Sequence[Prompt]) -> Batch:
    """The prompts as tokens; ConfigError where one is too long, or a name is not one token in it."""
    tokens = tokens_of(model.files.path)
    ids = [[tokens.bos, *tokens.ids(prompt.text)] for prompt in prompts]
    longest = max(map(len, ids))
    if longest > model.shape.n_ctx:
        raise ConfigError(f"a prompt of {longest} tokens is too long; allowed: {model.shape.n_ctx}")
    name = {w: tokens.ids(f" {w}")[0] for p in prompts for w in (p.subject, p.indirect, p.third)}
    found: dict[str, list[int]] = {"S1": [], "S2": [], "IO": [], "end": [], "name2": []}
    for prompt, one in zip(prompts, ids, strict=True):
        said = [i for i, token in enumerate(one) if token == name[prompt.subject]]
        other = [i for i, token in enumerate(one) if token == name[prompt.indirect]]
        second = [i for i, t in enumerate(one) if t == name[prompt.third]] if prompt.abc else said[1:]
        if not (said and second and len(other) == 1):
            raise ConfigError(f"a name is not one token in the prompt {prompt.text!r}")
        where = {"S1": said[0], "S2": second[-1], "IO": other[0], "end": len(one) - 1}
        where["name2"] = max(where["S1"], where["IO"])
        for key, position in where.items():
            found[key].append(position)
    padded = torch.tensor([one + [tokens.bos] * (longest - len(one)) for one in ids]).to(model.device)
    at = {key: torch.tensor(positions, device=model.device) for key, positions in found.items()}
    subject = torch.tensor([name[prompt.subject] for prompt in prompts], device=model.device)
    indirect = torch.tensor([name[prompt.indirect] for prompt in prompts], device=model.device)
    return Batch(tuple(prompts), padded, at, subject, indirect)


def abc(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The same with a third name in place of the second subject."""
    return [replace(prompt, abc=True) for prompt in prompts]


def disguised(prompts: Sequence[Prompt], words: Words, seed: int = 1) -> list[Prompt]:
    """Other names, filler in front and filler before the second subject (seed 004, row E6)."""
    random = np.random.default_rng(seed)
    out = []
    for prompt in prompts:
        subject, indirect, third = (words.names[i] for i in random.choice(len(words.names), 3, replace=False))
        names = {"subject": subject, "indirect": indirect, "third": third}
        out.append(replace(prompt, **names, before=FILLER_BEFORE, between=FILLER_BETWEEN))
    return out


def rejoined(prompts: Sequence[Prompt], conjunction: str) -> list[Prompt]:
    """ " and" between the names replaced by another word (seed 004, row E7)."""
    return [replace(prompt, conjunction=f" {conjunction}") for prompt in prompts]
