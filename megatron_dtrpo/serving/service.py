"""What is served: checkpoints by name, and requests as jobs of the scheduler's."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from megatron_dtrpo.config.decoding import DecodingOptions
from megatron_dtrpo.data.prompts import make_prompt
from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.serving.answer import Answer
from megatron_dtrpo.serving.desk import Desk, Ticket
from megatron_dtrpo.serving.messages import Admission
from megatron_dtrpo.serving.protocol import ChatRequest, CompletionRequest

GREEDY = 1e-5  # temperatures below it are 0: dividing by them would overflow


class TooLong(UserError):
    """A prompt and its response do not fit into a slot."""


class UnknownModel(UserError):
    """A request names a model that is not served."""


@dataclass(frozen=True)
class Served:
    """A checkpoint. ``number``: its place in the worker's list. ``positions``: tokens of a slot. ``defaults``: what a
    request gets that does not say otherwise. ``choose``: (max_new_tokens, temperature, top_p) -> options."""

    name: str
    number: int
    tokenizer: Tokenizer
    positions: int
    defaults: DecodingOptions
    choose: Callable[[int, float, float], DecodingOptions]
    end_ids: frozenset[int] = frozenset()
    created: int = 0

    def admission(
        self,
        row: dict,
        where: str,
        *,
        longest: int | None,
        temperature: float | None,
        top_p: float | None,
        seed: int,
        key: tuple[int, int],
        stops: Sequence[str] = (),
        watched: bool = False,
    ) -> Admission:
        """Raises UserError for a prompt that cannot be decoded."""
        ids = make_prompt(row, where, self.tokenizer, 2**31).ids
        room = self.positions - len(ids)
        if room < (1 if longest is None else longest):
            raise TooLong(
                f"{where}: the prompt has {len(ids)} tokens and the response may have {longest or 1}: together at most "
                f"{self.positions}; shorten the prompt, or ask for fewer tokens"
            )
        temperature = self.defaults.temperature if temperature is None else temperature
        options = self.choose(
            min(room, self.defaults.max_new_tokens) if longest is None else longest,
            temperature if temperature >= GREEDY else 0.0,
            self.defaults.top_p if top_p is None else top_p,
        )
        # Special tokens have no text that a stop string could be found in: they end the response.
        special = frozenset(i for i in map(self.tokenizer.token_id, stops) if i in self.tokenizer.special_ids)
        return Admission(-1, self.number, 0, ids, options, seed, key, self.end_ids | special, watched)


class Service:
    """Attributes:
    models: by name, the first one the default.
    reader: a thread to read long prompts on.
    """

    def __init__(self, models: Sequence[Served], desk: Desk):
        self.models = {model.name: model for model in models}
        self.default = models[0]
        self.desk = desk
        self.reader = ThreadPoolExecutor(1, "long prompts")

    def model(self, name: str | None) -> Served:
        if name is None:
            return self.default
        if name not in self.models:
            raise UnknownModel(f"model {name!r} is not served here; these are: {', '.join(self.models)}")
        return self.models[name]

    def admissions(self, served: Served, request: CompletionRequest | ChatRequest) -> list[Admission]:
        """Of each prompt its ``n`` samples. The same seed gives the same samples as those of `generate`'s."""
        if isinstance(request, ChatRequest) and not served.tokenizer.has_chat_template:
            raise UserError(f"{served.name} has no chat template: ask /v1/completions, with the prompt as text")
        prompts, samples, most = request.prompts(), request.n or 1, self.desk.most
        if len(prompts) * samples > most:
            raise UserError(f"{len(prompts) * samples} responses in one request, at most {most}: fewer prompts, or n")
        seed = secrets.randbits(62) if request.seed is None else request.seed
        found = [
            served.admission(
                _row(prompt),
                "messages" if isinstance(request, ChatRequest) else f"prompt {number + 1}",
                longest=request.longest(),
                temperature=request.temperature,
                top_p=request.top_p,
                seed=seed,
                key=(number, 0),
                stops=request.stops(),
            )
            for number, prompt in enumerate(prompts)
        ]
        return [replace(one, key=(one.key[0], sample)) for one in found for sample in range(samples)]


def _row(prompt: str | list) -> dict:
    """``prompt`` as a row of `make_prompt`."""
    ids = isinstance(prompt, list) and isinstance(prompt[0], int)
    return {"prompt_ids" if ids else "prompt": prompt}


async def written(ticket: Ticket, answers: Sequence[Answer]) -> AsyncIterator[tuple[int, str, list]]:
    """What is new of each answer, until all are finished: place, text and scores."""
    unfinished = set(range(len(answers)))
    while unfinished:
        place, progress = await ticket.next()
        if place not in unfinished or progress.tokens is None:
            continue
        completion = progress.completion
        ended = None if completion is None else completion.ended
        text, scores = answers[place].take(progress.tokens, progress.confidence, progress.passes, ended)
        if answers[place].finish is not None:
            unfinished.discard(place)
            if completion is None:  # a stop string ended it
                ticket.end(place, answers[place].count, answers[place].passes)
        yield place, text, scores
