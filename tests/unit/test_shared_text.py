"""The prompt that two whole dialogues share: the label of the assistant's turn belongs to it, the answer never does."""

from __future__ import annotations

import pytest

from megatron_dtrpo.data.shared_text import shared_prompt
from megatron_dtrpo.errors import UserError

# Of public formats: a dialogue up to where the assistant begins to speak, label and the rest of its line included.
ASKED = {
    "HH-RLHF": "\n\nHuman: 2+2?\n\nAssistant:",
    "HH-RLHF, a later turn": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2+2?\n\nAssistant:",
    "user and AI": "User: 2+2?\nAI:",
    "human and bot": "Human: 2+2?\nBot:",
    "AI alone": "2+2?\nAI:",
    "headings": "### Human: 2+2?\n### Assistant:",
    "bold": "**User:** 2+2?\n**Assistant:**",
    "Alpaca": "Below is an instruction.\n\n### Instruction:\nAdd.\n\n### Input:\n2+2\n\n### Response:\n",
    "Alpaca, one line": "### Instruction: 2+2?\n### Response:",
    "Vicuna": "A chat between a user and an assistant. USER: Hi ASSISTANT: Hello</s>USER: 2+2? ASSISTANT:",
    "OpenChat": "GPT4 Correct User: 2+2?<|end_of_turn|>GPT4 Correct Assistant:",
    "Llama 2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n2+2? [/INST]",
    "Mistral, a later turn": "<s>[INST] Hi [/INST] Hello</s>[INST] 2+2? [/INST]",
    "Llama 3": "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "Llama 4": "<|header_start|>user<|header_end|>\n\n2+2?<|eot|><|header_start|>assistant<|header_end|>\n\n",
    "Gemma": "<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n",
    "ChatML": "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
    "Phi 4": "<|im_start|>user<|im_sep|>2+2?<|im_end|><|im_start|>assistant<|im_sep|>",
    "Zephyr": "<|system|>\nBe brief.</s>\n<|user|>\n2+2?</s>\n<|assistant|>\n",
    "Phi 3": "<|user|>2+2?<|end|><|assistant|>",
    "OpenAssistant": "<|prompter|>2+2?<|endoftext|><|assistant|>",
    "InternLM": "<|User|>:2+2?<eoh>\n<|Bot|>:",
    "DeepSeek": "<\uff5cUser\uff5c>2+2?<\uff5cAssistant\uff5c>",
    "Granite": "<|start_of_role|>user<|end_of_role|>2+2?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
    "Command R": "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>2+2?<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "question and answer": "Q: 2+2?\nA:",
    "in words": "Question: 2+2?\nAnswer:",
    "Chinese": "\u95ee\uff1a2+2?\n\n\u7b54\uff1a",
}
ANSWERS = (" The sum is 4.", " The sum is 5.")  # which begin with the same words


@pytest.mark.parametrize("name", ASKED)
def test_the_label_is_the_prompts_and_the_answer_is_whole(name):
    asked = ASKED[name]
    chosen, rejected = ANSWERS if asked[-1] != "\n" else [answer.lstrip() for answer in ANSWERS]
    assert shared_prompt(asked + chosen, asked + rejected) == (asked, True)
    # The answers begin with a label of another format, or with the words of one.
    for begins in ("AI: so\n", "A: so\nB: so\n", "Response: so\n"):
        if not asked.rstrip().endswith(begins[:-4]):
            assert shared_prompt(asked + begins + "4", asked + begins + "5") == (asked, True)


@pytest.mark.parametrize(
    ("asked", "chosen", "rejected"),
    [
        ("The sky is", " blue.", " green."),
        ("Once\n\n", "upon", "under"),
        ("Once", "\nupon", "\n\nunder"),
        # The whole line before the one that differs, and the name in front of that.
        ("What is the sky?\n", "The sky is blue.", "The sky is green."),
        ("What is the sky?\n\n", "It is blue.", "It is green."),
        ("2+2?\nRobot:", " The sum is 4.", " The sum is 5."),
        ("2+2?\nA:", " The sum is 4.", " The sum is 5."),
        ("Question: 2+2?\nA:", " The sum is 4.", " The sum is 5."),
        ("Add.\n=== result\n", "The sum is 4.", "The sum is 5."),
    ],
)
def test_without_a_known_label(asked, chosen, rejected):
    assert shared_prompt(asked + chosen, asked + rejected) == (asked, False)


FOLLOWED = "end both after the first answer that differs"


@pytest.mark.parametrize(
    ("chosen", "rejected", "words"),
    [
        ("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hello\n\nAssistant: No", FOLLOWED),
        (*(f"\n\nHuman: Hi\n\nAssistant: Yes\n\nHuman: {q}?\n\nAssistant: 4" for q in ("a", "b")), FOLLOWED),
        (*(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\nYes" for q in "ab"), FOLLOWED),
        (*(f"[INST] Hi [/INST] Hello </s>[INST] {q} [/INST] Yes" for q in "ab"), FOLLOWED),
        (*(f"Q: Hi\nA: Yes\nQ: {q}\nA: 4" for q in "ab"), FOLLOWED),
        (*(f"Q: 2+2?\nA: {a}\nQ: and 3?\nA: 4" for a in "45"), FOLLOWED),
        (*(f"[INST] Hi [/INST] {a}</s>[INST] And? [/INST] Yes" for a in "ab"), FOLLOWED),
        (*(f"USER: Hi ASSISTANT: {a} USER: And? ASSISTANT: Yes" for a in "ab"), FOLLOWED),
        (*(f"User: Hi\nAI: one\nAI: {a}" for a in "ab"), FOLLOWED),
        ("Human: Hi\nAI: Yes", "Human: Hi\nAI: Yes\nHuman: more\nAI: No", FOLLOWED),
        ("Yes", "No", "share no first word"),
    ],
)
def test_dialogues_that_part_elsewhere_are_refused(chosen, rejected, words):
    with pytest.raises(UserError, match=words):
        shared_prompt(chosen, rejected)
