"""For the tests of conversion: small Hugging Face folders, written by safetensors itself, and the tool's command."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dtrpo.checkpoint import folder as checkpoint_folder
from megatron_dtrpo.checkpoint import iterations
from megatron_dtrpo.cli import convert
from megatron_dtrpo.conversion import mapping
from megatron_dtrpo.conversion.to_megatron import ImportOptions, import_checkpoint
from megatron_dtrpo.conversion.torch_dist_reader import TorchDistReader
from tools.benchmarks.peers.qwen2_weights import megatron_from_qwen2

# Fast_dLLM_v2_7B's head layout: 28 query and 4 key/value heads. The vocabulary is no multiple of 128.
SHAPE = dict(layers=4, hidden=56, ffn=40, heads=28, groups=4, width=2, vocabulary=272)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MASK = "|<MASK>|"
FAST_DLLM, QWEN2 = "Fast_dLLM_QwenForCausalLM", "Qwen2ForCausalLM"
SDAR, A2D, QWEN3 = "SDARForCausalLM", "A2DQwen3LMHeadModel", "Qwen3ForCausalLM"
LLADA, DREAM, LLAMA = "LLaDAModelLM", "DreamModel", "LlamaForCausalLM"
MODEL_TYPES = {FAST_DLLM: "Fast_dLLM_Qwen", QWEN2: "qwen2", SDAR: "sdar", A2D: "a2d-qwen3", QWEN3: "qwen3"}
MODEL_TYPES |= {LLADA: "llada", DREAM: "Dream", LLAMA: "llama"}
LIKE_QWEN3 = (SDAR, A2D, QWEN3)  # norms of queries and keys, no biases
MASKS = {FAST_DLLM: MASK, QWEN2: MASK, SDAR: "<MASK>", A2D: "<MASK>", QWEN3: "<MASK>"}
MASKS |= {LLADA: "<|mdm_mask|>", DREAM: "<|mask|>", LLAMA: "<|mask|>"}
# Qwen2's names -> LLaDA's, which are OLMo's.
LLADA_NAMES = {
    "model.embed_tokens": "model.transformer.wte",
    "model.layers": "model.transformer.blocks",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.o_proj": "attn_out",
    "self_attn.": "",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
}


def random_weights(
    dtype=torch.float32, tied=False, seed=0, shape=None, architecture=FAST_DLLM
) -> dict[str, torch.Tensor]:
    """Name -> tensor of a model shaped as Qwen2 or Qwen3; values are small enough for a forward pass to mean
    something."""
    s = {**SHAPE, **(shape or {})}
    query, key = s["heads"] * s["width"], s["groups"] * s["width"]
    sizes = {"model.embed_tokens.weight": (s["vocabulary"], s["hidden"])}
    for n in range(s["layers"]):
        layer = f"model.layers.{n}."
        sizes |= {
            layer + "self_attn.q_proj.weight": (query, s["hidden"]),
            layer + "self_attn.q_proj.bias": (query,),
            layer + "self_attn.k_proj.weight": (key, s["hidden"]),
            layer + "self_attn.k_proj.bias": (key,),
            layer + "self_attn.v_proj.weight": (key, s["hidden"]),
            layer + "self_attn.v_proj.bias": (key,),
            layer + "self_attn.o_proj.weight": (s["hidden"], query),
            layer + "mlp.gate_proj.weight": (s["ffn"], s["hidden"]),
            layer + "mlp.up_proj.weight": (s["ffn"], s["hidden"]),
            layer + "mlp.down_proj.weight": (s["hidden"], s["ffn"]),
            layer + "input_layernorm.weight": (s["hidden"],),
            layer + "post_attention_layernorm.weight": (s["hidden"],),
        }
        if architecture in (*LIKE_QWEN3, LLAMA):
            sizes = {name: size for name, size in sizes.items() if not name.endswith("bias")}
        if architecture in LIKE_QWEN3:
            sizes |= {f"{layer}self_attn.{letter}_norm.weight": (s["width"],) for letter in "qk"}
    sizes["model.norm.weight"] = (s["hidden"],)
    if not tied:
        sizes["lm_head.weight"] = (s["vocabulary"], s["hidden"])
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in sizes.items():
        values = torch.randn(size, generator=generator) * 0.2
        weights[name] = (values + 1 if "norm" in name else values).to(dtype)
    if architecture == LLADA:
        return {as_llada(name): weight for name, weight in weights.items() if not name.endswith("bias")}
    return weights


def as_llada(name: str, back: bool = False) -> str:
    """LLaDA's name of a tensor of Qwen2's; or Qwen2's of LLaDA's."""
    if back:  # "ff_out" is the head outside of the layers, and a layer's own inside
        head, _, rest = name.partition(".blocks.")
        number, _, inner = rest.partition(".")
        within = {theirs: ours for ours, theirs in LLADA_NAMES.items() if theirs and "." not in theirs}
        within |= {f"{letter}_proj": f"self_attn.{letter}_proj" for letter in "qkv"}
        outside = {theirs: ours for ours, theirs in LLADA_NAMES.items() if "." in theirs}
        if rest:
            return f"model.layers.{number}.{within[inner.removesuffix('.weight')]}.weight"
        return f"{outside[head.removesuffix('.weight')]}.weight"
    for ours, theirs in LLADA_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def llada_config(tied: bool, dtype: torch.dtype, s: dict) -> dict:
    """The keys of LLaDA-8B-Instruct's config.json."""
    return {
        "activation_type": "silu",
        "alibi": False,
        "architectures": [LLADA],
        "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": s["hidden"],
        "embedding_size": s["vocabulary"],
        "include_bias": False,
        "include_qkv_bias": False,
        "layer_norm_type": "rms",
        "mask_token_id": 259,
        "max_sequence_length": 512,
        "mlp_hidden_size": s["ffn"],
        "model_type": "llada",
        "n_heads": s["heads"],
        "n_kv_heads": s["groups"],
        "n_layers": s["layers"],
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_theta": 500000.0,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": s["vocabulary"],
        "weight_tying": tied,
    }


