"""Trains the quickstart's SentencePiece tokenizer on JSONL data.

Three settings matter to a block-diffusion model:

* `[MASK]` is a piece of its own: the model reads it wherever a token has not been decided yet.
* No dummy prefix and no whitespace clean-up: a prompt and its completion tokenise independently, and the two lists
  joined are the text joined.
* Digits are split, so that arithmetic is done on digits. Bytes are the fallback, so that no text is unknown; they
  take 256 of the vocabulary.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from megatron_dtrpo.errors import UserError

FIELDS = ("prompt", "completion", "chosen", "rejected")
MASK = "[MASK]"


def read_texts(paths: list[Path]) -> Iterator[str]:
    """Every text in the fields we train on, of every line of every file."""
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
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


def train(texts: list[str], vocab_size: int) -> bytes:
    """The SentencePiece model, as it is written to a file."""
    if not texts:
        raise UserError(f"--input: no text in any of the fields {', '.join(FIELDS)}")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            user_defined_symbols=[MASK],
            split_digits=True,
            byte_fallback=True,
            character_coverage=1.0,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        # Too small or too large for the text. Behind its source location, SentencePiece says what would do.
        raise UserError(f"--vocab-size {vocab_size}: {str(error).split('] ')[-1].strip()}") from error
    return model.getvalue()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help="JSONL files")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets tokenizer.model")
    parser.add_argument("--vocab-size", type=int, default=448, metavar="N", help="pieces in all (default: 448)")
    options = parser.parse_args(arguments)
    try:
        model = train(list(read_texts(options.input)), options.vocab_size)
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "tokenizer.model").write_bytes(model)
    except OSError as error:
        print(f"error: --output {options.output}: {error.strerror}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output / 'tokenizer.model'}: {options.vocab_size} pieces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
