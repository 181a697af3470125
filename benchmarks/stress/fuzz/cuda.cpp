// The CUDA kernels' own sources on the emulated devices of tests/cuda_emulation.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "backend.h"
#include "cuda_runtime.h"
#include "entropy_fusion.h"
#include "feature_mean.h"
#include "head_step.h"

namespace fuzz {

namespace cuda = mla_ext::cuda;

const bool takes_strides = true, takes_any_product = true;
const int64_t largest_size = 140, no_classes = 0, variants = 5;
const std::vector<Target> targets = {try_feature_mean, try_rls_update, try_entropy_fusion, try_head_step};

namespace {

void expect_success(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "cudaError_t %d\n", static_cast<int>(error));
  std::abort();
}

std::unique_ptr<unsigned char[]> workspace(DType dtype, int64_t classes, int64_t s) {
  return std::make_unique<unsigned char[]>(cuda::head_step_workspace_bytes(dtype, classes, s));
}

}  // namespace

void use(int64_t variant, uint64_t seed) { emulation::use_device(static_cast<int>(variant), seed); }

void feature_mean(DType dtype, const void* features, void* mean, int64_t N, int64_t s, int64_t stride) {
  expect_success(cuda::feature_mean(dtype, features, N, s, stride, mean, nullptr));
}

void rls_update(DType accumulate, void* base, const void* feature_mean, int64_t s, const Hyperparameters& hyper) {
  expect_success(cuda::rls_update(accumulate, base, feature_mean, s, hyper.alpha, hyper.forget, hyper.normalize,
                                  workspace(accumulate, 0, s).get(), nullptr));
}

void head_step(const HeadStep& step, const void* projected_grad) {
  const auto memory = workspace(step.dtype, step.C, step.s);
  expect_success(projected_grad ? cuda::head_step_projected(step, projected_grad, memory.get(), nullptr)
                                : cuda::head_step(step, memory.get(), nullptr));
}

void entropy_fusion(DType dtype, const EntropyFusion& f) {
  expect_success(cuda::entropy_fusion(dtype, f.logits, reinterpret_cast<const uint8_t*>(f.present), f.M, f.N, f.C,
                                      f.temperatures, f.equal, f.fused, f.weights, nullptr));
}

}  // namespace fuzz
