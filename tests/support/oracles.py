"""Slow and obvious counterparts of the package, written from the mathematics and not from its code.

Nothing here imports `megatron_dtrpo`. Positions are absolute, the prompt is ``0 .. P-1`` and the block of position p is
``p // block_size``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM


class _WideRMSNorm(torch.nn.Module):
    """transformers' Qwen2RMSNorm computes in fp32 whatever its input; this one stays in the input's dtype."""

    def __init__(self, weight: torch.nn.Parameter, epsilon: float):
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.epsilon)


def qwen2(**changes: Any) -> Qwen2ForCausalLM:
    """A tiny Qwen2 with biases on q, k and v, every parameter random and far from a symmetric choice; ``changes``: of
    `_tiny`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM  # slow to import, and not every test needs it

    return _tiny(Qwen2Config, Qwen2ForCausalLM, **changes)


def qwen3(*, head_dim: int = 12, **changes: Any) -> Qwen3ForCausalLM:
    """As `qwen2`: norms of queries and keys, no biases, heads that are not hidden size / heads wide."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _tiny(Qwen3Config, Qwen3ForCausalLM, head_dim=head_dim, **changes)


def _tiny(
    config_class: type,
    model_class: type,
    *,
    vocab_size: int = 61,
    hidden_size: int = 32,
    ffn_hidden_size: int = 48,
    layers: int = 2,
    heads: int = 4,
    groups: int = 2,
    tied: bool = False,
    rotary_base: float = 10000.0,
    epsilon: float = 1e-6,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **own: Any,
) -> Any:
    """``own``: further settings of ``config_class``."""
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=ffn_hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        rms_norm_eps=epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": rotary_base},
        attn_implementation="sdpa",  # eager computes its softmax in fp32
        **own,
    )
    return _randomized(model_class(config), dtype, seed)


def llama(*, groups: int = 4, rotary_base: float = 500000.0, epsilon: float = 1e-5, **changes: Any) -> LlamaForCausalLM:
    """A tiny Llama as `qwen2`, without biases; the defaults are LLaDA's, which has no groups of heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _tiny(LlamaConfig, LlamaForCausalLM, groups=groups, rotary_base=rotary_base, epsilon=epsilon, **changes)


def _randomized(model, dtype: torch.dtype, seed: int):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    model = model.to(dtype).eval()
    if dtype == torch.float64:
        norms = [(parent, name) for parent in model.modules() for name, _ in parent.named_children() if "norm" in name]
        for parent, name in norms:
            setattr(parent, name, _WideRMSNorm(getattr(parent, name).weight, model.config.rms_norm_eps))
    return model


def full_logits(model: LlamaForCausalLM | Qwen2ForCausalLM, tokens: Tensor) -> Tensor:
    """Logits ``[S, V]`` of one sequence ``[S]`` whose tokens all see each other."""
    return qwen2_logits(model, tokens, torch.arange(len(tokens)), torch.ones(len(tokens), len(tokens)).bool())


def full_hidden(model: LlamaForCausalLM | Qwen2ForCausalLM, tokens: Tensor) -> Tensor:
    """Hidden states ``[S, h]`` of one sequence ``[S]`` whose tokens all see each other."""
    zeros = torch.zeros(1, 1, len(tokens), len(tokens), dtype=model.dtype)  # additive: nothing is hidden
    return model.model(input_ids=tokens[None], attention_mask=zeros, use_cache=False).last_hidden_state[0]


def llada_log_likelihood(log_probs, length: int) -> float:
    """The mean over its random masks that LLaDA's published likelihood code estimates: k uniform on 1 .. L, k of the
    answer's L tokens masked, each set of k alike; the cross-entropy of the masked ones over the share k / L, summed.
    ``log_probs``: from the masked places to the log-probability of the token at each."""
    total = 0.0
    for k in range(1, length + 1):
        sets = list(itertools.combinations(range(length), k))
        total += sum(sum(log_probs(masked).values()) / (k / length) for masked in sets) / len(sets)
    return total / length


