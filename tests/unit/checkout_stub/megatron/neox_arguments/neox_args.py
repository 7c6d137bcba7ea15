"""Stands in for a GPT-NeoX checkout where only the names of its keys matter."""

from dataclasses import dataclass


@dataclass
class Arguments:
    """A few keys."""

    char_level_ppl: bool = False
    tokenizer_type: str = ""
    pos_emb: str = "rotary"
    attention_config: list = None
