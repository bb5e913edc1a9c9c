"""The packed layout: what one forward pass sees, and the one predicate that says who sees whom.

A *document* is a prompt with its one (SFT) or two (preference) responses. Blocks of ``B`` tokens tile prompt and
response together; the block the prompt ends in belongs to the response. A document is laid out as

    [ prompt's full blocks, clean ]                                                                 branch 0, view 0
    [ prompt tail + response 1, clean, without its last block ][ the same, noisy ] x K views         branch 1
    [ prompt tail + response 2, clean, without its last block ][ the same, noisy ] x K views         branch 2

so every run of tokens starts and ends on a block boundary, the prompt is computed once for both responses, and
nothing is computed that no prediction reads: the last clean block has no successor, and an unmasked noisy block of
the prompt would repeat its clean one. A view may hold some of the blocks only: each block has its own number of views.
The noisy copy of the last block is filled with ``[MASK]`` after the end token, as the decoder sees it; or shows tokens
there that the decoder saw before an earlier end token threw them away.

With the block size `FULL` prompt and response are one block, as long as they are: full attention. Nothing is clean, and
the prompt, which sees what is masked behind it, is repeated in each view:

    [ prompt + response 1, noisy ] x K views                                                         branch 1
    [ prompt + response 2, noisy ] x K views                                                         branch 2

A response may be several *turns* of the assistant with text between them that it reads and does not write, as the reply
of a tool. Each turn then is what a response of its own would be after everything before it: its blocks have noisy
copies, in which later text is ``[MASK]``, and a block that two turns share has a copy for each. The clean run is one.
Under full attention a turn's views end where it ends.

Legend: P prompt tokens, R response tokens, B block size, n response blocks, K noisy views, S packed tokens,
N targets. Nothing here touches a device, a process group or global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dtrpo.config.blocks import FULL, grain
from megatron_dtrpo.rounding import ceil_divide

CLEAN = 0  # the view number of clean tokens
PADDING_DOCUMENT = -1


@dataclass(frozen=True)
class Blocks:
    """Where one response lies on the block grid. Positions are absolute: the prompt is ``0 .. P-1``."""

    prompt_length: int
    response_length: int
    block_size: int

    @property
    def first(self) -> int:
        """The first response block: the one the prompt ends in, or the next if the prompt fills its last block."""
        return self.prompt_length // self.block_size

    @property
    def count(self) -> int:
        """n, the number of blocks that hold at least one response token."""
        return ceil_divide(self.prompt_length + self.response_length, self.block_size) - self.first

    @property
    def start(self) -> int:
        """The position of the first token of the first response block."""
        return self.first * self.block_size

    def is_response(self) -> Tensor:
        """Bool ``[n, B]``: which places of the response blocks hold response tokens, its end token included."""
        position = torch.arange(self.start, self.start + self.count * self.block_size)
        is_response = (position >= self.prompt_length) & (position < self.prompt_length + self.response_length)
        return is_response.view(self.count, self.block_size)

    def place(self, values: Tensor) -> Tensor:
        """One value per response token, int64 ``[R]``, to where the tokens lie: ``[n, B]``, 0 elsewhere."""
        placed = values.new_zeros(self.count, self.block_size)
        placed[self.is_response()] = values
        return placed

    def put(self, grid: Tensor, place: Tensor, values: Tensor) -> None:
        """Writes ``values [d]`` into ``grid [n, B]`` at places int64 ``[d]`` of the response, counted from 0; they may
        lie behind its end, in its last block."""
        grid.view(-1)[self.prompt_length - self.start + place] = values

    def maskable(self, block_start: str | None) -> Tensor:
        """Bool ``[n, B]``: the response tokens that noise may mask.

        With ``block_start="clean"`` the first token of a block is a decoding step of its own, read from the clean
        pass, and stays visible in every noisy view. None: as ``"noisy"``, see `lay_out`.
        """
        maskable = self.is_response()
        if block_start == "clean":
            maskable[:, 0] = False
        return maskable


class Coordinates(NamedTuple):
    """Where a packed token belongs: four int tensors of one shape ``[...]``."""

    document: Tensor
    branch: Tensor
    view: Tensor
    block: Tensor

    def at(self, index) -> Coordinates:
        return Coordinates(*(field[index] for field in self))

    def map(self, function) -> Coordinates:
        """With ``function`` applied to each field."""
        return Coordinates(*(function(field) for field in self))


def visible(query: Coordinates, key: Coordinates) -> Tensor:
    """The whole attention mask: may ``query`` attend to ``key``? Shapes broadcast; plain ``&`` and ``|`` only, so
    that FlexAttention can trace it.

    A clean query sees the clean keys of blocks up to its own; a noisy query sees the clean keys of the blocks before
    its own, and its own block in its own view. Branch 0, the prompt, is seen by every branch of its document.
    """
    same_document = query.document == key.document
    shared = (key.branch == 0) | (key.branch == query.branch)
    history = (key.view == CLEAN) & (key.block < query.block)
    own_block = (key.view == query.view) & (key.block == query.block)
    return same_document & shared & (history | own_block)


@dataclass
class PackedSequence:
    """Tokens of one or more documents in the packed layout, and the predictions that are read from it.

    ``block_size``: tokens of a block; 1 where blocks have different lengths, under full attention.
    ``tokens, document, branch, view, block, position``: int64 ``[S]``. The prediction of ``target_token`` is read from
    the hidden state at packed row ``target_row`` and counts with ``target_weight``. It belongs to ``target_response``,
    numbered through the sequence, lies in ``target_block`` of its document, and is a part of decoding step
    ``target_step``: the recorded one or, where no decoding was recorded, 0 for a block's first token that is read from
    the clean pass and else the number of its view. All int64 ``[N]``, weights float64.
    """

    block_size: int
    responses: int
    tokens: Tensor
    document: Tensor
    branch: Tensor
    view: Tensor
    block: Tensor
    position: Tensor
    target_row: Tensor
    target_token: Tensor
    target_weight: Tensor
    target_response: Tensor
    target_block: Tensor
    target_step: Tensor

    def __len__(self) -> int:
        return self.tokens.numel()

    def coordinates(self) -> Coordinates:
        """Token coordinates, each ``[S]``."""
        return Coordinates(self.document, self.branch, self.view, self.block)

    def map_tensors(self, function) -> PackedSequence:
        """A copy with ``function`` applied to every tensor (to move it to a device, say)."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(t) for name, t in tensors.items() if isinstance(t, Tensor)})


