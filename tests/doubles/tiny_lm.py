"""A GPT-2 of a few thousand weights in a folder, as save_pretrained writes it. For tests only."""

from pathlib import Path
from typing import Any

import torch
from ngram import TOPICS, made_up

from vestige.core.texts import to_bytes
from vestige.teachers.language_model import open_writer

PROMPT = '<L>: "'
MINE: dict[str, Any] = {
    "prompt": PROMPT,
    "min_words": 3,
    "new_tokens": 24,
    "labels": {name: {} for name in TOPICS},
}


def save(folder: Path, steps: int = 150) -> Path:
    """Teach it what texts of each topic are like, and write it to `folder`.

    Every other text ends as a question.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    rows = [
        (text[:-1] + ".?"[number // 4 % 2], label)
        for number, (text, label) in enumerate(made_up(400))
    ]
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    pieces.train_from_iterator(
        [text for text, _ in rows],
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token=end, eos_token=end)
    torch.manual_seed(0)
    network = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=128,
            n_embd=32,
            n_layer=1,
            n_head=2,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    tokenizer.save_pretrained(folder)
    network.save_pretrained(folder)
    prompts = folder / "mine.yaml"
    prompts.write_text(_yaml())
    lm = open_writer({"lm": folder, "prompts": prompts}, input_spec=None, num_classes=None).module
    optimizer = torch.optim.Adam(lm.parameters(), 0.01)
    texts, labels = to_bytes([text for text, _ in rows], 128), torch.tensor([n for _, n in rows])
    lm.train()
    for _ in range(steps):
        some = torch.randint(len(rows), (16,))
        optimizer.zero_grad()
        lm.training_loss(texts[some], labels[some]).backward()
        optimizer.step()
    lm.network.save_pretrained(folder)
    return folder


def _yaml() -> str:
    import yaml

    return yaml.safe_dump(MINE, sort_keys=False)
