"""Messages between the host and the device: few, and they bring what was sent."""

from __future__ import annotations

import sys

import pytest
import torch

from megatron_dtrpo.config.settings import ModelSettings, ParallelSettings
from megatron_dtrpo.runtime import initialize
from megatron_dtrpo.runtime.transfer import send_together

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CPU = torch.device("cpu")


def test_what_is_sent_arrives():
    generator = torch.Generator().manual_seed(0)
    sent = [
        torch.arange(7),
        torch.rand(3, 2, generator=generator, dtype=torch.float64),
        torch.zeros(0, dtype=torch.float64),
        torch.tensor([[-1, 2**62]]),
    ]
    for found, given in zip(send_together(sent, CPU), sent, strict=True):
        assert found.dtype == given.dtype and torch.equal(found, given)
    for found, given in zip(send_together(sent, torch.device("meta")), sent, strict=True):
        assert (found.is_meta, found.shape, found.dtype) == (True, given.shape, given.dtype)
    with pytest.raises(RuntimeError):
        send_together([torch.zeros(3)], CPU)  # four bytes each


def test_a_decoding_pass_is_one_message_there_and_one_back(monkeypatch):
    initialize.start(ParallelSettings(), seed=1)
    try:
        from megatron_dtrpo.config.decoding import DecodingOptions
        from megatron_dtrpo.inference.decoder import BlockDecoder, Vocabulary
        from megatron_dtrpo.model.initialization import initialize_weights
        from megatron_dtrpo.model.provider import build_model

        settings = ModelSettings(
            num_layers=2,
            hidden_size=32,
            ffn_hidden_size=48,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=8,
            vocab_size=50,
            block_size=8,
        )
        model = build_model(settings, ParallelSettings())
        initialize_weights(model, 1)
        # FlexAttention, as on a GPU: SDPA plans prompts on the host.
        decoder = BlockDecoder(model, Vocabulary(50, 49, frozenset([48])), 8, 64, "flex")

        def counting(name: str, function, moves):
            def call(self, *args, **kwargs):
                here = sys._getframe(1).f_code.co_filename
                calls[name] += moves(*args, **kwargs) and ("/inference/" in here or here.endswith("transfer.py"))
                return function(self, *args, **kwargs)

            return call

        def to_a_device(*args, **kwargs) -> bool:
            return any(isinstance(a, torch.device) for a in (*args, *kwargs.values()))

        calls = {"there": 0, "back": 0, "passes": 0}
        model.register_forward_hook(lambda *_: calls.update(passes=calls["passes"] + 1))
        monkeypatch.setattr(torch.Tensor, "to", counting("there", torch.Tensor.to, to_a_device))
        monkeypatch.setattr(torch.Tensor, "cpu", counting("back", torch.Tensor.cpu, lambda: True))
        options = DecodingOptions(max_new_tokens=12, small_block_size=4, temperature=0.7)
        done = decoder.decode([[1] * 3, [2] * 20, [3] * 9], options, batch_size=2)
        assert all(completion.tokens for completion in done)
        assert calls["there"] == calls["passes"] + 1  # which tokens may be proposed, once
        assert calls["passes"] - 4 <= calls["back"] < calls["passes"]  # passes that only write bring nothing back
    finally:
        monkeypatch.undo()
        initialize.stop()