Turns = Sequence[tuple[int, int]]  # first and last plus one of a response's tokens that the assistant writes


def runs(coordinates: Coordinates) -> tuple[Coordinates, Tensor]:
    """Neighbouring tokens (of ``[S]``) that share all their coordinates see and are seen alike: the coordinates of each
    such run, ``[m]``, and how many tokens it has, int64 ``[m]``."""
    fields = torch.stack(coordinates)
    length = fields.shape[1]
    inner = (fields[:, 1:] != fields[:, :-1]).any(0).nonzero().squeeze(1) + 1
    start = torch.cat([inner.new_zeros(min(length, 1)), inner])
    return coordinates.at(start), start.diff(append=start.new_tensor([length]))


def turn_blocks(prompt_length: int, turns: Turns, block_size: int) -> list[Blocks]:
    """The blocks of each turn, everything before it being its prompt. With `FULL` one block for each, as wide as prompt
    and response together, whose places behind the turn are not laid out."""
    width = block_size or prompt_length + turns[-1][1]
    return [Blocks(prompt_length + begin, end - begin, width) for begin, end in turns]


def packed_length(prompt_length, response_lengths: Sequence, block_size: int, views: int, copies: Sequence = ()):
    """Packed tokens of one document; works on ints and, elementwise, on arrays (one per response in the sequence).
    ``copies``: per response the number of its noisy blocks, where not every block has ``views``; with `FULL` of its
    noisy tokens."""
    if block_size == FULL:
        whole = [views * (prompt_length + length) for length in response_lengths]
        return sum(copies if len(copies) else whole)
    first = prompt_length // block_size
    total = first * block_size
    for number, length in enumerate(response_lengths):
        count = ceil_divide(prompt_length + length, block_size) - first
        noisy = copies[number] if len(copies) else views * count
        total = total + (count - 1 + noisy) * block_size
    return total


