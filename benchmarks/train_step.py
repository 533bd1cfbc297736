"""How fast is a GRPO step, and how much memory does it take? The same groups, trained in three ways in one run.

    python benchmarks/train_step.py --geometry tiny                    two CPU cores, a minute or two
    python benchmarks/train_step.py --geometry 7b --device cuda        random weights in the shape of Qwen2.5-VL-7B

    stock    the defaults of a trainer: rows padded to the longest, a pass for old log-probabilities, the vision tower
             in every pass for every rollout, activation checkpointing, logits of every token of the completions;
             transformers' own forward with "sdpa"
    packed   thinkimg's packed forward, head by chunks, but nothing shared: passes and checkpointing as in stock
    shared   thinkimg as it trains: each group's prompt once, each image once, no needless pass and no checkpointing

Each way runs in processes of its own, in turns, so that other work on the machine slows all of them alike. A further
process gives the log-probabilities and gradients to compare with: transformers' own forward, row by row, in float32.

Useful FLOPs are those of the leanest of the three, the same for all, with prompts and images counted once:
- 4 a linear weight of the language model and token: 2 forward, 2 for the gradient of the activations. The base has no
  gradients of weights.
- 6 an adapter's weight and token, 4 a weight of the head and scored token.
- 12 x heads x head size a layer and pair of tokens that see each other.
- 2 a weight of the vision tower and patch, and 4 x width a pair and layer.

Peak memory: max_memory_allocated on a GPU, with the weights; on a CPU VmHWM above the memory after a small step.
CPU seconds are the process's own: on a busy machine they say more than the clock.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from workload import (
    GEOMETRIES,
    IMAGE,
    IMAGE_TOKEN,
    PAD,
    Geometry,
    Pixels,
    enable_fast_attention,
    make_groups,
    make_policy,
)

from thinkimg.grpo.loss import Logps, compute_grpo_loss, compute_normaliser
from thinkimg.grpo.settings import LossConfig
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.forward.shared_prompts import count_unit_tokens, share_groups
from thinkimg.trainer.micro_batches import MicroBatches
from thinkimg.trainer.stepper import checkpoint_activations

MODES = ("stock", "packed", "shared")
GROUP = 8
# Without the engine correction old log-probabilities are the only ones the loss needs: the ratio is 1 in every mode.
LOSS = LossConfig(vllm_importance_sampling_correction=False)


class Step:
    """One optimizer step's forward and backward passes; gradients are left on the parameters."""

    def __init__(self, mode: str, policy, geometry: Geometry, groups, device: torch.device):
        self.mode, self.policy, self.device, self.geometry = mode, policy, device, geometry
        self.rows = [row for group in groups for row in group]
        self.names = [number for number, group in enumerate(groups) for _ in group]
        rng = np.random.default_rng(1)
        self.advantages = torch.from_numpy(rng.standard_normal(len(self.rows)).astype(np.float32)).to(device)
        masks = [torch.ones(1, int(row.scored.sum())) for row in self.rows]
        self.normaliser = compute_normaliser(LOSS, masks, max_completion_length=8192)
        self.pixels = Pixels(self.rows)
        self.old: dict[int, torch.Tensor] = {}
        self.logps: dict[int, torch.Tensor] = {}

    def __call__(self) -> None:
        self.old, self.logps = {}, {}
        for parameter in self.policy.model.parameters():
            parameter.grad = None
        getattr(self, f"_{self.mode}")()

    def _backward(self, indices: list[int], flat: torch.Tensor, entropy: torch.Tensor) -> None:
        counts = torch.tensor([int(self.rows[i].scored.sum()) for i in indices], device=self.device)
        mask = torch.arange(int(counts.max()), device=self.device) < counts[:, None]

        def padded(values):
            return torch.zeros(mask.shape, dtype=values.dtype, device=self.device).masked_scatter(mask, values)

        for i, part in zip(indices, flat.detach().split(counts.tolist()), strict=True):
            self.logps[i] = part
        old = torch.cat([self.old.get(i, self.logps[i]) for i in indices])
        output = compute_grpo_loss(
            LOSS,
            Logps(padded(flat), padded(old)),
            advantages=self.advantages[indices],
            mask=mask,
            entropies=padded(entropy),
            normaliser=self.normaliser,
        )
        output.loss.backward()

    def _shared(self) -> None:
        scorer = Scorer(self.policy.model, self.pixels, temperature=1.0, banned=(), features={})
        for batch in MicroBatches(self.rows, self.geometry.budget, scorer, self.pixels, self.names):
            with self.policy.autocast():
                flat, entropy = scorer([self.rows[i] for i in batch.rows], batch.units, entropy=True)
            self._backward(batch.rows, flat, entropy)

    def _packed(self) -> None:
        for grad in (False, True):
            scorer = Scorer(self.policy.model, self.pixels, temperature=1.0, banned=(), features={})
            batches = MicroBatches(self.rows, self.geometry.budget, scorer, self.pixels, range(len(self.rows)))
            with checkpoint_activations(self.policy.model, grad):
                for batch in batches:
                    scorer.features.clear()
                    with torch.set_grad_enabled(grad), self.policy.autocast():
                        flat, entropy = scorer([self.rows[i] for i in batch.rows], batch.units, entropy=True)
                    if grad:
                        self._backward(batch.rows, flat, entropy)
                    else:
                        self._keep_old(batch.rows, flat)

    def _stock(self) -> None:
        self.policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.policy.model.enable_input_require_grads()
        for grad in (False, True):
            self.policy.model.train(grad)
            for start in range(0, len(self.rows), GROUP):
                indices = list(range(start, min(start + GROUP, len(self.rows))))
                with torch.set_grad_enabled(grad), self.policy.autocast():
                    flat, entropy = self._plain([self.rows[i] for i in indices])
                if grad:
                    self._backward(indices, flat, entropy)
                else:
                    self._keep_old(indices, flat)
        self.policy.model.gradient_checkpointing_disable()
        self.policy.model.eval()

    def _reference(self) -> None:
        """One at a time. Activations are computed again, for the memory's sake: it changes no number."""
        self.policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.policy.model.enable_input_require_grads()
        self.policy.model.train()
        for i, row in enumerate(self.rows):
            self._backward([i], *self._plain([row]))

    def _keep_old(self, indices: list[int], flat: torch.Tensor) -> None:
        for i, part in zip(indices, flat.split([int(self.rows[i].scored.sum()) for i in indices]), strict=True):
            self.old[i] = part

    def _plain(self, rows) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' forward over a padded batch, and logits of everything after the shortest prompt."""
        length = max(len(row.tokens) for row in rows)
        tokens = torch.full((len(rows), length), PAD)
        seen = torch.zeros_like(tokens)
        for b, row in enumerate(rows):
            tokens[b, : len(row.tokens)] = torch.from_numpy(row.tokens)
            seen[b, : len(row.tokens)] = 1
        first = min(int(np.flatnonzero(row.scored)[0]) for row in rows)
        pixels = torch.from_numpy(np.concatenate([self.pixels(key) for row in rows for key in row.images]))
        grids = torch.from_numpy(np.concatenate([row.grids for row in rows]))
        kinds = (tokens == IMAGE).int()
        inputs = {
            "input_ids": tokens, "attention_mask": seen, "mm_token_type_ids": kinds,
            "pixel_values": pixels, "image_grid_thw": grids,
        }  # fmt: skip
        if len(rows) == 1:
            inputs.pop("attention_mask")
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        logits = self.policy.model(**inputs, logits_to_keep=length - first + 1, use_cache=False).logits[:, :-1].float()
        scored = torch.zeros(len(rows), length, dtype=torch.bool)
        for b, row in enumerate(rows):
            scored[b, : len(row.tokens)] = torch.from_numpy(row.scored)
        targets, scored = inputs["input_ids"][:, first:], scored[:, first:].to(self.device)
        logps = logits.gather(-1, targets[..., None]).squeeze(-1) - torch.stack([row.logsumexp(-1) for row in logits])
        with torch.no_grad():
            entropies = [(-part.softmax(-1) * part.log_softmax(-1)).sum(-1) for part in logits[scored].split(1024)]
        return logps[scored], torch.cat(entropies)