def decode_as_llada(
    model: LlamaForCausalLM | Qwen2ForCausalLM,
    prompt: Sequence[int],
    *,
    gen_length: int,
    block_length: int,
    steps: int | None = None,
    threshold: float | None = None,
    cache: str | None = None,
    mask_id: int,
    shift: int = 0,
    vocab_size: int | None = None,
) -> tuple[list[int], list[int]]:
    """LLaDA's greedy sampling by low confidence, of a model of prediction ``shift``: the response, and which pass wrote
    each token. ``steps``: of a block; None: as many as it has tokens. ``threshold``: Fast-dLLM's instead, all that are
    as sure, and always the surest. ``cache``: its ``prefix`` or ``dual``."""
    tokens = list(prompt) + [mask_id] * gen_length
    written: dict[int, int] = {}
    passes = 0
    for start in range(len(prompt), len(tokens), block_length):
        block = range(start, min(start + block_length, len(tokens)))
        number = steps or len(block)
        step, snapshot = 0, None
        while masked := [p for p in block if p not in written]:
            quota = len(block) // number + (step < len(block) % number)
            step += 1
            if quota == 0:
                continue
            if snapshot is None or cache is None:
                snapshot = list(tokens)
                probability = _probabilities(model, tokens, mask_id, shift, vocab_size)
            else:
                probability = _probabilities_beside(model, tokens, snapshot, block, cache, mask_id, shift, vocab_size)
            order = sorted(masked, key=lambda p: -probability[p].max())
            if threshold is not None:
                quota = max(1, sum(float(probability[p].max()) >= threshold for p in masked))
            for p in order[:quota]:
                tokens[p], written[p] = int(probability[p].argmax()), passes
            passes += 1
    return tokens[len(prompt) :], [written[p] for p in range(len(prompt), len(tokens))]


# How sure Dream's algorithms are of a place: of the probabilities ``[V]`` of its tokens.
DREAM = {
    "maskgit_plus": lambda p: p.max(),
    "topk_margin": lambda p: p.sort().values[-1] - p.sort().values[-2],
    "entropy": lambda p: (p[p > 0] * p[p > 0].log()).sum(),
}


def decode_as_dream(
    model: LlamaForCausalLM | Qwen2ForCausalLM,
    prompt: Sequence[int],
    *,
    gen_length: int,
    steps: int,
    mask_id: int,
    shift: int = 1,
    alg: str = "maskgit_plus",
    coin: Callable[[int, float], float] | None = None,
    block_length: int | None = None,
    cache: str | None = None,
    vocab_size: int | None = None,
) -> tuple[list[int], list[int]]:
    """Dream's greedy sampling, of a model of prediction ``shift``: as `decode_as_llada`.

    ``alg``: of `DREAM`, or ``origin``, which at time t writes a masked place p where ``coin(p, t)``, a fresh uniform
    number, is below the step's share. ``block_length`` and ``cache``: as Fast-dLLM has them, whose first step in a
    block, over everything, writes the block's first token and no other.
    """
    tokens = list(prompt) + [mask_id] * gen_length
    written: dict[int, int] = {}
    passes = 0
    time = torch.linspace(1, 1e-3, steps + 1)
    length = block_length or gen_length
    for start in range(len(prompt), len(tokens), length):
        block = range(start, min(start + length, len(tokens)))
        snapshot = None
        for step in range(steps):
            masked = [p for p in block if p not in written]
            share, is_last = 1 - time[step + 1] / time[step], step == steps - 1
            quota = len(masked) if is_last else int(len(masked) * share)
            if cache and step == 0:
                chosen = [start]
            elif alg == "origin":
                chosen = [p for p in masked if is_last or coin(p, float(time[step])) < share]
            else:
                chosen = masked if quota else []
            if not chosen:
                continue
            if snapshot is None or cache is None:
                snapshot = list(tokens)
                probability = _probabilities(model, tokens, mask_id, shift, vocab_size)
            else:
                probability = _probabilities_beside(model, tokens, snapshot, block, cache, mask_id, shift, vocab_size)
            if len(chosen) > quota and alg != "origin":
                chosen = sorted(chosen, key=lambda p: -DREAM[alg](probability[p]))[: max(1, quota)]
            for p in chosen:
                tokens[p], written[p] = int(probability[p].argmax()), passes
            passes += 1
    return tokens[len(prompt) :], [written[p] for p in range(len(prompt), len(tokens))]


def _probabilities(model, tokens: list[int], mask_id: int, shift: int, vocab_size: int | None = None) -> Tensor:
    """``[S, V]``: of the token at each position, from the row ``shift`` before it; the mask is never written. Rows from
    ``vocab_size`` on are no tokens."""
    return _as_read(full_logits(model, torch.tensor(tokens)), mask_id, shift, vocab_size)