def config(architecture=FAST_DLLM, tied=False, dtype=torch.float32, shape=None, **changes) -> dict:
    s = {**SHAPE, **(shape or {})}
    if architecture == LLADA:
        return {**llada_config(tied, dtype, s), **changes}
    values = {
        "architectures": [architecture],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": s["hidden"],
        "initializer_range": 0.02,
        "intermediate_size": s["ffn"],
        "max_position_embeddings": 512,
        "model_type": MODEL_TYPES[architecture],
        "num_attention_heads": s["heads"],
        "num_hidden_layers": s["layers"],
        "num_key_value_heads": s["groups"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_sliding_window": False,
        "vocab_size": s["vocabulary"],
    }
    if architecture == FAST_DLLM:
        values |= {
            "auto_map": {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.ForCausalLM"},
            "bd_size": 8,
            "conplemenrary_mask": True,
        }
    if architecture in LIKE_QWEN3:
        values |= {"attention_bias": False, "head_dim": s["width"]}
    if architecture == LLAMA:
        values |= {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "rope_scaling": None}
        for qwens in ("sliding_window", "use_sliding_window"):
            del values[qwens]
    if architecture == SDAR:
        values |= {"block_size": 4, "fuse_cross_entropy": True, "mask_token_id": 259}
    if architecture == DREAM:
        values |= {"mask_token_id": 259, "auto_map": {"AutoModel": "modeling_dream.DreamModel"}}
    return {**values, **changes}


def write_tokenizer(folder: Path, mask: bool, specials=SPECIALS, mask_token=MASK, kind="Qwen2Tokenizer") -> None:
    """Byte-level Qwen2 tokenizer without merges: 256 bytes, then the special tokens, then perhaps the mask token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}
    _dump(folder / "vocab.json", {letters[b]: b for b in range(256)})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = [*specials, *([mask_token] if mask else [])]
    description = {
        "added_tokens_decoder": {str(256 + i): {"content": token, **flags} for i, token in enumerate(added)},
        "additional_special_tokens": [mask_token] if mask else [],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": kind,
        "unk_token": None,
    }
    _dump(folder / "tokenizer_config.json", description)
    _dump(folder / "added_tokens.json", {token: 256 + i for i, token in enumerate(added)})
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )


def write_weights(folder: Path, weights: dict[str, torch.Tensor], shards=1) -> None:
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)  # not in the model's order: a layer's tensors lie in several shards
    index = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = {name: weights[name] for name in names[number::shards]}
        save_file(mine, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(mine, file)
    total = sum(w.nbytes for w in weights.values())
    _dump(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def write_folder(
    folder: Path,
    architecture=FAST_DLLM,
    dtype=torch.float32,
    tied=False,
    shards=1,
    mask=True,
    seed=0,
    shape=None,
    specials=SPECIALS,
    **changes,
) -> Path:
    """A complete folder; ``changes`` are made to its configuration."""
    folder.mkdir(parents=True)
    _dump(folder / "config.json", config(architecture, tied, dtype, shape, **changes))
    _dump(folder / "generation_config.json", {"eos_token_id": [258, 256], "temperature": 0.7})
    kind = "DreamTokenizer" if architecture == DREAM else "Qwen2Tokenizer"
    write_tokenizer(folder, mask, specials, MASKS[architecture], kind)
    write_weights(folder, random_weights(dtype, tied, seed, shape, architecture), shards)
    return folder


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def assert_same_weights(folder: Path, other: Path) -> None:
    """Equal to the last bit, by safetensors' own reader."""
    ours, theirs = read_weights(folder), read_weights(other)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert (weight.dtype, weight.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(weight.view(torch.uint8), theirs[name].view(torch.uint8)), name


def read_megatron(folder: Path, iteration: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of a Megatron checkpoint, unsharded, the vocabulary padded."""
    model = checkpoint_folder.load_model_config(folder)
    tensors = {}
    with TorchDistReader(iterations.iteration_folder(folder, iteration)) as reader:
        for tensor in mapping.megatron_tensors(model, model.vocab_size):
            tensors[tensor.key] = torch.empty(tensor.shape, dtype=reader.dtype(tensor.key, tensor.layer))
            reader.read_rows(tensor.key, tensor.layer, 0, tensors[tensor.key])
    return tensors


def assert_same_model(megatron: Path, folder: Path, iteration: int = 0, padding_is_zero: bool = True) -> None:
    """A Megatron checkpoint holds what the oracle makes of the Hugging Face folder's weights, and no more."""
    model, found = checkpoint_folder.load_model_config(megatron), read_megatron(megatron, iteration)
    weights = read_weights(folder)
    if model.family == "llada":
        weights = {as_llada(name, back=True): weight for name, weight in weights.items()}
    expected = megatron_from_qwen2(
        weights,
        model.num_attention_heads,
        model.num_query_groups,
        tied=not model.untie_embeddings_and_output_weights,
    )
    sharded_key = {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }
    for name, tensor in expected.items():
        for theirs, key in sharded_key.items():
            name = name.replace(theirs, key)
        value = found.pop(name)
        assert torch.equal(value[: len(tensor)], tensor), name
        assert not (padding_is_zero and value[len(tensor) :].any()), f"padding of {name}"
    assert not found


def checksums(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.is_file()}


def _dump(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


# Fixtures: a test module takes them over, `good = folders.good`.
@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A complete folder that no test changes."""
    return write_folder(tmp_path_factory.mktemp("good") / "hf", shards=3)


@pytest.fixture
def source(good, tmp_path):
    """A copy of it to damage."""
    shutil.copytree(good, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture(scope="module")
def good_megatron(good, tmp_path_factory):
    """The same, imported."""
    folder = tmp_path_factory.mktemp("good_megatron") / "megatron"
    import_checkpoint(good, folder, ImportOptions(progress=False))
    return folder


def run_tool(capsys, *words) -> tuple[int, str]:
    """Runs `megatron-dtrpo convert` in this process. Returns its exit status and what it said on stderr."""
    status = convert.main([str(word) for word in words])
    return status, capsys.readouterr().err


def refused(capsys, expected: str, *words) -> None:
    """The command fails with one line that holds ``expected``."""
    status, printed = run_tool(capsys, *words)
    assert status == 2, printed
    errors = [line for line in printed.splitlines() if not line.startswith("import:")]
    assert len(errors) == 1 and errors[0].startswith("error: "), printed
    assert expected in errors[0]


def import_refused(capsys, source, expected: str, *flags) -> None:
    """Importing ``source`` fails so, and leaves nothing behind."""
    before = sorted(source.parent.iterdir())
    refused(capsys, expected, "import", "--hf-path", source, "--megatron-path", source.parent / "out", *flags)
    assert sorted(source.parent.iterdir()) == before