def useful_flops(geometry: Geometry, policy, groups) -> float:
    rows = [row for group in groups for row in group]
    names = [number for number, group in enumerate(groups) for _ in group]
    units = share_groups(rows, names, IMAGE_TOKEN)
    tokens = sum(count_unit_tokens(unit, rows) for unit in units)
    scored = sum(int(row.scored.sum()) for row in rows)
    pairs = 0
    for unit in units:
        own = [len(rows[i].tokens) - unit.prefix for i in unit.rows]
        pairs += unit.prefix**2 / 2 + sum(n * unit.prefix + n**2 / 2 for n in own)
    named = [(name, p.numel()) for name, p in policy.model.named_parameters() if p.dim() >= 2]
    linear = sum(n for name, n in named if "language_model.layers" in name and "lora_" not in name)
    adapters = sum(n for name, n in named if "lora_" in name)
    text, vision = geometry.text, geometry.vision
    total = tokens * (4 * linear + 6 * adapters) + 4 * scored * text["hidden_size"] * text["vocab_size"]
    total += 12 * text["num_hidden_layers"] * text["hidden_size"] * pairs
    tower = sum(n for name, n in named if ".visual.blocks" in name or ".visual.patch_embed" in name)
    merger = sum(n for name, n in named if ".visual.merger" in name)
    grids = {key: int(np.prod(grid)) for row in rows for key, grid in zip(row.images, row.grids, strict=True)}
    whole = len(vision["fullatt_block_indexes"])
    for patches in grids.values():
        seen = whole * patches**2 + (vision["depth"] - whole) * patches * 64  # windows of 8 x 8 patches
        total += patches * (2 * tower + merger / 2) + 4 * vision["hidden_size"] * seen
    return float(total)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product, the best of several."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    best = 0.0
    for _ in range(8):
        start = now(device)
        a @ b
        best = max(best, 2 * n**3 / (now(device) - start))
    return best


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory(field: str) -> float:
    """MB of this process: VmHWM or VmRSS."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def settle() -> float:
    """Give what is free back to the system and forget the peak so far; MB held."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def child(mode: str, args: argparse.Namespace) -> dict:
    """Run one mode in this process; writes the reference, or compares with it."""
    geometry, device = GEOMETRIES[args.geometry], torch.device(args.device)
    if args.budget:
        geometry = Geometry(**vars(geometry) | {"budget": args.budget})
    torch.set_num_threads(args.threads)
    single = mode == "reference"
    policy = make_policy(geometry, device, dtype=torch.float32 if single else None)
    if single:
        object.__setattr__(policy.config, "dtype", "float32")
    elif mode != "stock":
        enable_fast_attention(policy)
    groups = make_groups(geometry, groups=args.groups)
    step = Step(mode, policy, geometry, groups, device)
    named = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    found = Path(args.scratch) / "reference.safetensors"
    if single:
        step()
        tensors = {f"grad.{name}": p.grad.cpu() for name, p in named.items()}
        save_file(tensors | {f"logp.{i}": logp.cpu() for i, logp in step.logps.items()}, found)
        return {}
    warm = Step(mode, policy, geometry, make_groups(geometry, size=2, groups=1, seed=9), device)
    warm()  # kernels and compilers
    for key in step.pixels.grids:
        step.pixels(key)
    rate = matmul_rate(device, getattr(torch, geometry.dtype))
    if device.type == "cuda":
        step()  # compiles for the lengths that will be measured
        torch.cuda.reset_peak_memory_stats()
        before = 0.0
    else:
        before = settle()
    seconds, busy = [], []
    for _ in range(args.repeats):
        start, worked = now(device), time.process_time()
        step()
        seconds.append(now(device) - start)
        busy.append(time.process_time() - worked)
        if len(seconds) == 1:
            peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else memory("VmHWM") - before
    reference = load_file(found)
    logps = max(float((step.logps[i].cpu() - reference[f"logp.{i}"]).abs().max()) for i in range(len(step.rows)))
    errors, wrong, size = [], 0.0, 0.0
    for name, p in named.items():
        expected = reference[f"grad.{name}"].double()
        difference = p.grad.cpu().double() - expected
        errors.append(float(difference.norm() / expected.norm().clamp(min=1e-30)))
        wrong, size = wrong + float(difference.norm() ** 2), size + float(expected.norm() ** 2)
    return {
        "seconds": seconds, "peak": peak, "rate": rate, "logp": logps, "gradient": (wrong / size) ** 0.5,
        "worst": max(errors), "useful": useful_flops(geometry, policy, groups),
        "compilations": sum(torch._dynamo.utils.counters["stats"].values()) if "torch._dynamo" in sys.modules else 0,
        "busy": busy,
    }  # fmt: skip


