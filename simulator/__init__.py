"""Task graphs on resources and what happens when they run. Knows nothing of neural networks and never imports torch."""

from simulator.engine import replay, simulate
from simulator.perfetto import write_perfetto
from simulator.program import Pool, Program, ProgramBuilder, Resource, program_from_arrays
from simulator.schedules import gpipe, one_f_one_b, pipeline_program
from simulator.timeline import Breakdown, Timeline, breakdown, critical_path, overall, utilisation

__all__ = [
    "Breakdown",
    "Pool",
    "Program",
    "ProgramBuilder",
    "Resource",
    "Timeline",
    "breakdown",
    "critical_path",
    "gpipe",
    "one_f_one_b",
    "overall",
    "pipeline_program",
    "program_from_arrays",
    "replay",
    "simulate",
    "utilisation",
    "write_perfetto",
]
