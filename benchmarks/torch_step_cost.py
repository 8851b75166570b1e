"""The same training step in PyTorch: PEFT's LoRA and HiRA, and a plain transcription of SMoA [S2].

    python -m benchmarks.torch_step_cost --model llama-1b --rows 8 --length 1024

Shapes, targets, batch and optimizer are those of ``step_cost.py``; weights are random. The model is
transformers', runs eagerly with PyTorch's own attention and keeps all activations: no
checkpointing.
The transcription does as the paper says: the update is assembled block by block and goes through a
second product, of which PyTorch takes the dense weight gradient.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

from benchmarks.step_cost import MODELS, median_and_spread, step_parser

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]

torch: Any = importlib.import_module("torch")


class PublishedSmoa(torch.nn.Module):
    """``y = x W^T + x (W * assembled(B_m A_m))^T`` over M blocks in any order."""

    def __init__(self, linear: Any, rank: int, num_blocks: int):
        super().__init__()
        self.linear = linear
        outputs, inputs = linear.weight.shape
        self.rows = torch.randperm(inputs, device=linear.weight.device).chunk(num_blocks)
        self.columns = torch.randperm(outputs, device=linear.weight.device).chunk(num_blocks)
        each = rank // num_blocks
        options = {"device": linear.weight.device, "dtype": torch.float32}
        self.a = torch.nn.ParameterList(
            torch.nn.Parameter(len(rows) ** -0.5 * torch.randn(each, len(rows), **options))
            for rows in self.rows
        )
        self.b = torch.nn.ParameterList(
            torch.nn.Parameter(torch.zeros(len(columns), each, **options))
            for columns in self.columns
        )

    def forward(self, x: Any) -> Any:
        weight = self.linear.weight
        update = torch.zeros_like(weight)
        for a, b, rows, columns in zip(self.a, self.b, self.rows, self.columns, strict=True):
            place = (columns[:, None], rows[None, :])
            update = update.index_put(place, weight[place] * (b @ a).to(weight.dtype))
        return self.linear(x) + torch.nn.functional.linear(x, update)


def adapted(model: Any, method: str, rank: int) -> Any:
    """A fresh model's adapter in place; everything else frozen."""
    peft: Any = importlib.import_module("peft")
    if method == "LoRA (PEFT)":
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
        return peft.get_peft_model(model, config)
    if method == "HiRA (PEFT)":
        return peft.get_peft_model(model, peft.HiraConfig(r=rank, target_modules=TARGETS))
    model.requires_grad_(False)
    if method.startswith("SMoA"):
        for name, module in list(model.named_modules()):
            if name.rsplit(".", 1)[-1] in TARGETS:
                parent = model.get_submodule(name.rsplit(".", 1)[0])
                wrapped = PublishedSmoa(module, rank, int(method.rsplit(" ", 1)[1]))
                setattr(parent, name.rsplit(".", 1)[1], wrapped)
    return model


def main() -> None:
    """Print the table."""
    options = step_parser(__doc__ or "").parse_args()
    transformers: Any = importlib.import_module("transformers")
    shape = MODELS[options.model]
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.embed_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp_dim,
        tie_word_embeddings=shape.tie_embeddings,
        max_position_embeddings=shape.max_positions,
        use_cache=False,
    )
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    tokens = torch.randint(0, shape.vocab_size, (options.rows, options.length), device=device)
    name = torch.cuda.get_device_name() if cuda else "cpu"
    print(
        f"{options.model}, {options.rows} x {options.length} tokens, rank {options.rank}, "
        f"{options.dtype}, {name}, torch {torch.__version__}\n"
    )
    print("| | s a step | +- | of LoRA's | tokens/s | peak memory, GiB | loss |")
    print("|---|---|---|---|---|---|---|")
    first = 0.0
    for method in (
        "LoRA (PEFT)",
        "HiRA (PEFT)",
        "SMoA transcribed, M = 2",
        "SMoA transcribed, M = 4",
    ):
        torch.manual_seed(0)
        with torch.device(device):
            model = transformers.LlamaForCausalLM(config).to(getattr(torch, options.dtype))
        model = adapted(model, method, options.rank)
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=cuda)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times: list[float] = []
        loss: Any = None
        for number in range(options.rounds + 3):
            start = time.perf_counter()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if cuda:
                torch.cuda.synchronize()
            if number > 2:
                times.append(time.perf_counter() - start)
        seconds, spread = median_and_spread(times)
        first = first or seconds
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
        print(
            f"| {method} | {seconds:.4f} | {spread:.4f} | {seconds / first:.3f} | "
            f"{options.rows * options.length / seconds:.0f} | {peak:.2f} | {float(loss):.4f} |",
            flush=True,
        )
        del model, trained, optimizer, loss


if __name__ == "__main__":
    main()
