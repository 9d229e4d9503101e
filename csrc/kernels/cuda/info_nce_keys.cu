// The gradient of in-batch keys: the pass of info_nce with the roles of queries and keys exchanged. The logsumexp of
// each query is already known, so no running maximum is needed:
//   W = upstream (exp(K Q^T / T - lse) - target),  gradient = W Q / T, then through the norm of each key.
// bfloat16 is multiplied directly, float16 as float32 in two terms because weights may be below the range of float16.
#include "kernels/cuda/info_nce_launch.cuh"
#include "kernels/cuda/info_nce_rows.cuh"

namespace moco_ext::cuda {
namespace {

template <typename Query>
using KeysOperand = std::conditional_t<std::is_same_v<Query, __nv_bfloat16>, __nv_bfloat16, float>;

struct KeysWorkspace {
  void* query;             // [N, C] operand
  void* key;               // [M_padded, C] operand
  float* key_norm;         // [M]
  InfoNceColumn* columns;  // [N]
  float* sums;             // [M, splits, C] of W Q
  int64_t padded;
  int64_t splits;
  size_t bytes;
};

__global__ void info_nce_columns_kernel(const float* lse, const float* weights, const float* upstream, int64_t n,
                                        InfoNceColumn* columns) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  // A row without a loss, or whose loss does not count, and perhaps with an lse of -inf or NaN.
  const bool lost = weights[3 * i] == 0.0f || upstream[i] == 0.0f;
  const float g = lost ? 0.0f : upstream[i];
  columns[i] = {lost ? INFINITY : lse[i] * 1.44269504f, g, weights[3 * i + 1] * g, weights[3 * i] * g};
}

constexpr int kChunk = 64;  // queries whose weights are in shared memory
constexpr int kThreads = 256;

// For any C. A block per key.
__global__ void __launch_bounds__(kThreads)
    info_nce_keys_generic_kernel(const float* keys, const float* queries, const InfoNceColumn* columns,
                                 InfoNceMask mask, int64_t n, int64_t c, InfoNceTemperature temperature, float* sums) {
  __shared__ float weights[kChunk];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int64_t row = blockIdx.x;
  const float scale = 1.44269504f / temperature.value();
  keys += row * c;
  sums += row * c;
  for (int64_t i = thread; i < c; i += kThreads) sums[i] = 0.0f;
  for (int64_t first = 0; first < n; first += kChunk) {
    const int count = static_cast<int>(min(n - first, int64_t{kChunk}));
    for (int q = thread / 32; q < count; q += kThreads / 32) {
      float score = 0.0f;
      for (int64_t i = lane; i < c; i += 32) score += keys[i] * queries[(first + q) * c + i];
      score = warp_join(score, Add{});
      if (lane != 0) continue;
      const InfoNceColumn column = columns[first + q];
      float w = column.upstream * exp2f(at_most_zero(score * scale - column.lse)) - column.floor;
      const bool masked = mask.same_id(row, first + q) && !mask.same_id_positive;
      if (masked || mask.is_positive(row, first + q)) w = 0.0f;
      weights[q] = w;
    }
    __syncthreads();
    for (int64_t i = thread; i < c; i += kThreads) {
      float sum = 0.0f;
      for (int q = 0; q < count; ++q) sum += weights[q] * queries[(first + q) * c + i];
      sums[i] += sum;
    }
    __syncthreads();  // before the next chunk overwrites the weights
  }
}

// gradient [M, C]: adds up the splits and the key's own query, subtracts its shares as a further positive, and applies
// 1 / T and the norm. A block per key. weights [N, 3], upstream [N]
template <typename Query, typename Operand>
__global__ void info_nce_keys_combine_kernel(const Query* key, const Operand* queries, int64_t n, RowOptions options,
                                             InfoNceMask mask, InfoNceTemperature temperature, const float* weights,
                                             const float* upstream, KeysWorkspace workspace, float* gradient) {
  __shared__ int any;
  const int64_t row = blockIdx.x;
  const int64_t c = options.c;
  key += row * c;
  gradient += row * c;
  const float norm = workspace.key_norm[row];
  const float inverse_norm = 1.0f / options.divisor(norm);
  for (int64_t i = threadIdx.x; i < c; i += blockDim.x) {
    float sum = 0.0f;
    for (int64_t split = 0; split < workspace.splits; ++split) {
      sum += workspace.sums[(row * workspace.splits + split) * c + i];
    }
    gradient[i] = sum;
  }
  const auto add = [&](int64_t query, float weight) {
    for (int64_t i = threadIdx.x; i < c; i += blockDim.x) gradient[i] += weight * to_float(queries[query * c + i]);
  };
  const int64_t own_query = row + mask.key_offset;
  if (own_query >= 0 && own_query < n) add(own_query, weights[3 * own_query + 2] * upstream[own_query]);
  if (mask.key_ids != nullptr && mask.same_id_positive) {
    for (int64_t first = 0; first < n; first += blockDim.x) {
      const int64_t query = first + threadIdx.x;
      const bool match = query < n && query != own_query && mask.same_id(row, query);
      __syncthreads();  // all threads have read `any` for the previous chunk
      if (threadIdx.x == 0) any = 0;
      __syncthreads();
      if (match) any = 1;  // all writers write the same value
      __syncthreads();
      if (any == 0) continue;
      for (int64_t q = first; q < min(first + blockDim.x, n); ++q) {
        if (q != own_query && mask.same_id(row, q)) add(q, -workspace.columns[q].share);
      }
    }
  }
  float dot = 0.0f;
  for (int64_t i = threadIdx.x; i < c; i += blockDim.x) {
    const float sum = gradient[i] / temperature.value();
    gradient[i] = sum;
    dot += sum * (to_float(key[i]) * inverse_norm);
  }
  dot = block_join(dot, Add{});
  const bool turns = options.normalize && norm > options.eps;  // a clamped norm is a constant
  for (int64_t i = threadIdx.x; i < c; i += blockDim.x) {
    gradient[i] = (gradient[i] - (turns ? dot * (to_float(key[i]) * inverse_norm) : 0.0f)) * inverse_norm;
  }
}

template <typename Query>
InfoNcePass<KeysOperand<Query>> keys_pass(const InfoNceShape& shape, InfoNceOptions options) {
  if (std::is_same_v<Query, __half>) options.precision = 2;
  return mma_pass<KeysOperand<Query>, MmaPass::kKeys>(shape, options);
}

template <typename Operand>
KeysWorkspace keys_workspace(void* base, const InfoNcePass<Operand>& pass, const InfoNceShape& shape, int64_t m) {
  KeysWorkspace w{};
  Pieces pieces(base);
  const bool fast = pass.resident > 0;
  w.padded = fast ? (m + pass.rows - 1) / pass.rows * pass.rows : m;
  w.splits = fast ? choose_splits(w.padded / pass.rows, (shape.n + pass.keys - 1) / pass.keys, pass.resident) : 1;
  const size_t element = fast ? sizeof(Operand) : sizeof(float);
  pieces.take(w.query, shape.n * shape.c, element);
  pieces.take(w.key, w.padded * shape.c, element);
  pieces.take(w.key_norm, m);
  pieces.take(w.columns, shape.n);
  pieces.take(w.sums, w.splits * m * shape.c);
  w.bytes = pieces.used();
  return w;
}

template <typename Operand, typename Query>
cudaError_t launch_operand(const Query* x, const RowOptions& options, int64_t padded, void* operand, float* norm,
                           cudaStream_t stream) {
  return launch(info_nce_prepare_kernel<Query, Operand>, row_blocks(padded), dim3(32 * kRowWarps), 0, stream, x,
                InfoNceAnchor<Query>{}, options, padded, InfoNceOperand<Operand>{static_cast<Operand*>(operand), norm});
}

}  // namespace

