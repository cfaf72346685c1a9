"""Flags of XLA for tests, which run most programs a few times, so that compiling is most of what they cost."""

# Seconds of the processor to compile four programs (a Transformer's train step on one device and on eight, its
# initialisation, the gradient of an encoder-decoder) at level 0: 7.7; without emitters of fusions through MLIR 4.4;
# without parts that are compiled in parallel 3.5. The level is that of programs that ask for none.
# Not in use: under "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
# --xla_backend_optimization_level=0" half of the time is spared, and a loop's collectives are counted otherwise
# (test_devices_do_not_wait_for_each_other_at_every_time_step).
COMPILES_FAST = ""
