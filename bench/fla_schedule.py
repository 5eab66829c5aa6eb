"""fla's Triton `chunk_kda` on an H200 that is not there, read as `gpu_schedule.py` reads ours.

    pip install fla-core einops triton    # and torch; a GPU, or torch with CUDA, is not needed
    python bench/fla_schedule.py --shape=kimi_48b --length=8192 \
        --output=bench/results/kda_gpu_schedule.jsonl

calls `chunk_kda`, forward and backward, on bfloat16 tensors that nothing reads: instead of being
launched, each kernel is compiled for sm_90 by triton, one of its configurations for each number of
warps (the blocks nearest 64, the stages nearest 3), and the one of the least estimate is taken, as
fla's autotuner would take the fastest. Loops turn as often as the shapes say. Bytes are those of a
kernel's tensors, each once.

triton is not XLA's compiler: small differences from our kernels mean nothing. The initial and the
final state are there, gates are given, chunks are fla's, of 64.
"""

import math
import tempfile
import types

import cubin
import gpu_schedule
import report
import sass
import torch
import triton
from absl import app, flags
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction
from triton.runtime.autotuner import Autotuner

from jaxalope.layers.ops.kda.shapes import SHAPES

# How often loops turn, and the share of programs that a branch is for, in order of their start:
# heads of 128 in two blocks of 64, `chunks` of a row, rows and blocks of 16 in a chunk of 64.
_TURNS = {
    "chunk_local_cumsum_vector_kernel": lambda chunks, regions: (),
    "chunk_kda_fwd_kernel_intra_token_parallel": lambda chunks, regions: (8.5,),
    "chunk_kda_fwd_kernel_inter_solve_fused": lambda chunks, regions: (
        *(2, *[1] * (regions - 5)),
        *[14] * 4,
    ),
    "recompute_w_u_fwd_kda_kernel": lambda chunks, regions: (2, 2),
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": lambda chunks, regions: (chunks,),
    "chunk_gla_fwd_kernel_o": lambda chunks, regions: (2,),
    "chunk_kda_bwd_kernel_dAv": lambda chunks, regions: (2,),
    "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64": lambda chunks, regions: (chunks,),
    "chunk_kda_bwd_kernel_wy_dqkg_fused": lambda chunks, regions: (2, 2, 0.5),
    "chunk_kda_bwd_kernel_intra": lambda chunks, regions: (1.5, 16, 1.5, 16),
}


class _Driver:
    """What triton and fla ask of a GPU's driver before they compile."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        return None

    utils = types.SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": 232448,
            "multiprocessor_count": 132,
        }
    )


class _Here:
    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def pretend():
    """Has torch and triton speak of an H200, as fla asks when it is imported."""
    facts = types.SimpleNamespace(
        name="NVIDIA H200",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=141 << 30,
        shared_memory_per_block_optin=232448,
    )
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": facts.name,
        "get_device_capability": (9, 0),
        "get_device_properties": facts,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    torch.cuda.device = torch.cuda.device_of = _Here
    triton.runtime.driver.set_active(_Driver())


def calls(shape, length: int) -> tuple[list, list]:
    """(autotuner, arguments, keywords) of each kernel, of the forward pass and of both."""
    pretend()
    found: list = []

    def keep(self, *args, **keywords):
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        found.append((self, args, keywords))

    from fla.ops.kda import chunk_kda
    from fla.ops.utils import cache

    for kind in (Autotuner, cache.CachedAutotuner):
        kind.run = keep

    def tensor(*size, dtype=torch.bfloat16):
        return torch.empty(size, dtype=dtype).requires_grad_()

    heads, key, value = shape.num_heads, shape.key_dim, shape.value_dim
    narrow, f32 = (1, length, heads, key), torch.float32
    o, state = chunk_kda(
        *(tensor(*narrow), tensor(*narrow), tensor(1, length, heads, value)),
        *(tensor(*narrow, dtype=f32), tensor(*narrow[:3], dtype=f32)),
        initial_state=tensor(1, heads, key, value, dtype=f32),
        output_final_state=True,
    )
    forward = list(found)
    torch.autograd.backward([o, state], [torch.empty_like(o), torch.empty_like(state)])
    return forward, found


def configurations(tuner):
    """One for each number of warps."""

    def far(config):
        blocks = sum(abs(config.kwargs.get(name, 64) - 64) for name in ("BK", "BV", "BS"))
        return blocks, abs(config.num_stages - 3)

    chosen = {}
    for config in sorted(tuner.configs, key=far):
        chosen.setdefault(config.num_warps, config)
    return chosen.values()


def best(call, chunks: int, tasks: float, tool: str) -> dict:
    """The kernel as its best configuration has it."""
    tuner, args, keywords = call
    kernel = tuner
    while not isinstance(kernel, JITFunction):
        kernel = kernel.fn
    name = kernel.__name__
    keywords = {key: x for key, x in keywords.items() if key not in ("grid", "warmup")}
    tensors = {x.data_ptr(): x.nbytes for x in (*args, *keywords.values()) if torch.is_tensor(x)}
    parts = []
    for config in configurations(tuner):
        more = keywords | config.all_kwargs()
        grid = call[2]["grid"]
        if callable(grid):
            grid = grid(dict(zip(kernel.arg_names, args, strict=False)) | more)
        made = kernel.run(*args, grid=grid, warmup=True, **more)
        (code,) = cubin.read_elf(made.asm["cubin"])
        with tempfile.NamedTemporaryFile() as file:
            file.write(code.elf)
            file.flush()
            read = sass.read(sass.disassemble(tool, file.name))
        threads = made.metadata.num_warps * sass.WARP
        launch = cubin.Launch(name, "", math.prod(grid), threads, made.metadata.shared)
        try:
            counts = _TURNS[name](chunks, len(read.regions))
            moved = sum(tensors.values())
            bandwidth = report.BANDWIDTH["NVIDIA H200"]
            row = gpu_schedule.part(name, code, launch, read, counts, moved, tasks, bandwidth)
        except ValueError as error:  # other loops, in a configuration that spills most of all
            print(f"left out: {name} {config}: {error}", flush=True)
            continue
        parts.append(row)
    return min(parts, key=lambda x: x["estimate_s"])


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    shape, length = SHAPES[flags.FLAGS.shape], flags.FLAGS.length
    if (shape.key_dim, shape.value_dim) != (128, 128):
        raise app.UsageError("the loops are known for heads of 128")
    tool = gpu_schedule.nvdisasm()
    versions = report.versions("fla-core", "triton", "torch")
    facts = report.facts(
        target="NVIDIA H200",
        **versions,
        shape=flags.FLAGS.shape,
        batch=1,
        length=length,
        dtype="bfloat16",
        bandwidth=report.BANDWIDTH["NVIDIA H200"],
        form="fla",
    )
    print(" ".join(f"{key}={value}" for key, value in facts.items()), flush=True)
    known, rows = {}, []
    for name, kernels in zip(("forward", "forward+backward"), calls(shape, length), strict=True):
        parts = []
        for call in kernels:
            if call[0] not in known:
                tasks = length / 64 * shape.num_heads
                known[call[0]] = best(call, length // 64, tasks, tool)
            parts.append(known[call[0]])
        what = {"pass": name, "chunk_size": 64, "sizes": {}}
        rows.append(facts | what | gpu_schedule.summary(parts))
    gpu_schedule.show(rows)
    report.write_rows(flags.FLAGS.output, rows)


if __name__ == "__main__":
    app.run(main)