template <typename Query>
size_t info_nce_keys_backward_workspace_bytes(const InfoNceShape& shape, const InfoNceOptions& options,
                                              const InfoNceContrast& contrast) {
  if (shape.n == 0) return 0;
  return keys_workspace(nullptr, keys_pass<Query>(shape, options), shape, contrast.keys).bytes;
}

template <typename Query>
cudaError_t info_nce_keys_backward(const Query* query, const Query* key, const InfoNceShape& shape,
                                   const InfoNceOptions& options, const InfoNceContrast& contrast, const float* lse,
                                   const float* weights, const float* upstream, float* grad_key, void* workspace,
                                   cudaStream_t stream) {
  using Operand = KeysOperand<Query>;
  const int64_t n = shape.n;
  const int64_t m = contrast.keys;
  if (m == 0) return cudaSuccess;
  if (n == 0) return cudaMemsetAsync(grad_key, 0, static_cast<size_t>(m * shape.c) * sizeof(float), stream);
  const InfoNcePass<Operand> pass = keys_pass<Query>(shape, options);
  const KeysWorkspace w = keys_workspace(workspace, pass, shape, m);
  const RowOptions queries{n, shape.c, options.eps, options.normalize};
  const RowOptions keys{m, shape.c, options.eps, options.normalize};
  const InfoNceTemperature temperature{options.temperature, options.temperature_ptr};
  // Here the rows are keys: row j is the key of query j - key_offset.
  const InfoNceMask mask{contrast.key_ids, contrast.row_ids, -contrast.key_offset, contrast.same_id_positive,
                         contrast.same_id_only};

  cudaError_t error = launch(info_nce_columns_kernel, dim3(static_cast<unsigned>((n + kThreads - 1) / kThreads)),
                             dim3(kThreads), 0, stream, lse, weights, upstream, n, w.columns);
  if (error != cudaSuccess) return error;
  if (pass.resident > 0) {
    error = launch_operand<Operand>(query, queries, n, w.query, nullptr, stream);
    if (error == cudaSuccess) error = launch_operand<Operand>(key, keys, w.padded, w.key, w.key_norm, stream);
    if (error != cudaSuccess) return error;
    const MmaArguments<Operand> arguments{static_cast<const uint32_t*>(w.key),
                                          static_cast<const Operand*>(w.query),
                                          nullptr,
                                          nullptr,
                                          {nullptr, nullptr, nullptr, w.sums, w.splits, shape.c},
                                          m,
                                          {n, nullptr},
                                          mask,
                                          temperature,
                                          w.columns};
    const dim3 grid(static_cast<unsigned>(w.padded / pass.rows), static_cast<unsigned>(w.splits));
    error = launch(pass.kernel, grid, dim3(pass.threads), pass.shared_bytes, stream, arguments);
  } else {
    error = launch_operand<float>(query, queries, n, w.query, nullptr, stream);
    if (error == cudaSuccess) error = launch_operand<float>(key, keys, m, w.key, w.key_norm, stream);
    if (error != cudaSuccess) return error;
    error = launch(info_nce_keys_generic_kernel, dim3(static_cast<unsigned>(m)), dim3(kThreads), 0, stream,
                   static_cast<const float*>(w.key), static_cast<const float*>(w.query), w.columns, mask, n, shape.c,
                   temperature, w.sums);
  }
  if (error != cudaSuccess) return error;
  const auto combine = [&]<typename T>(const T* operand) {
    return launch(info_nce_keys_combine_kernel<Query, T>, dim3(static_cast<unsigned>(m)), dim3(128), 0, stream, key,
                  operand, n, keys, mask, temperature, weights, upstream, w, grad_key);
  };
  return pass.resident > 0 ? combine(static_cast<const Operand*>(w.query))
                           : combine(static_cast<const float*>(w.query));
}

#define MOCO_INFO_NCE_KEYS(Query)                                                                                 \
  template size_t info_nce_keys_backward_workspace_bytes<Query>(const InfoNceShape&, const InfoNceOptions&,       \
                                                                const InfoNceContrast&);                          \
  template cudaError_t info_nce_keys_backward<Query>(const Query*, const Query*, const InfoNceShape&,             \
                                                     const InfoNceOptions&, const InfoNceContrast&, const float*, \
                                                     const float*, const float*, float*, void*, cudaStream_t);
MOCO_INFO_NCE_KEYS(float)
MOCO_INFO_NCE_KEYS(__nv_bfloat16)
MOCO_INFO_NCE_KEYS(__half)

}  // namespace moco_ext::cuda
