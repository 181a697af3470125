// Runs kernels on the emulated device: `driver INPUT OUTPUT`. INPUT is a sequence of calls, each
//   int64 operation, device, seed; int64 count and as many int64 arguments; int64 count and as many double arguments;
//   int64 count of arrays, each: int64 bytes (-1: a null pointer), int64 offset (bytes past an aligned address), data.
// OUTPUT gets for each call int64 error, launches; then every array's data again: what was not to change must not have.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "entropy_fusion.h"
#include "feature_mean.h"
#include "head_step.h"
#include "rank_step.h"
#include "recorder.h"

using namespace mla_ext;
using namespace mla_ext::cuda;

namespace {

enum Operation : int64_t { kFeatureMean, kRlsUpdate, kHeadStep, kEntropyFusion };

template <typename T>
bool read(std::FILE* file, T* values, size_t count) {
  return count == 0 || std::fread(values, sizeof(T), count, file) == count;
}

template <typename T>
std::vector<T> read_vector(std::FILE* file) {
  int64_t count = 0;
  if (!read(file, &count, 1)) std::abort();
  std::vector<T> values(static_cast<size_t>(count));
  if (!read(file, values.data(), values.size())) std::abort();
  return values;
}

/// Memory of exactly the given size, so that AddressSanitizer sees every access beyond it.
struct Array {
  static constexpr std::align_val_t kAlignment{256};  // as cudaMalloc's
  struct Free {
    void operator()(unsigned char* data) const {
      if (emulation::recorder) emulation::recorder->free(data);
      ::operator delete[](data, kAlignment);
    }
  };
  std::unique_ptr<unsigned char[], Free> memory;
  unsigned char* data = nullptr;
  size_t bytes = 0;

  Array(size_t bytes, size_t offset, int number)
      : memory(new (kAlignment) unsigned char[bytes + offset]), data(memory.get() + offset), bytes(bytes) {
    std::memset(data, 0xff, bytes);  // NaN
    if (emulation::recorder) emulation::recorder->allocate(memory.get(), bytes + offset, number);
  }
  Array() = default;
};

Array read_array(std::FILE* file, int number) {
  int64_t header[2];
  if (!read(file, header, 2)) std::abort();
  if (header[0] < 0) return {};
  Array array(static_cast<size_t>(header[0]), static_cast<size_t>(header[1]), number);
  if (!read(file, array.data, array.bytes)) std::abort();
  return array;
}

/// The t-th of `steps` equal parts of the array of that number, as memory of its own.
Array part(const std::vector<Array>& arrays, int number, int64_t t, int64_t steps, size_t offset = 0) {
  const Array& array = arrays[static_cast<size_t>(number)];
  if (!array.data) return {};
  const size_t bytes = array.bytes / static_cast<size_t>(steps);
  Array result(bytes, offset, number);
  std::memcpy(result.data, array.data + static_cast<size_t>(t) * bytes, bytes);
  return result;
}

const float* as_float(const Array& array) { return reinterpret_cast<const float*>(array.data); }

/// Several steps in a row. Arrays: weight, momentum_buffer, P, step; then, with one for each step: grad, h̄, lr, alpha,
/// grad_scale, found_inf, Z; then K, beta and count: with a beta P is in the rank form; then nu.
cudaError_t head_steps(const std::vector<int64_t>& n, const std::vector<double>& x, const std::vector<Array>& a) {
  HeadStep step = {};
  step.dtype = static_cast<DType>(n[0]);
  step.C = n[1];
  step.s = n[2];
  step.weight = a[0].data;
  step.momentum_buffer = a[1].data;
  step.projection = {a[2].data, a[12].data, a[11].data, reinterpret_cast<int64_t*>(a[13].data), n[9], a[14].data};
  step.step = reinterpret_cast<float*>(a[3].data);
  step.hyper.nesterov = n[4];
  step.hyper.maximize = n[5];
  step.hyper.absorb_before = n[6];
  step.hyper.normalize = n[7];
  step.hyper.lr = x[0];
  step.hyper.momentum = x[1];
  step.hyper.dampening = x[2];
  step.hyper.weight_decay = x[3];
  step.hyper.alpha = x[4];
  step.hyper.forget = x[5];
  const int64_t steps = n[3];
  const size_t grad_offset = static_cast<size_t>(n[8]);
  for (int64_t t = 0; t < steps; ++t) {
    const size_t bytes =
        a[12].data ? rank_step_workspace_bytes(step) : head_step_workspace_bytes(step.dtype, step.C, step.s);
    const Array workspace(bytes, 0, emulation::kWorkspace);
    const Array grad = part(a, 4, t, steps, grad_offset), mean = part(a, 5, t, steps), lr = part(a, 6, t, steps);
    const Array alpha = part(a, 7, t, steps), scale = part(a, 8, t, steps), inf = part(a, 9, t, steps);
    const Array Z = part(a, 10, t, steps);
    step.grad = grad.data;
    step.feature_mean = mean.data;
    step.hyper.lr_tensor = as_float(lr);
    step.hyper.alpha_tensor = as_float(alpha);
    step.grad_scale = as_float(scale);
    step.found_inf = as_float(inf);
    const bool is_rank = a[12].data != nullptr;
    const auto given = is_rank ? rank_step_projected : head_step_projected;
    const auto whole = is_rank ? rank_step : head_step;
    const cudaError_t error =
        Z.data ? given(step, Z.data, workspace.data, nullptr) : whole(step, workspace.data, nullptr);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t call(int64_t operation, const std::vector<int64_t>& n, const std::vector<double>& x,
                 const std::vector<Array>& a) {
  const DType dtype = static_cast<DType>(n[0]);
  switch (operation) {
    case kFeatureMean:
      return feature_mean(dtype, a[0].data, n[1], n[2], n[3], a[1].data, nullptr);
    case kRlsUpdate: {
      const Array workspace(head_step_workspace_bytes(dtype, 0, n[1]), 0, emulation::kWorkspace);
      return rls_update(dtype, a[0].data, a[1].data, n[1], x[0], x[1], n[2], workspace.data, nullptr);
    }
    case kHeadStep:
      return head_steps(n, x, a);
    case kEntropyFusion:
      return entropy_fusion(dtype, a[0].data, a[1].data, n[1], n[2], n[3], a[4].data, n[4] != 0, a[2].data, a[3].data,
                            nullptr);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::FILE* const input = std::fopen(argv[1], "rb");
  std::FILE* const output = std::fopen(argv[2], "wb");
  if (!input || !output) return 2;
  int64_t header[3];
  while (read(input, header, 3)) {
    const auto integers = read_vector<int64_t>(input);
    const auto reals = read_vector<double>(input);
    int64_t count = 0;
    if (!read(input, &count, 1)) return 2;
    std::vector<Array> arrays;
    for (int64_t i = 0; i < count; ++i) arrays.push_back(read_array(input, static_cast<int>(i)));
    emulation::use_device(static_cast<int>(header[1]), static_cast<uint64_t>(header[2]));
    const int64_t error = call(header[0], integers, reals, arrays);
    const int64_t outcome[2] = {error, emulation::launches()};
    std::fwrite(outcome, sizeof(outcome), 1, output);
    for (const Array& array : arrays) {
      if (array.bytes > 0) std::fwrite(array.data, 1, array.bytes, output);
    }
  }
  std::fclose(input);
  return std::fclose(output) == 0 ? 0 : 2;
}