def counts(geometry: Geometry, groups) -> dict[str, int]:
    rows = [row for group in groups for row in group]
    names = [number for number, group in enumerate(groups) for _ in group]
    return {
        "padded": sum(max(len(row.tokens) for row in group) * len(group) for group in groups),
        "packed": sum(len(row.tokens) for row in rows),
        "shared": sum(count_unit_tokens(unit, rows) for unit in share_groups(rows, names, IMAGE_TOKEN)),
        "scored": sum(int(row.scored.sum()) for row in rows),
        "images": len({key for row in rows for key in row.images}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--groups", type=int, help="of 8 rollouts each")
    parser.add_argument("--budget", type=int, help="tokens per micro-batch of packed and shared")
    parser.add_argument("--rounds", type=int, default=3, help="processes per way, in turns")
    parser.add_argument("--repeats", type=int, default=3, help="steps per process")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--json", help="file for all figures")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("RESULT " + json.dumps(child(args.child, args)), flush=True)
        return
    geometry = GEOMETRIES[args.geometry]
    with tempfile.TemporaryDirectory() as scratch:
        run("reference", args, scratch)
        results: dict[str, list[dict]] = {mode: [] for mode in args.modes}
        for _ in range(args.rounds):
            for mode in args.modes:
                results[mode].append(run(mode, args, scratch))
    report(args, counts(geometry, make_groups(geometry, groups=args.groups)), results)
    if args.json:
        Path(args.json).write_text(json.dumps(results))


def run(mode: str, args: argparse.Namespace, scratch: str) -> dict:
    argv = [sys.executable, __file__, "--child", mode, "--scratch", scratch]
    for name in ("geometry", "device", "groups", "budget", "repeats", "threads"):
        if (value := getattr(args, name)) is not None:
            argv += [f"--{name}", str(value)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{mode} failed with status {done.returncode}\n{done.stdout}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def report(args: argparse.Namespace, tokens: dict[str, int], results: dict[str, list[dict]]) -> None:
    first = next(iter(results.values()))[0]
    rate = max(r["rate"] for rs in results.values() for r in rs)
    print(f"torch {torch.__version__}, {args.geometry} on {args.device}, {args.threads} threads")
    print(", ".join(f"{name} {count}" for name, count in tokens.items()) + " (tokens, images)")
    print(f"useful {first['useful']:.3g} FLOP a step; a large matrix product runs at {rate / 1e12:.3g} TFLOP/s")
    titles = f"{'':8} {'seconds':>9} {'CPU s':>9} {'of matmul':>9} {'peak MB':>8}"
    print(f"{titles} {'max |dlogp|':>11} {'gradient':>9} {'worst':>8}")
    table = {}
    for mode, runs in results.items():
        seconds = statistics.median(s for r in runs for s in r["seconds"])
        peak = statistics.median(r["peak"] for r in runs)
        busy = statistics.median(s for r in runs for s in r["busy"])
        table[mode] = seconds, peak, busy
        last = runs[-1]
        share = first["useful"] / seconds / rate
        line = f"{mode:8} {seconds:9.3f} {busy:9.3f} {share:9.1%} {peak:8.0f}"
        print(f"{line} {last['logp']:11.2g} {last['gradient']:9.2g} {last['worst']:8.2g}")
    if "stock" in table:
        for mode in table:
            if mode != "stock":
                per_round = [
                    statistics.median(a["seconds"]) / statistics.median(b["seconds"])
                    for a, b in zip(results["stock"], results[mode], strict=True)
                ]
                spread = f"{min(per_round):.2f} to {max(per_round):.2f} by round"
                ratio = table["stock"][0] / table[mode][0]
                busy = table["stock"][2] / table[mode][2]
                peak = table[mode][1] / table["stock"][1]
                line = f"{mode}: {ratio:.2f} x as fast as stock ({spread}; {busy:.2f} x by CPU seconds)"
                print(f"{line}, {peak:.2f} of its peak")
    if args.device == "cuda":
        print("compilations:", {mode: runs[-1]["compilations"] for mode, runs in results.items()})


if __name__ == "__main__":
    main()
