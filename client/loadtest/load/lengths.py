"""How many tokens: the distributions that prompts and completions take their lengths from.

    128                                    always 128
    uniform:32-512                         each of 32 .. 512 equally often
    lognormal:median=128,sigma=0.8         half below 128; two thirds in 128 / 2.2 .. 128 x 2.2, as e^0.8 is 2.2
    lognormal:median=128,sigma=0.8,min=4,max=1024

Lengths of real conversations are skewed: many short, few very long. The log-normal one has that tail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

MAX_LENGTH = 10_000_000
"""Tokens. More than any model's context."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same."""

    tokens: int

    def __post_init__(self) -> None:
        _check("length", self.tokens)

    @property
    def minimum(self) -> int:
        """The least that is drawn."""
        return self.tokens

    @property
    def maximum(self) -> int | None:
        """The most that is drawn."""
        return self.tokens

    def sample(self, generator: np.random.Generator, count: int) -> tuple[int, ...]:
        """Nothing is drawn."""
        return (self.tokens,) * count

    def __str__(self) -> str:
        return f"{self.tokens}"


@dataclass(frozen=True, slots=True)
class Uniform:
    """Each length from `minimum` to `maximum` equally often, both included."""

    minimum: int
    maximum: int

    def __post_init__(self) -> None:
        _check("uniform's least length", self.minimum)
        _check("uniform's greatest length", self.maximum, self.minimum)

    def sample(self, generator: np.random.Generator, count: int) -> tuple[int, ...]:
        """More draws begin with the fewer ones."""
        return tuple(generator.integers(self.minimum, self.maximum, count, endpoint=True).tolist())

    def __str__(self) -> str:
        return f"uniform {self.minimum} to {self.maximum}"


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Lengths whose logarithms are normal, with standard deviation `sigma` around that of `median`.

    What is drawn beyond `minimum` or `maximum` becomes the limit itself.
    """

    median: float
    sigma: float
    minimum: int = 1
    maximum: int | None = None
    """None: the tail is open, and ends where the context does."""

    def __post_init__(self) -> None:
        _check("lognormal's min", self.minimum)
        if self.maximum is not None:
            _check("lognormal's max", self.maximum, self.minimum)
        highest = MAX_LENGTH if self.maximum is None else self.maximum
        if not self.minimum <= self.median <= highest:
            raise ValueError(f"lognormal's median is {self.median:g}; it must lie in {self.minimum} .. {highest}")
        if not 0 < self.sigma <= 5:
            raise ValueError(f"lognormal's sigma is {self.sigma:g}; it must be above 0 and at most 5")

    def sample(self, generator: np.random.Generator, count: int) -> tuple[int, ...]:
        """More draws begin with the fewer ones."""
        drawn = np.rint(self.median * np.exp(self.sigma * generator.standard_normal(count)))
        highest = MAX_LENGTH if self.maximum is None else self.maximum
        return tuple(np.clip(drawn, self.minimum, highest).astype(np.int64).tolist())

    def __str__(self) -> str:
        at_most = "" if self.maximum is None else f", at most {self.maximum}"
        at_least = "" if self.minimum == 1 else f", at least {self.minimum}"
        return f"log-normal with median {self.median:g} and sigma {self.sigma:g}{at_least}{at_most}"


Lengths: TypeAlias = Fixed | Uniform | LogNormal


def parse_lengths(text: str) -> Lengths:
    """Lengths from the forms at this file's head.

    >>> parse_lengths("lognormal:median=128,sigma=0.8,max=1024")
    LogNormal(median=128.0, sigma=0.8, minimum=1, maximum=1024)

    Raises:
        ValueError: names the part, its limit and its value.
    """
    kind, colon, rest = text.strip().partition(":")
    if not colon:
        return Fixed(_whole("length", kind))
    if kind == "uniform":
        least, dash, greatest = rest.partition("-")
        if not dash:
            raise ValueError(f"lengths is {text!r}; uniform takes LEAST-GREATEST, such as uniform:32-512")
        return Uniform(_whole("uniform's least length", least), _whole("uniform's greatest length", greatest))
    if kind == "lognormal":
        return _parse_lognormal(rest)
    raise ValueError(f"lengths is {text!r}; it must be a number, or begin with uniform: or lognormal:")


def _parse_lognormal(text: str) -> LogNormal:
    given = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in ("median", "sigma", "min", "max"):
            raise ValueError(f"lognormal holds {part!r}; it takes median=, sigma=, min= and max=")
        if name in given:
            raise ValueError(f"lognormal holds {name} twice")
        given[name] = value
    for name in ("median", "sigma"):
        if name not in given:
            raise ValueError(f"lognormal has no {name}; it needs one, such as lognormal:median=128,sigma=0.8")
    return LogNormal(
        median=_real("lognormal's median", given["median"]),
        sigma=_real("lognormal's sigma", given["sigma"]),
        minimum=_whole("lognormal's min", given.get("min", "1")),
        maximum=_whole("lognormal's max", given["max"]) if "max" in given else None,
    )


def _check(field: str, tokens: int, least: int = 1) -> None:
    if not least <= tokens <= MAX_LENGTH:
        raise ValueError(f"{field} is {tokens}; it must lie in {least} .. {MAX_LENGTH:,} tokens")


def _whole(field: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{field} is {text!r}; it must be a whole number") from None


def _real(field: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{field} is {text!r}; it must be a number")
    return number
