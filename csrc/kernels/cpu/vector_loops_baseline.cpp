#define MOCO_VECTOR_LOOPS vector_loops_baseline
#define MOCO_VECTOR_LOOPS_NAME "baseline"
#define MOCO_VECTOR_BYTES 16
#include "kernels/cpu/vector_loops.inc"
