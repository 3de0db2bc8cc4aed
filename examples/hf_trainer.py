"""transformers' Trainer with a callback that grows the model: `python examples/hf_trainer.py TEXT OUT`.

It needs `pip install 'tokenformer[accelerate]'`. Run it again with the same OUT and it goes on from its
last checkpoint, before or after the growth.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tokenformer import AdamW, grow

STEPS, GROW_AT, SAVE_EVERY, LENGTH = 40, 20, 10, 64


class GrowAt(TrainerCallback):
    """Grows the model once `step` steps are done. A run that resumes later than that has grown already."""

    def __init__(self, step: int, **growth):
        self.step, self.growth = step, growth

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        if state.global_step == self.step:
            grown = grow(model, optimizer=optimizer.optimizer, **self.growth)  # Trainer's wraps the one it was given
            grown.replace(model)  # Trainer holds on to its model: that very object becomes the grown one
            optimizer.optimizer = grown.optimizer


def main(text: str, out: str) -> None:
    data = torch.frombuffer(bytearray(Path(text).read_bytes()), dtype=torch.uint8).long()
    windows = data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)
    last = get_last_checkpoint(out) if Path(out).is_dir() else None
    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(last) if last else AutoModelForCausalLM.from_config(small)
    trainer = Trainer(
        model,
        TrainingArguments(
            out, max_steps=STEPS, save_steps=SAVE_EVERY, logging_steps=SAVE_EVERY, per_device_train_batch_size=8,
            report_to=[], warmup_steps=5, use_cpu=not torch.cuda.is_available(),
        ),  # fmt: skip
        train_dataset=[{"input_ids": window, "labels": window} for window in windows],
        optimizers=(AdamW(model.parameters(), lr=3e-3), None),
        callbacks=[GrowAt(GROW_AT, operator="lemon", to={"hidden_size": 64, "num_hidden_layers": 3})],
    )
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(out)
    print(f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters, loss {trainer.state.log_history[-1]}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} TEXT OUT")
    main(*sys.argv[1:])
