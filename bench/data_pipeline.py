"""Speed, start-up and memory of the input pipeline on the embedded corpus.

    python bench/data_pipeline.py --output=bench/results/data_pipeline.jsonl

Times are processor time of one process without prefetching, so that other load on the machine does
not count; every row is the median of five stretches, with the lowest and the highest.
"""

import json
import resource
import statistics
import sys
import time

import grain
import report
from absl import app, flags

from jaxalope.data.config import DataConfig
from jaxalope.data.pipeline import Pipeline
from jaxalope.data.tokenizers import load_tokenizer

_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "bytes", "Tokenizer of the run.")
_SECONDS = flags.DEFINE_float("seconds", 0.4, "Processor time of a stretch.")


def measure(length: int, rows: int, packing: str) -> dict:
    tokenizer = load_tokenizer(_TOKENIZER.value)
    config = DataConfig(length, rows, packing=packing, prefetch_batches=0)
    begin = time.perf_counter()
    with Pipeline(config, tokenizer) as pipeline:
        next(pipeline)
        first = time.perf_counter() - begin
        rates, used, total = [], 0, 0
        for _ in range(5):
            count, start = 0, time.process_time()
            while (spent := time.process_time() - start) < _SECONDS.value:
                batch = next(pipeline)
                count += batch["tokens"].size
                used += int((batch["segment_ids"] > 0).sum())
            rates.append(count / spent)
            total += count
        state = len(json.dumps(pipeline.state()))
    return {
        "length": length,
        "rows": rows,
        "packing": packing,
        "tokens_per_cpu_second": round(statistics.median(rates)),
        "lowest": round(min(rates)),
        "highest": round(max(rates)),
        "padding": round(1 - used / total, 4),
        "first_batch_seconds": round(first, 3),
        "state_bytes": state,
        "peak_resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "tokenizer": _TOKENIZER.value,
        **report.facts(grain=grain.__version__),
    }


def main(_) -> None:
    for length, rows in ((256, 16), (2048, 16), (2048, 64)):
        for packing in ("concat", "first_fit"):
            row = measure(length, rows, packing)
            print(
                f"T={length:5d} rows={rows:3d} {packing:9s} "
                f"{row['tokens_per_cpu_second'] / 1e6:6.1f} M tokens/CPU-s "
                f"({row['lowest'] / 1e6:.1f} - {row['highest'] / 1e6:.1f}), "
                f"padding {row['padding']:.1%}, first batch {row['first_batch_seconds']:.2f} s, "
                f"peak {row['peak_resident_mb']} MB"
            )
            sys.stdout.flush()
            report.write_rows(_OUTPUT.value, [row])


if __name__ == "__main__":
    app.run(main)