def _as_read(logits: Tensor, mask_id: int, shift: int, vocab_size: int | None) -> Tensor:
    probability = torch.softmax(logits[:, :vocab_size], -1)
    probability[:, mask_id] = 0
    return torch.cat([probability[:shift], probability[: len(logits) - shift]])


def _probabilities_beside(
    model,
    tokens: list[int],
    snapshot: list[int],
    block: range,
    cache: str,
    mask_id: int,
    shift: int,
    vocab_size: int | None,
) -> Tensor:
    """As `_probabilities`, of Fast-dLLM's approximation: what is outside of the part that is computed anew, ``block``
    or with the prefix cache all from there on, is seen as it was when ``snapshot`` was computed whole."""
    length = len(tokens)
    fresh = range(block.start, length if cache == "prefix" else block.stop)
    position = torch.tensor([*range(length), *fresh])
    sees = torch.zeros(len(position), len(position), dtype=torch.bool)
    sees[:length, :length] = True
    sees[length:] = True
    sees[length:, fresh.start : fresh.stop] = False
    logits = qwen2_logits(model, torch.tensor(snapshot + [tokens[p] for p in fresh]), position, sees)
    placed = torch.full((length, logits.shape[1]), torch.nan, dtype=logits.dtype)
    placed[fresh.start : fresh.stop] = logits[length:]
    return _as_read(placed, mask_id, shift, vocab_size)


def decode_as_sdar(
    model: Qwen2ForCausalLM | Qwen3ForCausalLM,
    prompt: Sequence[int],
    *,
    total: int,
    block_size: int,
    steps: int,
    remasking: str,
    threshold: float,
    mask_id: int,
) -> tuple[list[int], list[int]]:
    """SDAR's greedy sampling to ``total`` positions, whole blocks: the response, and which pass wrote each token."""
    tokens, written, passes = list(prompt), {}, 0
    for start in range(len(prompt) // block_size * block_size, total, block_size):
        tokens += [mask_id] * (start + block_size - len(tokens))
        for step in range(steps):
            masked = [p for p in range(max(start, len(prompt)), len(tokens)) if p not in written]
            quota = block_size // steps + (step < block_size % steps)
            if not masked:
                break
            sees = block_causal(len(tokens), block_size)
            logits = qwen2_logits(model, torch.tensor(tokens), torch.arange(len(tokens)), sees)
            probability = _as_read(logits, mask_id, 0, None)
            surest = sorted(masked, key=lambda p: -probability[p].max())[:quota]
            high = [p for p in masked if probability[p].max() > threshold]
            chosen = {
                "sequential": masked[:quota],
                "low_confidence_static": surest,
                "low_confidence_dynamic": high if len(high) >= quota else surest,
            }[remasking]
            for p in chosen:
                tokens[p], written[p] = int(probability[p].argmax()), passes
            passes += 1
    return tokens[len(prompt) :], [written[p] for p in range(len(prompt), len(tokens))]


def qwen2_logits(
    model: LlamaForCausalLM | Qwen2ForCausalLM | Qwen3ForCausalLM, tokens: Tensor, position: Tensor, sees: Tensor
) -> Tensor:
    """Logits ``[S, V]`` of tokens ``[S]`` at positions ``[S]`` where query q attends to key k iff ``sees[q, k]``."""
    additive = torch.zeros(sees.shape, dtype=model.dtype).masked_fill(~sees, -torch.inf)
    output = model(
        input_ids=tokens[None], position_ids=position[None], attention_mask=additive[None, None], use_cache=False
    )
    return output.logits[0]


@dataclass
class PlainLayout:
    """Fast-dLLM v2's own layout of one response and one noisy view: ``[noisy | clean]``, each half the whole of prompt
    and response, filled up with ``[MASK]`` to whole blocks. ``tokens, position`` ``[2 L]``, ``sees`` ``[2 L, 2 L]``."""

    length: int
    tokens: Tensor
    position: Tensor
    sees: Tensor

    def noisy_row(self, position: int) -> int:
        return position

    def clean_row(self, position: int) -> int:
        return self.length + position


def plain_layout(
    prompt: Sequence[int], response: Sequence[int], masked: Collection[int], block_size: int, mask_id: int
) -> PlainLayout:
    """``masked``: the absolute positions that the noisy half hides."""
    clean = list(prompt) + list(response)
    while len(clean) % block_size != 0:
        clean.append(mask_id)
    length = len(clean)
    noisy = [mask_id if p in masked else clean[p] for p in range(length)]
    sees = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for q in range(length):
        for k in range(length):
            query_block, key_block = q // block_size, k // block_size
            sees[q, length + k] = key_block < query_block  # noisy -> clean of earlier blocks
            sees[q, k] = key_block == query_block  # noisy -> its own noisy block
            sees[length + q, length + k] = key_block <= query_block  # clean -> clean up to its own block
    return PlainLayout(length, torch.tensor(noisy + clean), torch.tensor(list(range(length)) * 2), sees)


def read_from(position: int, block_size: int, block_start: str | None) -> tuple[str, int]:
    """The half and the position in `PlainLayout` whose logits predict the token at ``position``. ``block_start`` None:
    of a model that predicts every token at its own row."""
    if block_start is None:
        return "noisy", position
    if position % block_size == 0 and block_start == "clean":
        return "clean", position - 1
    return "noisy", position - 1


def sees_by_description(document: Tensor, branch: Tensor, view: Tensor, position: Tensor, block_size: int) -> Tensor:
    """Who sees whom in the packed layout, row by row: bool ``[S, S]``. View 0 is clean, branch 0 the shared prompt."""
    rows = list(zip(document.tolist(), branch.tolist(), view.tolist(), position.tolist(), strict=True))
    sees = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    for q, (q_document, q_branch, q_view, q_position) in enumerate(rows):
        for k, (k_document, k_branch, k_view, k_position) in enumerate(rows):
            if q_document != k_document or k_branch not in (0, q_branch):
                continue
            q_block, k_block = q_position // block_size, k_position // block_size
            if q_view == 0:
                sees[q, k] = k_view == 0 and k_block <= q_block
            elif k_view == 0:
                sees[q, k] = k_block < q_block
            else:
                sees[q, k] = k_view == q_view and k_block == q_block
    return sees


def dense_attention(query: Tensor, key: Tensor, value: Tensor, sees: Tensor, scale: float) -> Tensor:
    """Softmax attention head by head: ``query [S, heads, d]``, ``key, value [S, groups, d]`` -> ``[S, heads, d]``."""
    per_group = query.shape[1] // key.shape[1]
    heads = []
    for h in range(query.shape[1]):
        g = h // per_group
        scores = (query[:, h] @ key[:, g].T * scale).masked_fill(~sees, -torch.inf)
        exponential = torch.exp(scores - scores.max(1, keepdim=True).values)
        heads.append(exponential / exponential.sum(1, keepdim=True) @ value[:, g])
    return torch.stack(heads, 1)


def split_for_tensor_parallel(name: str, full: Tensor, ranks: int) -> list[Tensor]:
    """Each tensor-parallel rank's part of an unsharded megatron-core parameter of a Qwen2-shaped model."""
    if "norm" in name:
        return [full.clone() for _ in range(ranks)]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):  # row-parallel: inputs are divided
        return list(full.chunk(ranks, dim=1))
    if name.endswith("linear_fc1.weight"):  # every rank has its part of the gate above its part of up
        gate, up = full.chunk(2)
        return [torch.cat(pair) for pair in zip(gate.chunk(ranks), up.chunk(ranks), strict=True)]
    return list(full.chunk(ranks))  # vocabulary, or outputs (whole key/value groups)


