// Every operator of the package. The backends register themselves: ops_cpu.cpp in this library, ops_cuda.cpp in
// another; fake kernels and autograd are in moco_ext/ops/.
#include <torch/csrc/stable/library.h>

// Each with its twin that only checks the arguments and allocates the results, on any device; see ops_checks.cpp.
#define INFO_NCE_FORWARD                                                                                       \
  "(Tensor query, Tensor? key, Tensor? queue, Tensor? temperature_tensor, float temperature, bool normalize, " \
  "int reduction, bool query_grad, bool key_grad, bool temperature_grad, int precision, bool in_batch, "       \
  "int key_offset, Tensor? num_valid_tensor, int? num_valid, float label_smoothing, Tensor? query_ids, "       \
  "Tensor? queue_ids, int same_id, Tensor? key_ids, Tensor? target, int own_key) -> "                          \
  "(Tensor loss, Tensor losses, Tensor lse, Tensor positive_logit, Tensor rank, Tensor grad_query, "           \
  "Tensor grad_key, Tensor grad_temperature, Tensor weights)"
#define INFO_NCE_BACKWARD                                                                                     \
  "(Tensor query, Tensor key, Tensor? temperature_tensor, float temperature, bool normalize, int precision, " \
  "int key_offset, Tensor? query_ids, int same_id, Tensor? key_ids, Tensor lse, Tensor weights, "             \
  "Tensor grad_loss) -> Tensor grad_key"

STABLE_TORCH_LIBRARY(moco_ext, m) {
  // reduction: torch's own numbers, 0: none, 1: mean, 2: sum. loss [] is the reduced one, [N] without a reduction;
  // losses [N] are the rows'. grad_* are the gradient of loss (of loss[n], one row each, without a reduction); empty
  // where not asked for. grad_temperature is [], [N] without a reduction. A temperature tensor overrides the number, as
  // one of num_valid does (the keys of the queue that count; None: all). precision: of float32 rows in products
  // on CUDA, 3 (float32), 2 (11 bits, as tf32 and float16) or 1 (bfloat16). in_batch: the rows of key [M, C] are each
  // other's negatives, and key key_offset + n is the positive of query n. query_ids [N], [M] if in_batch and without
  // key_ids [M], and queue_ids [K]: keys of equal ids are masked out (same_id 0), positives (1), or the only ones that
  // are not masked out (2). target [N, C]: the mean of the keys under a target distribution; then key, and with it the
  // positive, may be None. own_key: what in key [M, C] is row key_offset + n to query n. 0: its positive, 1: its
  // positive, but not in the denominator, 2: nothing.
  m.def("info_nce_forward" INFO_NCE_FORWARD);
  m.def("info_nce_forward_outputs" INFO_NCE_FORWARD);
  // The gradient of in-batch keys needs the upstream gradients of all rows, hence an operator of its own. weights
  // [N, 3]: the share of each positive and of each class in the target distribution, and the own key's probability
  // less its own share of the target. A row of share 0 has no positive or no candidate.
  m.def("info_nce_backward" INFO_NCE_BACKWARD);
  m.def("info_nce_backward_output" INFO_NCE_BACKWARD);
  m.def(
      "enqueue_(Tensor(a!) queue, Tensor(b!) queue_ptr, Tensor keys, bool normalize, int row_offset=0, int? K=None) -> "
      "()");
  m.def(
      "momentum_update_(Tensor(a!)[] key_params, Tensor[] query_params, Tensor? m_tensor, float m, "
      "Tensor(b!)[] low_precision) -> ()");
  m.def(
      "nearest_keys(Tensor query, Tensor queue, int k, bool normalize, Tensor? num_valid_tensor, int? num_valid) -> "
      "(Tensor similarity, Tensor index)");
  m.def("l2_normalize_forward(Tensor x, float eps) -> (Tensor out, Tensor norm)");

  // Of uint8 views, on the CPU only: what follows the crop in an augmentation. See kernels/cpu.h for the arguments.
  m.def("color_steps(Tensor images, Tensor steps, Tensor factors, Tensor kernels) -> Tensor");

  m.def("check_enqueue(Tensor queue, Tensor queue_ptr, Tensor keys, bool normalize, int row_offset, int? K) -> ()");
  m.def(
      "check_momentum_update(Tensor[] key_params, Tensor[] query_params, Tensor? m_tensor, float m, "
      "Tensor[] low_precision) -> ()");
  m.def("check_l2_normalize(Tensor x, float eps) -> ()");
}
