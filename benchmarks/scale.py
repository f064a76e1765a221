"""Whether time and memory grow with the bytes alone: shares of a 0.5 B-shaped trajectory, 12 GiB in all.

Builds the tensors of Qwen2.5-0.5B (494 M parameters, bf16) with a base and 12 checkpoints, or a share of the layers,
and runs what `one_pass` runs: the floor, and the product's own path, each in a process of its own. Prints seconds a GiB
and peak resident memory, which should be the same in every line. The files come from wherever they are; --cold drops
them from the page cache before every run.

    .venv/bin/python -m benchmarks.scale [--layers 3 12 24] [--checkpoints 12] [--cold] [--keep DIR]
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.one_pass import forget, measured

HIDDEN, INNER, HEADS, VOCABULARY = 896, 4864, 128, 151_936
GIB = 1 << 30


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of the model with so many of its 24 layers, and as large a share of the vocabulary."""
    made: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY * layers // 24, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name, rows in (("q", HIDDEN), ("k", HEADS), ("v", HEADS)):
            made[f"{at}.self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            made[f"{at}.self_attn.{name}_proj.bias"] = (rows,)
        made[f"{at}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        made |= {f"{at}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        made[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        made |= {f"{at}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return made


def build(root: Path, layers: int, checkpoints: int) -> None:
    """Write base/ and run/step_N, each tensor a drift with noise: what is random is made once and rolled along."""
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    for number in range(checkpoints + 1):
        state = {}
        for place, (name, shape) in enumerate(shapes(layers).items()):
            count = torch.Size(shape).numel()
            drawn = noise.roll(place * 7919).repeat(-(-count // len(noise)))[:count]
            other = noise.roll(place * 104_729 + number * 1_299_709).repeat(-(-count // len(noise)))[:count]
            state[name] = (0.02 * drawn + 1e-5 * (number * drawn.flip(0) + other)).bfloat16().view(shape)
        path = root / ("base" if number == 0 else f"run/step_{10 * number}")
        path.mkdir(parents=True)
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text("{}")
        if number:
            (path / "trainer_state.json").write_text("{}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 12, 24])
    parser.add_argument("--checkpoints", type=int, default=12)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--memory", type=int, default=512, help="MiB")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--keep", type=Path, help="build here and keep it, or use what an earlier call built")
    options = parser.parse_args()
    print(
        f"{'layers':>6}{'GiB':>7}{'floor s':>9}{'run s':>8}{'x wall':>8}{'x CPU':>7}{'CPU s/GiB':>11}{'peak MiB':>10}"
    )
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as scratch:
            root = (options.keep or Path(scratch)) / f"{layers}-layers"
            if not (root / "base").exists():
                build(root, layers, options.checkpoints)
            common = ["--keep", str(root), "--threads", str(options.threads), "--memory", str(options.memory)]
            figures = []
            for kind in ("floor", "extrapolate"):
                if options.cold:
                    forget(root)
                figures.append(measured(["--worker", kind, *common]))
            bare, full = figures
            size = bare["read_mib"] * (1 << 20) / GIB
            print(
                f"{layers:6}{size:7.2f}{bare['wall_s']:9.2f}{full['wall_s']:8.2f}{full['wall_s'] / bare['wall_s']:8.2f}"
                f"{full['cpu_s'] / bare['cpu_s']:7.2f}{full['cpu_s'] / size:11.2f}{full['peak_rss_mib']:10.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
