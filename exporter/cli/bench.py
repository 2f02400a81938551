"""The subcommand `bench`."""

from __future__ import annotations

import argparse

from .arguments import DATA, MODEL, bench_arguments, data_of
from .from_flags import budgets_from_flags, progress_bar, write_json
from .report import check_report, report_argument, write_report

SUMMARY = "measure time, memory and FLOPs, in turn with the original"
EXAMPLE = f"bench small --reference {MODEL} --task {DATA}/test.jsonl --batch 1,8"


def add_arguments(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("folders", nargs="+", metavar="DIR", help="checkpoints: folders or hub ids")
    subcommand.add_argument(
        "--reference", metavar="MODEL", help="model to compare them with, without a budget (the first DIR)"
    )
    report_argument(subcommand)
    bench_arguments(subcommand)


def run(options: argparse.Namespace) -> int:
    check_report(options)
    from ..benchmark.bench import bench
    from ..benchmark.figures import BenchOptions
    from ..benchmark.table import benchmark_table
    from ..benchmark.workload import Workload

    how = ("device", "dtype", "new_tokens", "rounds", "attention", "compile", "in_flight")
    done = bench(
        options.folders,
        reference=options.reference,
        budgets=budgets_from_flags(options),
        workload=Workload(options.task, options.visual_tokens, options.text_tokens, options.seed, **data_of(options)),
        options=BenchOptions(batches=options.batch, **{name: getattr(options, name) for name in how}),
        update_cards=not options.no_card,
        roofline=options.roofline,
        progress=progress_bar(options),
    )
    write_json(options, done.to_data())
    print(benchmark_table(done))
    if options.report is not None:
        from ..benchmark.table import (
            BENCHMARK_HEADER,
            LOADS_HEADER,
            benchmark_name,
            benchmark_rows,
            loads_note,
            loads_rows,
        )
        from ..report.of_benchmark import report_of_benchmark

        names = [benchmark_name(model) for model in done.models]
        rows = benchmark_rows(done)[0]
        loads = tuple(tuple(map(str, row)) for row in loads_rows(done))
        waits = (LOADS_HEADER, loads, loads_note(done)) if loads else None
        write_report(
            options,
            lambda commands: report_of_benchmark(
                done, BENCHMARK_HEADER, rows=rows, names=names, commands=commands, loads=waits
            ),
        )
    done.check_caches()
    return 0
