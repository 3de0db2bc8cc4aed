"""An Accelerate loop whose Llama grows at half its steps: `accelerate launch examples/accelerate_loop.py TEXT OUT`.

It needs `pip install 'tokenformer[accelerate]'`. Run it again with the same OUT and it goes on from its last
checkpoint, before or after the growth.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from tokenformer import AdamW, grow

STEPS, GROW_AT, SAVE_EVERY, LENGTH = 40, 20, 10, 64


def main(text: str, out: str) -> None:
    data = torch.frombuffer(bytearray(Path(text).read_bytes()), dtype=torch.uint8).long()
    accelerator, step = Accelerator(), 0
    done = Path(out, "done.json")  # says which checkpoint is whole
    small = LlamaConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    if done.exists():
        step = json.loads(done.read_text())["step"]
    last = f"{out}/step-{step}"
    config = AutoConfig.from_pretrained(last) if step else small  # the sizes that the checkpoint has grown to
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model, optimizer = accelerator.prepare(model, AdamW(model.parameters(), lr=3e-3))
    if step:
        accelerator.load_state(last)
    while step < STEPS:
        if step == GROW_AT:
            grown = grow(
                accelerator.unwrap_model(model), "lemon", to={"hidden_size": 64, "num_hidden_layers": 3},
                optimizer=optimizer.optimizer,
            )  # fmt: skip
            accelerator.free_memory()  # forget the small model, which the next line would only add to
            model, optimizer = accelerator.prepare(grown.model, grown.optimizer)
            accelerator.print(f"step {step}: grown, {grown.promise}")
        seed = step * accelerator.num_processes + accelerator.process_index  # each process reads text of its own
        starts = torch.randint(len(data) - LENGTH, (8, 1), generator=torch.Generator().manual_seed(seed))
        batch = data[starts + torch.arange(LENGTH)].to(accelerator.device)
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        step += 1
        if step % SAVE_EVERY == 0:
            accelerator.print(f"step {step}: loss {loss.item():.4f}")
            accelerator.save_state(f"{out}/step-{step}")
            if accelerator.is_main_process:
                accelerator.unwrap_model(model).config.save_pretrained(f"{out}/step-{step}")
                done.write_text(json.dumps({"step": step}))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} TEXT OUT")
    main(*sys.argv[1:])
