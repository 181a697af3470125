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

const bool takes_scalars_from_memory = true;
const int64_t largest_size = 140, no_classes = 0, variants = 5;

namespace {

static_assert(int(DType::BFloat16) == int(mla_ext::DType::BFloat16));
mla_ext::DType of(DType dtype) { return static_cast<mla_ext::DType>(dtype); }

void expect_success(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "cudaError_t %d\n", static_cast<int>(error));
  std::abort();
}

std::unique_ptr<unsigned char[]> workspace(DType dtype, int64_t classes, int64_t s) {
  return std::make_unique<unsigned char[]>(cuda::head_step_workspace_bytes(of(dtype), classes, s));
}

}  // namespace

void use(int64_t variant, uint64_t seed) { emulation::use_device(static_cast<int>(variant), seed); }

void feature_mean(DType dtype, const void* features, void* mean, int64_t N, int64_t s, int64_t stride) {
  expect_success(cuda::feature_mean(of(dtype), features, N, s, stride, mean, nullptr));
}

void rls_update(DType accumulate, const RlsUpdate& u) {
  expect_success(cuda::rls_update(of(accumulate), u.projection, u.feature_mean, u.s, u.alpha, u.forget, u.normalize,
                                  workspace(accumulate, 0, u.s).get(), nullptr));
}

void head_step(DType dtype, const HeadStep& step) {
  const float lr = static_cast<float>(step.lr), alpha = static_cast<float>(step.rls.alpha);
  const float found_inf = step.found_inf;
  mla_ext::HeadStep arguments = {};
  arguments.dtype = of(dtype);
  arguments.C = step.C;
  arguments.s = step.rls.s;
  arguments.weight = step.weight;
  arguments.grad = step.grad;
  arguments.momentum_buffer = step.momentum_buffer;
  arguments.projection.base = step.rls.projection;
  arguments.feature_mean = step.rls.feature_mean;
  arguments.step = step.step;
  arguments.grad_scale = &step.grad_scale;
  mla_ext::Hyperparameters& hyper = arguments.hyper;
  hyper.lr = step.lr;
  hyper.momentum = step.momentum;
  hyper.dampening = step.dampening;
  hyper.weight_decay = step.weight_decay;
  hyper.alpha = step.rls.alpha;
  hyper.forget = step.rls.forget;
  hyper.nesterov = step.nesterov;
  hyper.maximize = step.maximize;
  hyper.absorb_before = step.absorb_before;
  hyper.normalize = step.rls.normalize;
  if (step.scalars_from_memory) {
    hyper.lr_tensor = &lr;
    hyper.alpha_tensor = &alpha;
    arguments.found_inf = &found_inf;
  }
  const auto memory = workspace(dtype, step.C, step.rls.s);
  expect_success(step.projected_grad ? cuda::head_step_projected(arguments, step.projected_grad, memory.get(), nullptr)
                                     : cuda::head_step(arguments, memory.get(), nullptr));
}

void entropy_fusion(DType dtype, const EntropyFusion& f) {
  expect_success(cuda::entropy_fusion(of(dtype), f.logits, reinterpret_cast<const uint8_t*>(f.present), f.M, f.N, f.C,
                                      f.fused, f.weights, nullptr));
}

}  // namespace fuzz
