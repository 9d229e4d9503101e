#define MOCO_VECTOR_LOOPS vector_loops_avx2
#define MOCO_VECTOR_LOOPS_NAME "avx2"
#define MOCO_VECTOR_BYTES 32
#include "kernels/cpu/vector_loops.inc"
