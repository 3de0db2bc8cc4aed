"""A plain PyTorch loop whose Llama grows at half its steps: `python examples/plain_loop.py TEXT OUT`.

Run it again with the same OUT and it goes on from its last checkpoint, before or after the growth.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tokenformer import AdamW, grow

STEPS, GROW_AT, SAVE_EVERY, LENGTH = 40, 20, 10, 64


def main(text: str, out: str) -> None:
    data = torch.frombuffer(bytearray(Path(text).read_bytes()), dtype=torch.uint8).long()
    checkpoint, step = Path(out, "checkpoint.pt"), 0
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    small = LlamaConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    saved = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else None
    config = LlamaConfig(**saved["config"]) if saved else small  # the sizes that the checkpoint has grown to
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = AdamW(model.parameters(), lr=3e-3)
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    while step < STEPS:
        if step == GROW_AT:
            grown = grow(model, "lemon", to={"hidden_size": 64, "num_hidden_layers": 3}, optimizer=optimizer)
            model, optimizer = grown.model, grown.optimizer  # the same function, and its moments kept
            print(f"step {step}: grown to {sum(p.numel() for p in model.parameters()):,} parameters, {grown.promise}")
        starts = torch.randint(len(data) - LENGTH, (8, 1), generator=torch.Generator().manual_seed(step))
        batch = data[starts + torch.arange(LENGTH)]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % SAVE_EVERY == 0:
            print(f"step {step}: loss {loss.item():.4f}")
            state = {"config": model.config.to_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)  # a run that is killed has the old one or the new one


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} TEXT OUT")
    main(*sys.argv[1:])
