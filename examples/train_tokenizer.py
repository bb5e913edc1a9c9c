"""Trains the quickstart's tokenizer on JSONL data, and writes it as a Hugging Face folder.

It is Qwen2's tokenizer with a vocabulary of its own, because the model is Qwen2's too. Three things matter to a
block-diffusion model:

* `[MASK]` is a token of its own: the model reads it wherever a token has not been decided yet.
* Nothing is added before a text, and no white space is cleaned up: a prompt and its completion tokenize independently,
  and the two lists joined are the text joined.
* Digits are split, so that arithmetic is done on digits. Every byte is a token, so that no text is unknown; they take
  256 of the vocabulary.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from megatron_dtrpo.errors import UserError

FIELDS = ("prompt", "completion", "chosen", "rejected")
END, MASK = "<|endoftext|>", "[MASK]"
SMALLEST = 256 + 2  # bytes and special tokens


def read_texts(paths: list[Path]) -> Iterator[str]:
    """Every text in the fields we train on, of every line of every file."""
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # not at U+2028, as str.splitlines does
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--input {path}: {getattr(error, 'strerror', None) or error}") from error
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON ({error.msg})") from error
            if not isinstance(record, dict):
                raise UserError(f"{path}:{number}: expected an object with the fields {', '.join(FIELDS)}")
            yield from (record[field] for field in FIELDS if isinstance(record.get(field), str) and record[field])


def train(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of at most ``vocab_size`` tokens."""
    if not texts:
        raise UserError(f"--input: no text in any of the fields {', '.join(FIELDS)}")
    if vocab_size < SMALLEST:
        raise UserError(f"--vocab-size {vocab_size}: it must be at least {SMALLEST}: 256 bytes, {END} and {MASK}")
    special = {"eos_token": END, "pad_token": END, "mask_token": MASK, "unk_token": None}
    untrained = Qwen2Tokenizer(vocab={}, merges=[], **special)
    return untrained.train_new_from_iterator(texts, vocab_size, show_progress=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help="JSONL files")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the tokenizer")
    parser.add_argument("--vocab-size", type=int, default=448, metavar="N", help="tokens at most (default: 448)")
    options = parser.parse_args(arguments)
    try:
        tokenizer = train(list(read_texts(options.input)), options.vocab_size)
        options.output.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(options.output)
    except OSError as error:
        print(f"error: --output {options.output}: {error.strerror}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: a tokenizer of {len(tokenizer)} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
