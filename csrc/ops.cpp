// Every operator of the package. The backends register themselves: ops_cpu.cpp here, ops_cuda.cpp in a library of its
// own; fake kernels and autograd stand beside the wrappers in moco_ext/ops.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(moco_ext, m) {
  // grad_* are d loss[n] / d input, one row each; empty where not asked for. A temperature tensor overrides the number.
  m.def(
      "info_nce_forward(Tensor query, Tensor key, Tensor queue, Tensor? temperature_tensor, float temperature, "
      "bool normalize, bool query_grad, bool key_grad, bool temperature_grad, bool allow_tf32) -> "
      "(Tensor loss, Tensor lse, Tensor positive_logit, Tensor rank, "
      "Tensor grad_query, Tensor grad_key, Tensor grad_temperature)");
  // The same with all that a contrastive loss may ask for. in_batch: key [M, C] are one another's negatives, and row
  // i's positive is key key_offset + i; their gradient then needs every row's upstream gradient, so it is an operator
  // of its own. num_valid: keys of the queue that count, -1 for all. key_ids [M], queue_ids [K]: equal ids are masked
  // out, or positives. weights [N, 2]: the target distribution's share of each positive and of each class.
  m.def(
      "info_nce_contrast_forward(Tensor query, Tensor key, Tensor? queue, Tensor? temperature_tensor, "
      "float temperature, bool normalize, bool query_grad, bool key_grad, bool temperature_grad, bool allow_tf32, "
      "bool in_batch, int key_offset, Tensor? num_valid_tensor, int num_valid, float label_smoothing, Tensor? key_ids, "
      "Tensor? queue_ids, bool same_id_positive) -> "
      "(Tensor loss, Tensor lse, Tensor positive_logit, Tensor rank, "
      "Tensor grad_query, Tensor grad_key, Tensor grad_temperature, Tensor weights)");
  m.def(
      "info_nce_contrast_backward(Tensor query, Tensor key, Tensor? temperature_tensor, float temperature, "
      "bool normalize, bool allow_tf32, int key_offset, Tensor? key_ids, bool same_id_positive, Tensor lse, "
      "Tensor weights, Tensor grad_loss) -> Tensor grad_key");
  m.def("enqueue_(Tensor(a!) queue, Tensor(b!) queue_ptr, Tensor keys, bool normalize) -> ()");
  m.def(
      "momentum_update_(Tensor(a!)[] key_params, Tensor[] query_params, Tensor? m_tensor, float m, "
      "Tensor(b!)[] low_precision) -> ()");
  m.def("l2_normalize_forward(Tensor x, float eps) -> (Tensor out, Tensor norm)");
}