def lay_out(
    prompt: Tensor,
    responses: Sequence[Tensor],
    masked: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    block_size: int,
    mask_id: int,
    block_start: str | None,
    shift: int = 1,
    behind: Sequence[tuple[Tensor, Tensor]] = (),
    every_step: bool = False,
    turns: Sequence[Turns] | None = None,
    steps: Sequence[Tensor] = (),
) -> PackedSequence:
    """Lays out one document.

    Args:
        prompt: int64 ``[P]``, P >= 1.
        responses: int64 ``[R]`` each, R >= 1, the end token included.
        masked: per response bool ``[K, n, B]``: the tokens that each noisy view hides; n blocks in all turns.
        weight: per response float ``[K, n, B]``: the weight of predicting a token from its noisy view; tokens of
            weight 0 are not read.
        block_size: B, or `FULL`; then B is all of P + R, n is 1 for each turn, and ``block_start`` None.
        block_start: ``"clean"`` reads the first token of a block from the clean pass, weight 1, once for all views;
            ``"noisy"`` reads it, as any other token, from the row before it in its own view, or from the prompt
            where the block before is all prompt. None with ``shift`` 0, where there is nothing to choose.
        shift: 1 where a token is predicted by the row before it, 0 where by its own row (`Family.prediction_shift`).
        behind: per response places, counted from the response's first token, and ids, int64 ``[d]`` each, of tokens
            behind its end that ``masked`` shows in some view.
        every_step: leaves out the noisy copies of blocks that nothing is read from; not with ``block_start="noisy"``.
        turns: per response, the parts that the assistant writes, in order, the last up to its end; default: all of it.
        steps: per response, of one turn each, int64 ``[n, B]``: the recorded step that wrote each token.
    """
    P = prompt.numel()
    parts, targets = [], []
    prompt_full = 0 if block_size == FULL else P // block_size * block_size
    parts.append(_run(prompt[:prompt_full], 0, CLEAN, torch.arange(prompt_full)))
    length = prompt_full
    for r, (response, hidden, w) in enumerate(zip(responses, masked, weight, strict=True)):
        B = block_size or P + response.numel()
        whole = Blocks(P, response.numel(), B)
        end = whole.start + whole.count * B
        tokens = torch.full((end - whole.start,), mask_id, dtype=torch.long)
        tail = P - whole.start
        tokens[:tail] = prompt[prompt_full:]
        tokens[tail : tail + response.numel()] = response
        if behind:
            whole.put(tokens, *behind[r])

        clean_row = torch.arange(end)  # packed row of a position's clean copy; the prompt's rows are its positions
        clean_row[whole.start :] += length - whole.start
        parts.append(_run(tokens[:-B], r + 1, CLEAN, torch.arange(whole.start, end - B)))
        length += tokens.numel() - B
        views = hidden.shape[0]
        before = 0  # blocks of the turns before
        spans = [(0, response.numel())] if turns is None else turns[r]
        for number, blocks in enumerate(turn_blocks(P, spans, block_size)):
            position = torch.arange(blocks.start, blocks.start + blocks.count * B)
            written = tokens[position - whole.start]
            if not behind:  # otherwise the response is one turn, and what lies behind its end was seen
                written[blocks.prompt_length + blocks.response_length - blocks.start :] = mask_id
            own = slice(before, before + blocks.count)
            before += blocks.count
            if block_start == "clean":
                starts = position[::B][position[::B] >= blocks.prompt_length]
                ones = torch.ones(starts.numel(), dtype=torch.float64)
                step = steps[r].flatten()[starts - blocks.start] if len(steps) else torch.zeros_like(starts)
                targets.append((clean_row[starts - 1], written[starts - blocks.start], ones, r, starts // B, step))

            for k in range(views):
                weights = w[k, own].flatten()
                laid_out = w[k, own].any(1) if every_step else torch.ones(blocks.count, dtype=torch.bool)
                kept = laid_out.repeat_interleave(B)
                if block_size == FULL:
                    kept &= position < blocks.prompt_length + blocks.response_length
                noisy = written.masked_fill(hidden[k, own].flatten(), mask_id)
                parts.append(_run(noisy[kept], r + 1, number * views + k + 1, position[kept]))
                read = weights.nonzero().squeeze(1)
                # What lies before the turn's first block is clean.
                row = length - 1 + kept.cumsum(0)
                source = read - shift
                rows = torch.where(source < 0, clean_row[blocks.start - 1], row[source])
                step = steps[r].flatten()[read] if len(steps) else torch.full_like(read, k + 1)
                targets.append((rows, written[read], weights[read].double(), r, position[read] // B, step))
                length += int(kept.sum())

    tokens, branch, view, position = (torch.cat(field) for field in zip(*parts, strict=True))
    target_rows, target_tokens, target_weights, response_ids, target_blocks, target_steps = zip(*targets, strict=True)
    return PackedSequence(
        block_size=grain(block_size),
        responses=len(responses),
        tokens=tokens,
        document=torch.zeros_like(tokens),
        branch=branch,
        view=view,
        block=torch.zeros_like(position) if block_size == FULL else position // block_size,
        position=position,
        target_row=torch.cat(target_rows),
        target_token=torch.cat(target_tokens),
        target_weight=torch.cat(target_weights),
        target_response=torch.cat([torch.full_like(t, r) for t, r in zip(target_rows, response_ids, strict=True)]),
        target_block=torch.cat(target_blocks),
        target_step=torch.cat(target_steps),
    )


def _run(tokens: Tensor, branch: int, view: int, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A run of tokens of one branch and view."""
    return tokens, torch.full_like(tokens, branch), torch.full_like(tokens, view), position


def concatenate(documents: Sequence[PackedSequence]) -> PackedSequence:
    """Packs documents one after the other into one sequence; they never see each other."""
    rows = responses = 0
    shifted = []
    for number, document in enumerate(documents):
        shifted.append(
            replace(
                document,
                document=document.document + number,
                target_row=document.target_row + rows,
                target_response=document.target_response + responses,
            )
        )
        rows += len(document)
        responses += document.responses
    merged = {
        f.name: torch.cat([getattr(d, f.name) for d in shifted])
        for f in fields(PackedSequence)
        if isinstance(getattr(documents[0], f.name), Tensor)
    }
    return PackedSequence(block_size=documents[0].block_size, responses=responses, **merged)


def share_prompt(documents: Sequence[PackedSequence]) -> PackedSequence:
    """Joins documents of one response each, all of the same prompt, into one document with a branch for every response,
    so that the prompt's full blocks are computed once. Every response keeps its views and weights."""
    names = ("tokens", "document", "branch", "view", "block", "position")
    shared = int((documents[0].branch == 0).sum())
    length, tokens, rows = shared, [[getattr(documents[0], name)[:shared] for name in names]], []
    for branch, document in enumerate(documents, start=1):
        own = replace(document, branch=torch.full_like(document.branch, branch))
        tokens.append([getattr(own, name)[shared:] for name in names])
        rows.append(
            torch.where(document.target_row < shared, document.target_row, document.target_row + length - shared)
        )
        length += len(document) - shared
    joined: dict[str, Any] = dict(zip(names, map(torch.cat, zip(*tokens, strict=True)), strict=True))
    for name in ("target_token", "target_weight", "target_block", "target_step"):
        joined[name] = torch.cat([getattr(document, name) for document in documents])
    joined["target_row"] = torch.cat(rows)
    joined["target_response"] = torch.cat([d.target_response + r for r, d in enumerate(documents)])
    return replace(documents[0], responses=len(documents), **joined)


def empty_sequence(block_size: int) -> PackedSequence:
    """No tokens, no predictions, no responses: to be padded."""
    nothing: dict[str, Any] = {
        f.name: torch.zeros(0, dtype=torch.long) for f in fields(PackedSequence) if f.name != "responses"
    }
    nothing |= {"block_size": block_size, "responses": 0, "target_weight": torch.zeros(0, dtype=torch.float64)}
    return PackedSequence(**nothing)


def pad_to(sequence: PackedSequence, length: int, pad_id: int) -> PackedSequence:
    """Appends padding up to ``length`` tokens. Each block of padding sees only itself, so it costs next to nothing
    where attention follows the mask. ``length`` is a multiple of the block size."""
    extra = length - len(sequence)
    if extra == 0:
        return sequence

    def extend(field: Tensor, values) -> Tensor:
        return torch.cat([field, torch.as_tensor(values, dtype=field.dtype).expand(extra)])

    return replace(
        sequence,
        tokens=extend(sequence.tokens, pad_id),
        document=extend(sequence.document, PADDING_DOCUMENT),
        branch=extend(sequence.branch, 0),
        view=extend(sequence.view, 1),  # a noisy view without clean history sees its own block only
        block=extend(sequence.block, torch.arange(extra) // sequence.block_size),
        position=extend(sequence.position, torch.arange(extra)),
    )
