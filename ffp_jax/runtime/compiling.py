"""How long the compiler may work on a program."""

# For programs that a run computes with for seconds. The TPU's compiler takes a
# fifth of the time, and hides less of what the chips send each other behind
# their products, which stay the same (docs/scale.md). The CPU's makes the same
# program with and without.
BRIEFLY = {'exec_time_optimization_effort': -1.0}
