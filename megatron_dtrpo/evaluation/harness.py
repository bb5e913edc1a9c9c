"""The lm-evaluation-harness runs on an engine: its model ``megatron_dtrpo``.

    with source.open() as engine:
        model = HarnessModel(engine, noising, HarnessOptions())
        if engine.is_main:
            with model.rank_zero.calling():
                results = lm_eval.simple_evaluate(model, tasks=["gsm8k"])
        else:
            model.rank_zero.follow()

The harness itself runs on rank zero only, which builds the requests, judges the answers and reports. The others take
part where the model is called (`rank_zero`). Data sets are fetched once, code that a model wrote is run once, and all
processes work on the same requests.

The harness (0.4) has no hook by which another package could offer it a model: its own command ``lm_eval`` does not
know this one. `megatron-dtrpo evaluate` is the command.

Needs the extra ``eval`` (lm-eval); nothing else in the package imports it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from megatron_dtrpo.config.decoding import DecodingOptions, default_small_block
from megatron_dtrpo.data.batches import Noising
from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.diffusion.decoding import Completion
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.evaluation.likelihood import Continuation, content_key, score_continuations
from megatron_dtrpo.evaluation.rank_zero import RankZero
from megatron_dtrpo.training.engine import Engine

MODEL_NAME = "megatron_dtrpo"
# Options of generation that a request may have.
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}


@dataclass(frozen=True)
class HarnessOptions:
    """``decoding`` holds where a task does not say otherwise. ``fits_length``: its ``small_block_size`` is a
    default, and another length has its own. ``check_greedy``: answer the harness's question whether a
    continuation is what greedy decoding of as many tokens writes, at the price of that decoding. Otherwise the
    answer is always no, and metrics made of it, as LAMBADA's accuracy, mean nothing."""

    decoding: DecodingOptions = DecodingOptions(max_new_tokens=256)  # the harness's own default
    batch_size: int = 16
    seed: int = 1234
    check_greedy: bool = False
    fits_length: bool = False


class Generation(NamedTuple):
    """One response to write. ``key``: what it draws its randomness from, with the seed."""

    prompt: tuple[int, ...]
    options: DecodingOptions
    end_ids: frozenset[int]
    until: tuple[str, ...]
    key: tuple[int, int]


