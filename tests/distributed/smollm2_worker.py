"""``smollm2_worker.py GGUF FOLDER``: a Llama-shaped GGUF file as a Qwen2 folder with zero q, k and v biases."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM


def main(gguf: str, folder: str) -> None:
    where = {"pretrained_model_name_or_path": str(Path(gguf).parent), "gguf_file": Path(gguf).name}
    llama = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "bos_token_id",
        "eos_token_id",
    )
    config = Qwen2Config(**{key: getattr(llama.config, key) for key in keys}, tie_word_embeddings=True)
    qwen2 = Qwen2ForCausalLM(config)
    missing, unexpected = qwen2.load_state_dict(llama.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("proj.bias") for name in missing), (missing, unexpected)
    with torch.no_grad():
        for name in missing:
            qwen2.get_parameter(name).zero_()
    qwen2.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
