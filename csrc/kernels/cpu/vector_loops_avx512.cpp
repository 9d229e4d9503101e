#define MOCO_VECTOR_LOOPS vector_loops_avx512
#define MOCO_VECTOR_LOOPS_NAME "avx512"
#define MOCO_VECTOR_BYTES 64
#include "kernels/cpu/vector_loops.inc"
