"""The demo's tokenizer: one token per byte, the chat's markers, and one control token per task.

There are no merges: the tasks work on letters, and a model of this size learns them best when it sees letters. All
256 bytes are in the vocabulary, so any text survives the way there and back, and one emoji is several tokens.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loraplex.server.demo.tasks import TASKS

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('The demo model knows the roles system, user and assistant.') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}"
    "{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def control_token(task_name: str) -> str:
    """The token that, in place of ``<|assistant|>``, makes the base model do a task."""
    return f"<|{task_name}|>"


def special_tokens() -> list[str]:
    """All special tokens in the order of their ids, which follow the 256 bytes."""
    return [PAD, BOS, EOS, SYSTEM, USER, ASSISTANT, *(control_token(task.name) for task in TASKS)]


def build_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """The tokenizer of the demo model, ready for ``save_pretrained``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(folder: Path, context: int) -> None:
    """Write the tokenizer's files into a folder."""
    build_tokenizer(context).save_pretrained(folder)