@register_model(MODEL_NAME)
class HarnessModel(TemplateLM):
    """All processes of a run make one. Rank zero gives it to the harness, the others follow."""

    def __init__(self, engine: Engine, noising: Noising, options: HarnessOptions):
        super().__init__()
        self.engine, self.noising, self.options = engine, noising, options
        self.text: Tokenizer = engine.tokenizer
        self.max_positions = engine.config.model.max_position_embeddings
        self.truncated = 0
        self.unknown: set[str] = set()
        self.completions: list[Completion] = []  # of all requests to generate, on the first process
        self.rank_zero = RankZero({"decode": self._decode, "score": self._score})

    # What the harness asks of the tokenizer.

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id

    @property
    def tokenizer_name(self) -> str:
        return f"{self.text.tokenizer_type}-{self.text.fingerprint()[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.text.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text, up to where the assistant begins to speak, or goes on to with the words that it is
        given. Raises UserError where there is no template or it refuses."""
        return self.text.render_prompt(chat_history)  # whose last message says which of the two it is

    # What it asks of the model; on the first process.

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """A response to every request ``(text, settings)``, up to the first of its stop strings."""
        seen: Counter = Counter()
        generations = []
        for context, settings in (request.args for request in requests):
            generation = self._generation(context, settings)
            # Repetitions of one request are different samples of the same prompt.
            generations.append(generation._replace(key=(content_key(generation.prompt), seen[generation])))
            seen[generation] += 1
        self._warn()
        completions = self.rank_zero.call("decode", generations)
        self.completions += completions
        return [
            postprocess_generated_text(self.text.decode(completion.answer), list(generation.until), None)
            for generation, completion in zip(generations, completions, strict=True)
        ]

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of every text, after an end token, in windows as long as the model allows."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            ids = self.text.encode(text)
            pairs = get_rolling_token_windows(ids, self.prefix_token_id, self.max_positions - 1, context_len=1)
            mine = [("", *make_disjoint_window(pair)) for pair in pairs]
            windows += mine
            counts.append(len(mine))
        scores = iter(self._scores([self._continuation(context, ids) for _, context, ids in windows]))
        return [sum(next(scores) for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """``L`` of every continuation and, if asked for, whether it is greedy. Requests: ``(texts, context ids,
        continuation ids)``."""
        continuations = [self._continuation(context, ids) for _, context, ids in requests]
        self._warn()
        scores = self._scores(continuations)
        greedy = self._are_greedy(continuations) if self.options.check_greedy else [False] * len(continuations)
        return list(zip(scores, greedy, strict=True))

    def _scores(self, continuations: Sequence[Continuation]) -> list[float]:
        places = [place for place, continuation in enumerate(continuations) if continuation.tokens]
        found = dict(zip(places, self.rank_zero.call("score", [continuations[p] for p in places]), strict=True))
        return [found.get(place, 0.0) for place in range(len(continuations))]  # of nothing: log 1

    def _are_greedy(self, continuations: Sequence[Continuation]) -> list[bool]:
        """Whether decoding as many tokens at temperature 0, with this model's decoding options, writes the same."""
        greedy = [
            Generation(
                continuation.context,
                self._decoding(max(1, len(continuation.tokens)), temperature=0.0),
                frozenset(),
                (),
                (0, 0),
            )
            for continuation in continuations
        ]
        written = self.rank_zero.call("decode", greedy)
        return [not c.tokens or tuple(w.tokens) == c.tokens for w, c in zip(written, continuations, strict=True)]

    # From requests to tokens.

    def _generation(self, context: str, settings: dict) -> Generation:
        """Raises UserError for settings that cannot be."""
        settings = normalize_gen_kwargs(settings, default_max_gen_toks=self.options.decoding.max_new_tokens)
        self.unknown |= {name for name in settings.keys() - _KNOWN if settings[name] is not None}
        new_tokens = settings["max_gen_toks"]
        room = self.max_positions - new_tokens
        if new_tokens < 1 or room < 1:
            raise UserError(
                f"max_gen_toks {new_tokens}: the model has {self.max_positions} positions for prompt and response: "
                "give another --max-new-tokens"
            )
        # Sampling without a temperature is sampling from the model's own distribution.
        temperature = float(settings.get("temperature", 1.0)) if settings["do_sample"] else 0.0
        options = self._decoding(new_tokens, temperature=temperature, top_p=float(settings.get("top_p", 1.0)))
        until = tuple(text for text in settings["until"] if text)
        # Special tokens have no text that could be cut: they end the response.
        end_ids = frozenset(i for i in map(self.text.token_id, until) if i in self.text.special_ids)
        ids = self._left_truncated(self.text.encode(context) or [self.prefix_token_id], room)
        return Generation(ids, options, end_ids, until, (0, 0))

    def _decoding(self, new_tokens: int, **settings) -> DecodingOptions:
        options = replace(self.options.decoding, max_new_tokens=new_tokens, **settings)
        if not self.options.fits_length:
            return options
        small = default_small_block(self.engine.config.model.block_size, options.rule, new_tokens)
        return replace(options, small_block_size=small)

    def _continuation(self, context: Sequence[int], ids: Sequence[int]) -> Continuation:
        if len(ids) >= self.max_positions:
            raise UserError(f"a continuation has {len(ids)} tokens: the model has {self.max_positions} positions")
        context = list(context) or [self.prefix_token_id]
        return Continuation(self._left_truncated(context, self.max_positions - len(ids)), tuple(ids))

    def _left_truncated(self, ids: Sequence[int], room: int) -> tuple[int, ...]:
        self.truncated += len(ids) > room
        return tuple(ids[-room:])

    def _warn(self) -> None:
        """Says, once per call of the harness, what of the requests could not be kept."""
        if self.truncated:
            _say(f"{self.truncated} prompts are too long for {self.max_positions} positions and lost their beginning")
        if self.unknown:
            _say(f"this model does not have the generation settings {', '.join(sorted(self.unknown))}; ignored")
        self.truncated, self.unknown = 0, set()

    # On all processes.

    def _decode(self, generations: Sequence[Generation]) -> list[Completion]:
        """The completion of every generation; those with the same options are decoded together."""
        alike: dict[tuple, list[int]] = {}
        for place, generation in enumerate(generations):
            alike.setdefault((generation.options, generation.end_ids), []).append(place)
        found: dict[int, Completion] = {}
        show = self.engine.is_main and sys.stderr.isatty()
        with tqdm(total=len(generations), desc="decoding", unit=" responses", disable=not show) as bar:
            for (options, end_ids), places in alike.items():
                mine = {n: generations[n] for n in places[self.engine.replica :: self.engine.replicas]}
                if not mine:
                    continue
                untils = [generation.until for generation in mine.values()]

                def stop(place: int, tokens: Sequence[int], untils: list = untils) -> bool:
                    return self._has_stop_string(tokens, untils[place])

                done = self.engine.decoder(end_ids).decode(
                    [generation.prompt for generation in mine.values()],
                    options,
                    batch_size=self.options.batch_size,
                    seed=self.options.seed,
                    keys=[generation.key for generation in mine.values()],
                    finished=lambda place, completion: bar.update(self.engine.replicas),
                    stop=stop,
                )
                found |= zip(mine, done, strict=True)
        found = self.engine.joined(found)
        return [found[place] for place in range(len(generations))]

    def _has_stop_string(self, tokens: Sequence[int], until: Sequence[str]) -> bool:
        if not until:
            return False
        text = self.text.decode(tokens)
        return any(stop in text for stop in until)

    def _score(self, continuations: Sequence[Continuation]) -> list[float]:
        return score_continuations(self.engine, self.noising, continuations, self.engine.config.data.seq_length)


def _say(warning: str) -> None:
    print(f"warning: {warning}", file=sys.stderr, flush=True)