def join_tensor_parallel(name: str, parts: Sequence[Tensor]) -> Tensor:
    """The inverse of `split_for_tensor_parallel`."""
    if "norm" in name:
        for part in parts:
            assert torch.equal(part, parts[0]), f"{name} differs between tensor-parallel ranks"
        return parts[0]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return torch.cat(list(parts), dim=1)
    if name.endswith("linear_fc1.weight"):
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(list(parts))


SHARP = (0.5, 0.9, 0.97, 0.99, 0.998, 0.999, 0.9999)  # probabilities of a target


FEW = 5  # tokens of `padded_logits`


def padded_logits() -> tuple[Tensor, Tensor]:
    """Logits ``[8, 12]`` in float64, the padding's the largest, and targets ``[8]`` among the tokens."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    logits[:, FEW:] += 9
    return logits, torch.arange(8) % FEW


def sharp_logits(probability: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[5, 16]`` whose targets ``[5]``, one of them the first token and one the last, have about this
    probability; and the gradient of the sum of their log-probabilities in float64, ``[5, 16]``."""
    generator = torch.Generator().manual_seed(3)
    target = torch.tensor([0, 3, 8, 11, 15])
    logits = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    rest = logits.scatter(1, target[:, None], -torch.inf).logsumexp(1)
    wanted = rest + torch.tensor(probability / (1 - probability), dtype=torch.float64).log()
    logits = logits.scatter(1, target[:, None], wanted[:, None]).to(dtype)
    wide = logits.double().requires_grad_()
    torch.log_softmax(wide, 1).gather(1, target[:, None]).sum().backward()
    return logits, target, wide.grad


