"""OpenAI's replies, as dictionaries: whole ones, chunks of a stream, errors."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from megatron_dtrpo.serving.answer import Answer, TokenScore


def error(message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None) -> dict:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(data: dict | str) -> str:
    """One event of a stream."""
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"


def usage(prompt_tokens: int, answers: Sequence[Answer]) -> dict:
    """``passes``, which is not OpenAI's: forward passes that the responses took part in."""
    written = sum(answer.count for answer in answers)
    total = {"prompt_tokens": prompt_tokens, "completion_tokens": written, "total_tokens": prompt_tokens + written}
    return total | {"passes": sum(answer.passes for answer in answers)}


class Reply:
    """The frame of one request's replies."""

    kind = name = ""

    def __init__(self, model: str):
        self.head = {"id": f"{self.name}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answers: Sequence[Answer], prompt_tokens: int) -> dict:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return self._framed(self.kind, choices) | {"usage": usage(prompt_tokens, answers)}

    def chunk(self, index: int, text: str, scores: list[TokenScore] | None, finish: str | None) -> dict:
        raise NotImplementedError

    def opening(self, index: int) -> list[dict]:
        """What a choice's stream begins with."""
        return []

    def usage_chunk(self, answers: Sequence[Answer], prompt_tokens: int) -> dict:
        return self.chunk_of([]) | {"usage": usage(prompt_tokens, answers)}

    def chunk_of(self, choices: list[dict]) -> dict:
        raise NotImplementedError

    def _choice(self, index: int, answer: Answer) -> dict:
        raise NotImplementedError

    def _framed(self, kind: str, choices: list[dict]) -> dict:
        return {"object": kind, **self.head, "choices": choices}


class CompletionReply(Reply):
    kind, name = "text_completion", "cmpl"

    def _choice(self, index: int, answer: Answer) -> dict:
        return self._part(index, answer.text, answer.scores if answer.scored else None, answer.finish)

    def _part(self, index: int, text: str, scores: list[TokenScore] | None, finish: str | None) -> dict:
        logprobs = None if scores is None else _columns(scores)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def chunk(self, index: int, text: str, scores: list[TokenScore] | None, finish: str | None) -> dict:
        return self.chunk_of([self._part(index, text, scores, finish)])

    def chunk_of(self, choices: list[dict]) -> dict:
        return self._framed(self.kind, choices)


class ChatReply(Reply):
    kind, name = "chat.completion", "chatcmpl"

    def _choice(self, index: int, answer: Answer) -> dict:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        scores = answer.scores if answer.scored else None
        return {"index": index, "message": message, "logprobs": _rows(scores), "finish_reason": answer.finish}

    def opening(self, index: int) -> list[dict]:
        return [self._delta(index, {"role": "assistant", "content": ""}, None, None)]

    def chunk(self, index: int, text: str, scores: list[TokenScore] | None, finish: str | None) -> dict:
        return self._delta(index, {"content": text} if text else {}, scores, finish)

    def _delta(self, index: int, delta: dict, scores: list[TokenScore] | None, finish: str | None) -> dict:
        return self.chunk_of([{"index": index, "delta": delta, "logprobs": _rows(scores), "finish_reason": finish}])

    def chunk_of(self, choices: list[dict]) -> dict:
        return self._framed("chat.completion.chunk", choices)


def _columns(scores: Sequence[TokenScore]) -> dict[str, list[Any]]:
    return {
        "tokens": [score.text for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        # Of the token that was written alone: no other is kept.
        "top_logprobs": [{score.text: score.logprob} for score in scores],
        "text_offset": [score.offset for score in scores],
    }


def _rows(scores: Sequence[TokenScore] | None) -> dict | None:
    if scores is None:
        return None
    rows: list[dict] = []
    for score in scores:
        row = {"token": score.text, "logprob": score.logprob, "bytes": list(score.text.encode("utf-8", "replace"))}
        rows.append({**row, "top_logprobs": []})
    return {"content": rows, "refusal": None}


def metrics(rows: Sequence[tuple[str, str, str, float]]) -> str:
    """Prometheus' text format. ``rows``: name, type, help, value."""
    lines = []
    for name, kind, words, value in rows:
        full = f"megatron_dtrpo_{name}"
        lines += [f"# HELP {full} {words}", f"# TYPE {full} {kind}", f"{full} {value:.15g}"]
    return "\n".join(lines) + "\n"