def block_causal(tokens: int, block_size: int) -> Tensor:
    """Bool ``[tokens, tokens]``: who sees whom among clean tokens, and where the last block is being written."""
    block = torch.arange(tokens) // block_size
    return block.unsqueeze(1) >= block.unsqueeze(0)


def decode_without_cache(
    model: Qwen2ForCausalLM | Qwen3ForCausalLM,
    prompt: Sequence[int],
    *,
    block_size: int,
    small_block_size: int,
    threshold: float,
    max_new_tokens: int,
    mask_id: int,
    end_id: int,
    vocab_size: int,
    sub_block_cache: str | None = None,
    shift: int = 1,
) -> tuple[list[int], list[int]]:
    """Greedy block-diffusion decoding that recomputes everything in every step: the response, and which step wrote each
    token.

    With ``sub_block_cache`` a step inside a sub-block whose first token is known runs that sub-block's tokens only
    (``dual``), or what follows them too (``prefix``); the rest of the block is seen as it was in the last step that
    ran the whole block. ``shift`` 0: a token is predicted at its own row, and a block's first token is written as the
    others are.
    """
    tokens, written = list(prompt), {}
    last = len(prompt) + max_new_tokens

    def proposals(positions: list[int], snapshot: list[int] | None) -> dict[int, tuple[int, float]]:
        length = len(tokens)
        if snapshot is None:
            logits = qwen2_logits(model, torch.tensor(tokens), torch.arange(length), block_causal(length, block_size))
            rows = {p: logits[p - shift] for p in positions}
        else:  # [earlier blocks, the block as it was, the sub-block as it is]
            start = positions[0] // small_block_size * small_block_size
            fresh = range(start, length if sub_block_cache == "prefix" else start + small_block_size)
            position = torch.tensor([*range(length), *fresh])
            sees = torch.zeros(len(position), len(position), dtype=torch.bool)
            sees[:length, :length] = block_causal(length, block_size)
            sees[length:, :length] = True
            sees[length:, fresh.start : fresh.stop] = False
            sees[length:, length:] = True
            now = tokens[: length - block_size] + snapshot + [tokens[p] for p in fresh]
            logits = qwen2_logits(model, torch.tensor(now), position, sees)
            rows = {p: logits[length + p - shift - start] for p in positions}
        found = {}
        for p, row in rows.items():
            row = row[:vocab_size]  # below are rows that pad the vocabulary
            allowed = row.clone()
            allowed[mask_id] = -torch.inf
            token = int(allowed.argmax())
            found[p] = (token, float(torch.softmax(row, 0)[token]))
        return found

    step, block = 0, len(prompt) // block_size * block_size
    while True:
        # With shift 1 the first token of a block is read from the clean pass before it.
        if shift == 1 and block == len(tokens) and block > 0:
            logits = qwen2_logits(model, torch.tensor(tokens), torch.arange(block), block_causal(block, block_size))[-1]
            logits[mask_id] = logits[vocab_size:] = -torch.inf
            tokens.append(int(logits.argmax()))
            written[block] = step
            step += 1
        tokens += [mask_id] * (block + block_size - len(tokens))
        snapshot, entered = None, None
        while True:
            ends = [p for p in written if tokens[p] == end_id]
            stop = min([block + block_size, last, *ends])
            for p in range(stop + 1, len(tokens)):
                if ends:
                    tokens[p] = mask_id
                    written.pop(p, None)
            masked = [p for p in range(max(block, len(prompt)), stop) if p not in written]
            if not masked:
                break
            start = masked[0] // small_block_size * small_block_size
            asked = [p for p in masked if p < start + small_block_size]
            if not sub_block_cache or snapshot is None or asked[0] - shift < start or start != entered:
                snapshot, entered = tokens[block:], start
                found = proposals(asked, None)
            else:
                found = proposals(asked, snapshot)
            surest = max(asked, key=lambda p: found[p][1])
            for p in asked:
                if p == surest or found[p][1] > threshold:
                    tokens[p] = found[p][0]
                    written[p] = step
            step += 1
        block += block_size
        if ends or block >= last:
            response = range(len(prompt), stop + 1 if ends else stop)
            return [tokens[p] for p in response], [written[p] for p in response]
